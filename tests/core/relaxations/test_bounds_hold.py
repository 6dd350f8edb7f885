"""Every bound is below what samples, corners and attacks find, on random networks."""

import random

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region

NETWORKS, AT_ONCE = 120, 10
SMOOTH = (nn.SiLU, nn.GELU, nn.ELU, nn.CELU, nn.Softplus, nn.Mish, nn.Tanh, nn.Sigmoid)


class Skip(nn.Module):
    """The input beside what is made of it: added, or as more channels."""

    def __init__(self, inside, together):
        super().__init__()
        self.inside, self.together = inside, together

    def forward(self, x):
        return x + self.inside(x) if self.together else torch.cat([x, self.inside(x)], 1)


def batch_norm(channels, draw):
    module = nn.BatchNorm2d(channels)
    for value, low, high in (
        (module.running_mean, -0.5, 0.5),
        (module.running_var, 0.3, 2),
        (module.weight, -1.5, 1.5),
        (module.bias, -0.5, 0.5),
    ):
        value.data.uniform_(low, high, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    return module


def convolution(inside, draw):
    """A convolution of any kind that keeps at least a pixel of 5x5."""
    groups = draw.choice([1, 1, 2]) if inside % 2 == 0 else 1
    outside, taps = 2 * draw.randint(1, 3), draw.randint(1, 3)
    stride, dilation, padding = draw.randint(1, 3), draw.choice([1, 1, 2]), draw.choice([0, 1, 2, "same", "valid"])
    if padding == "same":
        stride, taps = 1, draw.randint(1, 4)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return nn.Conv2d(inside, outside, (taps, draw.randint(1, 3)), bias=draw.random() < 0.7, **options)


def activation(draw):
    return draw.choice([nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1), draw.choice(SMOOTH)()])


def block(channels, draw):
    kind = draw.choice(["conv", "conv", "bn", "skip", "cat", "max", "mean", "affine"])
    if kind == "conv":
        layer = convolution(channels, draw)
        return [layer, activation(draw)], layer.out_channels
    if kind == "bn":
        layer = convolution(channels, draw)
        return [layer, batch_norm(layer.out_channels, draw), activation(draw)], layer.out_channels
    if kind in ("skip", "cat"):
        inside = [nn.Conv2d(channels, channels, 3, padding=1), activation(draw), nn.Conv2d(channels, channels, 1)]
        more = channels * (1 if kind == "skip" else 2)
        return [Skip(nn.Sequential(*inside), kind == "skip"), *draw.choice([[], [activation(draw)]])], more
    if kind == "max":
        return [nn.MaxPool2d(draw.choice([2, (3, 2)]), stride=draw.choice([1, 2]), padding=1, ceil_mode=True)], channels
    if kind == "mean":
        return [nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=draw.random() < 0.5)], channels
    return [nn.Conv2d(channels, 4, 2, padding=1), nn.Conv2d(4, 4, 3, padding=1), activation(draw)], 4


def random_network(number):
    """Return a network for images (channels, size, size) in double precision, and that shape."""
    draw = random.Random(number)
    channels, size = draw.choice([1, 2, 3]), draw.choice([6, 7, 8])
    layers = [Normalise([0.4] * channels, [0.3 + 0.1 * i for i in range(channels)])] * draw.choice([0, 1])
    inside = channels
    with torch.random.fork_rng():
        torch.manual_seed(number)
        for _ in range(draw.randint(1, 3)):
            more, wide = block(inside, draw)
            with torch.no_grad():
                try:
                    shape = nn.Sequential(*layers, *more).eval()(torch.zeros(1, channels, size, size)).shape
                except RuntimeError:  # no pixel would be left
                    continue
            layers, inside = [*layers, *more], wide
            numbers = shape[1:].numel()
        else:
            with torch.no_grad():
                numbers = nn.Sequential(*layers).eval()(torch.zeros(1, channels, size, size)).numel()
        if draw.random() < 0.2:
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 3)]
        elif draw.random() < 0.5:
            head = [nn.Flatten(), nn.Linear(numbers, 4)]
        else:
            head = [nn.Flatten(), nn.Linear(numbers, 5), nn.BatchNorm1d(5), activation(draw), nn.Linear(5, 3)]
        model = nn.Sequential(*layers, *head).double().eval()
    return model, (channels, size, size)


def differences(logits, y):
    """Return logit_y - logit_k, k ascending without y, of (…, n, classes)."""
    return torch.stack(
        [
            torch.stack([logits[..., i, label] - logits[..., i, k] for k in range(logits.shape[-1]) if k != label], -1)
            for i, label in enumerate(y.tolist())
        ],
        -2,
    )


def inside(region, points):
    """Return ``points`` (m, n, *input) moved into the region."""
    if region.norm == "l2":
        delta = points - region.x
        norms = delta.flatten(2).norm(dim=2).clamp(min=1e-12)
        points = region.x + delta * (region.eps / norms).clamp(max=1).view(*norms.shape, *[1] * (points.ndim - 2))
    return torch.minimum(torch.maximum(points, region.lower), region.upper)


def found(model, region, y, generator):
    """Return the least margins that samples, corners and descent find, (n, classes - 1)."""

    def margins(points):
        return differences(model(points.flatten(0, 1)).unflatten(0, points.shape[:2]), y)

    def random_points(m):
        return torch.rand(m, *region.x.shape, generator=generator, dtype=torch.float64)

    corners = torch.where(random_points(60) < 0.5, region.lower, region.upper)
    starts = torch.cat([region.lower + random_points(60) * (region.upper - region.lower), corners])
    with torch.no_grad():
        least = margins(inside(region, starts)).amin(0)
    for k in range(least.shape[1]):
        points = inside(region, starts[-3:])
        for step in (1.0, 0.5, 0.25, 0.1, 0.05):
            points = points.requires_grad_()
            gradient = torch.autograd.grad(margins(points)[..., k].sum(), points)[0]
            if region.norm == "l2":
                norms = gradient.flatten(2).norm(dim=2).clamp(min=1e-12)
                gradient = gradient / norms.view(*norms.shape, *[1] * (points.ndim - 2))
            else:
                gradient = gradient.sign()
            points = inside(region, (points - step * region.eps * gradient).detach())
            with torch.no_grad():
                least = torch.minimum(least, margins(points).amin(0))
    return least


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(AT_ONCE, NETWORKS, AT_ONCE))]
)
def test_no_point_is_below_a_bound(first):
    for number in range(first, first + AT_ONCE):
        model, shape = random_network(number)
        draw, generator = random.Random(-number), torch.Generator().manual_seed(number)
        network = RelaxedNetwork(model, shape)
        x = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        x[0] = x[0].round()  # pixels at the very ends of [0, 1]
        y = torch.tensor([0, network.classes - 1])
        norm = draw.choice(["linf", "linf", "l2"])
        region = Region(x, draw.choice([0.003, 0.03, 0.3] if norm == "linf" else [0.02, 0.2, 1.0]), norm)
        least = found(model, region, y, generator)
        slope = draw.choice(["adaptive", "parallel"])
        for method in ("ibp", "crown-ibp", "crown"):
            with torch.no_grad():
                bounds = network.margins(region, y, method=method, lower_slope=slope)
            assert bounds.isfinite().all()
            assert (bounds <= least + 1e-9).all(), (number, method, model)
        optimised = network.alpha_margins(region, y, steps=3)
        assert (optimised <= least + 1e-9).all(), (number, "alpha", model)
        assert (optimised >= bounds - 1e-12).all() or slope == "parallel"
