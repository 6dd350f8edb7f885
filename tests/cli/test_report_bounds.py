import csv
import io
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.core.relaxations.bound_files import BoundsWriter
from rs_plugins.core.relaxations.bound_results import BoundCertificate, BoundProvenance
from rs_plugins.core.results.files import HEADER
from rs_plugins.core.selection import Selection

RUN = BoundProvenance(8 / 255, "linf", "ibp, crown", "none", 0, "small", "float64", "cpu", "AVX2", "0" * 64, "torch 3")
ROWS = [
    (0, 1, 1, "verified", "ibp", 1.0),
    (1, 1, 1, "verified", "crown", 2.0),
    (2, 0, 0, "unknown", "crown", -1.0),
    (3, 2, 2, "falsified", "pgd", -1.5),
    (4, 2, 1, "misclassified", "prediction", -0.5),
]


def write(path, rows=ROWS, images=5, **changes):
    with BoundsWriter(path) as writer:
        writer.begin(replace(RUN, **changes), {"images": images}, Selection() if images else None)
        for row in rows:
            writer.write(BoundCertificate(*row, slack=1e-9, seconds=0.5, made_with=replace(RUN, **changes)))
    return str(path)


def report(*arguments):
    return CliRunner().invoke(main, ["report", *arguments])


@pytest.fixture
def logs(tmp_path):
    return [write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", ROWS[2:4], 2, eps=0.5, norm="l2")]


def test_logs_are_shown_beside_each_other(logs):
    assert report(*logs).stdout.splitlines() == [
        "   images      eps  norm    dtype  natural %  certified %  95% interval  at most %  95% interval  s/image",
        "a       5  0.03137  linf  float64      80.00        40.00      5.3-85.3      60.00     14.7-94.7      0.5",
        "b       2      0.5    l2  float64     100.00         0.00      0.0-84.2      50.00      1.3-98.7      0.5",
        "",
        "images  by ibp  by crown-ibp  by crown  by alpha-crown  verified  falsified  misclassified  unknown  failed",
        "a            1             0         1               0         2          1              1        1       0",
        "b            0             0         0               0         0          1              0        1       0",
        "",
        "at most: of images that are neither misclassified nor falsified; unknown and failed ones are not verified",
    ]


def test_other_formats_hold_the_same(logs):
    markdown = report(*logs, "--format", "markdown").stdout
    assert "| a | 5 | 0.03137 | linf | float64 | 80.00 | 40.00 | 5.3-85.3 | 60.00 |" in markdown
    content = json.loads(report(*logs, "--format", "json", "--confidence", "0.9").stdout)
    first = content["logs"][0]
    assert (content["confidence"], first["name"], first["images"], first["certified"]["share"]) == (0.9, "a", 5, 0.4)
    assert first["certified"]["interval"] == pytest.approx([0.076440, 0.810745], abs=1e-6)
    assert first["counts"] == {"verified": 2, "falsified": 1, "misclassified": 1, "unknown": 1, "failed": 0}
    rows = list(csv.DictReader(io.StringIO(report(*logs, "--format", "csv").stdout)))
    figures = {(row["log"], row["figure"]): row["value"] for row in rows}
    assert (figures["a", "natural"], figures["a", "at most"]) == ("0.8", "0.6")
    assert (figures["a", "verified by ibp"], figures["b", "unknown"], figures["b", "eps"]) == ("1", "1", "0.5")


@pytest.mark.filterwarnings("default")
def test_a_log_that_is_not_finished_says_so(tmp_path):
    result = report(write(tmp_path / "log.tsv", images=9))
    assert "not finished: 5 of 9 images; the figures are of these alone" in result.stderr


def test_a_log_without_rows_has_no_figures(tmp_path):
    shown = report(write(tmp_path / "log.tsv", [], images=0)).stdout
    assert shown.splitlines()[1].split() == ["log", "0", *(9 * "-")]


def test_what_means_nothing_for_bounds_is_refused(tmp_path, logs):
    (tmp_path / "other.tsv").write_text(HEADER)
    assert "expected one kind, got" in report(*logs, str(tmp_path / "other.tsv")).output
    for option in (["--radii", "0,1"], ["--parity"], ["--alpha", "0.1"], ["--plot", str(tmp_path / "a.png")]):
        result = report(*logs, *option)
        assert result.exit_code == 2
        assert f"{option[0]} is not for logs of bounds, which know one radius only" in result.output
    assert "confidence: expected a number in (0, 1), got 2.0" in report(*logs, "--confidence", "2").output
