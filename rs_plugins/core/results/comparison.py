"""The figures that papers give, of several logs side by side, and the best of them at each radius."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rs_plugins.core.results.files import bytes_of, parse_number, parse_results, text_of
from rs_plugins.core.results.logged_noise import LoggedNoise, read_noise, unlike
from rs_plugins.core.results.logged_plan import LoggedPlan, read_plan
from rs_plugins.core.results.merging import warn_unfinished
from rs_plugins.core.results.table import Floats, Results, as_logged
from rs_plugins.errors import InputError, ResultsError

STEP = 0.25  # of the radii in published tables
MOST_RADII = 20


@dataclass(frozen=True, eq=False)
class Curve:
    """Certified accuracy at radii as some codes publish it, without the log that it was computed from.

    Attributes:
        radii: Radii in pixels, increasing, (k,).
        accuracy: Certified accuracy at each, (k,).
    """

    radii: Floats
    accuracy: Floats

    def certified_accuracy(self, radii: Sequence[float] | Floats) -> Floats:
        """Return the accuracy at the first radius of the curve that is not below r, for each r of ``radii``.

        Beyond the curve it is NaN.
        """
        places = np.searchsorted(list(map(as_logged, self.radii.tolist())), list(map(as_logged, radii)))
        return np.append(self.accuracy, math.nan)[places]


@dataclass(frozen=True)
class At:
    """Certified accuracy of one log at one radius.

    Attributes:
        radius: The radius in pixels.
        accuracy: Share of all rows that are correct with at least this radius; NaN where the log cannot say.
        interval: Ends of its Clopper-Pearson interval over the images; None where the log cannot say.
        lower: What exact certificates would show at least (`Results.certified_accuracy_lower`); None if unknown.
    """

    radius: float
    accuracy: float
    interval: tuple[float, float] | None = None
    lower: float | None = None


@dataclass(frozen=True)
class Figures:
    """The figures of one log. None stands for what it does not say.

    Attributes:
        name: What tables call it.
        images: Number of rows.
        clean: Share of rows that are correct, whatever their radius. A plan that does not look at 0 does not say.
        abstention: Share of rows that abstain.
        acr: Average certified radius in pixels; of a plan with several radii of its own, rounded down to these. A plan
            with a single one does not say.
        acr_interval: Ends of its bootstrap interval over the images.
        samples: Mean votes an image.
        seconds: Time of all images.
        sigma: Standard deviation of the noise, in pixels.
        certified: Certified accuracy at each radius of the report; empty for a log of predictions.
        plan: How the votes were spent.
        noise: The noise family, and the norm of the radii.
    """

    name: str
    images: int | None = None
    clean: float | None = None
    abstention: float | None = None
    acr: float | None = None
    acr_interval: tuple[float, float] | None = None
    samples: float | None = None
    seconds: float | None = None
    sigma: float | None = None
    certified: tuple[At, ...] = ()
    plan: LoggedPlan | None = None
    noise: LoggedNoise | None = None


@dataclass(frozen=True)
class Best:
    """The log with the highest certified accuracy at a radius; of equals the one with the highest clean accuracy."""

    radius: float
    accuracy: float
    name: str


def read_logs(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Results | Curve]:
    """Read logs, prediction logs and curves, by the names of their files without ``.tsv``, or by path where not unique.

    Raises:
        ResultsError: If one is none of these.
        InputError: If one is given twice.
    """
    return {name: read_log(path) for name, path in zip(log_names(paths), paths, strict=True)}


def read_plans(paths: Sequence[str | os.PathLike[str]]) -> dict[str, LoggedPlan | None]:
    """Read the plans of logs from their records, by the same names as `read_logs`; None where there is none.

    Raises:
        InputError: If a log is given twice.
    """
    return {name: read_plan(path) for name, path in zip(log_names(paths), paths, strict=True)}


def read_noises(paths: Sequence[str | os.PathLike[str]]) -> dict[str, LoggedNoise | None]:
    """Read the noise of logs from their records, by the same names as `read_logs`; None where there is none.

    Raises:
        InputError: If a log is given twice.
    """
    return {name: read_noise(path) for name, path in zip(log_names(paths), paths, strict=True)}


def log_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return what tables call logs: the names of their files without ``.tsv``, or the paths where these are not unique.

    Raises:
        InputError: If one is given twice.
    """
    short = [Path(path).name.removesuffix(".tsv") for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"logs: expected each once, got {twice[0]} twice")
    return names


def read_log(path: str | os.PathLike[str]) -> Results | Curve:
    """Read a log, a prediction log, or a curve: lines of radius and accuracy without a header.

    Where the record beside a log names more images than it holds there is a `ResultsWarning`.

    Raises:
        ResultsError: If it is none of these.
    """
    data = bytes_of(path)
    text = text_of(data, path)
    if _numbers(text.partition("\n")[0]) is not None:
        return _read_curve(text, path)
    results = parse_results(data, path)
    warn_unfinished(Path(path), results)
    return results


def _read_curve(text: str, path: str | os.PathLike[str]) -> Curve:
    lines = text.removesuffix("\n").split("\n")
    rows = [_numbers(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if row is None or not (0 <= row[0] < math.inf and 0 <= row[1] <= 1):
            raise ResultsError(
                f"{path}, line {number}: expected a radius and an accuracy, got {lines[number - 1]!r:.80}"
            )
    radii, accuracy = np.array(rows, dtype=np.float64).T
    if (np.diff(radii) <= 0).any():
        raise ResultsError(f"{path}: expected increasing radii")
    return Curve(radii, accuracy)


def _numbers(line: str) -> tuple[float, float] | None:
    try:
        radius, accuracy = map(parse_number, line.split("\t"))
    except ValueError:
        return None
    return radius, accuracy


def default_radii(
    logs: Mapping[str, Results | Curve], plans: Mapping[str, LoggedPlan | None] | None = None
) -> list[float]:
    """Return multiples of 0.25 up to the first at which no log certifies anything, as published tables have them.

    Where that would be more than 20 radii the step is doubled, where it would be one it is halved, until it fits. The
    radii of ``plans`` that have their own are added if there is room, and are all where each log is of such a plan.
    """
    known = [plan.radii if (plan := (plans or {}).get(name)) else () for name in logs]
    own = sorted({radius for radii in known for radius in radii})
    grid = own if own and all(known) else _multiples(logs)
    both = sorted({*own, *grid})
    return both if len(both) <= MOST_RADII else _multiples(logs)


def _multiples(logs: Mapping[str, Results | Curve]) -> list[float]:
    largest = max((_largest_radius(log) for log in logs.values()), default=0.0)
    step = STEP
    while 0 < largest < step:
        step /= 2
    while largest / step >= MOST_RADII - 1:
        step *= 2
    return [step * place for place in range(math.floor(largest / step) + 2)]


def _largest_radius(log: Results | Curve) -> float:
    """Return the largest radius at which the log certifies an image, 0 if there is none."""
    if isinstance(log, Curve):
        return float(log.radii[log.accuracy > 0].max(initial=0.0))
    return 0.0 if log.radius is None else float((log.radius * log.correct).max(initial=0.0))


def figures(
    name: str,
    log: Results | Curve,
    radii: Sequence[float],
    *,
    confidence: float = 0.95,
    alpha: float | None = None,
    parity: bool = False,
    plan: LoggedPlan | None = None,
    noise: LoggedNoise | None = None,
) -> Figures:
    """Return the figures of one log.

    Args:
        name: What tables call it.
        log: A certification log, a prediction log or a curve.
        radii: Radii in pixels.
        confidence: Of the intervals over the images.
        alpha: Failure probability of each certificate, for a log that does not say.
        parity: Compare radii, and bound the accuracy, as the published codes did (`Results.certified_accuracy_lower`).
        plan: How the votes were spent, if that is known. One with radii of its own leaves some figures unknown.
        noise: The noise family and the norm of the radii, if they are known.

    Raises:
        InputError: If ``confidence`` or ``alpha`` is outside (0, 1).
    """
    if isinstance(log, Curve):
        accuracy = log.certified_accuracy(radii).tolist()
        at = tuple(At(r, share) for r, share in zip(radii, accuracy, strict=True))
        return Figures(name, clean=float(log.accuracy[0]) if log.radii[0] == 0 else None, certified=at)
    if not len(log):
        return Figures(name, images=0, seconds=0.0, sigma=log.sigma, plan=plan, noise=noise)
    common = Figures(
        *(name, len(log), log.accuracy if plan is None or plan.clean else None, log.abstention),
        samples=None if log.samples is None else float(log.samples.mean()),
        seconds=float(log.seconds.sum()),
        sigma=log.sigma,
        plan=plan,
        noise=noise,
    )
    if log.radius is None:
        return common
    own = () if plan is None else plan.radii
    at = _certified(log, radii, confidence, log.alpha if log.alpha is not None else alpha, parity)
    beyond = [bool(own) and as_logged(one.radius) > as_logged(own[-1]) for one in at]
    certified = tuple(At(one.radius, math.nan) if unknown else one for one, unknown in zip(at, beyond, strict=True))
    if len(own) == 1:
        return replace(common, certified=certified)
    return replace(
        common,
        acr=log.average_certified_radius,
        acr_interval=log.average_certified_radius_interval(confidence=confidence),
        certified=certified,
    )


def _certified(
    log: Results, radii: Sequence[float], confidence: float, alpha: float | None, parity: bool
) -> tuple[At, ...]:
    accuracy = log.certified_accuracy(radii, parity=parity).tolist()
    low, high = (ends.tolist() for ends in log.certified_accuracy_interval(radii, confidence=confidence, parity=parity))
    lower: list[float | None] = [None] * len(accuracy)
    if alpha is not None:
        bounds = log.certified_accuracy_lower(radii, alpha=alpha, parity=parity)
        lower = [max(0.0, bound) for bound in bounds.tolist()]
    return tuple(
        At(r, share, ends, bound)
        for r, share, ends, bound in zip(radii, accuracy, zip(low, high, strict=True), lower, strict=True)
    )


def envelope(rows: Sequence[Figures]) -> list[Best]:
    """Return the best log at each radius, among those that have certified accuracy there."""
    able = [row for row in rows if row.certified]
    best = []
    for place, at in enumerate(able[0].certified if able else ()):
        there = [row for row in able if not math.isnan(row.certified[place].accuracy)]
        if there:
            row = max(there, key=lambda row: (row.certified[place].accuracy, row.clean or 0.0))
            best.append(Best(at.radius, row.certified[place].accuracy, row.name))
    return best


def incomparable(
    logs: Mapping[str, Results | Curve], noises: Mapping[str, LoggedNoise | None] | None = None
) -> str | None:
    """Return why no log can be called better than another; None if radii are of the same images and in one norm."""
    if curves := [name for name, log in logs.items() if isinstance(log, Curve)]:
        return f"{curves[0]} is a curve, which does not say of which images it is"
    able = {name: log for name, log in logs.items() if isinstance(log, Results) and len(log) and log.radius is not None}
    names = list(able)
    if (reason := unlike(noises or {}, names)) is not None:
        return reason
    for name in names[1:]:
        one, other = able[names[0]], able[name]
        if not (np.array_equal(one.idx, other.idx) and np.array_equal(one.label, other.label)):
            return f"{names[0]} and {name} are not of the same images"
    return None


def differing(logs: Mapping[str, Results | Curve]) -> list[str]:
    """Return which settings, other than the noise family and the plan, the certificates of ``logs`` differ in."""
    able = {name: log for name, log in logs.items() if isinstance(log, Results) and len(log) and log.radius is not None}
    named = {
        "noise levels": {name: log.sigma for name, log in able.items()},
        "failure probabilities alpha": {name: log.alpha for name, log in able.items()},
    }
    found = []
    for what, values in named.items():
        known = {name: value for name, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            told = ", ".join(f"{value:g} ({name})" for name, value in known.items())
            found.append(f"The logs have different {what}: {told}. What differs between them may be due to that alone.")
    return found
