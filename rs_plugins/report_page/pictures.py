"""The pictures of a report: certified accuracy with confidence bands, and how the radii are distributed."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.results.comparison import Curve
from rs_plugins.core.results.logged_plan import LoggedPlan
from rs_plugins.core.results.table import Results
from rs_plugins.plots import COLOURS, draw_steps, dress, new_figure
from rs_plugins.report_page.content import Content, certified, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Draw = Callable[[Content, float], "Figure | None"]

WIDE, NARROW = 7.4, 3.7  # inches, for a desk and for a phone
BINS = 30
_POINTS = 400  # of a band: more cannot be told apart
_HATCHES = ("", "////")


def curves(content: Content, width: float = WIDE) -> "Figure | None":
    """Return a picture of certified accuracy against radius with confidence bands; None if there is nothing to draw."""
    logs = {name: log for name, log in content.logs.items() if isinstance(log, Curve) or certified(log)}
    if not logs:
        return None
    figure = new_figure(width, 3.6 + 0.2 * len(logs))
    axes = figure.subplots()
    draw_steps(axes, logs, content.plans)
    draw_bands(axes, logs, content.plans, confidence=content.confidence)
    dress(axes, f"radius: {content.norm} norm, pixels in [0, 1]", "certified accuracy (%)")
    _legend(figure, axes.get_lines(), [str(line.get_label()) for line in axes.get_lines()], width)
    return figure


def draw_bands(
    axes: "Axes",
    logs: Mapping[str, Results | Curve],
    plans: Mapping[str, LoggedPlan | None],
    *,
    confidence: float = 0.95,
) -> None:
    """Draw Clopper-Pearson bands in the colours that `draw_steps` gave the lines of ``logs``."""
    end = max((float(np.max(np.asarray(line.get_xdata(), dtype=np.float64))) for line in axes.get_lines()), default=1.0)
    for place, (name, log) in enumerate(logs.items()):
        if isinstance(log, Curve):
            continue
        plan = plans.get(name)
        radii, low, high = band(log, confidence, own=plan.radii if plan else (), end=end)
        look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(radii, 100 * low, 100 * high, step="pre", **look)


def band(
    log: Results, confidence: float, *, own: Sequence[float] = (), end: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """Return radii, and both ends of the Clopper-Pearson interval for the certified accuracy at each.

    Args:
        log: A log with radii and rows.
        confidence: Probability that an interval holds the accuracy on images drawn like these, at each radius.
        own: The only radii at which something is known; all if empty.
        end: Up to where the band goes, unless there are radii of its ``own``.
    """
    radii: Floats = np.unique(np.append(own or log.radii[log.correct], 0.0))
    if not own:
        if len(radii) > _POINTS:
            radii = np.linspace(0.0, radii[-1], _POINTS)
        radii = np.append(radii, end) if end > radii[-1] else radii
    low, high = log.certified_accuracy_interval(radii, confidence=confidence, parity=not own)
    return radii, low, high


def histograms(content: Content, width: float = WIDE) -> "Figure | None":
    """Return a picture of how many images have which radius, a panel for each log; None if there is nothing to draw."""
    logs = {name: log for name, log in content.logs.items() if certified(log)}
    if not logs:
        return None
    figure = new_figure(width, 0.9 + 1.45 * len(logs))
    grid: Any = figure.subplots(len(logs), 1, squeeze=False, sharex=True)
    most = max(float(log.radii.max()) for log in logs.values()) or 1.0
    edges: Floats = np.linspace(0.0, most, BINS + 1)
    for axes, (name, log) in zip(grid[:, 0], logs.items(), strict=True):
        draw_histogram(axes, log, edges)
        abstained = f"{int((log.predict == ABSTAIN).sum()):,} of {len(log):,} abstain"
        axes.set_title(_wrapped(f"{name}: {abstained}", width), fontsize=9, loc="left", parse_math=False)
    grid[-1, 0].set_xlabel(f"radius: {content.norm} norm, pixels in [0, 1]")
    figure.supylabel("images (%)", fontsize=10)
    _legend(figure, grid[0, 0].containers, ["right", "another class, with this radius"], width)
    return figure


def draw_histogram(axes: "Axes", log: Results, edges: Floats) -> None:
    """Draw the share of images by their radius in the bins ``edges``, wrong ones on top; abstentions have none."""
    answered = log.predict != ABSTAIN
    floor: Floats = np.zeros(len(edges) - 1)
    for chosen, colour, hatch in zip((log.correct, ~log.correct), COLOURS, _HATCHES, strict=False):
        shares = 100 * np.histogram(log.radii[answered & chosen], edges)[0] / len(log)
        look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.4, "hatch": hatch}
        axes.bar(edges[:-1], shares, np.diff(edges), bottom=floor, align="edge", **look)
        floor = floor + shares
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlim(0, None)
    axes.spines[["top", "right"]].set_visible(False)


def as_svg(figure: "Figure") -> bytes:
    """Return ``figure`` as SVG, with letters as shapes: no font is needed."""
    return _saved(figure, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def as_png(figure: "Figure") -> bytes:
    """Return ``figure`` as PNG."""
    return _saved(figure, "png")


def _saved(figure: "Figure", form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)
    return file.getvalue()


def _legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str], width: float) -> None:
    """Write a legend below the picture; names are put in afterwards, as they may look like formulas or be private."""
    texts = [_wrapped(name, width) for name in names]
    legend = figure.legend(handles, ["x"] * len(texts), loc="outside lower left", fontsize=9, frameon=False)
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set_parse_math(False)
        entry.set_text(text)


def _wrapped(name: str, width: float) -> str:
    return textwrap.fill(printable(name), int(11 * width))
