import numpy as np
import pytest

from rs_plugins.core.results.files import read_results
from rs_plugins.demo import run_demo
from rs_plugins.demo.settings import Settings
from rs_plugins.errors import InputError, MissingDependencyError

SMALL = Settings(images=8, n=50, n0=10, judge=50, epochs=2, sigma=0.3)
FILES = {
    "certified-ART-smoothing.tsv",
    "certified-accuracy.png",
    "certified-rs-plugins.tsv",
    "certified-rs-plugins.tsv.json",
    "certified-undefended.tsv",
    "certified-undefended.tsv.json",
    "report.md",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL, progress=False)


def test_the_demo_writes_what_it_says(outcome):
    folder, table = outcome
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "certified-accuracy.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert table in report
    assert "8 test images" in report


def test_the_table_agrees_with_the_logs(outcome):
    folder, table = outcome
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header[:5] == ["accuracy in %", "clean", "PGD", "SmoothAdv", "cert. 0"]
    assert [row[0] for row in rows] == ["undefended", "ART smoothing", "rs-plugins"]
    for row in rows:
        results = read_results(folder / f"certified-{row[0].replace(' ', '-')}.tsv")
        assert len(results) == 8
        shares = 100 * results.certified_accuracy([0, 0.3, 0.6, 2.8 * 0.3])
        np.testing.assert_allclose([float(cell) for cell in row[4:8]], shares, atol=0.051)
        assert float(row[8]) == pytest.approx(results.average_certified_radius, abs=6e-4)


def test_a_caption_never_says_more_than_is_certified():
    from rs_plugins.demo.examination import _caption

    assert "certified to r = 0.99 " in _caption(3, 3, 0.9996, 0.5)


@pytest.mark.slow
def test_the_demo_repeats_itself(outcome, tmp_path):
    folder, _ = outcome
    run_demo(tmp_path, SMALL, progress=False)
    for log in folder.glob("*.tsv"):
        first, second = read_results(log), read_results(tmp_path / log.name)
        assert first.predict.tolist() == second.predict.tolist()
        assert first.radius.tolist() == second.radius.tolist()


def test_a_host_that_does_not_run_is_a_line_of_the_report(tmp_path, monkeypatch):
    from rs_plugins.demo import defences

    def broken(*_):
        raise RuntimeError("no statsmodels")

    monkeypatch.setattr(defences, "train_art", broken)
    table = run_demo(tmp_path, Settings(images=2, n=20, n0=5, judge=20, epochs=1), progress=False)
    assert "ART's PyTorchRandomizedSmoothing did not run: RuntimeError: no statsmodels" in table
    assert "rs-plugins" in table


def test_missing_packages_are_named_before_work(tmp_path, monkeypatch):
    import rs_plugins.demo

    monkeypatch.setattr(rs_plugins.demo, "find_spec", lambda name: None if name == "sklearn" else name)
    with pytest.raises(MissingDependencyError, match=r"the demo needs scikit-learn: pip install 'rs-plugins\[all\]'"):
        run_demo(tmp_path / "new", SMALL)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images: expected 1 to 500 of the digits' test images, got 0"),
        ({"images": 501}, "images: expected 1 to 500 of the digits' test images, got 501"),
        ({"sigma": -1}, "sigma: expected a finite number > 0, got -1"),
        ({"eps": 0}, "eps: expected a finite number > 0, got 0"),
        ({"n": 3}, "n: expected at least 10, got 3"),
        ({"n0": 0}, "n0: expected an integer >= 1, got 0"),
        ({"alpha": 2}, r"alpha: expected a number in \(0, 1\), got 2"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"judge": 0.5}, "judge: expected an integer >= 1, got 0.5"),
        ({"seed": 0.5}, "seed: expected an integer or None, got 0.5"),
    ],
    ids=repr,
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Settings(**options)
