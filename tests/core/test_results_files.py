import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results import Results
from rs_plugins.core.results_files import (
    COLUMNS,
    OUR_COLUMNS,
    format_down,
    format_time,
    parse_time,
    read_results,
    write_results,
)
from rs_plugins.core.results_writer import ResultsWriter
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

LOGS = Path(os.environ.get("RS_PLUGINS_REFERENCE", Path(__file__).parents[3] / "shared" / "reference")) / "certify-logs"
needs_logs = pytest.mark.skipif(
    not LOGS.is_dir(), reason="the published certification logs are not here; RS_PLUGINS_REFERENCE says where they are"
)
HEADER = "\t".join(COLUMNS) + "\n"
IMAGES = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = [0, 1, 2, 3, 0, 1]

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


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))


def certificates(seed=0, model_seed=0, **options):
    plan = FixedBudget(**({"n0": 10, "n": 200} | options))
    return list(certify(network(model_seed), IMAGES, 0.5, plan=plan, seed=seed))


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
        (HEADER + row(time="later"), "line 2: could not convert"),
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


def test_written_logs_are_read_back(tmp_path):
    made = certificates()
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        for certificate, label in zip(made, LABELS, strict=True):
            writer.write(certificate, label)
    lines = (tmp_path / "log.tsv").read_text().splitlines()
    assert lines[0].split("\t") == [*COLUMNS, *OUR_COLUMNS]
    assert all(len(line.split("\t")[5].split(":")) == 3 for line in lines[1:])
    last = dict(zip(lines[0].split("\t"), lines[-1].split("\t"), strict=True))
    assert (last["n0"], last["n"], last["sigma"], last["alpha"], last["seed"]) == ("10", "200", "0.5", "0.001", "0")
    assert int(last["count"]) == made[-1].count
    assert float(last["pa_lower"]) == pytest.approx(made[-1].p_lower, rel=1e-9)
    assert float(last["pa_lower"]) <= made[-1].p_lower
    results, direct = read_results(tmp_path / "log.tsv"), Results.of(made, LABELS)
    for name in ("idx", "label", "predict", "correct"):
        assert getattr(results, name).tolist() == getattr(direct, name).tolist()
    assert (results.radius <= direct.radius).all()
    np.testing.assert_allclose(results.radius, direct.radius, rtol=1e-7)


def test_our_own_columns_come_back(tmp_path):
    made = certificates(alpha=0.01)
    made[1] = replace(made[1], runner_up=0.25, draw=0.125)
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        for certificate, label in zip(made, LABELS, strict=True):
            writer.write(certificate, label)
    results, direct = read_results(tmp_path / "log.tsv"), Results.of(made, LABELS)
    for table in (results, direct):
        assert table.samples.tolist() == [210] * 6
        assert (table.sigma, table.alpha) == (0.5, 0.01)
    lines = [line.split("\t") for line in (tmp_path / "log.tsv").read_text().splitlines()]
    assert lines[0][-2:] == ["runner_up", "draw"]
    assert [line[-2:] for line in lines[1:3]] == [["", ""], ["0.25", "0.125"]]


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


def test_a_run_can_be_compared_before_its_first_certificate(tmp_path):
    path, made = tmp_path / "log.tsv", certificates()
    with ResultsWriter(path) as writer:
        writer.begin(made[0].made_with, {"data": "digits", "size": [1, 2]})
        writer.write(made[0], 0)
        writer.begin(made[0].made_with)  # compares only
        with pytest.raises(ResultsError, match=r"begun by another run \(seed: 0 -> 1\); choose"):
            writer.write(certificates(seed=1)[1], 1)
    with ResultsWriter(path) as writer:
        with pytest.raises(ResultsError, match=r"\(data: 'digits' -> 'mnist'\)"):
            writer.begin(made[0].made_with, {"data": "mnist", "size": [1, 2]})
        with pytest.raises(ResultsError, match=r"\(data: 'digits' -> None; size: \[1, 2\] -> None\)"):
            writer.begin(made[0].made_with)
        writer.begin(made[0].made_with, {"data": "digits", "size": (1, 2)})
        writer.write(made[1], 1)
    assert read_results(path).idx.tolist() == [0, 1]


def test_tables_without_certificates_are_written_too(tmp_path):
    table = Results.of(certificates(), LABELS)
    write_results(tmp_path / "log.tsv", table)
    again = read_results(tmp_path / "log.tsv")
    assert (tmp_path / "log.tsv").read_text().startswith(HEADER)
    assert again.predict.tolist() == table.predict.tolist()
    np.testing.assert_allclose(again.radius, table.radius, rtol=1e-7)
    np.testing.assert_allclose(again.seconds, table.seconds, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_run_killed_in_the_middle_of_a_line_goes_on(tmp_path, cut):
    path, made = tmp_path / "log.tsv", certificates()

    def run(stop):
        with ResultsWriter(path) as writer:
            for certificate, label in zip(made[:stop], LABELS, strict=False):
                if certificate.index not in writer.done:
                    writer.write(certificate, label)

    run(6)
    whole = path.read_bytes()
    path.unlink()
    run(3)
    path.write_bytes(path.read_bytes()[:-cut])
    run(6)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"alpha": 0.01}, "alpha: 0.001 -> 0.01"),
        ({"model_seed": 1}, "model: '"),
        ({"n": 300}, r"plan: 'FixedBudget\(n0=10, n=200, alpha=0.001\)' -> 'FixedBudget\(n0=10, n=300"),
        ({"n0": 20}, r"plan: .* -> 'FixedBudget\(n0=20, n=200"),
    ],
    ids=["seed", "alpha", "model", "n", "n0"],
)
def test_a_file_of_another_run_is_not_continued(tmp_path, options, difference):
    path = tmp_path / "log.tsv"
    with ResultsWriter(path) as writer:
        writer.write(certificates()[0], 0)
    before = path.read_bytes()
    with (
        ResultsWriter(path) as writer,
        pytest.raises(ResultsError, match=f"begun by another run .*{difference}.*; choose another file"),
    ):
        writer.write(certificates(**options)[1], 1)
    assert path.read_bytes() == before


def test_other_files_are_not_overwritten(log):
    path = log("something else entirely, with no newline")
    with pytest.raises(ResultsError, match="expected a log begun by rs-plugins, got another file"):
        ResultsWriter(path)
    assert path.read_text().startswith("something else")


@pytest.mark.parametrize(
    "record", [None, "", '{"sigma": 0.', "[]", "null"], ids=["missing", "empty", "cut", "list", "null"]
)
def test_a_log_without_its_record_is_not_continued(tmp_path, record):
    path = tmp_path / "log.tsv"
    with ResultsWriter(path) as writer:
        writer.write(certificates()[0], 0)
    (tmp_path / "log.tsv.json").unlink()
    if record is not None:
        (tmp_path / "log.tsv.json").write_text(record)
    message = r"cannot go on: log.tsv.json, which says what it was made with, is missing or damaged"
    with ResultsWriter(path) as writer, pytest.raises(ResultsError, match=message):
        writer.write(certificates()[1], 1)


@pytest.mark.parametrize("kept", [0, 1, 20, len("\t".join((*COLUMNS, *OUR_COLUMNS)))])
def test_a_run_killed_in_the_middle_of_the_header_goes_on(tmp_path, kept):
    header = "\t".join((*COLUMNS, *OUR_COLUMNS)) + "\n"
    path = tmp_path / "log.tsv"
    path.write_text(header[:kept])
    with ResultsWriter(path) as writer:
        assert writer.done == set()
        writer.write(certificates()[0], 0)
        assert writer.done == {0}
    assert path.read_text().startswith(header)
    assert len(read_results(path)) == 1


def test_a_run_killed_between_header_and_first_row_or_after_the_record_goes_on(tmp_path):
    path = tmp_path / "log.tsv"
    ResultsWriter(path).close()
    (tmp_path / "log.tsv.json").write_text("{}")
    with ResultsWriter(path) as writer:
        writer.write(certificates()[0], 0)
    assert len(read_results(path)) == 1


def test_images_are_written_in_order_and_once(tmp_path):
    made = certificates()
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        writer.write(made[2], 0)
        for index in (2, 1):
            with pytest.raises(ResultsError, match=f"expected images in increasing order, got {index} after 2"):
                writer.write(made[index], 0)
    with ResultsWriter(tmp_path / "log.tsv") as writer, pytest.raises(ResultsError, match="got 0 after 2"):
        writer.write(made[0], 0)
    assert read_results(tmp_path / "log.tsv").idx.tolist() == [2]


def test_one_writer_at_a_time(tmp_path):
    with ResultsWriter(tmp_path / "log.tsv"), pytest.raises(ResultsError, match="another process is writing this file"):
        ResultsWriter(tmp_path / "log.tsv")
    ResultsWriter(tmp_path / "log.tsv").close()


def test_numbers_of_other_libraries_can_be_written(tmp_path):
    plan = FixedBudget(n0=np.int64(10), n=200.0, alpha=np.float32(0.001))
    assert repr(plan).startswith("FixedBudget(n0=10, n=200, alpha=0.001")
    made = next(certify(network(), IMAGES, np.float32(0.5), plan=plan, seed=np.int64(3)))
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        writer.write(made, 0)
    assert len(read_results(tmp_path / "log.tsv")) == 1


@pytest.mark.parametrize("text", ["0.1", "0.3", "0.7", "1.1", "2.675"])
def test_radii_of_a_grid_are_written_as_they_were_given(text):
    assert format_down(float(text)) == text


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_only_sizes_are_rounded_down(value):
    with pytest.raises(InputError, match="value: expected a finite number >= 0, got"):
        format_down(value)
