"""Plain and averaged gradients: against sums written out, and what they leave untouched."""

import math

import pytest
import torch
from torch import nn

from rs_plugins.core.streams import stream
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.core.training.gradient_estimators import RGS, PlainGradient
from rs_plugins.core.training.objective import StreamDraws
from rs_plugins.core.training.pgpe import PGPE
from rs_plugins.errors import InputError

ESTIMATORS = {
    "plain": PlainGradient(),
    "rgs": RGS(draws=4),
    "rgs, fixed": RGS(draws=3, mode="fixed", sigma_w=0.02, antithetic=False),
    "pgpe": PGPE(population=6),
    "pgpe, at once": PGPE(population=6, chunk=4),
}


class Loss(nn.Module):
    """A small network with batch normalisation and its cross-entropy; raises at call number ``at``."""

    def __init__(self, at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        )
        self.calls, self.at = 0, at

    def forward(self, x, y):
        self.calls += 1
        if self.calls == self.at:
            raise MemoryError
        return nn.functional.cross_entropy(self.net(x), y)


def draws(seed=0):
    return StreamDraws(stream(seed, "test"), seed)


@pytest.fixture
def batch():
    source = torch.Generator().manual_seed(3)
    return torch.rand(8, 1, 6, 6, generator=source), torch.randint(0, 4, (8,), generator=source)


def step(estimator, loss, batch, source=None):
    """Return value and gradients by name; the parameters have none afterwards."""
    value = estimator(loss, batch, source or draws())
    value.backward()
    found = {name: p.grad for name, p in loss.named_parameters()}
    loss.zero_grad()
    return value.detach(), found


def at(model, shift, batch):
    """Return the loss and the gradients where ``shift`` has been added to the parameters, by a copy."""
    copy = Loss().to(torch.float64).requires_grad_()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, value in copy.named_parameters():
            value += shift.get(name, 0)
    value = copy(*batch)
    return value.detach(), dict(
        zip(dict(copy.named_parameters()), torch.autograd.grad(value, list(copy.parameters())), strict=True)
    )


def normals(loss, names, key):
    source = draws().fresh("weight noise", key)
    like = dict(loss.named_parameters())
    return {name: torch.randn(like[name].shape, generator=source, dtype=torch.float64) for name in names}


WEIGHTS = ["net.0.weight", "net.4.weight"]


def test_rgs_relative_is_the_mean_over_pairs_of_noise_on_weights_alone(batch):
    loss, batch = Loss().double(), (batch[0].double(), batch[1])
    value, found = step(RGS(draws=4, sigma_w=0.3), loss, batch)
    weights, expected = {name: loss.state_dict()[name] for name in WEIGHTS}, []
    for key in range(2):
        std = {name: float((w - w.mean()).square().mean().sqrt()) for name, w in weights.items()}
        e = {name: 0.3 * std[name] * z for name, z in normals(loss, WEIGHTS, key).items()}
        expected += [at(loss, e, batch), at(loss, {name: -each for name, each in e.items()}, batch)]
    torch.testing.assert_close(value, sum(each for each, _ in expected) / 4)
    for name in found:
        torch.testing.assert_close(found[name], sum(each[name] for _, each in expected) / 4)


def test_rgs_fixed_without_pairs_moves_every_parameter(batch):
    loss, batch = Loss().double(), (batch[0].double(), batch[1])
    value, found = step(RGS(draws=3, sigma_w=0.05, mode="fixed", antithetic=False), loss, batch)
    names = [name for name, _ in loss.named_parameters()]
    expected = [at(loss, {name: 0.05 * z for name, z in normals(loss, names, key).items()}, batch) for key in range(3)]
    torch.testing.assert_close(value, sum(each for each, _ in expected) / 3)
    for name in found:
        torch.testing.assert_close(found[name], sum(each[name] for _, each in expected) / 3)


@pytest.mark.parametrize("mode", ["relative", "fixed"])
def test_rgs_without_noise_is_the_plain_gradient_bit_for_bit(batch, mode):
    value, found = step(RGS(sigma_w=0, mode=mode), Loss(), batch)
    plain, expected = step(PlainGradient(), Loss(), batch)
    assert torch.equal(value, plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scale_multiplies_the_noise(batch):
    ours = step(RGS(sigma_w=0.1), Loss(), batch)
    value = RGS(sigma_w=0.4)(Loss(), batch, draws(), 0.25)
    torch.testing.assert_close(value.detach(), ours[0])
    assert ours[0] != step(RGS(sigma_w=0.4), Loss(), batch)[0]


class Quadratic(nn.Module):
    """½ θᵀ A θ + bᵀ θ."""

    def __init__(self, size=6):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        A = torch.randn(size, size, generator=source, dtype=torch.float64)
        self.A, self.b = A + A.T, torch.randn(size, generator=source, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(size, generator=source, dtype=torch.float64))

    def forward(self):
        return self.theta @ self.A @ self.theta / 2 + self.b @ self.theta

    @property
    def gradient(self):
        return (self.A @ self.theta + self.b).detach()


def test_one_antithetic_pair_on_a_quadratic_is_the_plain_gradient():
    _, pair = step(RGS(draws=2, sigma_w=0.5, mode="fixed"), Quadratic(), ())
    _, single = step(RGS(draws=1, sigma_w=0.5, mode="fixed", antithetic=False), Quadratic(), ())
    torch.testing.assert_close(pair["theta"], Quadratic().gradient, rtol=1e-12, atol=1e-12)
    assert float((single["theta"] - pair["theta"]).abs().max()) > 0.1


# ---- what all have in common -----------------------------------------------------------------------------------------


def state(loss):
    return {
        "modes": [module.training for module in loss.modules()],
        "asking": [parameter.requires_grad for parameter in loss.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in loss.parameters()],
        "parameters": [id(parameter) for parameter in loss.parameters()],
        "tensors": {name: value.tolist() for name, value in loss.state_dict().items()},
    }


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"plain"}))
@pytest.mark.parametrize("at_call", [None, 1, 2, 3])
def test_nothing_is_changed_before_the_backward_pass_also_after_an_exception(name, at_call, batch):
    loss = Loss(at_call)
    loss.net[0].bias.requires_grad_(False)
    loss.net[4].weight.grad = torch.full_like(loss.net[4].weight, 0.25)
    loss.net[2].eval()
    before, numbers = state(loss), torch.get_rng_state()
    if at_call is None or (name == "pgpe, at once" and at_call > 2):
        ESTIMATORS[name](loss, batch, draws())
    else:
        with pytest.raises(MemoryError):
            ESTIMATORS[name](loss, batch, draws())
    assert state(loss) == before
    assert torch.equal(numbers, torch.get_rng_state())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_backward_pass_adds_the_gradient_times_what_comes_from_above(name, batch):
    loss = Loss()
    value, found = step(ESTIMATORS[name], loss, batch)
    assert value.shape == ()
    for parameter in loss.parameters():
        parameter.grad = torch.ones_like(parameter)
    (0.25 * ESTIMATORS[name](loss, batch, draws())).backward()
    for key, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter.grad, 1 + 0.25 * found[key])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_frozen_parameters_get_neither_noise_nor_gradient(name, batch):
    loss = Loss()
    loss.net[4].requires_grad_(False)
    seen = []
    loss.net[4].register_forward_hook(lambda layer, inputs, _: seen.append(layer.weight.detach().clone()))
    _, found = step(ESTIMATORS[name], loss, batch)
    assert found["net.4.weight"] is None
    assert found["net.0.weight"] is not None
    if "at once" not in name:
        assert all(torch.equal(each, loss.net[4].weight) for each in seen)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"plain"}))
def test_hooks_on_gradients_are_called_once(name, batch):
    """As several processes wait for one call each, to average the gradients."""
    loss, called = Loss(), []
    for key, parameter in loss.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: called.append(key))
    value = ESTIMATORS[name](loss, batch, draws())
    assert called == []
    value.backward()
    assert sorted(called) == sorted(key for key, _ in loss.named_parameters())


def test_a_parameter_without_a_part_gets_no_gradient(batch):
    loss = Loss()
    loss.spare = nn.Linear(1, 1)
    _, found = step(RGS(), loss, batch)
    assert found["spare.weight"] is None
    assert found["net.0.weight"] is not None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_average_to_one(name, batch):
    """Each has half of the images; they have the same noise on the weights."""
    loss = Loss()
    loss.net[1].eval()  # batch statistics of halves are others
    x, y = batch
    value, whole = step(ESTIMATORS[name], loss, batch, BlockDraws(5, "training step 3"))
    halves = [
        step(ESTIMATORS[name], loss, (x[rows], y[rows]), BlockDraws(5, "training step 3", first=rows.start))
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(each for each, _ in halves) / 2, value)
    for key in whole:
        torch.testing.assert_close(sum(each[key] for _, each in halves) / 2, whole[key], rtol=1e-4, atol=1e-4)


def test_another_step_has_other_noise(batch):
    first, second = (step(RGS(), Loss(), batch, BlockDraws(5, f"training step {n}"))[0] for n in (1, 2))
    assert first != second


def test_tied_weights_move_together(batch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return (self.one(x) - self.two(x)).abs().sum() + self.one(x).sum()

    x, seen = torch.ones(1, 3), []
    loss = Tied()
    loss.two.register_forward_hook(lambda layer, *_: seen.append(layer.weight is loss.one.weight))
    value, found = step(RGS(sigma_w=0.5), loss, (x,))
    assert seen == [True, True]
    torch.testing.assert_close(value, loss.one(x).sum().detach())
    assert math.isclose(float(found["one.weight"].sum()), 9.0, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 3}, "draws: expected an even number of antithetic draws, got 3"),
        ({"draws": 0}, "draws: expected an integer >= 1, got 0"),
        ({"sigma_w": -1}, "sigma_w: expected a finite number >= 0, got -1"),
        ({"mode": "decay"}, "mode: expected one of 'relative', 'fixed', got 'decay'"),
        ({"antithetic": 1}, "antithetic: expected True or False, got 1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RGS(**options)


def test_relative_noise_needs_a_layer_to_go_on(batch):
    loss = Loss()
    loss.net[0].requires_grad_(False)
    loss.net[4].requires_grad_(False)
    with pytest.raises(InputError, match="mode: 'relative' is for weights of linear and convolutional layers, of whi"):
        RGS()(loss, batch, draws())
