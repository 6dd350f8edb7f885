"""SmoothAdv: attacks on a smoothed classifier (Salman et al. 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rs_plugins.core.attacks.pgd import pgd_l2
from rs_plugins.core.checks import check_count, check_images, check_labels, check_seed
from rs_plugins.core.models import check_logits
from rs_plugins.core.noise import Family, GaussianNoise, make_noise
from rs_plugins.core.objectives import Logits
from rs_plugins.core.smoothing import NoiseMode, check_noise_mode, shared_draws, soft_vote_gradient
from rs_plugins.core.streams import fresh_seed, stream


def smooth_adv_pgd(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    sigma: float,
    *,
    eps: float | Tensor = 1.0,
    step: float | Tensor = 0.2,
    steps: int = 10,
    samples: int = 16,
    noise: NoiseMode = "fixed",
    family: Family = GaussianNoise,
    targeted: bool = False,
    mask: Tensor | None = None,
    seed: int | None = 0,
    chunk: int | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Perturb ``x`` so that the classifier smoothed with ``sigma`` is wrong about it: PGD on -log mean softmax.

    The caller puts the model into eval mode. The noise draws are shared by all images, so
    the result for an image does not depend on the others.

    Args:
        logits: The base classifier, (k, *input) in pixels to (k, classes).
        x: (n, *input), pixels in [0, 1].
        y: True labels (n,), or the targets if ``targeted``.
        sigma: Standard deviation of the noise, in pixels.
        eps: l2 budget in pixels, a number or one per image.
        step: Length of a step in pixels, a number or one per image.
        steps: Number of steps, >= 1.
        samples: Noise draws per step (the paper's m).
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step.
        family: The noise family.
        targeted: Whether to make the classifier say ``y`` instead of anything else.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        seed: Seed of the draws; None takes one from the operating system.
        chunk: At most this many noisy images per forward pass.
        watch: Called at each step with its number, from 0, the current images and the gradient of the loss there.

    Returns:
        The perturbed images (n, *input), detached.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model returns no usable logits, or no gradient flows through it.
    """
    check_images(x)
    check_count(samples, "samples")
    check_labels(y, n=len(x))
    check_noise_mode(noise)
    distribution = make_noise(family, sigma)
    seed = fresh_seed() if seed is None else check_seed(seed)
    sign = -1.0 if targeted else 1.0
    checked = False

    def classify(noisy: Tensor) -> Tensor:
        nonlocal checked
        output = check_logits(logits(noisy), len(noisy))
        if not checked:
            check_labels(y, n=len(x), classes=output.shape[1])
            checked = True
        return output

    def ascent(current: Tensor, number: int) -> Tensor:
        source = stream(seed, "attack", number if noise == "fresh" else 0, device=x.device)
        draws = shared_draws(distribution, samples, current, source)
        _, gradient = soft_vote_gradient(classify, current, y, draws, chunk=chunk)
        if watch is not None:
            watch(number, current, gradient)
        return sign * gradient

    with torch.no_grad():
        return pgd_l2(ascent, x, eps=eps, step=step, steps=steps, mask=mask, seed=seed)
