from decimal import Context, Decimal, localcontext
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.attacks.stein import Stein, stein_for
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.gaussian_linf import GaussianLinfNoise
from rs_plugins.core.objectives import LOG_MEAN_SOFTMAX
from rs_plugins.errors import InputError

SIGMA = 0.5
X = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 2])
DRAWS = SIGMA * torch.randn(9, 1, 2, 3, generator=torch.Generator().manual_seed(1))
either = pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])


def network(scale=3.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[1].weight *= scale
    return model


def estimates(centred, model, x, y, draws, **how):
    """The estimated gradient of the mean probability of y, (n, *input)."""
    loss, gradient, _ = Stein(SIGMA, centred).look(model, x, y, draws, **how)
    return -(-loss).exp().reshape(-1, *[1] * (x.ndim - 1)) * gradient


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 1000])
@either
def test_it_is_the_formula_however_many_passes_it_takes(centred, chunk):
    model = network()
    found = estimates(centred, model, X, Y, DRAWS, chunk=chunk)
    e = DRAWS.double().numpy().reshape(9, 6)
    with torch.no_grad():
        F = np.array([[model(x + d).softmax(1)[0, y] for d in DRAWS] for x, y in zip(X, Y, strict=True)])
    if centred:
        others = (F.sum(1, keepdims=True) - F) / 8
        F = F - others
    torch.testing.assert_close(found.flatten(1).double(), torch.from_numpy(F @ e / 9 / SIGMA**2), atol=1e-6, rtol=1e-5)
    loss = LOG_MEAN_SOFTMAX.look(model, X, Y, DRAWS)
    mine = Stein(SIGMA, centred).look(model, X, Y, DRAWS, chunk=chunk)
    torch.testing.assert_close((mine.loss, mine.votes), (loss.loss, loss.votes))
    torch.testing.assert_close(Stein(SIGMA, centred).loss(model, X, Y, DRAWS, chunk=chunk), loss.loss)


@either
def test_it_is_unbiased(centred):
    """With two classes F_1 is the logistic function of ⟨w, x + e⟩ + b, whose smoothed gradient is one integral."""
    w, b = np.array([1.5, -2.0, 0.5]), 0.3
    x = torch.tensor([[0.6, 0.2, 0.4]])
    weight = torch.tensor(np.stack([0 * w, w]), dtype=torch.float32)

    def model(at):
        return at @ weight.T + torch.tensor([0.0, b])

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    at = x.double().numpy()[0] @ w + b + SIGMA * np.linalg.norm(w) * nodes
    F = 1 / (1 + np.exp(-at))
    weights = weights / weights.sum()
    truth = (weights * F * (1 - F)).sum() * w

    m = 200_000
    draws = SIGMA * torch.randn(m, 3, generator=torch.Generator().manual_seed(3))
    found = estimates(centred, model, x, torch.tensor([1]), draws)[0].double().numpy()
    # The variance of one draw's F·e_j/sigma² is at most E[e_j²]/sigma⁴ = 1/sigma², and less if F is centred.
    error = 5 / (SIGMA * m**0.5)
    assert np.abs(truth).min() > 3 * error
    assert np.abs(found - truth).max() < error


@pytest.mark.parametrize(("samples", "factor"), [(2, 2), (3, 4 / 3), (4, 4 / 3)], ids=repr)
def test_with_antithetic_draws_it_is_unbiased_too_and_centring_makes_it_longer(samples, factor):
    """One pixel, and the mean over the independent draws by quadrature.

    The factor is m/(m-1) where each draw has its negative, (m+1)/m where one has none.
    """

    def model(at):
        return at * torch.tensor([0.0, 1.5], dtype=torch.float64)

    x, y = torch.tensor([[0.6]], dtype=torch.float64), torch.tensor([1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    weights = weights / weights.sum()
    F = 1 / (1 + np.exp(-1.5 * (0.6 + SIGMA * nodes)))
    truth = (weights * F * (1 - F)).sum() * 1.5
    independent = (samples + 1) // 2
    for centred in (False, True):
        mean = 0.0
        for chosen in product(range(16), repeat=independent):
            half = torch.from_numpy(SIGMA * nodes[list(chosen)]).reshape(-1, 1)
            draws = torch.cat([half, -half])[:samples]
            mean += weights[list(chosen)].prod() * estimates(centred, model, x, y, draws).item()
        assert mean == pytest.approx(truth * (factor if centred else 1), abs=1e-6)


@pytest.mark.parametrize("samples", [2, 8])
def test_with_antithetic_draws_in_pairs_there_is_nothing_to_be_centred(samples):
    half = DRAWS[: samples // 2]
    draws = torch.cat([half, -half])
    plain, centred = (estimates(way, network(), X, Y, draws) for way in (False, True))
    torch.testing.assert_close(centred, plain * samples / (samples - 1))


def test_centring_helps_where_the_classifier_is_sure():
    weight = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    x, y = torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([0])
    source = torch.Generator().manual_seed(4)
    sets = [SIGMA * torch.randn(32, 3, generator=source) for _ in range(200)]
    plain, centred = (
        torch.stack([estimates(way, lambda at: at @ weight.T, x, y, draws)[0] for draws in sets]).var(0).sum()
        for way in (False, True)
    )
    assert centred < plain / 5


@either
def test_probabilities_too_small_for_floats_still_have_a_direction(centred):
    model = network(4000)
    unlikely = model(X).argmin(1)
    loss, gradient, _ = Stein(SIGMA, centred).look(model, X, unlikely, DRAWS * 0.01)
    assert (loss > 100).all()
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def by_decimals(centred, logits, draws):
    """The gradient of one image by the formula as it stands, in a hundred digits, of float64 logits (m, classes)."""
    with localcontext(Context(prec=100)):
        m, e = len(draws), [[Decimal(v) for v in draw] for draw in draws.double().flatten(1).tolist()]
        powers = [[Decimal(v).exp() for v in row] for row in logits.tolist()]
        F = [row[0] / sum(row) for row in powers]
        mean = sum(F) / m
        weights = [(f - mean) * m / (m - 1) if centred else f for f in F]
        pixels = zip(*e, strict=True)
        slopes = [-sum(w * v for w, v in zip(weights, pixel, strict=True)) for pixel in pixels]
        return torch.tensor([float(s / sum(F) / Decimal(SIGMA) ** 2) for s in slopes], dtype=torch.float64)


@pytest.mark.parametrize("draws", ["independent", "pairs", "pairs but one"])
@pytest.mark.parametrize("gap", [8.0, 18.0, 60.0, 0.7, -70.0], ids=repr)
@either
def test_it_keeps_its_digits_where_the_classifier_is_sure_and_where_it_is_hopeless(centred, gap, draws):
    """Of class 0, which is ahead by ``gap``: single precision knows no F between 1 and 1 - 6e-8."""
    model, y, pairs = network(), torch.zeros(4, dtype=torch.int64), torch.cat([DRAWS, -DRAWS])
    draws = {"independent": DRAWS, "pairs": pairs, "pairs but one": pairs[:-1]}[draws]

    def logits(at):
        return model(at) + torch.tensor([gap, 0.0, 0.0])

    found = Stein(SIGMA, centred).look(logits, X, y, draws, chunk=20).gradient.double()
    double = network().double()
    for image, slope in zip(X, found, strict=True):
        with torch.no_grad():
            z = double((image + draws).double()) + torch.tensor([gap, 0.0, 0.0], dtype=torch.float64)
        truth = by_decimals(centred, z, draws)
        assert (slope.flatten() - truth).norm() <= 2e-5 * truth.norm()


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_sure_network_is_attacked_in_the_same_way_in_any_batches(antithetic):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        model = nn.Sequential(*layers).eval()
        x, y = torch.rand(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64)
    with torch.no_grad():
        model[-1].weight *= 10
        model[-1].bias[0] += 18
        assert 1e-9 < 1 - model.double()(x.double()).softmax(1)[:, 0].mean() < 1e-7
        model.float()
    how = {"eps": 1.0, "step": 0.25, "samples": 32, "antithetic": antithetic}
    whole = attack(model, x, y, **how)
    parts = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], **how) for i in range(24)])
    assert (whole - x).flatten(1).norm(dim=1).min() > 0.5
    assert (parts - whole).flatten(1).norm(dim=1).max() < 1e-5


def attack(model, x=X, y=Y, **how):
    how = {"eps": 0.5, "step": 0.2, "steps": 4, "samples": 400, "gradient": "centred-stein"} | how
    return smooth_adv_pgd(model, x, y, SIGMA, **how)


def no_gradient(x):
    return network()(x).detach()


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("gradient", ["stein", "centred-stein"])
def test_it_attacks_a_model_without_gradient_repeatably_and_in_any_batches(gradient, noise):
    how = {"gradient": gradient, "noise": noise}
    whole = attack(no_gradient, **how)
    assert torch.equal(whole, attack(no_gradient, **how))
    assert not torch.equal(whole, attack(no_gradient, seed=1, **how))
    parts = torch.cat([attack(no_gradient, x=X[i : i + 1], y=Y[i : i + 1], chunk=7, **how) for i in range(4)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("gradient", ["stein", "centred-stein"])
def test_it_points_where_the_gradient_does(gradient, antithetic):
    slopes = {}
    for way, samples in ((gradient, 4000), ("backprop", 20_000)):
        how = {"gradient": way, "samples": samples, "antithetic": antithetic, "steps": 1, "seed": 2}
        attack(network(), watch=lambda *what, way=way: slopes.update({way: what[3].flatten(1)}), **how)
    assert (torch.cosine_similarity(slopes[gradient], slopes["backprop"]) > 0.97).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_with_many_draws_it_comes_near_the_attack_by_gradient(targeted):
    def loss(x):
        draws = SIGMA * torch.randn(4000, 1, 2, 3, generator=torch.Generator().manual_seed(9))
        return (-1 if targeted else 1) * LOG_MEAN_SOFTMAX.loss(network(), x, Y, draws)

    exact = loss(attack(network(), targeted=targeted, gradient="backprop")) - loss(X)
    blind = loss(attack(no_gradient, targeted=targeted, samples=4000)) - loss(X)
    assert (exact > 0.1).all()
    assert (blind > 0.8 * exact).all()


class Uniform:
    name, norm, sigma = "uniform", "l1", 0.5

    def __init__(self, sigma=0.5):
        self.sigma = sigma

    def draw_(self, out, generator):
        return out.uniform_(-1, 1, generator=generator)

    def radius(self, p_lower):
        return 0.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 1}, "samples: expected an integer >= 2, got 1"),
        ({"family": Uniform}, "family: expected Gaussian noise for a gradient by Stein's identity, got uniform"),
        ({"objective": "mean-logits"}, "objective: expected 'log-mean-softmax' with gradient='centred-stein', got 'me"),
        ({"gradient": "none"}, "gradient: expected one of 'backprop', 'stein', 'centred-stein', got 'none'"),
    ],
    ids=repr,
)
def test_what_it_cannot_do_is_refused_before_the_model_is_run(changed, message):
    with pytest.raises(InputError, match=message):
        attack(lambda _: pytest.fail("the model was run"), **changed)


def test_gaussian_noise_is_gaussian_whatever_its_certificate():
    assert torch.equal(attack(network(), family=GaussianLinfNoise), attack(network(), family=GaussianNoise))


def test_one_draw_is_refused_by_the_estimator_too():
    with pytest.raises(InputError, match="samples: expected an integer >= 2, got 1"):
        stein_for(GaussianNoise(SIGMA)).look(network(), X, Y, DRAWS[:1])
