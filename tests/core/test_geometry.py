import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rs_plugins.core.geometry import l2_norm, normalise_l2, per_image, project_box, project_l2
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
