"""Certificates: what was proved about each image, and with what."""

import platform
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rs_plugins
from rs_plugins.core.black_box import Predict, as_base_classifier
from rs_plugins.core.checks import check_images, check_indices, check_probability
from rs_plugins.core.confidence import majority_p_value
from rs_plugins.core.decisions import warn_invalid
from rs_plugins.core.identity import identity, numerics
from rs_plugins.core.models import Unchanged, UnseenModule, without_addresses
from rs_plugins.core.noise import Family, GaussianNoise
from rs_plugins.core.perturbing import check_on_grid
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.protocol import ABSTAIN, Case, Plan, Verdict
from rs_plugins.core.plans.supervision import check_noise_of, check_plan, check_verdict, supervised
from rs_plugins.core.procedures import Counts, Procedure, Turn
from rs_plugins.core.streams import stream
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class Provenance:
    """With what a certificate was made; equal for all certificates of one run.

    Attributes:
        family: Name of the noise family.
        norm: Norm of the certified ball.
        sigma: Standard deviation of the noise, in pixels.
        noise: The noise with its settings.
        plan: The plan with its settings.
        alpha: Failure probability of each certificate.
        bound: Name of the confidence bound.
        seed: Seed of the noise streams.
        dtype: Floating-point type of the model that voted and of its input.
        device: Device type that computed it; CPU and GPU draw different noise from one seed.
        execution: How the model was run: "eager" or "compiled", and "channels last" where it was so.
        numerics: The hardware and the settings of torch that rounding depends on (`rs_plugins.core.identity.numerics`).
        model: SHA-256 of the model when the first vote was asked for (`rs_plugins.core.identity.identity`); of a black
            box no more than the name is known, and stands before it.
        versions: Versions of rs-plugins, torch, numpy and python.
    """

    family: str
    norm: str
    sigma: float
    noise: str
    plan: str
    alpha: float
    bound: str
    seed: int
    dtype: str
    device: str
    execution: str
    numerics: str
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
        runner_up: Upper bound on the probability of every other class; None where 1 - ``p_lower`` serves as one.
        draw: The uniform draw of a randomised bound; None for other bounds.
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
    runner_up: float | None
    draw: float | None
    invalid: int
    seconds: float
    made_with: Provenance

    @property
    def abstained(self) -> bool:
        """Whether nothing could be certified."""
        return self.prediction == ABSTAIN


class Certificates(Iterator[Certificate]):
    """The certificates of one run, each computed when it is asked for.

    Attributes:
        classes: How many classes the model tells apart.
    """

    def __init__(
        self,
        poll: Poll,
        plan: Plan,
        watch: Callable[[Certificate], bool | None] | None,
        progress: bool,
        ahead: int = 0,
    ) -> None:
        self._poll, self._plan, self._watch, self._progress = poll, plan, watch, progress
        self._certificates, self.classes = _certificates(poll, plan, watch, progress, ahead), poll.classes

    @property
    def made_with(self) -> Provenance:
        """What all of them are made with, if the model stays as it is until the first is asked for."""
        return _provenance(self._poll, self._plan)

    def go_on(self, images: Tensor, indices: Sequence[int], *, ahead: int = 0) -> "Certificates":
        """Return the certificates of further images, when all of these are taken, or none of them.

        They are those that `certify` would return, but what it measures, compiles and tries out first is taken from
        here: worth while where images come in small parts.

        Args:
            images: (n, *input), of the same shape as the first.
            indices: Position of each in its data set, (n,).
            ahead: How many images are to come after these. Where much is to come a trial of chunks pays off, which
                changes the speed alone.

        Raises:
            InputError: If images or indices cannot be.
        """
        poll = copy(self._poll)
        if not len(poll.images):
            raise InputError("images: expected a run that was begun with images, got one without")
        shape, wanted = tuple(images.shape[1:]), tuple(self._poll.images.shape[1:])
        if shape != wanted:
            raise InputError(
                f"images: expected the shape (n, {', '.join(map(str, wanted))}), got {tuple(images.shape)}"
            )
        poll.images, poll.indices = check_images(images, "images"), check_indices(indices, len(images))
        check_on_grid(poll.noise, poll.images, poll.indices)
        return Certificates(poll, self._plan, self._watch, self._progress, ahead)

    def __next__(self) -> Certificate:
        return next(self._certificates)


def certify(
    model: nn.Module | Predict,
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
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compile: bool = False,  # noqa: A002 (torch's name for it)
    watch: Callable[[Certificate], bool | None] | None = None,
    progress: bool = False,
) -> Certificates:
    """Certify the smoothed version of ``model`` at each image (Cohen et al. 2019).

    All checks are made before this function returns; the certificates are computed as the iterator is consumed, in the
    order of the images. Batches are filled with noisy copies of several images, so when one is ready, others are on
    their way.

    Args:
        model: The base classifier: a module, (n, *input) in pixels to logits (n, classes), normalisation inside; or a
            function of such a batch in NumPy to scores or labels (`BlackBox`).
        images: (n, *input), floating point, pixels in [0, 1]; read on the way, so not to be changed meanwhile.
        sigma: Standard deviation of the noise, in pixels.
        plan: How many votes to spend; `FixedBudget` with the paper's numbers by default.
        family: The noise family.
        seed: Seed of the noise streams; None takes one from the operating system.
        indices: Position of each image in its data set, (n,); 0…n-1 by default. An image's noise depends on it, so
            give the true positions when certifying a part of a data set.
        classes: The number of classes; found by running the model once if not given. A function that gives labels
            needs it.
        chunk: At most this many noisy images per forward pass; found by a short trial if not given and the work is long
            enough for one. Changes the speed, never a certificate.
        device: Only needed for a model without parameters.
        dtype: Floating-point type of a copy of the model, which is certified in its place; None for the model itself.
        channels_last: Whether to run a copy with the channels last in memory, on images (channels, height, width):
            often much faster.
        compile: Whether to run the model through torch.compile; takes a while before the first vote.
        watch: Called, while an image is sampled, with the certificate that it would get if sampling stopped now; if it
            returns True, it stops. For plans that can stop at any look: `Anytime`, `OnGrid`, `AtRadius`.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits (1, classes) without NaN on the first image, what it says of a
            noisy copy depends on the batch, or it cannot be copied or compiled as asked; later, if its weights are
            changed before the last certificate is taken.
        PluginError: Later, if a plan or a noise family of somebody else's raises anything that is not ours.
        MissingDependencyError: If ``compile`` needs a C++ compiler that is not there.
    """
    plan = FixedBudget() if plan is None else check_plan(plan)
    classifier = as_base_classifier(model, classes)
    if isinstance(classifier, UnseenModule) and (dtype is not None or channels_last or compile):
        raise InputError("dtype, channels_last, compile: only for torch modules; a function is called as it is")
    poll = Poll(
        classifier,
        images,
        sigma,
        family=family,
        seed=seed,
        indices=indices,
        classes=classes,
        chunk=chunk,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        compile=compile,
    )
    check_noise_of(plan, poll.noise)
    _check_watch(watch, plan)
    return Certificates(poll, plan, watch, progress)


def _check_watch(watch: object, plan: Plan) -> None:
    if watch is not None and not callable(watch):
        raise InputError(f"watch: expected a function of a certificate, got {watch!r}")
    if watch is not None and not getattr(plan, "interim", False):
        raise InputError(f"watch: {type(plan).__name__} has no certificate before its end; use Anytime or OnGrid")


def _certificates(
    poll: Poll, plan: Plan, watch: Callable[[Certificate], bool | None] | None, progress: bool, ahead: int
) -> Iterator[Certificate]:
    made_with, weights = _provenance(poll, plan), Unchanged(poll.model)
    most = plan.most * (1 + ahead // max(1, len(poll.images)))  # an image's share of the work that is known of

    def certificate(index: int, verdict: Verdict, invalid: int, seconds: float) -> Certificate:
        return Certificate(index=index, invalid=invalid, seconds=seconds, made_with=made_with, **vars(verdict))

    def procedure(turn: Turn) -> Procedure[Verdict]:
        def report(verdict: Verdict) -> bool:
            if watch is None:
                return False
            interim = check_verdict(verdict, plan)
            return bool(watch(certificate(turn.index, interim, turn.invalid, turn.seconds)))

        source = stream(poll.seed, "randomised bound", turn.index)
        draw = 1 - float(torch.rand((), dtype=torch.float64, generator=source))  # in (0, 1]
        return supervised(plan, Case(poll.noise, draw, lambda: turn.seconds, report))

    with _Progress(plan.most, len(poll.images), shown=progress) as bar:
        for index, ballot in zip(poll.indices, poll.run(procedure, most=most), strict=True):
            weights.check()  # else the votes would be of several models, under the digits of the first
            warn_invalid(index, ballot.invalid)
            bar.advance(ballot.result)
            yield certificate(index, ballot.result, ballot.invalid, ballot.seconds)


class _Progress:
    """A bar of images, with the pace, the votes saved against the plan's most, and how many were certified."""

    def __init__(self, most: int, images: int, *, shown: bool) -> None:
        self._most, self._votes, self._certified = most, 0, 0
        self._bar = tqdm(total=images, desc="certify", unit="images", disable=not shown)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, verdict: Verdict) -> None:
        """Count one image."""
        if self._bar.disable:
            return
        self._votes += verdict.n0 + verdict.n
        self._certified += verdict.prediction != ABSTAIN
        self._bar.update()
        pace = self._votes / max(self._bar.format_dict["elapsed"], 1e-9)
        saved = 1 - self._votes / (self._most * self._bar.n)
        self._bar.set_postfix_str(f"{pace:,.0f} samples/s, {saved:.1%} saved, {self._certified} certified")


def _provenance(poll: Poll, plan: Plan) -> Provenance:
    return Provenance(
        family=poll.noise.name,
        norm=poll.noise.norm,
        sigma=poll.noise.sigma,
        noise=without_addresses(repr(poll.noise)),
        plan=without_addresses(repr(plan)),
        alpha=plan.alpha,
        bound=plan.bound,
        seed=poll.seed,
        dtype=str(poll.dtype).removeprefix("torch."),
        device=poll.device.type,
        execution=poll.runner.execution,
        numerics=numerics(poll.device),
        model=identity(poll.model),
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
