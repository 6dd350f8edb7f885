import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import COLUMNS, OUR_COLUMNS, read_results
from rs_plugins.core.results.table import Results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.errors import ResultsError

IMAGES = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = [0, 1, 2, 3, 0, 1]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))


def certificates(seed=0, model_seed=0, **options):
    plan = FixedBudget(**({"n0": 10, "n": 200} | options))
    return list(certify(network(model_seed), IMAGES, 0.5, plan=plan, seed=seed))


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
    made[1] = replace(made[1], runner_up=0.25, draw=0.125, invalid=3)
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        for certificate, label in zip(made, LABELS, strict=True):
            writer.write(certificate, label)
    results, direct = read_results(tmp_path / "log.tsv"), Results.of(made, LABELS)
    for table in (results, direct):
        assert table.samples.tolist() == [210] * 6
        assert (table.sigma, table.alpha) == (0.5, 0.01)
    lines = [line.split("\t") for line in (tmp_path / "log.tsv").read_text().splitlines()]
    assert lines[0][-3:] == ["runner_up", "draw", "invalid"]
    assert [line[-3:] for line in lines[1:3]] == [["", "", "0"], ["0.25", "0.125", "3"]]


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


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("something else entirely, with no newline")
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


def test_the_names_of_a_record_and_a_log_are_forced_to_disk_too(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        writer.write(certificates()[0], 0)
    assert synced == [False, True, False, False]  # record, folder, header, row
