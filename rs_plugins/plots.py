"""Pictures of results. Needs matplotlib, of which no global state is touched and no window opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.results import Results
from rs_plugins.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind readers tell apart; each series has its own line style as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", "-.", ":")


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


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of ``width`` by ``height`` inches that draws to files only.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'rs-plugins[demo]'") from error
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
    tops = [float(table.radius.max()) for table in certified.values() if table.radius is not None and len(table)]
    largest = max(tops, default=1.0)
    radii: Floats = np.linspace(0, largest * 1.05 or 1.0, 400, dtype=np.float64)
    for (name, table), colour, style in zip(certified.items(), COLOURS, STYLES, strict=False):
        axes.plot(
            radii, 100 * table.certified_accuracy(radii), style, color=colour, linewidth=2.2, label=f"{name}: certified"
        )
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
    axes.set(xlabel="size of the change: l2 norm, pixels in [0, 1]", ylabel="accuracy (%)")
    axes.set(ylim=(0, 101), xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
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
