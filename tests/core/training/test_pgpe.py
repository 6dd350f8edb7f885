"""PGPE: unbiased where gradients are not, as far from the gradient as is predicted, its state."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata
from torch import nn

from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.streams import stream
from rs_plugins.core.training.certified_loss import CertifiedLoss
from rs_plugins.core.training.gradient_estimators import RGS
from rs_plugins.core.training.objective import StreamDraws
from rs_plugins.core.training.pgpe import PGPE, centred_ranks
from rs_plugins.errors import InputError, ModelError


def draws(seed=0):
    return StreamDraws(stream(seed, "test"), seed)


class Function(nn.Module):
    """A function of one parameter ``theta``."""

    def __init__(self, function, theta):
        super().__init__()
        self.function, self.theta = function, nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self):
        return self.function(self.theta)


def estimate(estimator, loss, *, seed=0):
    estimator(loss, (), draws(seed)).backward()
    found = loss.theta.grad
    loss.theta.grad = None
    return found


def noise(pairs, size, seed=0):
    return torch.stack(
        [
            torch.randn(size, generator=draws(seed).fresh("weight noise", key), dtype=torch.float64)
            for key in range(pairs)
        ]
    )


G = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
A = torch.tensor([[2.0, 1.0, 0.0], [1.0, -1.0, 0.5], [0.0, 0.5, 3.0]], dtype=torch.float64)
THETA = [0.3, -0.7, 1.1]
LOSSES = {
    "linear": (lambda theta: G @ theta, lambda theta: G),
    "quadratic": (lambda theta: theta @ A @ theta / 2 + G @ theta, lambda theta: A @ theta + G),
}


@pytest.mark.parametrize("name", LOSSES)
def test_given_the_noise_it_is_exact_on_linear_and_quadratic_losses(name):
    """A pair is (l(θ+e) - l(θ-e))/2 · e/sd² = e·∇l(θ) · e/sd², so that with E[e eᵀ] = sd² I the mean is ∇l(θ)."""
    function, slope = LOSSES[name]
    loss = Function(function, THETA)
    e = 0.2 * noise(4, 3)
    expected = ((e @ slope(loss.theta.detach())).unsqueeze(1) * e).mean(dim=0) / 0.2**2
    torch.testing.assert_close(estimate(PGPE(population=8, sigma_w=0.2), loss), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_many_pairs_is_the_gradient_of_linear_and_quadratic_losses(name):
    """A pair's entry i has variance |∇l|² + (∇l)_i², so 3000 pairs are off by 0.08 or so."""
    function, slope = LOSSES[name]
    loss = Function(function, THETA)
    true = slope(loss.theta.detach())
    found = estimate(PGPE(population=6000, sigma_w=0.2, chunk=6000), loss)
    assert float((found - true).abs().max()) < 3 * math.sqrt(2 * float(true @ true) / 3000)


@pytest.mark.parametrize("theta", [0.1, -0.3])
def test_on_a_step_it_has_the_slope_of_the_smoothed_step_and_rgs_none(theta):
    """E[1(θ + e > 0)] = Φ(θ/sd), whose slope is the density; almost everywhere the step itself has slope 0."""
    loss = Function(lambda value: (value > 0).to(value.dtype).sum() + 0 * value.sum(), [theta])
    true = norm.pdf(theta / 0.2) / 0.2
    found = float(estimate(PGPE(population=4000, sigma_w=0.2, chunk=4000), loss))
    assert found == pytest.approx(true, rel=0.1)
    assert float(estimate(RGS(draws=200, sigma_w=0.2, mode="fixed"), loss)) == 0
    smoothed = RGS(draws=600, sigma_w=0.2, mode="fixed")(loss, (), draws())
    assert smoothed.item() == pytest.approx(norm.cdf(theta / 0.2), abs=0.04)


def test_the_cosine_with_the_gradient_is_as_predicted_and_its_projection_is_one():
    """Of a loss of interval bounds, over 5 estimates with P pairs of D parameters: √(P/(P + D))."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.rand(32, 8, generator=source, dtype=torch.float64), torch.randint(0, 4, (32,), generator=source)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    loss, pairs, size = CertifiedLoss(RelaxedNetwork(model, (8,)), bound="ibp"), 300, 108

    def flat(estimator, seed):
        estimator(loss, (x, y, 0.1), draws(seed)).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in loss.parameters()])
        loss.zero_grad()
        assert len(found) == size
        return found

    true = flat(RGS(draws=80, sigma_w=0.01, mode="fixed"), 99)
    found = [flat(PGPE(population=2 * pairs, sigma_w=0.01, chunk=2 * pairs), seed) for seed in range(5)]
    cosine = np.mean([float(torch.cosine_similarity(each, true, dim=0)) for each in found])
    projection = np.mean([float(each @ true / (true @ true)) for each in found])
    assert cosine == pytest.approx(math.sqrt(pairs / (pairs + size)), abs=0.05)
    assert projection == pytest.approx(1, abs=0.1)


# ---- options ---------------------------------------------------------------------------------------------------------


def bumpy(theta):
    return (3 * theta).sin().sum() + theta.prod()


def test_scale_multiplies_sigma_w():
    loss = Function(bumpy, THETA)
    PGPE(population=8, sigma_w=0.8)(loss, (), draws(), 0.25).backward()
    torch.testing.assert_close(loss.theta.grad, estimate(PGPE(population=8, sigma_w=0.2), Function(bumpy, THETA)))
    with pytest.raises(InputError, match="scale: expected a finite number > 0, got 0"):
        PGPE()(loss, (), draws(), 0)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 7.0], [1.0, 1.0, 5.0, 0.0, 5.0, 5.0]])
def test_ranks_are_centred_and_shared_by_equal_values(values):
    expected = (rankdata(values) - 1) / (len(values) - 1) - 0.5
    np.testing.assert_allclose(centred_ranks(torch.tensor(values)).numpy(), expected, atol=1e-6)


def values_at(loss, e):
    theta = loss.theta.detach()
    return torch.stack([torch.stack([loss.function(theta + s * each) for each in e]) for s in (1, -1)])


def test_ranks_take_the_place_of_losses():
    loss = Function(bumpy, THETA)
    e = 0.2 * noise(5, 3)
    values = values_at(loss, e)
    ranks = torch.tensor((rankdata(values.flatten().numpy()) - 1) / 9 - 0.5).view(2, 5)
    expected = (((ranks[0] - ranks[1]) / 2).unsqueeze(1) * e).mean(dim=0) / 0.2**2
    estimator = PGPE(population=10, sigma_w=0.2, ranks=True)
    torch.testing.assert_close(estimate(estimator, loss), expected)
    torch.testing.assert_close(estimator(loss, (), draws()).detach(), values.mean())


def after(loss, e, sd, lr, ranks):
    """Return the standard deviations after a step, entry by entry."""
    fitness = -values_at(loss, e)
    if ranks:
        fitness = torch.tensor((rankdata(fitness.flatten().numpy()) - 1) / (fitness.numel() - 1) - 0.5).view_as(fitness)
    expected = []
    for i in range(len(sd)):
        change = sum(
            float((up + down) / 2 - fitness.mean()) * float(each[i] ** 2 - sd[i] ** 2) / float(sd[i])
            for up, down, each in zip(*fitness, e, strict=True)
        ) / len(e)
        expected.append(min(max(float(sd[i]) + lr * change, 0.8 * float(sd[i])), 1.2 * float(sd[i])))
    return torch.tensor(expected, dtype=torch.float64)


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize(("lr", "clipped"), [(0.05, False), (100.0, True)])
def test_standard_deviations_are_learned_by_at_most_a_fifth(ranks, lr, clipped):
    loss = Function(bumpy, THETA)
    estimator = PGPE(population=12, sigma_w=0.4, adapt=True, lr_sd=lr, ranks=ranks)
    sd = torch.full((3,), 0.4, dtype=torch.float64)
    for seed in (0, 1):
        e = sd * noise(6, 3, seed)
        values = values_at(loss, e)
        if not ranks:
            expected = (((values[0] - values[1]) / 2).unsqueeze(1) * e).mean(dim=0) / sd**2
            torch.testing.assert_close(estimate(PGPE_at(estimator), loss, seed=seed), expected)
        estimate(estimator, loss, seed=seed)
        before, sd = sd, after(loss, e, sd, lr, ranks)
        torch.testing.assert_close(estimator.state_dict()["theta"], sd)
        assert bool(((sd / before - 1).abs() > 0.199).any()) == clipped
        assert len(set(sd.tolist())) > 1


def PGPE_at(estimator):
    """Return another one in the same state."""
    other = PGPE(**{name: getattr(estimator, name) for name in ("population", "sigma_w", "adapt", "lr_sd", "ranks")})
    other.load_state_dict(estimator.state_dict())
    return other


def test_the_state_goes_on_where_it_was():
    losses = [Function(bumpy, THETA) for _ in range(2)]
    one = PGPE(population=8, sigma_w=0.4, adapt=True)
    assert one.state_dict() == {}
    estimate(one, losses[0])
    kept = one.state_dict()
    two = PGPE_at(one)
    assert torch.equal(estimate(one, losses[0], seed=1), estimate(two, losses[1], seed=1))
    assert torch.equal(one.state_dict()["theta"], two.state_dict()["theta"])
    assert not torch.equal(one.state_dict()["theta"], kept["theta"])
    assert one == two == PGPE(population=8, sigma_w=0.4, adapt=True)
    assert "state" not in repr(one)


def test_a_state_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="state: expected none, as adapt is False"):
        PGPE().load_state_dict({"theta": torch.ones(3)})
    PGPE().load_state_dict({})
    estimator = PGPE(adapt=True)
    with pytest.raises(InputError, match="state: expected standard deviations above 0, got others for theta"):
        estimator.load_state_dict({"theta": torch.zeros(3)})
    estimator.load_state_dict({"theta": torch.ones(2)})
    with pytest.raises(InputError, match="state: its standard deviations are of another network, see theta"):
        estimator(Function(bumpy, THETA), (), draws())


def test_an_exception_leaves_the_state_as_it_was():
    loss = Function(bumpy, THETA)
    estimator = PGPE(population=8, sigma_w=0.4, adapt=True)
    estimate(estimator, loss)
    before = estimator.state_dict()
    loss.function = lambda theta: 1 / 0
    with pytest.raises(ZeroDivisionError):
        estimator(loss, (), draws())
    assert torch.equal(estimator.state_dict()["theta"], before["theta"])


# ---- several weights at once -----------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A network in train mode that counts how often its code runs."""

    def __init__(self, look=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)),
        ).double()
        self.runs, self.look = 0, look

    def forward(self, x, y):
        self.runs += 1
        loss = nn.functional.cross_entropy(self.net(x), y)
        return 2 * loss if self.look and loss.item() < 0 else loss


@pytest.mark.parametrize(("chunk", "look", "runs"), [(1, False, 10), (None, False, 10), (4, False, 3), (4, True, 11)])
def test_at_once_gives_what_one_after_the_other_gives(chunk, look, runs):
    """10 losses in chunks of 4 are 3 runs; where the code looks at values, the first is in vain."""
    source = torch.Generator().manual_seed(0)
    batch = torch.rand(6, 1, 6, 6, generator=source, dtype=torch.float64), torch.randint(0, 4, (6,), generator=source)
    results = []
    for each in (1, chunk):
        loss = Counting(look)
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        value = PGPE(population=10, chunk=each)(loss, batch, draws())
        value.backward()
        assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
        results.append((value.detach(), [parameter.grad for parameter in loss.parameters()]))
    assert loss.runs == runs
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


def test_losses_that_cannot_be_computed_at_once_are_tried_so_only_once():
    loss, estimator = Counting(look=True), PGPE(population=4, chunk=4)
    batch = torch.rand(6, 1, 6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    for runs in (5, 9):
        estimator(loss, batch, draws())
        assert loss.runs == runs


@pytest.mark.parametrize("error", [RuntimeError, ModelError])
def test_an_error_of_the_loss_itself_is_seen(error):
    def fail(theta):
        raise error("no such thing")

    estimator = PGPE(population=4, chunk=4)
    with pytest.raises(error, match="no such thing"):
        estimator(Function(fail, THETA), (), draws())
    loss = Function(bumpy, THETA)
    torch.testing.assert_close(estimate(estimator, loss), estimate(PGPE(population=4), loss))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ranks", "adapt"])
def test_several_processes_are_refused_where_their_results_would_differ(name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    PGPE(population=2)(Function(bumpy, THETA), (), draws())
    with pytest.raises(InputError, match=f"{name}: expected a process alone, got 2 together"):
        PGPE(population=2, **{name: True})(Function(bumpy, THETA), (), draws())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 7}, "population: expected an even number, two for each pair, got 7"),
        ({"population": 1}, "population: expected an integer >= 2, got 1"),
        ({"sigma_w": 0}, "sigma_w: expected a finite number > 0, got 0"),
        ({"lr_sd": -1}, "lr_sd: expected a finite number >= 0, got -1"),
        ({"ranks": "yes"}, "ranks: expected True or False, got 'yes'"),
        ({"adapt": 1}, "adapt: expected True or False, got 1"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PGPE(**options)
