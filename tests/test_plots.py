import numpy as np
import pytest

from rs_plugins.core.results import Results
from rs_plugins.plots import Specimen, draw_certified_accuracy, draw_gallery, new_figure, save_demo_figure


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
        assert x.max() > 0.9
    assert lines["a, attacked"].get_ydata().tolist() == [90, 50]
    assert lines["a, attacked"].get_color() == lines["a: certified"].get_color() != lines["b: certified"].get_color()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {*lines, "between proof and attack"}


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
