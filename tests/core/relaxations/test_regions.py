import numpy as np
import pytest
import torch

from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.relaxations.slack import SLACK, slack
from rs_plugins.errors import InputError


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_box_is_cut_with_the_pixels():
    region = Region(torch.tensor([[0.0, 0.05, 0.5, 1.0]], dtype=torch.float64), 0.1)
    torch.testing.assert_close(region.lower, torch.tensor([[0.0, 0.0, 0.4, 0.9]], dtype=torch.float64))
    torch.testing.assert_close(region.upper, torch.tensor([[0.1, 0.15, 0.6, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(region.centre, torch.tensor([[0.05, 0.075, 0.5, 0.95]], dtype=torch.float64))
    torch.testing.assert_close(region.radius, torch.tensor([[0.05, 0.075, 0.1, 0.05]], dtype=torch.float64))


def test_an_image_is_in_its_region_even_outside_the_pixels():
    x = torch.tensor([[-1e-7, 1 + 1e-7]], dtype=torch.float64)
    for eps in (0.0, 0.1):
        region = Region(x, eps)
        assert (region.lower <= x).all()
        assert (region.upper >= x).all()
        assert (region.radius >= 0).all()


def test_nothing_asks_for_a_gradient():
    region = Region(rand(2, 3).requires_grad_(), torch.tensor(0.1, requires_grad=True))
    assert not any(part.requires_grad for part in (region.x, region.lower, region.upper, region.centre, region.radius))


@pytest.mark.parametrize("eps", [0.1, torch.tensor([0.02, 0.3])], ids=["one", "each"])
def test_minimum_over_a_box(eps):
    x, rows = rand(2, 3, 2), rand(2, 5, 3, 2, seed=1) - 0.5
    region = Region(x, eps)
    expected = np.empty((2, 5))
    for i in range(2):
        for k in range(5):
            a, low, high = (part.numpy() for part in (rows[i, k], region.lower[i], region.upper[i]))
            expected[i, k] = np.where(a > 0, a * low, a * high).sum()
    torch.testing.assert_close(region.minimum(rows), torch.from_numpy(expected))
    torch.testing.assert_close(region.minimum(rows[:1]), region.minimum(rows[:1].expand(2, -1, -1, -1)))


def test_minimum_over_a_ball_is_reached_inside_the_pixels():
    x, rows = 0.4 + 0.2 * rand(2, 6), rand(2, 4, 6, seed=1) - 0.5
    eps = torch.tensor([0.05, 0.2], dtype=torch.float64)
    steps = -eps.view(2, 1, 1) * rows / rows.norm(dim=2, keepdim=True)
    reached = (rows * (x.unsqueeze(1) + steps)).sum(2)
    torch.testing.assert_close(Region(x, eps, "l2").minimum(rows), reached)


def test_a_wide_ball_gives_no_more_than_the_box_around_it():
    x, rows = rand(2, 6).round(), rand(2, 4, 6, seed=1) - 0.5
    ball = Region(x, 3.0, "l2").minimum(rows)
    torch.testing.assert_close(ball, Region(x, 3.0).minimum(rows))
    assert (ball > (rows * x.unsqueeze(1)).sum(2) - 3 * rows.norm(dim=2)).any()


def test_the_gradient_of_a_row_of_zeros_is_finite():
    rows = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    Region(rand(1, 3), 0.1, "l2").minimum(rows).sum().backward()
    assert rows.grad.isfinite().all()


def test_what_is_handed_in_is_looked_at():
    x = rand(2, 3)
    with pytest.raises(InputError, match=r"norm: expected one of 'linf', 'l2', got 'L2'"):
        Region(x, 0.1, "L2")
    with pytest.raises(
        InputError, match=r"eps: expected a number or one per image \(2\), got a tensor of shape \(3,\)"
    ):
        Region(x, torch.tensor([0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match=r"eps: expected finite values >= 0, got nan"):
        Region(x, float("nan"))
    with pytest.raises(InputError, match=r"x: expected floating-point pixels in \[0, 1\], got torch.int64"):
        Region(torch.zeros(2, 3, dtype=torch.long), 0.1)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_slack(dtype, least):
    margins = torch.tensor([-3.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    found = slack(margins)
    torch.testing.assert_close(found, least * torch.tensor([4.0, 1.0, 2.0], dtype=dtype))
    assert not found.requires_grad
    assert SLACK[dtype] == least


def test_half_precision_proves_nothing():
    assert not (torch.ones(2, dtype=torch.float16) > slack(torch.ones(2, dtype=torch.float16))).any()
