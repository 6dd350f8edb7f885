"""Pictures of results. Needs matplotlib, of which no global state is touched and no window opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.results.comparison import Curve
from rs_plugins.core.results.logged_plan import LoggedPlan
from rs_plugins.core.results.table import Results
from rs_plugins.errors import MissingDependencyError, ResultsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from rs_plugins.core.training.folder import Epoch

Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind readers tell apart; each series has its own line style as well. Seven and
# four have no common divisor, so that all 28 pairs come before one comes again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h")
MANY = 6  # more curves than this have markers too


@dataclass(frozen=True)
class Specimen:
    """One image of the gallery.

    Attributes:
        clean: The image, (height, width).
        noisy: A noisy copy, as the network sees it.
        attacked: The image after an attack.
        caption: What became of it.
    """

    clean: Floats
    noisy: Floats
    attacked: Floats
    caption: str


@dataclass(frozen=True)
class AttackedImage:
    """One image before and after an attack.

    Attributes:
        clean: The image, (channels, height, width), of 1 or 3 channels.
        attacked: The same after the attack.
        label: Its true class.
        before: What is predicted before, -1 for an abstention.
        after: What is predicted after.
        l2: l2 norm of the perturbation, in pixels.
    """

    clean: npt.NDArray[np.float32]
    attacked: npt.NDArray[np.float32]
    label: int
    before: int
    after: int
    l2: float


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of ``width`` by ``height`` inches that draws to files only.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'rs-plugins[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def draw_certified_accuracy(
    axes: "Axes",
    certified: Mapping[str, Results],
    attacked: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> None:
    """Draw certified accuracy against radius as lines, accuracy under attack as points.

    What a classifier really withstands lies between its line, which no attack can get below, and its points, which say
    how far one attack got; between two points no attack is known that does better than the one before.

    Args:
        axes: Where to draw.
        certified: Certification logs by name; the first one's colour is that of the first of ``attacked``.
        attacked: Attack budgets in pixels and the accuracies under them, by name.
    """
    draw_steps(axes, {f"{name}: certified": table for name, table in certified.items()})
    for (name, (budgets, accuracies)), colour, marker in zip(
        (attacked or {}).items(), (COLOURS[0], *COLOURS[len(certified) :]), "osD^", strict=False
    ):
        percent = 100 * np.asarray(accuracies)
        axes.plot(
            *(budgets, percent, marker + ":"),
            drawstyle="steps-post",
            color=colour,
            markersize=5,
            linewidth=1,
            label=name,
        )
    dress(axes, "size of the change: l2 norm, pixels in [0, 1]", "accuracy (%)")
    if certified and attacked:
        (budgets, accuracies), proved = next(iter(attacked.values())), next(iter(certified.values()))
        grid: Floats = np.linspace(min(budgets), max(budgets), 400, dtype=np.float64)
        floor = 100 * proved.certified_accuracy(grid)
        ceiling = 100 * np.asarray(accuracies)[np.searchsorted(budgets, grid, side="right") - 1]
        label = "between proof and attack"
        axes.fill_between(
            grid, floor, np.maximum(floor, ceiling), color=COLOURS[0], alpha=0.1, linewidth=0, label=label
        )
    axes.legend(fontsize=8.5, loc="best", framealpha=0.9)


def draw_steps(
    axes: "Axes", logs: Mapping[str, Results | Curve], plans: Mapping[str, LoggedPlan | None] | None = None
) -> None:
    """Draw certified accuracy against radius, one line of steps for each of ``logs``, which have radii.

    Of a log of one of ``plans`` with radii of its own nothing is known but at these: they are marked, the line is thin
    and ends at the last.
    """
    own = {name: plan.radii if (plan := (plans or {}).get(name)) else () for name in logs}
    lines = {name: _steps(log, own[name]) for name, log in logs.items()}
    end = 1.05 * max((float(radii[-1]) for radii, _ in lines.values()), default=0.0) or 1.0
    for place, (name, (x, y)) in enumerate(lines.items()):
        if not own[name]:
            x, y = np.append(x, end), np.append(y, y[-1] if isinstance(logs[name], Curve) else 0.0)
        look: dict[str, Any] = {"linewidth": 1 if own[name] else 2, "markersize": 5}
        if own[name] or len(lines) > MANY:
            look["marker"] = MARKERS[place % len(MARKERS)]
            # at the plan's radii, or else a few along the line, each curve's at other places
            look["markevery"] = np.isin(x, own[name]).tolist() if own[name] else (place / len(lines) / 10, 0.1)
        label = f"{name} (known at the markers)" if own[name] else name
        colour, style = COLOURS[place % len(COLOURS)], STYLES[place % len(STYLES)]
        axes.plot(x, 100 * y, style, drawstyle="steps-pre", color=colour, label=label, **look)


def _steps(log: Results | Curve, own: Sequence[float]) -> tuple[Floats, Floats]:
    """Return radii, 0 first, and the accuracy that holds up to each from the one before."""
    if isinstance(log, Curve):
        return log.radii, log.accuracy
    radii: Floats = np.unique(np.append(own or log.radii[log.correct], 0.0))
    if own:
        return radii, log.certified_accuracy(radii)
    return radii, log.certified_accuracy(radii, parity=True)


def dress(axes: "Axes", xlabel: str, ylabel: str) -> None:
    """Label the axes of a picture of accuracies in percent."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set(ylim=(0, 101), xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_certified_accuracy(
    path: Path, logs: Mapping[str, Results | Curve], plans: Mapping[str, LoggedPlan | None] | None = None
) -> None:
    """Draw certified accuracy against radius of those of ``logs`` that have radii and rows into the file ``path``.

    Args:
        path: The picture.
        logs: Logs by name.
        plans: Their plans, as far as they are known; see `draw_steps`.

    Raises:
        ResultsError: If none has.
        MissingDependencyError: If matplotlib is not installed.
    """
    shown = {name: log for name, log in logs.items() if isinstance(log, Curve) or (log.radius is not None and len(log))}
    if not shown:
        raise ResultsError(f"nothing to draw: none of {', '.join(logs)} has certified radii")
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    draw_steps(axes, shown, plans)
    dress(axes, "radius, in pixels of [0, 1]", "certified accuracy (%)")
    axes.legend(fontsize=8.5 if len(shown) <= 6 else 6.5, loc="best", framealpha=0.9)
    figure.savefig(path)


def save_training_curves(path: Path, history: Sequence["Epoch"]) -> None:
    """Draw the loss and, where it is known, the accuracy of each epoch into the file ``path``.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(7, 4)
    left = figure.subplots()
    epochs = [epoch.epoch for epoch in history]
    dot: dict[str, Any] = {"marker": "o", "markersize": 3} if len(history) < MANY else {}  # a line needs two points
    lines = left.plot(epochs, [epoch.loss for epoch in history], STYLES[0], color=COLOURS[0], label="loss", **dot)
    left.set(xlabel="epoch", ylabel="loss")
    left.grid(alpha=0.25)
    left.spines["top"].set_visible(False)
    known = [epoch for epoch in history if epoch.accuracy is not None]
    if known:
        right = left.twinx()
        percent = [100 * (epoch.accuracy or 0) for epoch in known]
        label = {"noisy accuracy": "accuracy under one noise draw"}.get(known[0].figure, known[0].figure)
        lines += right.plot([epoch.epoch for epoch in known], percent, STYLES[1], color=COLOURS[1], label=label, **dot)
        right.set(ylabel="accuracy (%)", ylim=(0, 101))
        right.spines["top"].set_visible(False)
    left.legend(handles=lines, fontsize=8.5, loc="center right", framealpha=0.9)
    figure.savefig(path)


def draw_gallery(figure: "SubFigure", specimens: Sequence[Specimen]) -> None:
    """Draw one row per specimen: clean, noisy, attacked, with its caption."""
    titles = ("image", "what the network sees", "after the attack")
    grid: Any = figure.subplots(len(specimens), 3, squeeze=False)
    for row, specimen in zip(grid, specimens, strict=True):
        for axes, picture in zip(row, (specimen.clean, specimen.noisy, specimen.attacked), strict=True):
            axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[1].set_xlabel(specimen.caption, fontsize=8)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)


def save_attacked_images(path: Path, specimens: Sequence[AttackedImage]) -> None:
    """Draw one row per image into the file ``path``: clean, adversarial, and the difference, amplified around grey.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    factor = amplification(max((float(np.abs(s.attacked - s.clean).max()) for s in specimens), default=0.0))
    figure = new_figure(6, 0.4 + 2.1 * len(specimens))
    grid: Any = figure.subplots(len(specimens), 3, squeeze=False)
    for row, specimen in zip(grid, specimens, strict=True):
        difference = 0.5 + factor * (specimen.attacked - specimen.clean)
        titles = (
            f"clean, label {specimen.label} → {_named(specimen.before)}",
            f"adversarial → {_named(specimen.after)}",
            f"difference x {factor:g}, l2 {specimen.l2:.2f}",
        )
        for axes, picture, title in zip(row, (specimen.clean, specimen.attacked, difference), titles, strict=True):
            shown = picture.clip(0, 1).transpose(1, 2, 0)
            axes.imshow(shown[:, :, 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, fontsize=8)
    figure.savefig(path)


def amplification(largest: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, … by which a change of ``largest`` stays within one half; at least 1."""
    if largest <= 0:
        return 1.0
    most = 0.5 / largest * (1 + 1e-6)
    steps = [step * 10.0**power for power in range(10) for step in (1, 2, 5)]
    return max((step for step in steps if step <= most), default=1.0)


def _named(prediction: int) -> str:
    return "abstains" if prediction == -1 else str(prediction)


def save_demo_figure(
    path: Path,
    title: str,
    certified: Mapping[str, Results],
    attacked: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    specimens: Sequence[Specimen],
) -> None:
    """Write the demo's picture to ``path``: curves on the left, a gallery on the right."""
    figure = new_figure(12.5, 6.5)
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    left, right = panels
    axes = left.subplots()
    draw_certified_accuracy(axes, certified, attacked)
    axes.set_title(title, fontsize=10)
    if specimens:
        draw_gallery(right, specimens)
    figure.savefig(path)
