"""The pictures of a report."""

import numpy as np
import pytest
from scipy.stats import beta

from rs_plugins.core.results.comparison import Curve, figures
from rs_plugins.core.results.logged_plan import understood
from rs_plugins.core.results.table import Results
from rs_plugins.plots import COLOURS, draw_steps, new_figure
from rs_plugins.report_page.content import Content
from rs_plugins.report_page.pictures import NARROW, WIDE, band, curves, draw_bands, draw_histogram, histograms

pytest.importorskip("matplotlib")


def log(radius, right):
    n = len(radius)
    label, predict = np.zeros(n, dtype=np.int64), np.where(np.array(radius) == 0, -1, np.where(right, 0, 1))
    return Results(np.arange(n), label, predict, np.array(radius), predict == label, np.zeros(n))


ONE = log([0.1, 0.4, 0.4, 0.0, 0.7], [True, True, True, True, False])


def content(logs, **plans):
    plans = {name: understood(plan) for name, plan in plans.items()}
    return Content([figures(name, table, [0]) for name, table in logs.items()], logs, plans, {}, confidence=0.9)


def exact(hits, n, confidence):
    """Return the ends of Clopper and Pearson's interval as their definition has it."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else beta.ppf(tail, hits, n - hits + 1)
    return low, 1.0 if hits == n else beta.ppf(1 - tail, hits + 1, n - hits)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_bands_are_beta_quantiles(confidence):
    radii, low, high = band(ONE, confidence, end=0.8)
    assert radii.tolist() == [0.0, 0.1, 0.4, 0.8]
    expected = [exact(hits, 5, confidence) for hits in (3, 3, 2, 0)]
    np.testing.assert_allclose(np.stack([low, high], axis=1), expected, rtol=1e-9)


def test_bands_of_many_radii_and_of_radii_of_their_own():
    many = log(np.arange(1, 2001) / 1000, np.full(2000, True))
    radii, low, high = band(many, 0.95)
    assert len(radii) == 400
    place = 123
    hits = int((many.radii >= radii[place]).sum())
    np.testing.assert_allclose((low[place], high[place]), exact(hits, 2000, 0.95), rtol=1e-9)
    radii, low, high = band(ONE, 0.95, own=(0.1, 0.4), end=0.8)
    assert radii.tolist() == [0.0, 0.1, 0.4]
    np.testing.assert_allclose((low[2], high[2]), exact(2, 5, 0.95), rtol=1e-9)


def test_bands_have_the_colours_of_their_lines_and_end_with_them():
    axes = new_figure(4, 3).subplots()
    logs = {"curve": Curve(np.array([0.0, 1.0]), np.array([0.9, 0.5])), "one": ONE}
    draw_steps(axes, logs)
    draw_bands(axes, logs, {}, confidence=0.9)
    (shade,) = axes.collections
    corners = shade.get_paths()[0].vertices
    assert corners[:, 0].max() == pytest.approx(1.05)
    assert corners[:, 1].min() == 0
    assert corners[:, 1].max() == pytest.approx(100 * exact(3, 5, 0.9)[1])
    from matplotlib.colors import to_hex

    assert to_hex(shade.get_facecolor()[0]).upper() == COLOURS[1]
    assert axes.get_lines()[1].get_color() == COLOURS[1]


def test_histogram():
    axes = new_figure(4, 3).subplots()
    draw_histogram(axes, ONE, np.array([0.0, 0.25, 0.5, 0.75]))
    right, wrong = axes.containers
    assert [bar.get_height() for bar in right] == pytest.approx([20, 40, 0])
    assert [bar.get_height() for bar in wrong] == pytest.approx([0, 0, 20])
    assert {bar.get_hatch() for bar in wrong} == {"////"}  # not told apart by colour alone
    assert right[0].get_facecolor() != wrong[0].get_facecolor()


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_pictures_of_a_report(width):
    about = content({"_a$b$": ONE, "grid " + "x" * 90: ONE}, **{"grid " + "x" * 90: "OnGrid(radii=(0.1, 0.4))"})
    figure = curves(about, width)
    (axes,) = figure.axes
    (legend,) = figure.legends
    texts = [text.get_text().replace("\n", "") for text in legend.get_texts()]
    assert texts[0] == "_a$b$"
    assert texts[1].replace(" ", "") == f"grid{'x' * 90}(knownatthemarkers)"
    assert axes.get_xlabel() == "radius: l2 norm, pixels in [0, 1]"
    figure.draw_without_rendering()  # a formula that cannot be read would raise
    assert figure.get_window_extent().width == pytest.approx(width * figure.dpi)
    figure = histograms(about, width)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_title(loc="left") == "_a$b$: 1 of 5 abstain"
    figure.draw_without_rendering()


def test_nothing_to_draw():
    predictions = Results(*(getattr(ONE, name) for name in ("idx", "label", "predict")), None, *(ONE.correct,) * 2)
    nothing = content({"predictions": predictions})
    assert curves(nothing) is histograms(nothing) is None
    curve = Content([], {"curve": Curve(np.array([0.0]), np.array([0.9]))}, {}, {})
    assert histograms(curve) is None
    assert len(curves(curve).axes) == 1
