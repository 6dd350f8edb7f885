"""``rs-plugins report --out`` from the command line."""

import base64
import csv
import io
import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.results.files import write_results
from rs_plugins.core.results.table import Results

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two logs of a small data set: b is better from 0.25 on, and its record says with which noise it was made."""
    monkeypatch.chdir(tmp_path)
    np.savez("squares.npz", images=PIXELS, labels=np.arange(5))
    label, ones = np.arange(5), np.ones(5)
    for name, radius in (("a", [0.1, 0.2, 0.3, 0.4, 0.0]), ("b", [0.5, 0.5, 0.5, 0.0, 0.0])):
        predict = np.where(np.array(radius) == 0, -1, label)
        write_results(f"{name}.tsv", Results(label, label, predict, np.array(radius), predict == label, ones))
    return tmp_path


def invoke(command):
    return CliRunner().invoke(main, shlex.split(command))


def pictures(page):
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([\w+/=]+)", page)]


def test_the_text_stays_and_the_files_have_its_figures(folder):
    plain = invoke("report a.tsv b.tsv --format json --confidence 0.9")
    found = invoke("report a.tsv b.tsv --format json --confidence 0.9 --out out")
    assert found.exit_code == 0, found.output
    assert found.stdout == plain.stdout
    assert found.stderr.split()[:3] == ["out/report.html", "out/report.md", "out/report.csv"]
    rows = list(csv.DictReader(io.StringIO((folder / "out" / "report.csv").read_text())))
    figures = {(row["log"], row["figure"], row["radius"]): row for row in rows}
    for log in json.loads(found.stdout)["logs"]:
        assert float(figures[log["name"], "acr", ""]["value"]) == log["acr"]
        for at in log["certified"]:
            assert float(figures[log["name"], "certified", str(float(at["radius"]))]["value"]) == at["accuracy"]
    page = (folder / "out" / "report.html").read_text()
    assert "90% interval in small print" in page
    assert "with confidence 0.9 at" in page
    assert "<strong>60.00</strong>" in page
    assert pictures(page) == []
    again = invoke("report a.tsv --out out")  # its files are replaced
    assert again.exit_code == 0, again.output
    assert "<strong>60.00</strong>" not in (folder / "out" / "report.html").read_text()


def test_a_gallery(folder):
    result = invoke("report a.tsv b.tsv --data npz:squares.npz --gallery 2 --out out")
    assert result.exit_code == 0, result.output
    page = (folder / "out" / "report.html").read_text()
    shown = [np.asarray(Image.open(io.BytesIO(png))) for png in pictures(page)]
    assert len(shown) == 2
    np.testing.assert_array_equal(shown[0], PIXELS[4])  # the one that abstains, and the safest
    np.testing.assert_array_equal(shown[1], PIXELS[3])
    assert "not known with which noise" in page


def test_a_gallery_with_noise_and_attack(folder):
    data = open_data_set("npz:squares.npz")
    lines = (folder / "b.tsv").read_text().splitlines()
    header = "\tpa_lower\tcount\tn0\tn\tsigma\talpha\tseed"
    more = "\t0.9\t95\t10\t100\t0.5\t0.01\t0"
    rows = [line + (more if place else header) for place, line in enumerate(lines)]
    (folder / "b.tsv").write_text("\n".join(rows) + "\n")
    record = {"family": "laplace", "norm": "l1", "digest": data.digest, "model": "m"}
    (folder / "b.tsv.json").write_text(json.dumps(record))
    (folder / "attacked").mkdir()
    votes = np.full((5, 5), 1) + 999 * np.eye(5, dtype=np.int64)
    columns = {"index": np.arange(5), "images": PIXELS / np.float32(255), "labels": np.arange(5)}
    columns |= {"counts_before": votes, "counts_after": votes[::-1], "l2": np.full(5, 0.5), "linf": np.full(5, 0.1)}
    np.savez("attacked/adversarial.npz", **columns)
    made_with = {"attack": "PGD", "options": {"eps": 0.5}, "alpha": 0.001, "digest": data.digest, "model": "m"}
    (folder / "attacked" / "evaluation.json").write_text(json.dumps({"made_with": made_with}))
    result = invoke("report b.tsv --data npz:squares.npz --attacked attacked --gallery 5 --out out")
    assert result.exit_code == 0, result.output
    page = (folder / "out" / "report.html").read_text()
    assert len(pictures(page)) == 15
    assert "one draw of laplace noise, sigma 0.5." in page
    assert "Adversarial: PGD(eps=0.5), against the model of b." in page
    assert "adversarial: predicted 4, moved by 0.50 (l2)" in page
    assert "l1 norm" in page
    record["family"] = "unheard-of"
    (folder / "b.tsv.json").write_text(json.dumps(record))
    result = invoke("report b.tsv --data npz:squares.npz --out out")
    assert result.exit_code == 0, result.output
    assert "not known with which noise" in (folder / "out" / "report.html").read_text()
    record["digest"] = "of other images with the same labels"
    (folder / "b.tsv.json").write_text(json.dumps(record))
    result = invoke("report b.tsv --data npz:squares.npz --out out")
    assert result.exit_code == 1
    assert "Error: data: expected the data set of the logs, got npz, which none of b is of" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data npz:squares.npz", "--data needs --out, the folder of the report in which the gallery is"),
        ("--out out --attacked .", "--attacked needs --data, whose images the gallery shows"),
        ("--out out --gallery 3", "--gallery needs --data"),
        ("--out out --split train", "--split needs --data"),
        ("--out out --image-size 3", "--image-size needs --data"),
        ("--out not/there", "--out: there is no folder"),
        ("--out a.tsv", "is a file"),
        ("--out out --data npz:squares.npz --gallery 0", "0 is not in the range x>=1"),
    ],
)
def test_refused_before_any_work(folder, options, message):
    result = invoke(f"report a.tsv {options}")
    assert result.exit_code == 2
    assert message in re.sub(r"\s*\n[│ ]*", " ", result.stderr)
    assert result.stdout == ""
    assert not (folder / "out").exists()


def test_not_for_logs_of_bounds(folder, monkeypatch):
    monkeypatch.setattr("rs_plugins.core.relaxations.bound_files.is_bound_log", lambda path: True)
    result = invoke("report a.tsv --out out")
    assert result.exit_code == 2
    assert "--out is not for logs of bounds" in result.stderr
