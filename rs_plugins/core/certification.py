"""Certificates: plans that say how many votes an image needs, and what they prove."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rs_plugins
from rs_plugins.core.checks import check_count, check_probability
from rs_plugins.core.confidence import clopper_pearson_lower, fewest_for_half, majority_p_value
from rs_plugins.core.models import digest
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.votes import Counts, Poll, Procedure, warn_invalid
from rs_plugins.errors import InputError

ABSTAIN = -1


@dataclass(frozen=True)
class Verdict:
    """What a plan concludes from one image's votes.

    Attributes:
        prediction: The certified class, or `ABSTAIN`.
        guess: The class that the selection votes chose.
        count: Estimation votes for the guess.
        n: Estimation votes in all.
        n0: Selection votes.
        p_lower: Lower bound on the probability of the guess under noise, at confidence 1 - alpha.
    """

    prediction: int
    guess: int
    count: int
    n: int
    n0: int
    p_lower: float


class Plan(Protocol):
    """How many votes to collect for an image, and what to conclude from them."""

    bound: ClassVar[str]

    @property
    def alpha(self) -> float:
        """Failure probability of each certificate."""

    @property
    def most(self) -> int:
        """The largest number of votes that an image can need."""

    def procedure(self) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""


@dataclass(frozen=True)
class FixedBudget:
    """CERTIFY of Cohen et al. (2019): ``n0`` votes choose the class, ``n`` fresh ones bound its probability.

    Args:
        n0: Selection votes, >= 1.
        n: Estimation votes; at least log(alpha)/log(1/2), fewer cannot certify anything.
        alpha: Failure probability of each certificate, in (0, 1).

    Raises:
        InputError: If a value is outside its range.
    """

    bound: ClassVar[str] = "clopper-pearson"
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "n0", check_count(self.n0, "n0"))
        object.__setattr__(self, "n", check_count(self.n, "n"))
        object.__setattr__(self, "alpha", check_probability(self.alpha, "alpha"))
        least = fewest_for_half(self.alpha)
        if self.n < least:
            raise InputError(
                f"n: expected at least {least}, got {self.n}: with fewer votes nothing can be certified at "
                f"alpha = {self.alpha}, even if all agree"
            )

    @property
    def most(self) -> int:
        """The number of votes of each image, selection and estimation."""
        return self.n0 + self.n

    def procedure(self) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        selection = yield self.n0
        guess = int(np.argmax(selection))  # the lowest of equals
        estimation = yield self.n
        count = int(estimation[guess])
        p_lower = clopper_pearson_lower(count, self.n, self.alpha)
        prediction = guess if p_lower >= 0.5 else ABSTAIN
        return Verdict(prediction, guess, count, self.n, self.n0, p_lower)


@dataclass(frozen=True)
class Provenance:
    """With what a certificate was made; equal for all certificates of one run.

    Attributes:
        family: Name of the noise family.
        norm: Norm of the certified ball.
        sigma: Standard deviation of the noise, in pixels.
        plan: The plan with its settings.
        alpha: Failure probability of each certificate.
        bound: Name of the confidence bound.
        seed: Seed of the noise streams.
        dtype: Floating-point type of the model's input.
        device: Device type that computed it; CPU and GPU draw different noise from one seed.
        model: SHA-256 of the model when the first vote was asked for (`rs_plugins.core.models.digest`).
        versions: Versions of rs-plugins, torch, numpy and python.
    """

    family: str
    norm: str
    sigma: float
    plan: str
    alpha: float
    bound: str
    seed: int
    dtype: str
    device: str
    model: str
    versions: str


@dataclass(frozen=True)
class Certificate:
    """The certified prediction of the smoothed classifier at one image.

    With probability at least 1 - alpha over the votes: for every perturbation shorter than ``radius``, the smoothed
    classifier predicts ``prediction``.

    Attributes:
        index: Position of the image in its data set.
        prediction: The class, or -1 for abstention.
        radius: Certified radius in pixels, in the norm of the noise family; 0 for an abstention.
        p_lower: Lower bound on the probability of ``guess`` under noise.
        guess: The class that the selection votes chose.
        count: Estimation votes for ``guess``.
        n: Estimation votes in all.
        n0: Selection votes.
        invalid: Votes that gave NaN logits and were counted for no class.
        seconds: The image's share of the wall-clock time.
        made_with: Everything else that the certificate depends on.
    """

    index: int
    prediction: int
    radius: float
    p_lower: float
    guess: int
    count: int
    n: int
    n0: int
    invalid: int
    seconds: float
    made_with: Provenance

    @property
    def abstained(self) -> bool:
        """Whether nothing could be certified."""
        return self.prediction == ABSTAIN


def certify(
    model: nn.Module,
    images: Tensor,
    sigma: float,
    *,
    plan: Plan | None = None,
    family: Family = GaussianNoise,
    seed: int | None = 0,
    indices: Sequence[int] | None = None,
    classes: int | None = None,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Iterator[Certificate]:
    """Certify the smoothed version of ``model`` at each image (Cohen et al. 2019).

    All checks are made before this function returns; the certificates are computed as the iterator is consumed, in the
    order of the images, so that each can be written down before the next is begun.

    Args:
        model: The base classifier: (n, *input) in pixels to logits (n, classes), normalisation inside.
        images: (n, *input), floating point, pixels in [0, 1]; read on the way, so not to be changed meanwhile.
        sigma: Standard deviation of the noise, in pixels.
        plan: How many votes to spend; `FixedBudget` with the paper's numbers by default.
        family: The noise family.
        seed: Seed of the noise streams; None takes one from the operating system.
        indices: Position of each image in its data set, (n,); 0…n-1 by default. An image's noise depends on it, so
            give the true positions when certifying a part of a data set.
        classes: The number of classes; found by running the model once if not given.
        chunk: At most this many noisy images per forward pass. Changes the speed, never a certificate.
        device: Only needed for a model without parameters.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits (1, classes) without NaN on the first image, or what it says
            of a noisy copy depends on the batch.
    """
    plan = FixedBudget() if plan is None else _check_plan(plan)
    poll = Poll(
        model,
        images,
        sigma,
        family=family,
        seed=seed,
        indices=indices,
        classes=classes,
        chunk=chunk,
        device=device,
    )
    return _certificates(poll, plan, progress)


def _check_plan(plan: Plan) -> Plan:
    if isinstance(plan, type) or not all(hasattr(plan, name) for name in ("alpha", "bound", "most", "procedure")):
        raise InputError(f"plan: expected a plan such as FixedBudget(n=1000), got {plan!r}")
    return plan


def _certificates(poll: Poll, plan: Plan, progress: bool) -> Iterator[Certificate]:
    made_with = _provenance(poll, plan)
    total = plan.most * len(poll.images)
    with tqdm(total=total, desc="certify", unit="votes", unit_scale=True, disable=not progress) as bar:
        for index, ballot in zip(poll.indices, poll.run(plan.procedure, progress=bar), strict=True):
            warn_invalid(index, ballot.invalid)
            verdict = ballot.result
            yield Certificate(
                index=index,
                radius=0.0 if verdict.prediction == ABSTAIN else poll.noise.radius(verdict.p_lower),
                invalid=ballot.invalid,
                seconds=ballot.seconds,
                made_with=made_with,
                **vars(verdict),
            )


def _provenance(poll: Poll, plan: Plan) -> Provenance:
    return Provenance(
        family=poll.noise.name,
        norm=poll.noise.norm,
        sigma=poll.noise.sigma,
        plan=repr(plan),
        alpha=plan.alpha,
        bound=plan.bound,
        seed=poll.seed,
        dtype=str(poll.dtype).removeprefix("torch."),
        device=poll.device.type,
        model=digest(poll.model),
        versions=(
            f"rs-plugins {rs_plugins.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
            f"python {platform.python_version()}"
        ),
    )


def majority(votes: Counts, alpha: float = 0.001) -> Counts:
    """Return PREDICT's answer (Cohen et al. 2019) for each row of ``votes`` (n, classes): the class, or -1.

    It abstains unless the two-sided binomial test tells the two largest counts apart at level ``alpha``; the answer is
    the smoothed classifier's with probability at least 1 - alpha per row.

    Raises:
        InputError: If ``alpha`` is outside (0, 1).
    """
    check_probability(alpha, "alpha")
    answers = np.full(len(votes), ABSTAIN, dtype=np.int64)
    for row, counts in enumerate(votes):
        first, second = np.argsort(-counts, kind="stable")[:2]
        if majority_p_value(int(counts[first]), int(counts[second])) <= alpha:
            answers[row] = first
    return answers
