"""SmoothAdv: attacks on a smoothed classifier (Salman et al. 2019)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from rs_plugins.core.attacks.ddn import ddn
from rs_plugins.core.attacks.norms import L2, Norm
from rs_plugins.core.attacks.pgd import Rule, pgd
from rs_plugins.core.attacks.stein import Stein, stein_for
from rs_plugins.core.certification import majority
from rs_plugins.core.checks import check_count, check_flag, check_images, check_labels, check_probability, check_seed
from rs_plugins.core.confidence import majority_p_value
from rs_plugins.core.models import check_logits
from rs_plugins.core.noise import Family, GaussianNoise, Noise, make_noise
from rs_plugins.core.objectives import (
    Logits,
    Look,
    Objective,
    ObjectiveName,
    count_votes,
    noisy_logits,
    objective_named,
    over_images,
)
from rs_plugins.core.smoothing import NoiseMode, check_noise_mode, shared_draws
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.errors import InputError

GradientName = Literal["backprop", "stein", "centred-stein"]
Watch = Callable[[int, Tensor, Tensor, Tensor], None]

CONFIRMING = 100  # draws, which no step has seen, that vote on whether the smoothed classifier is fooled
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


def level_of_each(votes: int, total: float | None, name: str) -> float | None:
    """Return how probable a mistake each of ``votes`` votes of `CONFIRMING` draws may be; None if ``total`` is.

    Args:
        votes: How many there are on one image, at most.
        total: How probable a mistake may be in any of them.
        name: What messages call ``total``.

    Raises:
        InputError: If ``total`` is outside (0, 1), or so small that not even draws that all agree would be enough.
    """
    if total is None:
        return None
    level, surest = check_probability(total, name) / votes, majority_p_value(CONFIRMING, 0)
    if level < surest:
        raise InputError(
            f"{name}: expected at least {votes * surest:.3g}, the surest that {votes} votes of {CONFIRMING} draws can "
            f"be, got {total}"
        )
    return level


def fooled(votes: Tensor, y: Tensor, *, targeted: bool) -> Tensor:
    """Return whether ``votes`` (n, classes) go against labels ``y`` (n,), or to targets ``y``; never in a tie."""
    if not votes.shape[1]:  # of no images
        return torch.zeros_like(y, dtype=torch.bool)
    column = y.long().unsqueeze(1)
    mine = votes.gather(1, column).squeeze(1)
    others = votes.scatter(1, column, -1).amax(dim=1)
    return mine > others if targeted else others > mine


def objective_with(gradient: str, name: str, noise: Noise) -> Objective:
    """Return the objective of that ``name`` with that kind of ``gradient`` under ``noise``.

    Raises:
        InputError: If there is none.
    """
    if gradient not in get_args(GradientName):
        raise InputError(f"gradient: expected one of {', '.join(map(repr, get_args(GradientName)))}, got {gradient!r}")
    objective = objective_named(name)
    if gradient == "backprop":
        return objective
    estimator = stein_for(noise, centred=gradient == "centred-stein")
    if objective.name != estimator.name:
        raise InputError(f"objective: expected {estimator.name!r} with gradient={gradient!r}, got {name!r}")
    return estimator


@dataclass
class NoisyLoss:
    """The loss of images under noise as an attack sees it, step by step; the draws are the same for all images.

    Attributes:
        logits: The base classifier, (k, *input) in pixels to (k, classes).
        noise: What the draws are drawn from.
        objective: The loss.
        samples: Draws per step.
        mode: ``"fixed"``: the same draws at each step; ``"fresh"``: new ones.
        antithetic: Whether half of the draws are the other half's negatives.
        seed: Seed of the draws.
        chunk: At most this many noisy images per forward pass.
    """

    logits: Logits
    noise: Noise
    objective: Objective
    samples: int
    mode: NoiseMode
    antithetic: bool
    seed: int
    chunk: int | None = None
    _checked: bool = field(default=False, init=False)

    @classmethod
    def checked(
        cls,
        logits: Logits,
        sigma: float,
        samples: int,
        mode: str,
        antithetic: bool,
        family: Family,
        objective: str,
        gradient: str,
        seed: int,
        chunk: int | None,
    ) -> "NoisyLoss":
        """Return the loss from settings as attacks take them.

        Raises:
            InputError: If one of them has an impossible value.
        """
        noise = make_noise(family, sigma)
        goal = objective_with(gradient, objective, noise)
        samples = check_count(samples, "samples", least=2 if isinstance(goal, Stein) else 1)
        antithetic = check_flag(antithetic, "antithetic")
        return cls(logits, noise, goal, samples, check_noise_mode(mode), antithetic, seed, chunk)

    def look(self, x: Tensor, y: Tensor, number: int) -> Look:
        """Return loss, gradient and votes at ``x`` (n, *input), labels ``y`` (n,), by the draws of step ``number``."""
        draws = self._draws(x, "attack", number if self.mode == "fresh" else 0)
        return self.objective.look(self._classifying(y), x, y, draws, chunk=self.chunk)

    def judge(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss (n,) at ``x`` (n, *input) with labels ``y`` (n,) under draws that belong to no step."""
        return self.objective.loss(self._classifying(y), x, y, self._draws(x, "judge", 0), chunk=self.chunk)

    def settled(
        self, x: Tensor, y: Tensor, number: int, votes: Tensor, level: float | None, *, targeted: bool
    ) -> Tensor:
        """Return whether ``x`` (n, *input) is classified as an attack wants it, (n,): a hasty answer, then a sure one.

        Args:
            x: The images at step ``number``, (n, *input).
            y: Labels to get away from, or targets, (n,).
            number: The step.
            votes: What the draws of this step say, (n, classes); where they say no, that is the answer.
            level: Where they say yes, that of `confirm`; None: they decide alone.
            targeted: Whether ``y`` are targets.
        """
        seems = fooled(votes, y, targeted=targeted)
        if level is None or not len(x):
            return seems
        sure, rivals = torch.zeros_like(seems), votes.scatter(1, y.unsqueeze(1), -1).argmax(dim=1)
        sure[seems] = self.confirm(x[seems], y[seems], rivals[seems], number, level, targeted=targeted)
        return sure

    def confirm(self, x: Tensor, y: Tensor, rivals: Tensor, number: int, level: float, *, targeted: bool) -> Tensor:
        """Return whether `CONFIRMING` draws say that ``x`` (n, *input) is classified as an attack wants it, (n,).

        Where it is not, they say so with probability at most ``level``: no step has seen these draws. A label is lost
        as soon as one class beats it: so it is put to the vote against one, of ``rivals`` (n,), chosen before, by the
        test of PREDICT (Cohen et al. 2019). A target has to beat all others.
        """
        if not len(x):
            return torch.zeros_like(y, dtype=torch.bool)
        draws = shared_draws(self.noise, CONFIRMING, x, stream(self.seed, "confirm", number, device=x.device))
        classify = self._classifying(y)

        def count(xs: Tensor, _: Tensor, parts: Sequence[Tensor]) -> Tensor:
            return reduce(torch.add, (count_votes(noisy_logits(classify, xs, part)) for part in parts))

        votes = over_images(count, x, y, draws, self.chunk)
        if not targeted:
            votes, y = votes.gather(1, torch.stack([y, rivals], dim=1)), torch.ones_like(y)
        return torch.from_numpy(majority(votes.cpu().numpy(), level)).to(y.device) == y

    def _draws(self, x: Tensor, purpose: str, number: int) -> Tensor:
        source = stream(self.seed, purpose, number, device=x.device)
        if not self.antithetic or self.samples == 1:
            return shared_draws(self.noise, self.samples, x, source)
        half = shared_draws(self.noise, (self.samples + 1) // 2, x, source)
        return torch.cat([half, -half])[: self.samples]

    def _classifying(self, y: Tensor) -> Logits:
        """Return the base classifier, which checks that its classes have the labels ``y``."""

        def classify(noisy: Tensor) -> Tensor:
            output = check_logits(self.logits(noisy), len(noisy))
            if not self._checked:
                check_labels(y, n=len(y), classes=output.shape[1])
                self._checked = True
            return output

        return classify
