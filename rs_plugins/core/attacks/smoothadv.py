"""SmoothAdv: attacks on a smoothed classifier (Salman et al. 2019)."""

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from rs_plugins.core.attacks.ddn import ddn
from rs_plugins.core.attacks.noisy_loss import GradientName, NoisyLoss, level_of_each
from rs_plugins.core.attacks.norms import L2, Norm
from rs_plugins.core.attacks.pgd import Rule, pgd
from rs_plugins.core.checks import check_count, check_images, check_labels, check_seed
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.objectives import Logits, ObjectiveName
from rs_plugins.core.smoothing import NoiseMode
from rs_plugins.core.streams import fresh_seed

Watch = Callable[[int, Tensor, Tensor, Tensor], None]

# Salman et al. (2019), for PGD where our defaults differ, and for DDN.
PUBLISHED = MappingProxyType({"noise": "fixed", "antithetic": False, "rule": "projected"})
PUBLISHED_DDN = MappingProxyType({"noise": "fixed", "antithetic": False, "confirm": None})


def smooth_adv_pgd(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    sigma: float,
    *,
    norm: Norm = L2,
    eps: float | Tensor = 1.0,
    step: float | Tensor | None = None,
    steps: int = 10,
    samples: int = 16,
    noise: NoiseMode = "fresh",
    antithetic: bool = True,
    rule: Rule = "dual-averaging",
    family: Family = GaussianNoise,
    objective: ObjectiveName = "log-mean-softmax",
    gradient: GradientName = "backprop",
    targeted: bool = False,
    mask: Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    early_stop: float | None = None,
    seed: int | None = 0,
    chunk: int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Perturb ``x`` so that the classifier smoothed with ``sigma`` is wrong about it: ascent on -log mean softmax.

    The caller puts the model into eval mode. The noise draws are shared by all images, so the result for an image does
    not depend on the others. The defaults are the strongest that we know for a number of passes; those of Salman et
    al. (2019) are `PUBLISHED`.

    Args:
        logits: The base classifier, (k, *input) in pixels to (k, classes).
        x: (n, *input), pixels in [0, 1].
        y: True labels (n,), or the targets if ``targeted``.
        sigma: Standard deviation of the noise, in pixels.
        norm: The norm of the budget, `L2` or `LINF`.
        eps: Budget in pixels, a number or one per image.
        step: Length of a step in pixels, a number or one per image. None: 2·eps/steps with ``rule="projected"``, as in
            the paper; else ``eps``.
        steps: Number of steps, >= 1.
        samples: Noise draws per step (the paper's m).
        noise: ``"fresh"``: a new set of draws at each step. ``"fixed"``: one for all steps, as in the paper.
        antithetic: Whether half of the draws are the other half's negatives, so that what is odd in the noise cancels
            out of the gradient; for noise that is as likely as its negative, as Gaussian noise is.
        rule: ``"dual-averaging"`` or, as in the paper, ``"projected"``: see `rs_plugins.core.attacks.pgd.pgd`.
        family: The noise family.
        objective: ``"log-mean-softmax"``, the paper's; ``"mean-cross-entropy"`` or ``"mean-logits"``.
        gradient: ``"backprop"``, or estimated from the probabilities alone, for a model without a gradient and 2 or
            more draws of Gaussian noise: ``"stein"``, the paper's, or ``"centred-stein"``, which is less noisy.
        targeted: Whether to make the classifier say ``y`` instead of anything else.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        random_start: Whether the first run starts uniformly at random in the ball instead of at the image.
        restarts: Number of runs, the later ones from random starts; for each image the result of greatest loss
            (smallest if ``targeted``) is kept, judged by ``samples`` draws that no step has seen, or the first at
            which it stopped early.
        early_stop: Once a vote of `CONFIRMING` draws that no step has seen says that the smoothed classifier is wrong
            about an image, it stays as it is, which saves passes. This is the probability, at most, that an image
            stops by mistake, at any of its steps. None: no image stops early.
        seed: Seed of the draws and starts; None takes one from the operating system.
        chunk: At most this many noisy images per forward pass.
        watch: Called at each step with its number, from 0, which of the n images still move (k,), these images
            (k, *input) and the gradient of the loss there.

    Returns:
        The perturbed images (n, *input), detached.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model returns no usable logits, or no gradient flows through it.
    """
    check_images(x)
    y = check_labels(y, n=len(x)).to(x.device)
    seed = fresh_seed() if seed is None else check_seed(seed)
    victim = NoisyLoss.checked(logits, sigma, samples, noise, antithetic, family, objective, gradient, seed, chunk)
    votes = check_count(steps, "steps") * check_count(restarts, "restarts")  # at most, on one image
    level = level_of_each(votes, early_stop, "early_stop")
    sign = -1.0 if targeted else 1.0

    def view(current: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        look = victim.look(current, y[rows], number)
        if watch is not None:
            watch(number, rows, current, look.gradient)
        there = torch.zeros_like(rows, dtype=torch.bool)
        if level is not None:
            there = victim.settled(current, y[rows], number, look.votes, level, targeted=targeted)
        return there, sign * look.gradient

    def height(found: Tensor, rows: Tensor) -> Tensor:
        return sign * victim.judge(found, y[rows])

    with torch.no_grad():
        return pgd(
            view,
            x,
            norm=norm,
            eps=eps,
            step=step,
            steps=steps,
            rule=rule,
            mask=mask,
            random_start=random_start,
            restarts=restarts,
            height=height,
            seed=seed,
        )


def smooth_adv_ddn(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    sigma: float,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    init_norm: float | Tensor = 1.0,
    max_norm: float | Tensor | None = None,
    levels: int | None = 256,
    samples: int = 16,
    noise: NoiseMode = "fixed",
    antithetic: bool = True,
    family: Family = GaussianNoise,
    objective: ObjectiveName = "log-mean-softmax",
    gradient: GradientName = "backprop",
    targeted: bool = False,
    mask: Tensor | None = None,
    confirm: float | None = None,
    seed: int | None = 0,
    chunk: int | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Look for the smallest perturbation at which most noisy copies are misclassified: DDN on -log mean softmax.

    The caller puts the model into eval mode. The noise draws are shared by all images, so the result for an image does
    not depend on the others. `rs_plugins.core.attacks.ddn.ddn` says what was repaired, and more about the settings.
    Those of Salman et al. (2019) are `PUBLISHED_DDN`.

    Args:
        logits: The base classifier, (k, *input) in pixels to (k, classes).
        x: (n, *input), pixels in [0, 1].
        y: True labels (n,), or the targets if ``targeted``.
        sigma: Standard deviation of the noise, in pixels.
        steps: Number of steps, >= 1; there is one pass more than steps, which judges the last image.
        gamma: By which share the norm changes at each step, in (0, 1).
        init_norm: l2 norm to begin with, in pixels, > 0, a number or one per image.
        max_norm: No perturbation is longer than this, in pixels, a number or one per image; None: no such bound.
        levels: Pixels are rounded to this many levels; None: never.
        samples: Noise draws per step (the paper's m), which also vote; an odd number avoids ties.
        noise: ``"fixed"``: one set of draws for all steps, as in the paper. ``"fresh"``: a new set at each step. The
            luckiest of all steps is then kept, so that without ``confirm`` fewer of the claimed successes hold.
        antithetic: As for `smooth_adv_pgd`.
        family: The noise family.
        objective: As for `smooth_adv_pgd`.
        gradient: As for `smooth_adv_pgd`.
        targeted: Whether to make the classifier say ``y`` instead of anything else.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        confirm: An image counts as adversarial at a step only if a vote of `CONFIRMING` draws that no step has seen
            agrees with that of the step's own. This is the probability, at most, that an image is said to be
            adversarial by mistake, at any of its steps. The search then ends where the smoothed classifier is clearly
            wrong, not at its boundary. None: the step's own draws decide alone, as in the paper.
        seed: Seed of the draws; None takes one from the operating system.
        chunk: At most this many noisy images per forward pass.
        watch: As for `smooth_adv_pgd`; all images move in every step.

    Returns:
        The images (n, *input), detached; and which of them are adversarial by the vote of the draws that the attack
        used, boolean (n,), which fresh draws need not confirm unless ``confirm`` asks for it. An image for which
        nothing adversarial was seen comes back where the search for it ended, perturbed by at most ``max_norm``.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model returns no usable logits, or no gradient flows through it.
    """
    check_images(x)
    y = check_labels(y, n=len(x)).to(x.device)
    seed = fresh_seed() if seed is None else check_seed(seed)
    victim = NoisyLoss.checked(logits, sigma, samples, noise, antithetic, family, objective, gradient, seed, chunk)
    level = level_of_each(check_count(steps, "steps") + 1, confirm, "confirm")

    def view(current: Tensor, number: int) -> tuple[Tensor, Tensor]:
        _, slope, votes = victim.look(current, y, number)
        if watch is not None and number < steps:
            watch(number, torch.arange(len(current), device=current.device), current, slope)
        return victim.settled(current, y, number, votes, level, targeted=targeted), -slope if targeted else slope

    with torch.no_grad():
        return ddn(
            view,
            x,
            steps=steps,
            gamma=gamma,
            init_norm=init_norm,
            max_norm=max_norm,
            levels=levels,
            mask=mask,
            seed=seed,
        )
