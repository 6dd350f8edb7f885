import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rs_plugins.core.results.files import (
    COLUMNS,
    format_down,
    format_time,
    parse_time,
    read_results,
    write_results,
)
from rs_plugins.core.results.table import Results
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

LOGS = Path(os.environ.get("RS_PLUGINS_REFERENCE", Path(__file__).parents[4] / "shared" / "reference")) / "certify-logs"
needs_logs = pytest.mark.skipif(
    not LOGS.is_dir(), reason="the published certification logs are not here; RS_PLUGINS_REFERENCE says where they are"
)
HEADER = "\t".join(COLUMNS) + "\n"

# file, rows, ACR, abstentions, certified images (correct and radius >= r) at r = 0, .25, .5, …
PUBLISHED = [
    ("cifar10-resnet110-smoothmix-0.25", 10000, 0.553396, 320, [7706, 6790, 5785, 4673, 0]),
    (
        "mnist-lenet-smoothmix-1.00",
        *(10000, 1.822620, 409),
        [9309, 9084, 8734, 8270, 7728, 7023, 6244, 5342, 4481, 3722, 2971, 2270, 1487, 668, 317, 84],
    ),
    ("mnist-lenet-gaussian-0.25", 10000, 0.910969, 14, [9921, 9845, 9678, 9315, 0]),
    ("cifar10-densenet40-aborted", 9, 0.793667, 1, [6, 5, 4, 4, 3, 3, 3, 3, 0]),
    ("cifar10-consistency-0.25", 10000, 0.543614, 392, [7784, 6879, 5735, 4376, 0]),
    ("imagenet-resnet50-smoothadv-0.50", 500, 0.849105, 34, [273, 263, 253, 233, 223, 207, 191, 174, 0]),
    ("cifar10-resnet110-cohen-plainseconds", 500, 0.428884, 43, [374, 300, 214, 133, 0]),
    ("cifar10-crlf", 500, 0.280988, 12, [364, 302, 0]),
]


@pytest.fixture
def log(tmp_path):
    def write(text, name="log.tsv"):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def row(idx=0, label=3, predict=3, radius="0.5", correct=1, time="0:00:01.500000", end="\n"):
    return f"{idx}\t{label}\t{predict}\t{radius}\t{correct}\t{time}{end}"


@needs_logs
@pytest.mark.parametrize(
    ("name", "rows", "acr", "abstentions", "certified"), PUBLISHED, ids=lambda value: str(value)[:40]
)
def test_published_logs(name, rows, acr, abstentions, certified):
    results = read_results(LOGS / f"{name}.tsv")
    assert len(results) == rows
    assert results.average_certified_radius == pytest.approx(acr, abs=1e-6)
    assert round(results.abstention * rows) == abstentions
    accuracy = results.certified_accuracy([0.25 * step for step in range(len(certified))])
    assert np.rint(accuracy * rows).astype(int).tolist() == certified
    assert results.accuracy == pytest.approx(certified[0] / rows)


@needs_logs
def test_published_curve():
    published = np.array([line.split() for line in (LOGS / "cifar10-consistency-acc.tsv").read_text().splitlines()])
    results = read_results(LOGS / "cifar10-consistency-0.25.tsv")
    grid = np.arange(0, 4.005, 0.005)
    parity = results.certified_accuracy(grid, parity=True)
    assert [f"{value:.5f}" for value in parity] == published[:, 1].tolist()
    exact = results.certified_accuracy(grid)
    differ = np.flatnonzero(exact != parity)
    assert len(differ) == 17
    assert round(exact[165], 5) == 0.39230  # r = 0.825
    assert np.rint(np.abs(exact - parity) * 10000).max() == 11


@needs_logs
def test_published_prediction_log_and_header_only_file():
    predictions = read_results(LOGS / "cifar10-predict-crlf.tsv")
    assert (len(predictions), round(predictions.accuracy, 3), round(predictions.abstention, 3)) == (500, 0.852, 0.026)
    with pytest.raises(ResultsError, match="radius: this is a log of predictions, which has no radii"):
        predictions.certified_accuracy([0.5])
    empty = read_results(LOGS / "imagenet-header-only.tsv")
    with pytest.warns(ResultsWarning, match="ACR is undefined: the table has no rows"):
        assert math.isnan(empty.average_certified_radius)


def test_windows_line_ends_further_columns_and_no_last_newline(log):
    text = (HEADER.strip() + "\tearly\r\n" + row(end="\tx\r\n") + row(7, end="\ty")).replace("\r\r", "\r")
    results = read_results(log(text))
    assert results.idx.tolist() == [0, 7]
    assert results.seconds.tolist() == [1.5, 1.5]


def test_a_line_cut_off_at_the_end_is_left_out(log):
    with pytest.warns(ResultsWarning, match="left out line 3, cut off in the middle"):
        results = read_results(log(HEADER + row() + "1\t3\t3\t0."))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.0\t0.5\n", "expected a header with the columns idx label predict radius correct time, got"),
        ("", "expected a header with the columns"),
        (HEADER + "1\t3\n" + row(2), "line 2: expected 6 columns, got 2"),
        (HEADER + "\n" + row(2), "line 2: expected 6 columns, got 1"),
        (HEADER + row(radius="nan"), "line 2: radius: expected a finite number >= 0, got nan"),
        (HEADER + row(radius="-0.1"), "line 2: radius: expected a finite number >= 0, got -0.1"),
        (HEADER + row(radius="inf"), "line 2: radius: expected a finite number >= 0, got inf"),
        (HEADER + row(1) + row(1), "line 3: idx: expected more than 1, got 1"),
        (HEADER + row(5) + row(2), "line 3: idx: expected more than 5, got 2"),
        (HEADER + row(predict=-1, correct=0), "line 2: radius: expected 0 for an abstention, got 0.5"),
        (HEADER + row(predict=-2, correct=0), "line 2: expected idx >= 0 and predict >= -1, got 0 and -2"),
        (HEADER + row(correct=0), "line 2: correct: got 0 for label 3 and prediction 3"),
        (HEADER + row(time="later"), "line 2: expected a number, got 'later'"),
        (HEADER + row(idx="a") + row(2), "line 2: expected an integer, got 'a'"),
        (HEADER + row(idx="1_0") + row(20), "line 2: expected an integer, got '1_0'"),
        (HEADER + row(idx="9" * 19) + row(2), "line 2: expected an integer, got '9999999999999999999'"),
        (HEADER + row(idx=-1), "line 2: expected idx >= 0 and predict >= -1, got -1 and 3"),
    ],
)
def test_files_that_are_no_logs(log, text, message):
    with pytest.raises(ResultsError, match=message):
        read_results(log(text))


def test_a_byte_order_mark_is_no_obstacle(log):
    assert len(read_results(log("\ufeff" + HEADER + row()))) == 1


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(ResultsError, match="expected UTF-8 text"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00:10.408281", 10.408281),
        ("0:01:00", 60),
        ("1 day, 2:00:01.5", 93601.5),
        ("2 days, 0:00:00", 172800),
        ("15.4", 15.4),
    ],
)
def test_times(text, seconds):
    assert parse_time(text) == pytest.approx(seconds)


@given(st.floats(0, 1e6))
def test_times_round_trip(seconds):
    text = format_time(seconds)
    assert parse_time(text) == pytest.approx(seconds, abs=1e-6)
    assert len(text.split(":")) == 3


@given(st.floats(0, 1e4, allow_subnormal=False))
def test_numbers_are_rounded_down_and_keep_their_digits(value):
    written = float(format_down(value))
    assert written <= value
    assert written >= value * (1 - 1e-7)
    assert "e" not in format_down(value).lower()


def test_logs_of_others_do_not_say_how_many_votes(log):
    results = read_results(log(HEADER + row()))
    assert (results.samples, results.sigma, results.alpha) == (None, None, None)


def test_older_logs_of_ours_are_read(log):
    older = "\t".join((*COLUMNS, "pa_lower", "count", "n0", "n", "sigma", "alpha", "seed"))
    results = read_results(log(f"{older}\n{row(end='')}\t0.9\t95\t10\t100\t0.5\t0.001\t0\n"))
    assert (results.samples.tolist(), results.sigma) == ([110], 0.5)


def test_settings_that_differ_between_rows_are_no_setting_of_the_log(log):
    header = HEADER.strip() + "\tsigma\talpha\n"
    results = read_results(log(header + row(end="\t0.5\t0.001\n") + row(1, end="\t0.25\t0.001\n")))
    assert (results.sigma, results.alpha) == (None, 0.001)


def test_tables_without_certificates_are_written_too(tmp_path):
    label, predict = np.array([1, 2, 3]), np.array([1, -1, 0])
    table = Results(np.arange(3), label, predict, np.array([0.3, 0.0, 0.1]), predict == label, np.array([0.5, 60, 4e3]))
    write_results(tmp_path / "log.tsv", table)
    again = read_results(tmp_path / "log.tsv")
    assert (tmp_path / "log.tsv").read_text().startswith(HEADER)
    assert again.predict.tolist() == table.predict.tolist()
    np.testing.assert_allclose(again.radius, table.radius, rtol=1e-7)
    np.testing.assert_allclose(again.seconds, table.seconds, atol=1e-6)


@pytest.mark.parametrize("text", ["0.1", "0.3", "0.7", "1.1", "2.675"])
def test_radii_of_a_grid_are_written_as_they_were_given(text):
    assert format_down(float(text)) == text


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_only_sizes_are_rounded_down(value):
    with pytest.raises(InputError, match="value: expected a finite number >= 0, got"):
        format_down(value)
