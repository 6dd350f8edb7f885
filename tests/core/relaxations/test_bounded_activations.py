"""Intervals and lines of every activation against its values on a fine grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rs_plugins.core.activations import ParametricSoftplus, SmoothReLU
from rs_plugins.core.relaxations.activations import Softplus, activation_of
from rs_plugins.core.relaxations.curves import GELU, GELU_TANH, MISH, SIGMOID, SILU, TANH, celu, elu

MODULES = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.4),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.Softplus(beta=3, threshold=2),
    nn.ELU(),
    nn.ELU(alpha=0.3),
    nn.ELU(alpha=2.5),
    nn.CELU(),
    nn.CELU(alpha=0.4),
    nn.CELU(alpha=3.0),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Mish(),
    SmoothReLU(),
    SmoothReLU(1.3, learnable=False),
    ParametricSoftplus(),
    ParametricSoftplus(0.7),
]
SMOOTH = MODULES[3:]
each = pytest.mark.parametrize("module", [module.double() for module in MODULES], ids=repr)
ends = st.one_of(st.floats(-6, 6), st.floats(-60, 60))


def bounded(module, lower, upper, slope="adaptive"):
    activation = activation_of(module)
    low, low_offset, high, high_offset = activation.lines(lower, upper, slope)
    return activation, (low, torch.zeros_like(low) if low_offset is None else low_offset), (high, high_offset)


def intervals(count, seed=0):
    """Intervals of all kinds: around 0, on either side, short and long."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, generator=generator, dtype=torch.float64) * 3
    radius = torch.randn(count, generator=generator, dtype=torch.float64).mul(1.5).exp() / 2
    return centre - radius, centre + radius


def grid(lower, upper, points=801):
    share = torch.linspace(0, 1, points, dtype=lower.dtype).view(-1, *[1] * lower.ndim)
    return lower * (1 - share) + upper * share


def check_lines(module, lower, upper, slope="adaptive", tolerance=1e-12):
    activation, below, above = bounded(module, lower, upper, slope)
    z = grid(lower, upper)
    values = module(z).detach()
    allowed = tolerance * (1 + torch.maximum(lower.abs(), upper.abs()))
    assert (below[0] * z + below[1] <= values + allowed).all()
    assert (above[0] * z + above[1] >= values - allowed).all()
    least, greatest = activation.interval(lower, upper)
    assert (least <= values.amin(0) + allowed).all()
    assert (greatest >= values.amax(0) - allowed).all()
    return z


@each
def test_lines_and_intervals_enclose_the_values(module):
    lower, upper = intervals(400)
    z = check_lines(module, lower, upper)
    assert torch.equal(activation_of(module)(z), module(z))
    check_lines(module, lower, upper, "parallel")


@settings(max_examples=40)
@given(ends, ends, st.sampled_from(MODULES))
def test_lines_enclose_the_values_anywhere(one, other, module):
    lower, upper = (torch.tensor([end], dtype=torch.float64) for end in sorted((one, other)))
    check_lines(module, lower, upper)


@each
def test_intervals_are_exact(module):
    lower, upper = intervals(300, seed=1)
    values = module(grid(lower, upper, 4001)).detach()
    least, greatest = activation_of(module).interval(lower, upper)
    # what the grid misses around a minimum, and the small step of torch's softplus at its threshold
    missed = ((upper - lower) / 4000) ** 2 + (math.log1p(math.exp(-2)) / 3 if "threshold=2" in repr(module) else 2.1e-9)
    assert (values.amin(0) - least <= missed).all()
    assert (greatest - values.amax(0) <= missed).all()


@each
def test_lines_are_no_worse_than_constants_at_the_middle_and_shrink_with_the_interval(module):
    lower, upper = intervals(300, seed=2)
    activation, below, above = bounded(module, lower, upper, "parallel")
    least, greatest = activation.interval(lower, upper)
    middle = (lower + upper) / 2
    step = math.log1p(math.exp(-2)) / 3 if "threshold=2" in repr(module) else 2.1e-9
    assert (above[0] * middle + above[1] <= greatest + step).all()
    assert (below[0] * middle + below[1] >= torch.minimum(least, module(middle).detach()) - 0.5 * (upper - lower)).all()
    centre = torch.linspace(-4.03, 4, 50, dtype=torch.float64)
    _, below, above = bounded(module, centre - 1e-3, centre + 1e-3)
    gap = (above[0] - below[0]) * centre + above[1] - below[1]
    assert gap.abs().max() < (0.06 if "threshold=2" in repr(module) else 2e-3)


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.Mish()], ids=repr)
def test_one_curvature_gives_tangent_and_chord(module):
    lower, upper = torch.tensor([0.2], dtype=torch.float64), torch.tensor([1.1], dtype=torch.float64)
    (low, low_offset), (high, high_offset) = bounded(module, lower, upper)[1:]
    middle = (lower + upper) / 2
    chord = (module(upper) - module(lower)) / (upper - lower)
    if isinstance(module, nn.Tanh | nn.Sigmoid):  # concave there
        low, low_offset, high, high_offset = high, high_offset, low, low_offset
    torch.testing.assert_close(low * middle + low_offset, module(middle), rtol=1e-9, atol=0)
    torch.testing.assert_close(high, chord)
    torch.testing.assert_close(high * upper + high_offset, module(upper), rtol=1e-9, atol=0)


@each
def test_intervals_that_are_points(module):
    values = torch.tensor([-30, -3, -1e-9, 0, 1e-9, 0.5, 3, 30], dtype=torch.float64)
    for width in (0.0, 1e-300, 1e-16, 1e-12, 1e-7):
        lower = values.clone().requires_grad_()
        upper = (values + width).requires_grad_()
        activation, below, above = bounded(module, lower, upper)
        outputs = torch.cat([*below, *above, *activation.interval(lower, upper)])
        assert outputs.isfinite().all()
        for slope, offset in (below, above):
            assert (slope * values + offset - module(values)).abs().max() < 1e-11 + 2 * width
        gradients = torch.autograd.grad(outputs.sum(), [lower, upper], allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@each
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e30), (torch.float64, 1e300)])
def test_huge_intervals(module, dtype, largest):
    module = module.to(dtype)
    lower = torch.tensor([-largest, -largest, -largest, 3.0, 0.9 * largest], dtype=dtype, requires_grad=True)
    upper = torch.tensor([largest, -0.9 * largest, 2.0, largest, largest], dtype=dtype, requires_grad=True)
    activation, below, above = bounded(module, lower, upper)
    bounds = activation.interval(lower, upper)
    assert all(part.isfinite().all() for part in (*below, *above, *bounds))
    outputs = [part for part in (*below, *above, *bounds) if part.requires_grad]
    gradients = torch.autograd.grad(outputs, [lower, upper], [torch.ones_like(lower)] * len(outputs))
    assert all(gradient.isfinite().all() for gradient in gradients)
    check_lines(module, lower.detach(), upper.detach(), tolerance=1e-14 if dtype == torch.float64 else 1e-6)
    module.double()


@pytest.mark.parametrize("module", SMOOTH, ids=repr)
def test_gradients_of_lines(module):
    lower, upper = (end.requires_grad_() for end in intervals(12, seed=5))

    def lines(lower, upper):
        activation, below, above = bounded(module, lower, upper)
        return (*below, *above, *activation.interval(lower, upper))

    assert torch.autograd.gradcheck(lines, (lower, upper), atol=2e-5, rtol=1e-3, fast_mode=True)


def test_gradient_reaches_what_the_activation_learns():
    module = SmoothReLU(1.5).double()
    lower, upper = intervals(20)

    def lines(raw):
        _, below, above = torch.func.functional_call(Caller(module), {"module.b_raw": raw}, (lower, upper))
        return (*below, *above)

    assert torch.autograd.gradcheck(lines, (torch.tensor(1.5, dtype=torch.float64, requires_grad=True),))


class Caller(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, lower, upper):
        return bounded(self.module, lower, upper)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LeakyReLU(0.3)], ids=repr)
def test_any_number_chooses_a_sound_lower_line(module):
    lower, upper = intervals(50, seed=3)
    choice = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert activation_of(module).adjustable
    check_lines(module, lower, upper, choice)
    (slopes, _), _ = bounded(module, torch.tensor([[-1.0, -1.0, 1.0]]), torch.ones(1, 3), torch.rand(1, 4, 3))[1:]
    assert slopes.shape == (1, 4, 3)
    assert torch.equal(slopes[:, :, 2], torch.ones(1, 4))


def test_where_tighter_bounds_change_nothing():
    lower, upper = torch.tensor([-2.0, -1.0, 0.5]), torch.tensor([-1.0, 1.0, 2.0])
    assert activation_of(nn.LeakyReLU(0.2)).settled(lower, upper).tolist() == [True, False, True]
    assert activation_of(nn.SiLU()).settled(lower, upper) is None


@pytest.mark.parametrize(
    ("curve", "place", "least"),
    [
        (SILU, -1.2784645, -0.27846455),
        (GELU, -0.7517915, -0.16997121),
        (GELU_TANH, -0.7524614, -0.17004076),
        (MISH, -1.1924312, -0.30884342),
    ],
)
def test_minima_are_those_of_the_specification_rounded_outward(curve, place, least):
    assert curve.minimum[0] == pytest.approx(place, abs=1e-7)
    assert 0 <= curve.minimum[1] - least < 1e-8
    z = torch.linspace(place - 1e-4, place + 1e-4, 2001, dtype=torch.float64)
    assert curve.value(z).min() >= curve.minimum[1]
    assert float(curve.derivative(torch.tensor(curve.minimum[0], dtype=torch.float64))) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("curve", [TANH, SIGMOID, SILU, GELU, GELU_TANH, MISH, elu(2.5), elu(0.4), celu(0.4)])
def test_derivatives_and_curvatures(curve):
    for start, end, curvature in curve.pieces:
        z = torch.linspace(max(start, -45), min(end, 45), 3001, dtype=torch.float64)[1:-1].requires_grad_()
        (slope,) = torch.autograd.grad(curve.value(z).sum(), z)
        torch.testing.assert_close(curve.derivative(z), slope, rtol=1e-6, atol=1e-12)  # torch's CELU is no better
        bend = curve.derivative(z.detach()).diff() * curvature
        assert bend.min() >= -1e-15 if curvature else curve.derivative(z).diff().abs().max() < 1e-15


def test_functions_and_methods():
    assert activation_of(functional.silu)(torch.ones(1)) == functional.silu(torch.ones(1))
    assert activation_of("relu")(torch.tensor(-1.0)) == 0
    assert activation_of(torch.tanh)(torch.tensor(0.0)) == 0


@pytest.mark.parametrize(
    "source",
    [
        nn.ELU(-1.0),
        nn.CELU(-2.0),
        nn.LeakyReLU(1.5),
        nn.LeakyReLU(-0.1),
        nn.Softplus(beta=-1),
        nn.Softplus(threshold=800),  # torch's overflows
        nn.Hardtanh(),
        functional.gelu,
    ],
    ids=repr,
)
def test_what_is_not_known(source):
    assert activation_of(source) is None


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("curve", [SIGMOID, TANH, SILU, GELU, MISH], ids=range(5))
def test_offsets_are_rounded_outward_where_a_curve_meets_the_slope(curve, side):
    """On wide intervals, where a bisection leaves a long bracket: beside the extremum that many more steps find."""
    slope = torch.linspace(0.02, 0.9, 40, dtype=torch.float64)
    lower, upper = torch.full_like(slope, -7.3), torch.full_like(slope, 8.1)
    grid = torch.linspace(-7.3, 8.1, 20001, dtype=torch.float64)
    heights = side * (curve.value(grid).unsqueeze(1) - slope * grid.unsqueeze(1))
    place = heights.argmin(0).clamp(1, len(grid) - 2)
    low, high = grid[place - 1], grid[place + 1]
    for _ in range(80):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        left, right = (side * (curve.value(z) - slope * z) for z in (first, second))
        low, high = torch.where(left < right, low, first), torch.where(left < right, second, high)
    exact = torch.minimum(side * (curve.value(low) - slope * low), heights.amin(0))
    found = side * curve.offset(slope, lower, upper, side)
    assert (found <= exact + 1e-14).all()
    assert (found >= exact - 1e-3).all()


def test_a_softplus_with_a_large_step_falls_where_it_becomes_a_line():
    softplus = Softplus(1.0, 0.1)
    lower, upper = (torch.tensor([end], dtype=torch.float64) for end in (0.05, 0.12))
    low, high = softplus.interval(lower, upper)
    z = torch.linspace(0.05, 0.12, 1001, dtype=torch.float64)
    values = functional.softplus(z, beta=1.0, threshold=0.1)
    assert float(low) <= float(values.min()) < 0.101
    assert float(high) >= float(values.max()) > 0.7
