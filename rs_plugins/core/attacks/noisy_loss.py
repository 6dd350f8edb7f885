"""The loss of a smoothed classifier as an attack sees it, and votes on draws that the attack has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from rs_plugins.core.attacks.stein import Stein, stein_for
from rs_plugins.core.certification import majority
from rs_plugins.core.checks import check_count, check_flag, check_labels, check_probability
from rs_plugins.core.confidence import majority_p_value
from rs_plugins.core.models import check_logits
from rs_plugins.core.noise import Family, Noise, make_noise
from rs_plugins.core.objectives import (
    Logits,
    Look,
    Objective,
    count_votes,
    noisy_logits,
    objective_named,
    over_images,
)
from rs_plugins.core.smoothing import NoiseMode, check_noise_mode, shared_draws
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError

GradientName = Literal["backprop", "stein", "centred-stein"]

CONFIRMING = 100  # draws, which no step has seen, that vote on whether the smoothed classifier is fooled


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
