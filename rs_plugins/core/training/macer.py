"""MACER: training that maximises the certified radius, without an attack (Zhai et al. 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.special import ndtri

from rs_plugins.core.checks import check_count, check_labels, check_nonnegative, check_positive
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.losses import check_range
from rs_plugins.core.training.objective import Batch, Draws, Method

LEAST = 1e-10  # their code adds it to the probability of the label: a copy that is surely wrong counts no more


@dataclass(frozen=True, kw_only=True)
class Macer(Method):
    """-log((1/m) Σ_i F_y(x + e_i)) + lam · sigma/2 · (margin - xi), the second for some images (Zhai et al. 2020).

    xi = Φ⁻¹(P_(1)) - Φ⁻¹(P_(2)), with P = (1/m) Σ_i softmax(inv_temp · f(x + e_i)) and its two greatest entries. An
    image has the second term if the greatest is that of y, and if xi <= margin. Where a probability rounds to 0 or 1,
    xi is not finite and the term is left out, as in their code; there a probability below 3e-8 does already.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        lam: Weight of the robustness term.
        margin: Where the hinge ends (the paper's gamma).
        inv_temp: Inverse temperature of the softmax in xi (the paper's beta).
        deferred: There is no robustness term up to and with this epoch, counted from 0; None: it is there from the
            beginning. Their code takes the epoch of the first drop of the learning rate.
        samples: Noise draws per image and step (m).
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    lam: float = 16.0
    margin: float = 8.0
    inv_temp: float = 16.0
    deferred: int | None = None
    samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", check_nonnegative)
        self.check("margin", check_positive)
        self.check("inv_temp", check_positive)
        if self.deferred is not None:
            self.check("deferred", check_count, least=0)
        self.check("samples", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        output = noisy_logits(model, x, draws.noise(self.noise, x, self.samples))
        p = output.softmax(dim=-1).mean(dim=1).gather(1, check_range(y, output.shape[-1]).unsqueeze(1))
        loss = -(p + LEAST).log().sum()
        if self.deferred is None or batch.epoch > self.deferred:
            loss = loss + self.lam * self.shortfall(output, y)
        return loss / len(x)

    def shortfall(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the sum of sigma/2 · (margin - xi), in pixels, over the images that have one.

        Args:
            output: Logits under noise, (n, m, classes).
            y: Labels (n,).
        """
        top, labels = (self.inv_temp * output).softmax(dim=-1).mean(dim=1).topk(2, dim=1)
        with torch.no_grad():
            counted = (labels[:, 0] == y) & (gap(top) <= self.margin)  # which is no for infinity and NaN
        # Chosen before Φ⁻¹: an infinite one that is masked afterwards still has a gradient, NaN.
        return (self.margin - gap(top[counted])).sum() * self.sigma / 2


def gap(top: Tensor) -> Tensor:
    """Return Φ⁻¹(P_(1)) - Φ⁻¹(P_(2)), (n,), of the two greatest probabilities (n, 2)."""
    first, second = ndtri(top).unbind(dim=1)
    return first - second  # type: ignore[no-any-return]
