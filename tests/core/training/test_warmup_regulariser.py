"""The regulariser of the warm-up, against its formula in NumPy, and where parts of it are not defined."""

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.training.warmup_regulariser import balance, input_radius, tightness, warmup_regulariser


def bounds(seed, shift=0.0, shape=(5, 3, 2)):
    source = np.random.default_rng(seed)
    lower = source.normal(size=shape) + shift
    return lower, lower + source.random(shape)


def expected_balance(lower, upper, tau):
    c = (lower + upper) / 2
    active, inactive = lower > 0, upper < 0
    rho_mean = np.mean(c * active) / -np.mean(c * inactive)
    rho_var = np.sum((c - c.mean()) ** 2 * active) / np.sum((c - c.mean()) ** 2 * inactive)
    rho_mean, rho_var = min(rho_mean, 1 / rho_mean), min(rho_var, 1 / rho_var)
    return (max(0, tau - rho_mean) + max(0, tau - rho_var)) / tau


def tensors(pair):
    return tuple(torch.tensor(each, requires_grad=True) for each in pair)


@pytest.mark.parametrize("tau", [0.5, 0.9])
@pytest.mark.parametrize("shift", [-0.9, -0.3, 0.6])
def test_the_formula(shift, tau):
    layers = [bounds(0, shift), bounds(1, -shift, (5, 7)), bounds(2, shift, (5, 4))]
    terms = []
    for lower, upper in layers:
        tight = max(0, tau - 0.1 / np.mean((upper - lower) / 2)) / tau
        terms.append(tight + expected_balance(lower, upper, tau))
    found = warmup_regulariser([tensors(each) for each in layers], 0.1, tau)
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-12)
    assert len(set(terms)) == 3
    for (lower, upper), _ in zip(layers, terms, strict=True):
        assert balance(*tensors((lower, upper)), tau).item() == pytest.approx(expected_balance(lower, upper, tau))


def test_half_is_the_usual_threshold():
    pair = tensors(bounds(3, 0.5))
    assert warmup_regulariser([pair], 0.1).item() == warmup_regulariser([pair], 0.1, 0.5).item() > 0


@pytest.mark.parametrize(
    ("lower", "upper", "value"),
    [
        ([-1.0, -2.0], [1.0, 2.0], 0.0),  # none of either kind: not defined
        ([1.0, 2.0], [2.0, 4.0], 2.0),  # no inactive one: both ratios are 0
        ([-1.0, -4.0], [-0.5, -2.0], 2.0),  # no active one
        ([float("inf"), 1.0], [float("inf"), 2.0], 0.0),
    ],
)
def test_balance_where_a_kind_is_missing(lower, upper, value):
    pair = tensors((np.array([lower]), np.array([upper])))
    found = balance(*pair)
    assert found.item() == value
    if np.isfinite(lower).all():
        assert all(bool(each.isfinite().all()) for each in torch.autograd.grad(found, pair, allow_unused=True))


def test_tightness_without_widths_is_nothing():
    radius = torch.zeros(4, 3, requires_grad=True)
    found = tightness(radius, 0.0)
    assert found.item() == 0
    assert torch.equal(torch.autograd.grad(found, radius)[0], torch.zeros(4, 3))
    assert tightness(torch.full((4, 3), 0.2), 0.05).item() == pytest.approx(0.5)
    assert tightness(torch.full((4, 3), 0.2), 0.2).item() == 0


def test_a_network_without_activations_has_none():
    assert warmup_regulariser([], 0.1).item() == 0


def test_the_radius_at_the_input_is_after_normalisation():
    x = torch.tensor([[[0.5, 0.05]], [[1.0, 0.5]]]).unsqueeze(0)  # one image of two channels
    region = Region(x, 0.1)
    assert input_radius(nn.Flatten(), region).item() == pytest.approx((0.1 + 0.075 + 0.05 + 0.1) / 4)
    model = nn.Sequential(Normalise([0.0, 0.0], [0.5, 0.25]), nn.Flatten())
    assert input_radius(model, region).item() == pytest.approx((0.1 / 0.5 + 0.075 / 0.5 + 0.05 / 0.25 + 0.1 / 0.25) / 4)
