"""Stability training (Zheng et al. 2016; Li et al. 2019): three losses that go by that name."""

from dataclasses import dataclass

from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_labels, check_nonnegative
from rs_plugins.core.models import check_logits
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.losses import cross_entropy_between, kl, mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method


@dataclass(frozen=True, kw_only=True)
class Stability(Method):
    """CE(f(x), y) - lam · Σ_c F_c(x) log F_c(x + e), as in the baseline of Jeong et al. (2021) after Li et al. (2019).

    The clean image has the label, the noisy copy is to say what the clean one says. The gradient flows through both,
    also through the soft target F(x). There are two forward passes, so batch normalisation sees both distributions.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        lam: Weight of the second term.
        samples: Noise draws per image and step (m), over which the second term is averaged; 1 in the paper.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    lam: float = 2.0
    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", check_nonnegative)
        self.check("samples", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        e = draws.noise(self.noise, x, self.samples)
        clean = check_logits(model(x), len(x))
        log_noisy = noisy_logits(model, x, e).log_softmax(dim=-1)
        log_clean = clean.to(log_noisy.dtype).log_softmax(dim=-1)
        agreement = cross_entropy_between(log_clean.unsqueeze(1), log_noisy).mean()
        return mean_cross_entropy(clean.to(log_noisy.dtype).unsqueeze(1), y) + self.lam * agreement


@dataclass(frozen=True, kw_only=True)
class _OfTwoCopies(Method):
    """The two losses that compare two noisy copies; these go through the model in one pass."""

    lam: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", check_nonnegative)

    def _two(self, model: nn.Module, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(x + e_1) and f(x + e_2), (n, 2, classes), the mean of KL(F(x + e_1) ‖ F(x + e_2)), the labels."""
        y = check_labels(batch.y, n=len(batch.x)).long()
        output = noisy_logits(model, batch.x, draws.noise(self.noise, batch.x, 2))
        log_f = output.log_softmax(dim=-1)
        return output, kl(log_f[:, 0], log_f[:, 1]).mean(), y


@dataclass(frozen=True, kw_only=True)
class StabilityRs4a(_OfTwoCopies):
    """CE(f(x + e_1), y) + lam · KL(F(x + e_1) ‖ F(x + e_2)), the stability training of Yang et al. (2020).

    Their code takes the copies through the model one after the other; here both share one pass.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        lam: Weight of the second term.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    lam: float = 6.0

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        output, difference, y = self._two(model, batch, draws)
        return mean_cross_entropy(output[:, :1], y) + self.lam * difference


@dataclass(frozen=True, kw_only=True)
class StabilityConfSeq(_OfTwoCopies):
    """-log F_y(x + e_1) - log F_y(x + e_2) + lam · KL(F(x + e_1) ‖ F(x + e_2)), that of Voracek (2024).

    Args:
        sigma: Standard deviation of the noise, in pixels.
        lam: Weight of the last term.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    lam: float = 12.0

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        output, difference, y = self._two(model, batch, draws)
        return 2 * mean_cross_entropy(output, y) + self.lam * difference
