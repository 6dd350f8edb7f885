"""Alpha-CROWN: sound against samples and exact minima, above CROWN, and no matter what a clamp's gradient is."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.optimised import highest, intersection
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.errors import InputError


def seeded(make, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def dense_network(*widths):
    layers = [nn.Flatten()]
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.way, self.last = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(64, 3)

    def forward(self, x):
        z = torch.relu(self.first(x))
        return self.last(nn.functional.leaky_relu(self.way(z) + z, 0.1).flatten(1))


NETWORKS = {
    "dense": (lambda: dense_network(8, 20, 20, 20, 4), (8,), 4),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        ),
        (1, 7, 7),
        3,
    ),
    "block": (Block, (1, 8, 8), 3),
}


def example(name, eps, n=3, seed=0):
    make, shape, classes = NETWORKS[name]
    network = RelaxedNetwork(seeded(make, seed), shape)
    x = torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return network, Region(x, eps), network.logits(x).argmax(1), classes


def margins_at(network, x, y):
    logits = network.logits(x)
    others = torch.arange(logits.shape[1]) != y.unsqueeze(1)
    return logits.gather(1, y.unsqueeze(1)) - logits[others].view(len(x), -1)


def sampled(network, region, y):
    """The least margins at random points, at corners, and after steps down the gradient of each."""
    generator = torch.Generator().manual_seed(0)
    least = margins_at(network, region.x, y).detach()
    for number in range(60):
        share = torch.rand(region.x.shape, generator=generator, dtype=torch.float64)
        points = region.lower + (region.upper - region.lower) * (share if number % 2 else share.round())
        least = torch.minimum(least, margins_at(network, points, y).detach())
    for row in range(least.shape[1]):
        points = region.x.clone()
        for _ in range(10):
            points.requires_grad_()
            found = margins_at(network, points, y)
            least = torch.minimum(least, found.detach())
            (slope,) = torch.autograd.grad(found[:, row].sum(), points)
            step = points.detach() - 0.3 * region.radius * slope.sign()
            points = torch.minimum(torch.maximum(step, region.lower), region.upper)
    return least


@pytest.mark.parametrize("intermediate", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_between_crown_and_what_is_found_in_the_region(name, intermediate):
    network, region, y, _ = example(name, 0.12)
    crown = network.margins(region, y)
    alpha = network.alpha_margins(region, y, intermediate=intermediate)
    assert (alpha >= crown - 1e-12).all()
    assert alpha.mean() > crown.mean() + 1e-4
    assert (alpha <= sampled(network, region, y) + 1e-12).all()
    assert not alpha.requires_grad


def exact_minimum(weights, biases, row, lower, upper):
    """The least value of <row, logits> over a box: of all activation patterns, the linear programme in each."""
    least = np.inf
    for pattern in itertools.product((0.0, 1.0), repeat=sum(len(bias) for bias in biases[:-1])):
        matrix, constant, rows, limits, used = np.eye(len(lower)), np.zeros(len(lower)), [], [], 0
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            matrix, constant = weight @ matrix, weight @ constant + bias
            on = np.array(pattern[used : used + len(bias)])
            used += len(bias)
            sign = 1 - 2 * on  # what is on is >= 0, what is off is <= 0
            rows.append(sign[:, None] * matrix)
            limits.append(-sign * constant)
            matrix, constant = on[:, None] * matrix, on * constant
        cost = row @ weights[-1] @ matrix
        offset = row @ (weights[-1] @ constant + biases[-1])
        bounds = list(zip(lower, upper, strict=True))
        found = linprog(cost, np.concatenate(rows), np.concatenate(limits), bounds=bounds)
        if found.status == 0:
            least = min(least, found.fun + offset)
    return least


@pytest.mark.parametrize("seed", range(4))
def test_below_the_exact_minimum(seed):
    network = RelaxedNetwork(seeded(lambda: dense_network(2, 3, 3, 2), seed), (2,))
    x = torch.rand(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    region, y = Region(x, 0.3), torch.tensor([seed % 2])
    linear = [part for part in network.model if isinstance(part, nn.Linear)]
    weights, biases = ([getattr(part, name).detach().numpy() for part in linear] for name in ("weight", "bias"))
    row = np.array([1.0, -1.0]) * (1 - 2 * (seed % 2))
    exact = exact_minimum(weights, biases, row, region.lower[0].numpy(), region.upper[0].numpy())
    crown = float(network.margins(region, y).detach())
    for intermediate in (False, True):
        alpha = float(network.alpha_margins(region, y, steps=30, intermediate=intermediate))
        assert crown - 1e-12 <= alpha <= exact + 1e-9


def test_better_bounds_before_activations_help():
    gains = []
    for seed in range(3):
        network, region, y, _ = example("dense", 0.15, seed=seed)
        alpha = network.alpha_margins(region, y)
        gains.append(network.alpha_margins(region, y, intermediate=True).mean() - alpha.mean())
    assert min(gains) > 1e-5


class StrictClamp(torch.autograd.Function):
    """A clamp whose gradient is 0 at the limits, as that of newer versions of torch."""

    @staticmethod
    def forward(ctx, z, low, high):
        ctx.save_for_backward((z > low) & (z < high))
        return torch.minimum(torch.maximum(z, z.new_tensor(low)), z.new_tensor(high))

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None


@pytest.mark.parametrize("intermediate", [False, True])
def test_no_clamp_in_the_graph(intermediate, monkeypatch):
    network, region, y, _ = example("convolutions", 0.1)
    expected = network.alpha_margins(region, y, intermediate=intermediate)
    calls = []

    def strict(z, min=-torch.inf, max=torch.inf):  # noqa: A002
        calls.append(z)
        return StrictClamp.apply(z, min, max)

    monkeypatch.setattr(torch.Tensor, "clamp", strict)
    monkeypatch.setattr(torch, "clamp", strict)
    assert torch.equal(network.alpha_margins(region, y, intermediate=intermediate), expected)
    assert calls  # of the start, outside the graph


def test_more_steps_are_no_worse_and_start_at_what_is_asked_for():
    network, region, y, _ = example("dense", 0.1)
    few, many = (network.alpha_margins(region, y, steps=steps) for steps in (1, 15))
    assert (many >= few - 1e-12).all()
    assert many.mean() > few.mean()
    parallel = network.alpha_margins(region, y, steps=1, lower_slope="parallel")
    assert (parallel >= network.margins(region, y, lower_slope="parallel") - 1e-12).all()
    assert not torch.equal(parallel, few)
    assert not torch.equal(network.alpha_margins(region, y, steps=1, lr=0.5), network.alpha_margins(region, y, steps=1))
    torch.testing.assert_close(network.alpha_margins(region, y, chunk=7), network.alpha_margins(region, y))


def test_given_intervals_are_taken():
    network, region, y, _ = example("dense", 0.1)
    point = {
        name: ((lower + upper) / 2 - 1e-3, (lower + upper) / 2 + 1e-3)
        for name, (lower, upper) in network.intervals(Region(region.x, 0.0)).items()
    }
    for intermediate in (False, True):
        given = network.alpha_margins(region, y, intervals=point, intermediate=intermediate, steps=3)
        assert (given > network.alpha_margins(region, y, intermediate=intermediate, steps=3)).all()


def test_the_guest_is_left_as_it_was():
    network, region, y, _ = example("convolutions", 0.1)
    first, *others = network.model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    before = [parameter.detach().clone() for parameter in network.parameters()]
    network.alpha_margins(region, y, steps=2, intermediate=True)
    assert [parameter.requires_grad for parameter in (first, *others)] == [False] + [True] * len(others)
    assert torch.equal(others[0].grad, torch.ones_like(others[0]))
    assert all(parameter.grad is None for parameter in (first, *others[1:]))
    assert all(torch.equal(one, two) for one, two in zip(before, network.parameters(), strict=True))


def test_slopes_move_inside_the_limits_and_the_best_of_each_row_is_kept():
    seen = []

    def bound(slopes):
        value = slopes["relu"]
        seen.append(value.detach().clone())
        return -(value - torch.tensor([[0.3, 2.0]])).square()

    found = highest(bound, {"relu": torch.tensor([[0.0, 1.0]])}, steps=60, lr=0.3)
    assert len(seen) == 61
    assert 0 < seen[0].min() <= seen[0].max() < 1
    assert all(value.min() >= 0 and value.max() <= 1 for value in seen)
    assert found[0, 0] == max(-((value[0, 0] - 0.3) ** 2) for value in seen)
    assert found[0, 0] > -1e-4
    assert found[0, 1] == -1
    assert not found.requires_grad


def test_nothing_to_optimise():
    network = RelaxedNetwork(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0), (3,))
    region, y = Region(torch.rand(2, 3, dtype=torch.float64), 0.1), torch.tensor([0, 1])
    for intermediate in (False, True):
        alpha = network.alpha_margins(region, y, intermediate=intermediate)
        torch.testing.assert_close(alpha, network.margins(region, y).detach())


def test_intersection():
    first = {"a": (torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0]))}
    second = {"a": (torch.tensor([1.0, 0.0]), torch.tensor([6.0, 5.0]))}
    lower, upper = intersection(first, second)["a"]
    assert lower.tolist() == [1, 1]
    assert upper.tolist() == [5, 5]


def test_mistakes_are_named():
    network, region, y, _ = example("dense", 0.1)
    with pytest.raises(InputError, match="steps: expected an integer >= 1, got 0"):
        network.alpha_margins(region, y, steps=0)
    with pytest.raises(InputError, match="lr: expected a finite number > 0, got 0"):
        network.alpha_margins(region, y, lr=0)
    with pytest.raises(InputError, match="intermediate: expected True or False, got 'all'"):
        network.alpha_margins(region, y, intermediate="all")
