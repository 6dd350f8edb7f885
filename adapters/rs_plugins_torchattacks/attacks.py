"""Attacks on smoothed classifiers for torchattacks."""

from torch import Tensor, nn

from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.checks import check_count
from rs_plugins.core.smoothing import NoiseMode, SmoothedModel
from rs_plugins_torchattacks.base import SmoothedAttack


class SmoothAdvPGD(SmoothedAttack):
    """SmoothAdv by PGD in the l2 ball (Salman et al. 2019).

    Climbs -log((1/m) Σ_i softmax(f(x + δ + e_i))_y), the loss of the smoothed classifier: the log is outside the mean.
    EOTPGD of torchattacks averages cross-entropies instead, which attacks the noisy base classifier.

    All settings are read at each call, so ``eps`` and others may be assigned between calls. Differences from `PGDRSL2`
    of torchattacks: private noise, so that results can be repeated and do not depend on how images are batched; noisy
    images are never clipped; an image without gradient moves in a random direction.

    Args:
        model: (n, *input) to logits (n, classes), or a `SmoothedModel`, which brings its own sigma and noise family.
        eps: l2 budget in pixels, a number or a tensor of one per image, (n,) or (n, 1, …, 1).
        alpha: Length of a step in pixels, a number or a tensor of one per image.
        steps: Number of steps, >= 1.
        sigma: Standard deviation of the noise, in pixels. None: that of a `SmoothedModel`, 0.25 for any other model.
        samples: Noise draws per step (the paper's m), shared by all images.
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step.
        chunk: At most this many noisy images per forward pass; chosen by device and size if not given.
        seed: Seed of the draws and of random targets; with None, each call takes one from the operating system.

    Raises:
        InputError: If an argument has an impossible value, or ``sigma`` is not that of the `SmoothedModel`.

    Examples:
        >>> attack = torchattacks.SmoothAdvPGD(model, eps=0.5, alpha=0.1, sigma=0.25)
        >>> adversarial = attack(images, labels)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float | Tensor = 1.0,
        alpha: float | Tensor = 0.2,
        steps: int = 10,
        *,
        sigma: float | None = None,
        samples: int = 16,
        noise: NoiseMode = "fixed",
        chunk: int | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__("SmoothAdvPGD", model, sigma=sigma, samples=samples, noise=noise, chunk=chunk, seed=seed)
        self.eps = eps
        self.alpha = alpha
        self.steps = check_count(steps, "steps")

    def perturb(self, victim: SmoothedModel, images: Tensor, labels: Tensor) -> Tensor:
        """Return the perturbed ``images`` (n, *input), exactly in [0, 1], within ``eps`` up to rounding."""
        return smooth_adv_pgd(
            victim.base,
            images,
            labels,
            victim.sigma,
            eps=self.eps,
            step=self.alpha,
            steps=self.steps,
            samples=victim.samples,
            noise=victim.noise,
            family=victim.family,
            targeted=self.targeted,
            seed=victim.seed,
            chunk=victim.chunk,
        )
