import itertools

import pytest
import torch
from torch.nn import functional

from rs_plugins.core.relaxations.linear import Dense
from rs_plugins.core.relaxations.pooling import MaxPool
from rs_plugins.core.relaxations.regions import Interval

# kernel, stride, padding, dilation, ceil_mode
KINDS = [
    ((2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 2), (1, 2), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (1, 0), (1, 1), True),
    ((2, 3), (2, 1), (0, 1), (2, 1), True),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entries(pool, height, width):
    """Return the positions in each window, by definition."""
    out = functional.max_pool2d(
        torch.zeros(1, 1, *pool.shape[1:]), pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    ).shape[2:]
    for i, j in itertools.product(*map(range, out)):
        rows = [i * pool.stride[0] - pool.padding[0] + a * pool.dilation[0] for a in range(pool.kernel[0])]
        columns = [j * pool.stride[1] - pool.padding[1] + b * pool.dilation[1] for b in range(pool.kernel[1])]
        yield (i, j), [(r, c) for r in rows for c in columns if 0 <= r < height and 0 <= c < width]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_lines_by_definition(kind):
    pool = MaxPool((2, 5, 6), *kind)
    lower = randn(3, 2, 5, 6)
    upper = lower + 0.8 * randn(3, 2, 5, 6, seed=1).abs()
    floors, ceilings = pool.interval(lower, upper)
    choice = pool.choice(lower, upper)
    alone = 0
    for (i, j), window in entries(pool, 5, 6):
        for n, c in itertools.product(range(3), range(2)):
            low, high = (torch.stack([ends[n, c, r, s] for r, s in window]) for ends in (lower, upper))
            first = int(low.argmax())
            others = [float(value) for place, value in enumerate(high) if place != first]
            assert float(floors[n, c, i, j]) == float(low.max())
            assert float(ceilings[n, c, i, j]) == float(choice.ceiling[n, c, i, j]) == float(high.max())
            assert int(choice.entry[n, c, i, j]) == window[first][0] * 6 + window[first][1]
            expected = all(value <= float(low[first]) for value in others)
            assert bool(choice.alone[n, c, i, j]) == expected
            alone += expected
    assert 0 < alone < choice.alone.numel()


@pytest.mark.parametrize("batch", [1, 3], ids=["one for all", "each its own"])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_bound_holds_and_is_reached_at_a_point(kind, batch):
    pool = MaxPool((2, 5, 6), *kind)
    lower = randn(3, 2, 5, 6)
    upper = lower + 0.8 * randn(3, 2, 5, 6, seed=1).abs()
    out = pool.interval(lower, upper)[0].shape[1:]
    rows = randn(batch, 4, *out, seed=2)
    before, offset = pool.through(Dense(rows), pool.choice(lower, upper))
    bound = before.concretise(Interval.between(lower, upper)) + offset
    for seed in range(20):
        z = lower + torch.rand(lower.shape, generator=torch.Generator().manual_seed(seed), dtype=lower.dtype) * (
            upper - lower
        )
        maxima = pool.interval(z, z)[0].unsqueeze(1)
        assert ((rows * maxima).flatten(2).sum(2) >= bound - 1e-12).all()
    point, _ = pool.through(Dense(rows), pool.choice(lower, lower))
    exact = (rows * pool.interval(lower, lower)[0].unsqueeze(1)).flatten(2).sum(2)
    torch.testing.assert_close(point.concretise(Interval.between(lower, lower)), exact)


def test_an_unknown_lower_end_makes_no_line_of_a_window():
    lower = torch.tensor([[[[0.0, torch.nan], [0.0, 0.0]]]], dtype=torch.float64)
    pool = MaxPool((1, 2, 2), (2, 2), (2, 2), (0, 0), (1, 1), False)
    assert not pool.choice(lower, torch.ones(1, 1, 2, 2, dtype=torch.float64)).alone.any()


def test_equal_entries_have_no_constant():
    """A window whose entries are one known number, as after a ReLU, is a line."""
    z = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    choice = MaxPool((1, 2, 2), (2, 2), (2, 2), (0, 0), (1, 1), False).choice(z, z)
    assert choice.alone.all()


def test_above_a_window_is_its_greatest_upper_end():
    """Of one output that no entry is known to be, the bound is minus the ceiling, to the last digit."""
    pool = MaxPool((1, 2, 4), (2, 2), (2, 2), (0, 0), (1, 1), False)
    lower = torch.tensor([[[[0.0, 0.1, 0.0, 0.0], [0.2, 0.1, 0.0, 5.0]]]], dtype=torch.float64)
    upper = lower + torch.tensor([0.7, 0.9, 0.0, 0.5], dtype=torch.float64)
    rows = torch.tensor([[[[[-2.0, -3.0]]]]], dtype=torch.float64)
    before, offset = pool.through(Dense(rows), pool.choice(lower, upper))
    assert float(offset) == -2.0 * 1.0
    assert before.values.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, -3.0]
