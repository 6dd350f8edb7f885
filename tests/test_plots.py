import numpy as np
import pytest

from rs_plugins.core.results.comparison import Curve
from rs_plugins.core.results.logged_plan import understood
from rs_plugins.core.results.table import Results
from rs_plugins.core.training.folder import Epoch
from rs_plugins.errors import ResultsError
from rs_plugins.plots import (
    AttackedImage,
    Specimen,
    amplification,
    draw_certified_accuracy,
    draw_gallery,
    draw_steps,
    new_figure,
    save_attacked_images,
    save_certified_accuracy,
    save_demo_figure,
    save_training_curves,
)


def table(radii, correct):
    n = len(radii)
    label = np.zeros(n, dtype=np.int64)
    correct = np.array(correct, dtype=bool)
    return Results(np.arange(n), label, label + ~correct, np.array(radii, dtype=float), correct, np.zeros(n))


A, B = table([0.1, 0.4, 0.9], [True, True, False]), table([0.2, 0.2, 0.2], [True, False, True])


def test_lines_are_the_certified_accuracy():
    axes = new_figure(4, 3).subplots()
    draw_certified_accuracy(axes, {"a": A, "b": B}, {"a, attacked": ([0, 0.5], [0.9, 0.5])})
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[corners[:, 0] == corners[:, 0][np.argmin(np.abs(corners[:, 0] - 0.4))], 1].max() == 90  # a step
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"a: certified", "b: certified", "a, attacked"}
    for name, results in (("a", A), ("b", B)):
        x, y = lines[f"{name}: certified"].get_data()
        np.testing.assert_allclose(y, 100 * results.certified_accuracy(x))
        assert x.max() > results.radii[results.correct].max()
    assert lines["a, attacked"].get_ydata().tolist() == [90, 50]
    assert lines["a, attacked"].get_color() == lines["a: certified"].get_color() != lines["b: certified"].get_color()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {*lines, "between proof and attack"}


def test_steps_are_where_the_radii_are():
    axes = new_figure(4, 3).subplots()
    draw_steps(axes, {"a": A, "curve": Curve(np.array([0.0, 0.5, 1.0]), np.array([0.9, 0.5, 0.3]))})
    steps, curve = axes.get_lines()
    assert {line.get_drawstyle() for line in (steps, curve)} == {"steps-pre"}
    np.testing.assert_allclose(steps.get_xydata(), [[0, 200 / 3], [0.1, 200 / 3], [0.4, 100 / 3], [1.05, 0]])
    np.testing.assert_allclose(curve.get_xydata(), [[0, 90], [0.5, 50], [1, 30], [1.05, 30]])


def test_a_log_of_radii_of_its_own_is_marked_at_these():
    axes = new_figure(4, 3).subplots()
    plans = {"a": understood("OnGrid(radii=(0.1, 0.4))"), "b": None}
    draw_steps(axes, {"a": A, "b": A}, plans)
    grid, curve = axes.get_lines()
    np.testing.assert_allclose(grid.get_xydata(), [[0, 200 / 3], [0.1, 200 / 3], [0.4, 100 / 3]])  # and no further
    assert grid.get_markevery() == [False, True, True]
    assert (grid.get_label(), curve.get_label()) == ("a (known at the markers)", "b")
    assert grid.get_linewidth() < curve.get_linewidth()
    assert (grid.get_marker(), curve.get_marker()) == ("o", "None")


def test_a_picture_of_many_logs_shows_each(tmp_path, monkeypatch):
    pictures = []
    monkeypatch.setattr("rs_plugins.plots.new_figure", lambda *size: pictures.append(new_figure(*size)) or pictures[-1])
    predictions = Results(*(getattr(A, name) for name in ("idx", "label", "predict")), None, A.correct, A.seconds)
    logs = {f"log {number}": A for number in range(8)} | {"predictions": predictions, "empty": table([], [])}
    save_certified_accuracy(tmp_path / "x.png", logs)
    (axes,) = pictures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"log {number}" for number in range(8)]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 8
    assert len({line.get_marker() for line in axes.get_lines()} - {"None"}) == 8
    with pytest.raises(ResultsError, match="nothing to draw: none of predictions, empty has certified radii"):
        save_certified_accuracy(tmp_path / "y.png", {"predictions": predictions, "empty": table([], [])})
    assert not (tmp_path / "y.png").exists()


def test_gallery_has_a_row_for_each_specimen():
    figure = new_figure(4, 3)
    pictures = [np.full((2, 2), value) for value in (0.0, 0.5, 1.0)]
    draw_gallery(figure, [Specimen(*pictures, "one"), Specimen(*pictures, "two")])
    assert len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "one", "", "", "two", ""]
    assert [axes.images[0].get_array().max() for axes in figure.axes[:3]] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("tables", [{"a": A}, {"empty": table([], [])}], ids=["some", "none"])
@pytest.mark.filterwarnings("ignore:certified accuracy is undefined:rs_plugins.errors.ResultsWarning")
def test_pictures_without_gallery_and_without_rows(tmp_path, tables):
    save_demo_figure(tmp_path / "x.png", "title", tables, {}, [])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_attacked_images_are_shown_with_an_amplified_difference(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("rs_plugins.plots.new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    clean = np.full((3, 4, 4), 0.5, dtype=np.float32)
    attacked = clean.copy()
    attacked[0, 0, 0] += 0.02
    grey = np.full((1, 4, 4), 0.25, dtype=np.float32)
    save_attacked_images(
        tmp_path / "x.png",
        [
            AttackedImage(clean, attacked, label=3, before=3, after=7, l2=0.02),
            AttackedImage(grey, grey, label=1, before=2, after=-1, l2=0.0),
        ],
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].get_axes()
    assert [one.get_title() for one in axes] == [
        *("clean, label 3 → 3", "adversarial → 7", "difference x 20, l2 0.02"),
        *("clean, label 1 → 2", "adversarial → abstains", "difference x 20, l2 0.00"),
    ]
    shown = [one.images[0].get_array() for one in axes]
    assert [picture.shape for picture in shown] == [(4, 4, 3)] * 3 + [(4, 4)] * 3
    assert shown[2][0, 0].tolist() == pytest.approx([0.9, 0.5, 0.5], abs=1e-6)
    assert np.allclose(shown[5], 0.5)


@pytest.mark.parametrize("accuracies", [(0.1, 0.5, 0.75), (None, 0.5, 0.75), (None, None, None)])
def test_curves_of_training(tmp_path, monkeypatch, accuracies):
    figures = []
    monkeypatch.setattr("rs_plugins.plots.new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    history = [Epoch(place + 1, 3.0 - place, accuracy, 0.1, 1.0) for place, accuracy in enumerate(accuracies)]
    save_training_curves(tmp_path / "x.png", history)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    left, *right = figures[0].axes
    (loss,) = left.get_lines()
    assert loss.get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    known = [[place, 100 * accuracy] for place, accuracy in enumerate(accuracies, start=1) if accuracy is not None]
    assert [line.get_xydata().tolist() for axes in right for line in axes.get_lines()] == ([known] if known else [])
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["loss", "accuracy under one noise draw"][: 1 + bool(known)]


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.0, 1), (2.0, 1), (0.5, 1), (0.3, 1), (0.25, 2), (0.1, 5), (0.024, 20), (8 / 255, 10)]
)
def test_amplification_keeps_changes_within_the_scale(largest, factor):
    assert amplification(largest) == factor
