"""What keeps a network apt to learn while the radius is still growing (Shi et al. 2021)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.regions import Region

TAU = 0.5


def warmup_regulariser(
    bounds: Iterable[tuple[Tensor, Tensor]], input_radius: float | Tensor, tau: float = TAU
) -> Tensor:
    """Return the mean over the activations of a network of `tightness` + `balance` (Shi et al. 2021).

    Args:
        bounds: Lower and upper interval bounds before each activation, pairs of (n, *layer).
        input_radius: Mean radius of the intervals of the network's input, after normalisation.
        tau: Where both are satisfied, in (0, 1].
    """
    parts = [tightness((upper - lower) / 2, input_radius, tau) + balance(lower, upper, tau) for lower, upper in bounds]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def tightness(radius: Tensor, input_radius: float | Tensor, tau: float = TAU) -> Tensor:
    """Return relu(tau - r̄_0/r̄)/tau: how much wider intervals have become on their way from the input.

    Where they have no width it is 0.

    Args:
        radius: Of the intervals of a layer, (n, *layer).
        input_radius: Mean radius at the input (r̄_0).
        tau: Where it ends.
    """
    mean = radius.mean()
    counted = (mean > 0) & mean.isfinite()
    share = input_radius / torch.where(counted, mean, 1.0)
    return torch.where(counted, relu(tau - share) / tau, 0.0)


def balance(lower: Tensor, upper: Tensor, tau: float = TAU) -> Tensor:
    """Return (relu(tau - ρ_mean) + relu(tau - ρ_var))/tau: how unequal active and inactive neurons are.

    With centres c, active where lower > 0 and inactive where upper < 0: ρ_mean compares the sums of |c| of both kinds,
    ρ_var those of (c - c̄)²; each is the smaller sum divided by the greater. Where neither kind has any it is 0.

    Args:
        lower: Lower bounds before an activation, (n, *layer).
        upper: Upper bounds.
        tau: Where it ends.
    """
    centre = (lower + upper) / 2
    active, inactive = (lower > 0).to(centre.dtype), (upper < 0).to(centre.dtype)
    spread = (centre - centre.mean()).square()
    means = _ratio((centre * active).sum(), -(centre * inactive).sum())
    variances = _ratio((spread * active).sum(), (spread * inactive).sum())
    total = (relu(tau - means) + relu(tau - variances)) / tau
    return torch.where(total.isfinite(), total, 0.0)


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """Return the smaller one divided by the greater; NaN without a gradient where both are 0."""
    greater = torch.maximum(first, second)
    defined = greater > 0
    return torch.where(defined, torch.minimum(first, second) / torch.where(defined, greater, 1.0), torch.nan)


def input_radius(model: nn.Module, region: Region) -> Tensor:
    """Return the mean radius of ``region`` after the first `Normalise` of ``model``; in pixels if it has none."""
    layer = next((part for part in model.modules() if isinstance(part, Normalise)), None)
    if layer is None:
        return region.radius.mean()
    per_channel = (-1, *(1,) * (region.radius.ndim - 2))
    return (region.radius / layer.std.view(per_channel)).mean()
