"""Gaussian training: cross-entropy on fresh noisy copies of each image (Cohen et al. 2019)."""

from dataclasses import dataclass

from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import check_logits
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.losses import mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method


def plain(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
    """Return the mean cross-entropy on the images as they are; ``draws`` is not used."""
    return mean_cross_entropy(check_logits(model(batch.x), len(batch.x)).unsqueeze(1), batch.y)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Method):
    """(1/m) Σ_i CE(f(x + e_i), y), e_i ~ N(0, sigma² I) (Cohen et al. 2019, section 3.3).

    Labels may also be class probabilities.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        samples: Noise draws per image and step (m); 1 in the paper.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("samples", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        e = draws.noise(self.noise, batch.x, self.samples)
        return mean_cross_entropy(noisy_logits(model, batch.x, e), batch.y)


def gaussian(sigma: float, family: Family = GaussianNoise) -> Gaussian:
    """Return `Gaussian` with one draw per image and step, ``sigma`` in pixels.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0.
    """
    return Gaussian(sigma, family=family)
