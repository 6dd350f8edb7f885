import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_plugins.core.attacks.pgd import pgd_l2
from rs_plugins.errors import InputError

X = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
SLOPE = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def norms(delta):
    return torch.linalg.vector_norm(delta.double().flatten(1), dim=1)


def bowl(x, number):
    """Gradient of a curved function, so that the direction changes from step to step."""
    return SLOPE + 3 * x.square()


def plain_numpy(x, gradient, eps, step, steps):
    """One image at a time, in double precision, as the paper writes it."""
    out = []
    for index, image in enumerate(x.double().numpy()):
        delta = np.zeros_like(image)
        for _ in range(steps):
            g = gradient(index, image + delta)
            delta = delta + step[index] * g / np.sqrt((g**2).sum())
            delta = np.clip(image + delta, 0, 1) - image
            length = np.sqrt((delta**2).sum())
            if length > eps[index]:
                delta = delta * eps[index] / length
        out.append(image + delta)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    ("eps", "step"),
    [
        (0.3, 0.1),
        (5.0, 2.0),
        (torch.tensor([0.1, 0.2, 0.3, 5.0]), 0.07),
        (
            torch.tensor([0.1, 0.2, 0.3, 5.0]).reshape(4, 1, 1, 1),
            torch.tensor([0.3, 0.2, 0.1, 1.0], dtype=torch.float64),
        ),
        (np.float64(0.4), [0.1, 0.2, 0.3, 0.4]),
    ],
    ids=repr,
)
def test_it_follows_the_paper(eps, step, steps):
    def gradient(index, image):
        return SLOPE[index].double().numpy() + 3 * image**2

    found = pgd_l2(bowl, X, eps=eps, step=step, steps=steps)
    radii, lengths = (torch.as_tensor(v, dtype=torch.float64).flatten().expand(4).tolist() for v in (eps, step))
    expected = plain_numpy(X, gradient, radii, lengths, steps)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert (norms(found - X) > 0.5 * torch.tensor(radii).clamp(max=0.1)).all()


def test_without_a_step_it_is_that_of_the_paper():
    """2·eps/T, so that half of the steps reach the edge; and each step is where the formula says."""
    radii, steps = [0.1, 0.2, 0.3, 5.0], 6
    seen = []

    def ascent(current, number):
        seen.append(current.clone())
        return bowl(current, number)

    def gradient(index, image):
        return SLOPE[index].double().numpy() + 3 * image**2

    seen.append(pgd_l2(ascent, X, eps=torch.tensor(radii), steps=steps))
    for count, found in enumerate(seen):
        expected = plain_numpy(X, gradient, radii, [2 * eps / steps for eps in radii], count)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(shape=SHAPES, eps=st.floats(0, 3), step=st.floats(0, 3), seed=st.integers(0, 99))
def test_ball_and_box_hold_for_any_shape(shape, eps, step, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(3, *shape, generator=source)
    x[0] = x[0].round()
    found = pgd_l2(lambda current, _: torch.randn(current.shape, generator=source), x, eps=eps, step=step, steps=3)
    assert found.shape == x.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert (norms(found - x) <= eps + 1e-6).all()


@pytest.mark.parametrize("useless", [0.0, math.nan, math.inf], ids=repr)
def test_an_image_without_a_usable_gradient_moves_to_the_sphere_and_the_others_do_not_notice(useless):
    inside = X * 0.2 + 0.4

    def ascent(current, number):
        gradient = bowl(current, number).clone()
        gradient[1] = useless
        return gradient

    found = pgd_l2(ascent, inside, eps=0.3, step=0.1, steps=5)
    torch.testing.assert_close(norms(found - inside), torch.full((4,), 0.3, dtype=torch.float64), atol=1e-6, rtol=0)
    others = [0, 2, 3]
    assert torch.equal(found[others], pgd_l2(bowl, inside, eps=0.3, step=0.1, steps=5)[others])
    assert torch.equal(found, pgd_l2(ascent, inside, eps=0.3, step=0.1, steps=5))
    assert not torch.equal(found[1], pgd_l2(ascent, inside, eps=0.3, step=0.1, steps=5, seed=1)[1])


def test_no_budget_returns_the_input():
    assert torch.equal(pgd_l2(bowl, X, eps=0, step=0.1, steps=3), X)
    found = pgd_l2(bowl, X, eps=torch.tensor([0.0, 0.5, 0.0, 0.5]), step=0.1, steps=3)
    assert torch.equal(found[::2], X[::2])
    assert (norms(found - X)[1::2] > 0.2).all()


def test_the_steps_are_numbered_and_start_at_the_image():
    seen = []

    def ascent(current, number):
        seen.append((number, current.clone()))
        return bowl(current, number)

    pgd_l2(ascent, X, eps=0.3, step=0.1, steps=3)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], X)
    torch.testing.assert_close(norms(seen[1][1] - X).max().item(), 0.1, atol=1e-6, rtol=0)


def test_pixels_slightly_out_of_the_box_come_back_into_it():
    x = torch.tensor([[0.0, 1.0, 0.5]]) + torch.tensor([[-5e-7, 5e-7, 0.0]])
    found = pgd_l2(lambda current, _: torch.tensor([[-1.0, 1.0, 0.0]]), x, eps=0.1, step=0.1, steps=1)
    assert found.tolist() == [[0.0, 1.0, 0.5]]


def test_the_input_is_untouched_and_the_result_detached():
    x = X.clone().requires_grad_()
    found = pgd_l2(bowl, x, eps=0.3, step=0.1, steps=2)
    assert torch.equal(x, X)
    assert x.grad is None
    assert not found.requires_grad
    attached = torch.ones(1, requires_grad=True)
    assert not pgd_l2(lambda at, number: attached * bowl(at, number), x, eps=0.3, step=0.1, steps=2).requires_grad


def test_a_whole_number_of_steps_may_be_a_float():
    assert torch.equal(pgd_l2(bowl, X, eps=0.3, steps=3.0, restarts=1.0), pgd_l2(bowl, X, eps=0.3, steps=3))


def test_the_empty_batch():
    assert pgd_l2(bowl, X[:0], eps=0.3, steps=3).shape == (0, 2, 3, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eps": -0.1}, r"eps: expected finite values >= 0, got -0\.1"),
        ({"eps": math.nan}, "eps: expected finite values >= 0, got nan"),
        ({"eps": torch.rand(3)}, r"eps: expected a number or one per image \(4\), got a tensor of shape \(3,\)"),
        ({"eps": None}, "eps: expected a number or one per image, got None"),
        ({"eps": "big"}, "eps: expected a number or one per image, got 'big'"),
        ({"step": -1.0}, r"step: expected finite values >= 0, got -1\.0"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"steps": 1.5}, r"steps: expected an integer >= 1, got 1\.5"),
        ({"x": X * 255}, r"x: expected pixels in \[0, 1\], got values from"),
        ({"x": (X * 255).to(torch.uint8)}, "x: expected floating-point pixels"),
        ({"x": X * math.nan}, "x: expected finite values"),
        ({"x": X[0, 0, 0]}, r"x: expected a batch of shape \(n, \*input\), got shape \(3,\)"),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_impossible_values_are_refused_before_the_first_gradient(changed, message):
    def never(current, number):
        pytest.fail("the loop was entered")

    arguments = {"x": X, "eps": 0.3, "step": 0.1, "steps": 2} | changed
    with pytest.raises(InputError, match=message):
        pgd_l2(never, arguments.pop("x"), **arguments)


def test_a_mask_keeps_the_pixels_it_hides_and_spends_the_whole_budget_on_the_others():
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    x[0, 0] = 1 + 5e-7  # tolerated, and not to be touched where it is hidden
    mask = torch.tensor([[False, True, True, False]])
    free_gradient = torch.tensor([1.0, 0.3, -0.4, 1.0])
    adv = pgd_l2(lambda x, _: free_gradient.expand_as(x), x, eps=0.1, step=0.05, steps=4, mask=mask)
    assert torch.equal(adv[:, [0, 3]], x[:, [0, 3]])
    torch.testing.assert_close((adv - x)[:, 1:3], torch.tensor([[0.06, -0.08]]).expand(3, 2), atol=1e-6, rtol=0)


def test_a_mask_also_holds_where_there_is_no_gradient():
    x, mask = torch.full((2, 4), 0.5), torch.tensor([[False, True, True, True], [False] * 4])
    adv = pgd_l2(lambda x, _: torch.zeros_like(x), x, eps=0.1, step=0.05, steps=2, mask=mask)
    assert torch.equal(adv[~mask], x[~mask])
    torch.testing.assert_close((adv - x).norm(dim=1), torch.tensor([0.1, 0.0]))  # the second may not move at all


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4), "mask: expected a boolean tensor, got torch.float32"),
        ([[True]], "mask: expected a boolean tensor, got list"),
        (
            torch.ones(3, dtype=torch.bool),
            r"mask: expected a shape that broadcasts to that of x, \(2, 4\), got shape \(3,\)",
        ),
    ],
    ids=["float", "list", "shape"],
)
def test_masks_are_checked_before_the_first_gradient(mask, message):
    with pytest.raises(InputError, match=message):
        pgd_l2(lambda *_: 1 / 0, torch.full((2, 4), 0.5), eps=0.1, step=0.05, steps=2, mask=mask)


def test_the_random_direction_does_not_depend_on_the_default_type():
    image = torch.full((1, 4), 0.5)
    expected = pgd_l2(lambda x, _: torch.zeros_like(x), image, eps=0.1, step=0.05, steps=2)
    try:
        torch.set_default_dtype(torch.float64)
        direction = pgd_l2(lambda x, _: torch.zeros_like(x), image, eps=0.1, step=0.05, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(direction, expected)
