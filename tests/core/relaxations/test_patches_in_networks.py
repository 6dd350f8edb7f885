"""Bounds of whole networks do not depend on the form of the coefficients."""

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations import propagation
from rs_plugins.core.relaxations.linear import Dense, Kernel
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.patches import Patches
from rs_plugins.core.relaxations.regions import Region


class Residual(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.way = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1), nn.ReLU(), nn.Conv2d(outside, outside, 3, 1, 1)
        )
        self.shortcut = nn.Conv2d(inside, outside, 1, stride) if (inside, stride) != (outside, 1) else nn.Identity()

    def forward(self, x):
        return torch.relu(self.way(x) + self.shortcut(x))


def last(width, classes=3):
    return nn.Flatten(), nn.Linear(width, classes)


NETWORKS = {
    "two": lambda: [nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 5, 2, 1, 1), nn.ReLU(), *last(125)],
    "normalised": lambda: [
        Normalise([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 4, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, 2, 2, dilation=2, groups=2),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        *last(100),
    ],
    "averages": lambda: [
        nn.Conv2d(2, 4, 3, 1, 1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, 1, 1),
        nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        *last(4),
    ],
    "averages of other kinds": lambda: [
        nn.Conv2d(2, 3, 2),
        nn.ReLU(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Conv2d(3, 3, 2),
        nn.ReLU(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(3, 3, 2, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2, divisor_override=3),
        *last(3),
    ],
    "residual": lambda: [Residual(2, 4, 2), Residual(4, 4, 1), nn.Conv2d(4, 2, 3, 1, 1), nn.Softplus(), *last(50)],
    "maxima": lambda: [
        nn.Conv2d(2, 4, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(4, 4, 2, padding=1),
        nn.ELU(),
        *last(100),
    ],
}


def network(name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(*NETWORKS[name]()).double()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(), part.running_var.uniform_(0.5, 2), part.weight.data.normal_()
        shape = (2, 9, 9) if name in ("two", "residual", "averages of other kinds", "normalised") else (2, 8, 8)
        return RelaxedNetwork(model.eval(), shape), torch.rand(3, *shape, dtype=torch.float64)


def dense(monkeypatch):
    monkeypatch.setattr(propagation, "Patches", Dense)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounds_and_gradients_are_those_of_dense_coefficients(name, norm, monkeypatch):
    relaxed, x = network(name)
    region, y = Region(x, 0.03 if norm == "linf" else 0.3, norm), torch.tensor([0, 2, 1])
    weights = list(relaxed.parameters())
    results = []
    for _ in range(2):
        margins = relaxed.margins(region, y, lower_slope="parallel")
        bounds = relaxed.output_bounds(region)
        results.append([margins, *bounds, *torch.autograd.grad(margins.sum(), weights, allow_unused=True)])
        dense(monkeypatch)
    for patches, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(patches, expected, rtol=1e-10, atol=1e-12)
    assert (results[0][0] > relaxed.margins(region, y, method="ibp") + 1e-6).any()


@pytest.mark.parametrize("chunk", [9, 40])
def test_bounds_do_not_depend_on_how_many_are_bounded_at_once(chunk):
    relaxed, x = network("residual")
    region, y = Region(x, 0.05), torch.tensor([0, 2, 1])
    torch.testing.assert_close(
        relaxed.margins(region, y, chunk=chunk), relaxed.margins(region, y), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_whole_channels_and_single_rows_are_the_same(share, monkeypatch):
    relaxed, x = network("two")
    region, y = Region(x, 0.02), torch.tensor([0, 2, 1])
    expected = relaxed.margins(region, y)
    seen = []
    identity = Patches.identity
    monkeypatch.setattr(Patches, "identity", lambda *arguments: seen.append(len(arguments[1])) or identity(*arguments))
    monkeypatch.setattr(propagation, "_WORTH_ALL", share)
    torch.testing.assert_close(relaxed.margins(region, y), expected, rtol=1e-12, atol=1e-12)
    assert (seen == [125]) == (share == 0.0)


def test_average_pooling_keeps_the_windows(monkeypatch):
    seen = []
    through = Patches.through_conv

    def watched(self, kernel: Kernel, shape):
        seen.append((kernel.groups, kernel.stride, tuple(kernel.weight.shape)))
        return through(self, kernel, shape)

    monkeypatch.setattr(Patches, "through_conv", watched)
    relaxed, x = network("averages")
    relaxed.margins(Region(x, 0.02), torch.tensor([0, 2, 1]))
    assert (4, (2, 2), (4, 1, 3, 3)) in seen
    assert (4, (2, 2), (4, 1, 2, 2)) not in seen  # by then the window is as large as the node


def test_memory_is_planned_for_the_largest_window():
    relaxed, x = network("two")
    work = relaxed._propagation(Region(x, 0.1), None)
    names = [node.name for node in work.network.nodes]
    assert work._longest_row(names[2], (5, 5, 5)) == 2 * 5 * 5
    assert work._longest_row(names[0], (4, 4, 4)) == 2 * 3 * 3 == 18
    assert work._longest_row(names[-1], (3,)) == 2 * 9 * 9
