"""Coefficients on windows against the same as one number for each value."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.relaxations.activations import activation_of
from rs_plugins.core.relaxations.linear import Dense, Kernel
from rs_plugins.core.relaxations.patches import Patches
from rs_plugins.core.relaxations.regions import Interval, Region

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(inside, outside, taps, stride=1, padding=0, dilation=1, groups=1, bias=True, after=None, seed=0):
    def pair(value):
        return (value, value) if isinstance(value, int) else value

    weight = randn(outside, inside // groups, *pair(taps), seed=seed)
    padding = pair(padding)
    after = padding if after is None else pair(after)
    return Kernel(
        weight, randn(outside, seed=seed + 1) if bias else None, pair(stride), padding, after, pair(dilation), groups
    )


def lines(shape, n=2, seed=0, activation=None):
    lower = randn(n, *shape, seed=seed) - 0.5
    upper = lower + randn(n, *shape, seed=seed + 1).abs() + 0.1
    return activation_of(activation or nn.ReLU()).lines(lower, upper, "adaptive")


def both_ways(shape, rows, steps, start=(Patches, Dense)):
    """The coefficients and the constants, as patches and dense, of steps (method, arguments) from the output back."""
    found = []
    for form in start:
        coefficients, total = form.identity(shape, rows, randn(1)), torch.zeros(1, len(rows), dtype=torch.float64)
        for method, *arguments in steps:
            coefficients, offset = getattr(coefficients, method)(*arguments)
            total = total if offset is None else total + offset
        found.append((coefficients, total))
    return found


def check(shape, rows, steps, ends):
    (patches, constant), (dense, expected) = both_ways(shape, rows, steps)
    full = patches.to_dense().values
    torch.testing.assert_close(full, dense.values.expand_as(full), **CLOSE)
    torch.testing.assert_close(*torch.broadcast_tensors(constant, expected), **CLOSE)
    torch.testing.assert_close(patches.concretise(ends), dense.concretise(ends), **CLOSE)
    return patches


def backwards(shape, kernels, between):
    """Steps from the output of a chain of convolutions with input ``shape`` back to it; the output's shape."""
    sizes = [shape]
    for each in kernels:
        sizes.append(tuple(each.apply(torch.zeros(1, *sizes[-1], dtype=torch.float64)).shape[1:]))
    steps = []
    for number in reversed(range(len(kernels))):
        steps.append(("through_conv", kernels[number], sizes[number]))
        if number:
            steps.extend(between(sizes[number], number))
    return steps, sizes[-1]


def relu(shape, number):
    return [("through_activation", lines(shape, seed=number))]


def nothing(shape, number):
    return []


def affine(shape, number):
    channels = shape[0]
    return [("through_diagonal", randn(channels, 1, 1, seed=7), randn(channels, 1, 1, seed=8))]


def silu(shape, number):
    return [("through_activation", lines(shape, seed=number, activation=nn.SiLU()))]


def picks(shape, kind):
    size = torch.Size(shape).numel()
    if kind == "all":
        return torch.arange(size)
    if kind == "channel":
        return torch.arange(size // shape[0], size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))[: size // 2].sort()[0]


SWEEP = [
    {"taps": taps, "stride": stride, "padding": padding}
    for taps, stride, padding in itertools.product((1, 2, 3, (2, 3)), (1, 2, (3, 1)), (0, 1, (0, 2)))
]


@pytest.mark.parametrize("between", [relu, nothing, affine], ids=lambda function: function.__name__)
@pytest.mark.parametrize("options", SWEEP, ids=str)
def test_two_convolutions_of_every_kind(options, between):
    kernels = [kernel(2, 4, **options, seed=1), kernel(4, 3, 3, 2, 1, seed=3)]
    steps, shape = backwards((2, 9, 8), kernels, between)
    ends = Interval(randn(2, 2, 9, 8), randn(2, 2, 9, 8).abs())
    for kind in ("all", "channel", "some"):
        check(shape, picks(shape, kind), steps, ends)


@settings(max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "taps": st.integers(1, 4),
                "stride": st.integers(1, 3),
                "padding": st.integers(0, 2),
                "dilation": st.integers(1, 2),
                "groups": st.sampled_from([1, 2]),
                "bias": st.booleans(),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([relu, nothing, affine, silu]),
    st.sampled_from(["all", "channel", "some"]),
    st.integers(8, 16),
)
def test_chains_of_convolutions(options, between, kind, size):
    kernels, room = [], (size, size + 1)
    for number, each in enumerate(options):
        inner = [(side + 2 * each["padding"] - each["dilation"] * (each["taps"] - 1) - 1) for side in room]
        if min(inner) < 0:
            break
        room = tuple(side // each["stride"] + 1 for side in inner)
        kernels.append(kernel(2, 2, **each, seed=number))
    if not kernels:
        return
    steps, shape = backwards((2, size, size + 1), kernels, between)
    x = randn(2, 2, size, size + 1)
    check(shape, picks(shape, kind), steps, Interval(x, x.abs() / 3))


def test_more_padding_after_than_before():
    steps, shape = backwards((2, 6, 6), [kernel(2, 3, 2, after=1), kernel(3, 2, 4, padding=1, after=2)], affine)
    assert shape == (2, 6, 6)
    check(shape, picks(shape, "all"), steps, Interval(randn(2, 2, 6, 6), randn(2, 2, 6, 6).abs()))


def test_windows_that_lie_in_the_padding_alone():
    kernels = [kernel(2, 2, 1, 1, 2), *(kernel(2, 2, 1, stride, seed=stride) for stride in (2, 2, 3))]
    steps, shape = backwards((2, 8, 9), kernels, relu)
    check(shape, picks(shape, "all"), steps, Interval(randn(2, 2, 8, 9), randn(2, 2, 8, 9).abs()))


def test_depthwise_and_grouped():
    kernels = [kernel(4, 4, 3, padding=1, groups=4), kernel(4, 6, 3, groups=2, dilation=2, seed=5)]
    steps, shape = backwards((4, 8, 8), kernels, relu)
    check(shape, picks(shape, "all"), steps, Interval(randn(2, 4, 8, 8), randn(2, 4, 8, 8).abs()))


@pytest.mark.parametrize("kind", ["all", "some"])
def test_balls(kind):
    steps, shape = backwards((2, 7, 7), [kernel(2, 4, 3, 2, 1), kernel(4, 3, 2, 1, 1, seed=3)], relu)
    x = torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for region in (
        Region(x, 0.3, "l2"),
        Region(x, torch.tensor([0.1, 0.4])),
        Region(x, torch.tensor([2.0, 0.1]), "l2"),
    ):
        check(shape, picks(shape, kind), steps, region)


@pytest.mark.parametrize("kind", ["all", "channel", "some"])
def test_ways_that_meet_again(kind):
    """A block with a shortcut: windows of other sizes on both ways, the same stride."""
    long = [kernel(2, 4, 3, 2, 1, seed=1), kernel(4, 4, 3, 1, 1, seed=2)]
    short = [kernel(2, 4, 1, 2, seed=4)]
    ends = Interval(randn(2, 2, 9, 9), randn(2, 2, 9, 9).abs())
    for last in (("through_activation", lines((2, 9, 9))), affine((2, 9, 9), 0)[0]):
        results = []
        for form in (Patches, Dense):
            rows = picks((4, 5, 5), kind)
            start, total = form.identity((4, 5, 5), rows, randn(1)), 0
            ways = []
            for kernels in (long, short):
                coefficients = start
                for method, *arguments in backwards((2, 9, 9), kernels, relu)[0]:
                    coefficients, offset = getattr(coefficients, method)(*arguments)
                    total = total + (0 if offset is None else offset)
                ways.append(coefficients)
            joint = ways[0].plus(ways[1]).plus(ways[1].negative()).plus(ways[1])
            joint, offset = getattr(joint, last[0])(*last[1:])
            assert isinstance(joint, form)
            results.append(joint.concretise(ends) + total + offset)
        torch.testing.assert_close(*results, **CLOSE)


def test_ways_of_other_strides_meet_as_dense():
    rows = picks((2, 3, 3), "all")
    shape = (2, 6, 6)
    one, _ = Patches.identity((2, 3, 3), rows, randn(1)).through_conv(kernel(2, 2, 2, 2), shape)
    two, _ = Patches.identity((2, 3, 3), rows, randn(1)).through_conv(kernel(2, 2, 4, 1), shape)
    expected = one.to_dense().values + two.to_dense().values
    assert torch.equal(one.plus(two).values, expected)
    assert torch.equal(one.plus(two.to_dense()).values, expected)
    assert torch.equal(two.to_dense().plus(one).values, expected)


def test_windows_stay_small_until_they_reach_the_size_of_the_node():
    kernels = [kernel(1, 2, 3, 1, 1, seed=number) for number in range(3)]
    kernels = [kernel(1, 2, 5, 2), kernel(2, 2, 4, 2, seed=2), kernel(2, 2, 3, 1, seed=4)]
    steps, shape = backwards((1, 28, 28), kernels, relu)
    rows = picks(shape, "all")
    windows = []
    for count in (1, 3, 5):
        coefficients, _ = both_ways(shape, rows, steps[:count], (Patches,))[0]
        windows.append(coefficients.window)
    assert windows == [(3, 3), (8, 8), (19, 19)]
    coefficients, _ = both_ways(
        shape, rows, [*steps[:4], ("through_conv", kernel(1, 2, 9, 4), (1, 28, 28))], (Patches,)
    )[0]
    assert isinstance(coefficients, Dense)


def test_positions_share_the_weights_until_an_activation():
    each = kernel(2, 3, 3, 1, 1)
    coefficients, _ = Patches.identity((3, 6, 6), picks((3, 6, 6), "all"), randn(1)).through_conv(each, (2, 6, 6))
    assert torch.equal(coefficients.values, each.weight[None, None])


@pytest.mark.parametrize("step", ["rows", "space"])
def test_what_has_no_windows_goes_on_as_dense(step):
    rows, shape = picks((2, 4, 4), "all"), (2, 4, 4)
    if step == "rows":
        found = lines(shape)
        steps = [
            (
                "through_activation",
                found._replace(lower_slope=found.lower_slope.unsqueeze(1).expand(-1, 32, -1, -1, -1)),
            )
        ]
    else:
        steps = [("through_diagonal", randn(*shape), None), ("through_linear", randn(4, 5), randn(4))]
    (patches, constant), (dense, expected) = both_ways(shape, rows, steps)
    assert isinstance(patches, Dense)
    torch.testing.assert_close(patches.values, dense.values.expand_as(patches.values), **CLOSE)
    torch.testing.assert_close(*torch.broadcast_tensors(constant, expected), **CLOSE)


def test_gradients_and_vmap():
    x, weight = randn(2, 2, 6, 6), randn(3, 4, 3, 3, seed=5).requires_grad_()
    other, between, rows = kernel(2, 4, 3, 2, 1), lines((4, 3, 3)), picks((3, 2, 2), "all")

    def least(weight, form=Patches, dense=False):
        start = form.identity((3, 2, 2), rows, x)
        last = Kernel(weight, None, (2, 2), (1, 1), (1, 1), (1, 1), 1)
        coefficients, _ = start.through_conv(last, (4, 3, 3))
        coefficients, offset = coefficients.through_activation(between)
        coefficients, _ = coefficients.through_conv(other, (2, 6, 6))
        coefficients = coefficients.to_dense() if dense else coefficients
        return coefficients.concretise(Interval(x, x.abs())) + offset

    assert torch.autograd.gradcheck(least, (weight,), fast_mode=True)
    expected = torch.autograd.grad(least(weight, Dense).sum(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(least(weight).sum(), weight)[0], expected, **CLOSE)
    stacked = torch.stack([weight.detach(), 2 * weight.detach()])
    expected = torch.stack([least(each) for each in stacked])
    torch.testing.assert_close(torch.func.vmap(least)(stacked), expected)
    torch.testing.assert_close(torch.func.vmap(partial(least, dense=True))(stacked), expected)


def test_no_rows():
    patches = Patches.identity((2, 4, 4), torch.arange(0), randn(1))
    assert patches.concretise(Interval(randn(3, 2, 4, 4), randn(3, 2, 4, 4).abs())).shape == (3, 0)
