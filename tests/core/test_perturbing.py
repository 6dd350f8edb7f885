import pytest
import torch

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.laplace import LaplaceNoise
from rs_plugins.core.perturbing import NoiseOnGrid, check_on_grid, perturb_
from rs_plugins.errors import InputError


class Stairs(GaussianNoise):
    """Adds one level of 1/4 to each image, and fails in every other."""

    def check_images(self, images, indices):
        if (images * 4 % 1).any():
            raise InputError(f"images: off the grid, {list(indices)}")

    def perturb_(self, out, images, generator):
        out.copy_(images + 0.25)
        return torch.arange(len(out)) % 2 == 1


@pytest.mark.parametrize("family", [GaussianNoise, LaplaceNoise])
@pytest.mark.parametrize("shape", [(5,), (8, 5)], ids=["one image", "an image each"])
def test_ordinary_noise_is_drawn_and_then_added(family, shape):
    out, images = torch.empty(8, 5), torch.rand(shape)
    assert perturb_(family(0.3), out, images, torch.Generator().manual_seed(1)) is None
    assert torch.equal(out, family(0.3).draw_(torch.empty(8, 5), torch.Generator().manual_seed(1)) + images)
    check_on_grid(family(0.3), images[None], [0])


def test_a_family_may_add_itself():
    out = torch.empty(3, 2)
    assert perturb_(Stairs(0.3), out, torch.tensor([0.5, 0.75]), torch.Generator()).tolist() == [False, True, False]
    assert out.tolist() == [[0.75, 1.0]] * 3
    assert isinstance(Stairs(0.3), NoiseOnGrid)
    assert not isinstance(GaussianNoise(0.3), NoiseOnGrid)


def test_it_may_refuse_images():
    check_on_grid(Stairs(0.3), torch.tensor([[0.25, 1.0]]), [7])
    with pytest.raises(InputError, match=r"images: off the grid, \[7\]"):
        check_on_grid(Stairs(0.3), torch.tensor([[0.3, 1.0]]), [7])
