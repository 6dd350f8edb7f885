import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_plugins.core.geometry import add_inside, highest_l2, l2_norm, normalise_l2, per_image, project_box, project_l2
from rs_plugins.errors import InputError

SHAPES = [(3, 5), (2, 1, 4, 4), (4, 3, 2), (1, 2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_norms_are_per_image(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([float((row.double() ** 2).sum().sqrt()) for row in delta])
    torch.testing.assert_close(l2_norm(delta), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_underflow_nor_overflow(scale):
    delta = torch.full((1, 4), scale)
    torch.testing.assert_close(l2_norm(delta), torch.tensor([2 * scale]))
    torch.testing.assert_close(normalise_l2(delta, torch.zeros(4)), torch.full((1, 4), 0.5))


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_zero_and_non_finite_gradients_take_the_other_direction(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    other = torch.ones(shape[1:])
    gradient[0] = 0
    gradient[-1].view(-1)[0] = float("nan")
    unit = normalise_l2(gradient, otherwise=other)
    torch.testing.assert_close(l2_norm(unit), torch.ones(len(unit)))
    for row in (unit[0], unit[-1]):
        torch.testing.assert_close(row, other / other.norm())


@given(st.integers(1, 4), st.integers(1, 30), st.just(0.0) | st.floats(1e-6, 3), st.integers(0, 2**31))
def test_projection_shortens_what_is_too_long_and_nothing_else(n, d, eps, seed):
    delta = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    projected = project_l2(delta, torch.tensor([[eps]]))
    assert (l2_norm(projected) <= eps * (1 + 1e-6)).all()
    inside = l2_norm(delta) <= eps
    assert torch.equal(projected[inside], delta[inside])
    cosine = torch.nn.functional.cosine_similarity(projected, delta)
    assert ((cosine > 1 - 1e-5) | (l2_norm(projected) == 0)).all()


def test_box():
    x = torch.tensor([[0.0, 0.5, 1.0]])
    delta = torch.tensor([[-0.2, 0.2, 0.2]])
    torch.testing.assert_close(project_box(delta, x), torch.tensor([[0.0, 0.2, 0.0]]))


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.full((3, 1, 1), 0.5)], ids=repr)
def test_per_image_accepts_numbers_and_one_per_image(value):
    x = torch.zeros(3, 2, 2)
    assert torch.equal(per_image(value, x, "eps").expand(3, 1, 1), torch.full((3, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"eps: expected a number or one per image \(3\), got a tensor of shape \(2,\)"),
        (-0.1, "eps: expected finite values >= 0, got -0.1"),
        (float("nan"), "eps: expected finite values >= 0, got nan"),
    ],
    ids=["shape", "negative", "nan"],
)
def test_per_image_refuses(value, message):
    with pytest.raises(InputError, match=message):
        per_image(value, torch.zeros(3, 2, 2), "eps")


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=repr,
)
def test_a_radius_is_not_rounded_to_half_precision(dtype, kept):
    radius = per_image(0.03, torch.zeros(1, 2, dtype=dtype), "eps")
    assert radius.dtype == kept
    assert radius.item() == pytest.approx(0.03, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
def test_in_half_precision_a_pixel_comes_as_near_as_it_can_and_not_further(dtype):
    """All pixels there are, against the next number found by looking through them all."""
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.double() <= 1].double()  # in order
    source = torch.Generator().manual_seed(0)
    x = torch.cat([numbers, numbers, numbers[torch.randint(len(numbers), (2000,), generator=source)]])
    delta = 2 * torch.rand(len(x), generator=source) - 1
    delta = delta * 10.0 ** -torch.randint(0, 9, (len(x),), generator=source)
    delta[:5] = torch.tensor([0.0, 1.0, -1.0, 1e-30, 1e-8])
    found = add_inside(x.to(dtype).unsqueeze(0), delta.unsqueeze(0))[0]
    assert found.dtype == dtype
    end = (x.float() + delta).clamp(0, 1).double()
    below = numbers[torch.searchsorted(numbers, end, right=True) - 1]
    above = numbers[torch.searchsorted(numbers, end)]
    expected = torch.where(end >= x, below, above)
    moved, most = (found.double() - x).abs(), delta.double().abs()
    assert (moved <= most * (1 + 1e-7)).all()
    # Where single precision rounds the sum up, and it is a number of half precision, one further back is right.
    assert ((found.double() - expected).abs() <= (expected - x).abs() * 2**-7).all()
    assert (found.double() == expected).double().mean() > 0.99
    assert found.min() >= 0
    assert found.max() <= 1


def highest_by_bisection(slope, x, eps):
    """The maximiser of <slope, delta> in ball and box, of one image of any size, in double precision.

    By the multiplier t of ||delta||² <= eps²: the maximiser of <slope, delta> - t ||delta||²/2 in the box is slope / t
    cut off there, and shrinks as t grows.
    """
    slope, x, eps = (np.asarray(value, dtype=np.float64) for value in (slope, x, eps))
    peak = np.abs(slope).max()
    if peak == 0 or eps == 0:
        return np.zeros_like(x)
    slope = slope / peak

    def at(log_t):
        return np.clip(slope * np.exp(-log_t), -x, 1 - x)

    low, high = -120.0, 120.0
    if np.linalg.norm(at(low)) <= eps:
        return at(low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle)) > eps else (low, middle)
    return at(high)


def check_highest(slope, x, eps, atol=1e-5):
    found = highest_l2(slope, x, per_image(eps, x, "eps"))
    radii = torch.as_tensor(eps, dtype=torch.float64).flatten().expand(len(x)).tolist()
    assert found.dtype == slope.dtype
    assert found.shape == x.shape
    for delta, s, image, radius in zip(found.double(), slope.double(), x.double(), radii, strict=True):
        expected = torch.from_numpy(highest_by_bisection(s.numpy(), image.numpy(), radius))
        torch.testing.assert_close(delta, expected, atol=atol, rtol=0)
    return found


IMAGES = ["inside", "binary", "mixed"]


def images_like(kind, shape, source):
    x = torch.rand(3, *shape, generator=source)
    if kind == "inside":
        return x
    return torch.where(torch.rand(x.shape, generator=source) < (0.5 if kind == "mixed" else 1.0), x.round(), x)


@settings(max_examples=150)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kind=st.sampled_from(IMAGES),
    eps=st.just(0.0) | st.floats(1e-3, 40),
    heavy=st.integers(1, 9),
    sparse=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_the_highest_point_is_that_of_an_independent_solver(shape, kind, eps, heavy, sparse, seed):
    source = torch.Generator().manual_seed(seed)
    x = images_like(kind, shape, source)
    slope = torch.randn(x.shape, generator=source) ** heavy  # a few pixels have nearly all of it
    slope[0] = slope[0] * (torch.rand(x[0].shape, generator=source) < 0.5) if sparse else slope[0]
    found = check_highest(slope, x, eps)
    assert (l2_norm(found.double()) <= eps * (1 + 1e-6)).all()
    assert (x + found).min() >= 0
    assert (x + found).max() <= 1
    # And so are no points of ball and box that are drawn at random, near it or anywhere.
    for spread in (0.01, 1.0):
        other = found + spread * torch.randn(50, *x.shape, generator=source)
        other = (x + other).clamp(0, 1) - x
        other = other * (eps / other.flatten(2).norm(dim=2).clamp(min=eps or 1)).reshape(50, 3, *[1] * len(shape))
        best = (slope * found).flatten(1).double().sum(1)
        size = slope.double().flatten(1).norm(dim=1)
        assert ((slope * other).flatten(2).double().sum(2) <= best + 1e-5 * size).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_highest_point_does_not_depend_on_the_size_of_the_slope(scale):
    source = torch.Generator().manual_seed(0)
    x, slope = images_like("mixed", (4, 4), source), torch.randn(3, 4, 4, generator=source)
    assert l2_norm(check_highest(slope * scale, x, 0.7)).min() > 0.6
    torch.testing.assert_close(highest_l2(slope * scale, x, torch.full((3, 1, 1), 0.7)), check_highest(slope, x, 0.7))


def test_the_highest_point_spends_on_small_slopes_what_large_ones_leave():
    """The first pixels cannot move along their slope; squares of the others vanish beside, and for themselves."""
    x = torch.tensor([[1.0, 0.0, 0.5, 0.5]])
    slope = torch.tensor([[1.0, -1.0, 3e-25, -4e-25]])
    found = check_highest(slope, x, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.06, -0.08]]))


@pytest.mark.parametrize("eps", [0.9, 3.0, 1e19, 1e38], ids=repr)
def test_a_ball_larger_than_the_box_leaves_pixels_without_slope_alone(eps):
    found = check_highest(torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.5]]), eps)
    assert found.tolist() == [[0.5, -0.5, 0.0]]


def test_the_highest_point_of_no_slope_is_the_image():
    assert highest_l2(torch.zeros(2, 3), torch.rand(2, 3), torch.ones(2, 1)).tolist() == [[0.0] * 3] * 2


def test_the_highest_point_has_a_radius_per_image_and_images_do_not_matter_to_each_other():
    source = torch.Generator().manual_seed(3)
    x, slope = images_like("mixed", (2, 5), source), torch.randn(3, 2, 5, generator=source) ** 5
    radii = torch.tensor([0.0, 0.5, 1.2])
    together = check_highest(slope, x, radii)
    alone = [highest_l2(slope[i : i + 1], x[i : i + 1], radii[i].reshape(1, 1, 1)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)], ids=repr
)
@pytest.mark.parametrize("eps", [0.25, 3.0, 300.0], ids=repr)
def test_the_highest_point_in_other_floating_types(dtype, atol, eps):
    source = torch.Generator().manual_seed(5)
    x = images_like("mixed", (3, 6), source).to(dtype)
    slope = torch.randn(x.shape, generator=source).to(dtype)
    slope[:, 0, 0] = 0
    check_highest(slope, x, eps, atol)


def test_in_half_precision_what_is_left_of_the_budget_is_reckoned_exactly():
    x = torch.tensor([[0.5, 0.5, 0.5, 0.47, 0.5, 0.5]], dtype=torch.bfloat16)
    check_highest(torch.tensor([[-9.0, 9.0, -9.0, -9.0, 1.0, 1.0]], dtype=torch.bfloat16), x, 1.0, atol=1e-3)


@pytest.mark.parametrize(("ratio", "pixels"), [(0.5, 60), (0.7, 200), (0.9, 300)], ids=repr)
def test_the_highest_point_where_each_round_cuts_off_few_pixels(ratio, pixels):
    """Each pixel has a share of all slopes left, and is cut off only once the one before it was."""
    size = ratio ** torch.arange(pixels, dtype=torch.float64)
    left = size.square().flip(0).cumsum(0).flip(0)
    room, c = torch.empty_like(size), 0.3 / left[0].sqrt()
    for i in range(pixels - 1):
        room[i] = c * size[i] * (1 - 0.5 * (left[i + 1] / left[i]))
        c = ((c.square() * left[i] - room[i].square()) / left[i + 1]).sqrt()
    room[-1] = 0.5
    x, slope = room.clamp(0, 1).reshape(1, -1), -size.reshape(1, -1)
    found = check_highest(slope, x, 0.3)
    assert abs(found.norm() - 0.3) < 1e-6
    # In single precision what is left for the last pixels is rounding of the rest; it is worth nothing to the sum.
    single = highest_l2(slope.float(), x.float(), torch.tensor([[0.3]]))
    torch.testing.assert_close((single.double() * slope).sum(), (found * slope).sum(), atol=1e-6, rtol=0)
