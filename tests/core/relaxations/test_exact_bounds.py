"""Bounds against independent computations: with matrices by hand, and the minimum over all activation patterns."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region

METHODS = ("ibp", "crown-ibp", "crown")
WIDTHS = [(3, 4, 3, 3), (2, 5, 4, 2), (4, 3, 3, 3, 3)]


def network(widths, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inside, outside in itertools.pairwise(widths):
        layer = nn.Linear(inside, outside).double()
        layer.weight.data.normal_(0, scale, generator=generator)
        layer.bias.data.normal_(0, 0.3, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def affine_parts(model):
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)]


def box(x, eps):
    return np.maximum(x - eps, 0), np.minimum(x + eps, 1)


def exact_minimum(parts, row, lower, upper):
    """Return the least value of <row, logits> over the box: a linear program for each pattern of active neurons."""
    sizes = [len(bias) for _, bias in parts[:-1]]
    least = np.inf
    for pattern in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        signs = np.split(np.array(pattern), np.cumsum(sizes)[:-1])
        linear, constant = np.eye(len(lower)), np.zeros(len(lower))
        rows, limits = [], []
        for (weight, bias), sign in zip(parts[:-1], signs, strict=True):
            linear, constant = weight @ linear, weight @ constant + bias
            direction = (1 - 2 * sign)[:, None]  # active: z >= 0; else z <= 0
            rows.append(direction * linear)
            limits.append(-direction[:, 0] * constant)
            linear, constant = sign[:, None] * linear, sign * constant
        weight, bias = parts[-1]
        linear, constant = weight @ linear, weight @ constant + bias
        bounds = list(zip(lower, upper, strict=True))
        result = linprog(row @ linear, np.concatenate(rows), np.concatenate(limits), bounds=bounds)
        if result.status == 0:
            least = min(least, result.fun + row @ constant)
    return least


def exact_margins(model, x, y, eps):
    parts = affine_parts(model)
    classes = len(parts[-1][1])
    each = np.eye(classes)
    rows = [each[y] - each[k] for k in range(classes) if k != y]
    return np.array([exact_minimum(parts, row, *box(x, eps)) for row in rows])


def folded(parts, y):
    weight, bias = parts[-1]
    rows = np.array([np.eye(len(bias))[y] - np.eye(len(bias))[k] for k in range(len(bias)) if k != y])
    return [*parts[:-1], (rows @ weight, rows @ bias)]


def ibp_by_hand(parts, lower, upper):
    """Return bounds of what each layer gives before its ReLU, by positive and negative parts of the weights."""
    found = []
    for weight, bias in parts:
        positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
        found.append((positive @ lower + negative @ upper + bias, positive @ upper + negative @ lower + bias))
        lower, upper = (np.maximum(end, 0) for end in found[-1])
    return found


def crown_by_hand(parts, ends, lower, upper):
    """Return a lower bound of the last layer: its matrix goes back through the lines of each ReLU."""
    matrix, constant = parts[-1]
    for (weight, bias), (low, high) in zip(reversed(parts[:-1]), reversed(ends), strict=True):
        slope, shift, below = np.zeros_like(low), np.zeros_like(low), np.zeros_like(low)
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            if a >= 0:
                slope[i] = below[i] = 1
            elif b > 0:
                slope[i], shift[i], below[i] = b / (b - a), -a * b / (b - a), float(b > -a)
        constant = constant + np.minimum(matrix, 0) @ shift
        matrix = np.where(matrix > 0, matrix * below, matrix * slope)
        matrix, constant = matrix @ weight, constant + matrix @ bias
    return np.where(matrix > 0, matrix * lower, matrix * upper).sum(1) + constant


def margins_by_hand(parts, y, lower, upper, method):
    """Return margins by the equations of Zhang et al. (2018), best bounds of each neuron whose sign is open."""
    parts = folded(parts, y)
    ends = ibp_by_hand(parts, lower, upper)
    if method == "ibp":
        return ends[-1][0]
    if method == "crown-ibp":
        return np.maximum(crown_by_hand(parts, ends[:-1], lower, upper), ends[-1][0])
    known = [ends[0]]
    for depth in range(1, len(parts)):
        weight, bias = parts[depth]
        inside = [np.maximum(end, 0) for end in known[-1]]
        low, high = ibp_by_hand([(weight, bias)], *inside)[0]
        below = crown_by_hand([*parts[:depth], (weight, bias)], known, lower, upper)
        above = -crown_by_hand([*parts[:depth], (-weight, -bias)], known, lower, upper)
        is_open = ((low < 0) & (high > 0)) | (depth == len(parts) - 1)
        known.append((np.where(is_open, np.maximum(low, below), low), np.where(is_open, np.minimum(high, above), high)))
    return known[-1][0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("widths", WIDTHS, ids=repr)
@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_by_hand(method, widths, eps):
    model = network(widths, seed=1)
    x = torch.rand(3, widths[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(3) % widths[-1]
    bounds = RelaxedNetwork(model, (widths[0],)).margins(Region(x, eps), y, method=method)
    for image, label, row in zip(x.numpy(), y.tolist(), bounds.detach().numpy(), strict=True):
        expected = margins_by_hand(affine_parts(model), label, *box(image, eps), method)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("widths", [(2, 3, 3, 3), (3, 5, 2)], ids=repr)
@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_below_the_exact_minimum(widths, eps):
    model = network(widths, seed=3)
    x = torch.rand(1, widths[0], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.tensor([1])
    exact = exact_margins(model, x[0].numpy(), 1, eps)
    relaxed = RelaxedNetwork(model, (widths[0],))
    found = [relaxed.margins(Region(x, eps), y, method=method)[0].detach().numpy() for method in METHODS]
    found.append(relaxed.alpha_margins(Region(x, eps), y)[0].numpy())
    for bounds in found:
        assert (bounds <= exact + 1e-9).all()
    mean = [bounds.mean() for bounds in found]
    assert mean[0] <= mean[1] <= mean[2] <= mean[3] <= exact.mean() + 1e-9
    assert mean[0] < mean[2] or eps < 0.1


def test_without_an_open_neuron_linear_bounds_are_exact():
    model = network((3, 3, 3, 2), seed=5, scale=0.5)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.bias.data = torch.where(torch.arange(len(layer.bias)) % 2 == 0, 5.0, -5.0).double()
    x = torch.full((1, 3), 0.4, dtype=torch.float64)
    exact = exact_margins(model, x[0].numpy(), 0, 0.1)
    relaxed, y = RelaxedNetwork(model, (3,)), torch.tensor([0])
    for method in ("crown-ibp", "crown"):
        bounds = relaxed.margins(Region(x, 0.1), y, method=method)[0].detach().numpy()
        np.testing.assert_allclose(bounds, exact, atol=1e-9)
    assert (relaxed.margins(Region(x, 0.1), y, method="ibp")[0].detach().numpy() < exact - 1e-3).all()


def test_golden_values():
    """Weights that a reader can follow: z = (x - y, x + y - 1), the margin relu z0 - relu z1 + 1."""
    hidden, last = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    hidden.weight.data, hidden.bias.data = torch.tensor([[1.0, -1], [1, 1]]).double(), torch.tensor([0.0, -1]).double()
    last.weight.data, last.bias.data = torch.tensor([[1.0, 0], [0, 1]]).double(), torch.tensor([1.0, 0]).double()
    relaxed = RelaxedNetwork(nn.Sequential(hidden, nn.ReLU(), last), (2,))
    x, y = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([0])
    # z0, z1 in [-0.5, 0.5]; intervals: 0 - 0.5 + 1
    assert relaxed.margins(Region(x, 0.25), y, method="ibp").item() == pytest.approx(0.5)
    # relu z0 >= 0 (adaptive, equal ends); relu z1 <= (z1 + 0.5) / 2 <= 0.5
    assert relaxed.margins(Region(x, 0.25), y, method="crown-ibp").item() == pytest.approx(0.5)
    # parallel: relu z0 >= z0 / 2, so (z0 - z1) / 2 - 0.25 + 1 = (0.5 - y) + 0.75 >= 0.5
    parallel = relaxed.margins(Region(x, 0.25), y, method="crown", lower_slope="parallel")
    assert parallel.item() == pytest.approx(0.5)
    # at (0.6, 0.5) both are in [-0.4, 0.6]: z0 - 0.6 (z1 + 0.4) + 1 = 0.4 x - 1.6 y + 1.36
    x = torch.tensor([[0.6, 0.5]], dtype=torch.float64)
    assert relaxed.margins(Region(x, 0.25), y, method="ibp").item() == pytest.approx(0.4)
    assert relaxed.margins(Region(x, 0.25), y, method="crown").item() == pytest.approx(0.4)
    lower, upper = relaxed.output_bounds(Region(x, 0.25), method="crown")
    # logit 0: relu z0 + 1 >= 1 by intervals; <= 0.6 (z0 + 0.4) + 1 <= 1.6
    torch.testing.assert_close(lower, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(upper, torch.tensor([[1.6, 0.6]], dtype=torch.float64))


@pytest.mark.parametrize("widths", WIDTHS[:2], ids=repr)
def test_single_logits(widths):
    """Bounds of a logit are those of a margin against a class that is always 0."""
    model = network(widths, seed=6)
    x = torch.rand(2, widths[0], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    lower, upper = RelaxedNetwork(model, (widths[0],)).output_bounds(Region(x, 0.1), method="crown-ibp")
    for i, image in enumerate(x.numpy()):
        parts, ends = affine_parts(model), box(image, 0.1)
        inner = ibp_by_hand(parts, *ends)
        low = np.maximum(crown_by_hand(parts, inner[:-1], *ends), inner[-1][0])
        weight, bias = parts[-1]
        high = np.minimum(-crown_by_hand([*parts[:-1], (-weight, -bias)], inner[:-1], *ends), inner[-1][1])
        np.testing.assert_allclose(lower[i].detach().numpy(), low, atol=1e-12)
        np.testing.assert_allclose(upper[i].detach().numpy(), high, atol=1e-12)
