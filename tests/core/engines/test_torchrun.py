"""Shards of the processes of torchrun; here one process plays them all, one after another."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.engines import torchrun
from rs_plugins.core.engines.torchrun import Processes, certify_in_shards, processes
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import RESULTS, read_results
from rs_plugins.core.selection import Selection
from rs_plugins.errors import InputError, ResultsError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 3), dtype=np.uint8)
DATA = in_memory("squares", IMAGES, np.arange(12) % 4)
FIRST, SECOND = Processes(0, 2, 0, 2, 0), Processes(1, 2, 1, 2, 0)


def certify(log, selection, resume, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    return certify_data_set(
        *(model, DATA, 0.5, log), plan=FixedBudget(n0=10, n=100), selection=selection, resume=resume, seed=seed
    )


def content(log):
    rows = [line.split("\t") for line in log.read_text().split("\n")]
    return [[*row[:5], *row[6:]] for row in rows], log.with_name(log.name + ".json").read_bytes()


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(torchrun, "_wait_for_all", lambda group: None)


def shards(log, group, selection=None, run=certify, **options):
    options = {"images": 12, "selection": selection or Selection()} | options
    return certify_in_shards(log, run, group, RESULTS, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("selection", [Selection(), Selection(start=1, stop=11, skip=3)], ids=["all", "some"])
def test_the_first_process_merges_the_shards(tmp_path, selection):
    log, one = tmp_path / "log.tsv", tmp_path / "one.tsv"
    certify(one, selection, False)
    assert shards(log, SECOND, selection) is None
    assert names(tmp_path) == ["log.tsv.shard-1-of-2", "log.tsv.shard-1-of-2.json", "one.tsv", "one.tsv.json"]
    assert json.loads((tmp_path / "log.tsv.shard-1-of-2.json").read_text())["selection"]["shard"] == [1, 2]
    rows = shards(log, FIRST, selection)
    assert rows.idx.tolist() == selection.positions(12)
    assert content(log) == content(one)
    assert names(tmp_path) == ["log.tsv", "log.tsv.json", "one.tsv", "one.tsv.json"]


def test_a_shard_that_is_not_finished_is_named_and_kept(tmp_path):
    log = tmp_path / "log.tsv"
    shards(log, SECOND)
    shard = SECOND.shard_of(log)
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:3]))
    with pytest.raises(ResultsError, match=r"log.tsv.shard-1-of-2: not finished: 2 of 6 images, no image 5"):
        shards(log, FIRST)
    assert not log.exists()
    with pytest.raises(ResultsError, match=r"log.tsv.shard-1-of-2: it exists; to go on with it use resume"):
        shards(log, SECOND)
    shards(log, SECOND, resume=True)
    shards(log, FIRST, resume=True)
    certify(tmp_path / "one.tsv", Selection(), False)
    assert content(log) == content(tmp_path / "one.tsv")


def test_a_shard_that_is_missing_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"log.tsv.shard-1-of-2: "):
        shards(tmp_path / "log.tsv", FIRST)
    assert read_results(tmp_path / "log.tsv.shard-0-of-2").idx.tolist() == [0, 2, 4, 6, 8, 10]


def test_what_torchrun_starts_again_goes_on_unasked(tmp_path):
    log, told = tmp_path / "log.tsv", []

    def run(path, selection, resume):
        told.append(resume)
        return certify(path, selection, resume)

    shards(log, SECOND, run=run)
    shards(log, replace(SECOND, restarts=1), run=run)
    shards(log, replace(FIRST, restarts=1), run=run)
    assert told == [False, True, True]
    assert len(read_results(log)) == 12


def test_a_finished_log_is_that_of_the_run_or_refused(tmp_path):
    log = tmp_path / "log.tsv"
    certify(log, Selection(), False)
    (tmp_path / "log.tsv.shard-1-of-2").write_text("left by a process that was killed while it took shards away")
    before = content(log)
    with pytest.raises(ResultsError, match=r"log.tsv: it exists; to go on with it use resume"):
        shards(log, FIRST)
    assert shards(log, SECOND, resume=True) is None
    with pytest.raises(ResultsError, match=r"log.tsv: begun by another run \(seed: 0 -> 1\)"):
        shards(log, FIRST, resume=True, run=lambda *given: certify(*given, seed=1))
    assert len(shards(log, FIRST, resume=True)) == 12
    assert content(log) == before
    assert names(tmp_path) == ["log.tsv", "log.tsv.json"]


def test_an_unfinished_log_of_one_process_is_refused(tmp_path):
    certify(tmp_path / "log.tsv", Selection(stop=5), False)
    for group in (FIRST, SECOND):
        with pytest.raises(ResultsError, match=r"log.tsv: it holds 5 of 12 images, .* go on with it without torchrun"):
            shards(tmp_path / "log.tsv", group, resume=True)
    assert len(read_results(tmp_path / "log.tsv")) == 5


def test_another_number_of_processes_is_refused(tmp_path):
    shards(tmp_path / "log.tsv", SECOND)
    message = r"log.tsv.shard-1-of-2: of a run with 2 processes, this one has 3; start as many, or take it away"
    with pytest.raises(ResultsError, match=message):
        shards(tmp_path / "log.tsv", Processes(0, 3, 0, 3, 0), resume=True)


@pytest.mark.parametrize(
    ("selection", "group", "message"),
    [
        (Selection(shard=(1, 3)), FIRST, "shard: torchrun makes its own; expected 0/1, got 1/3"),
        (Selection(stop=1), FIRST, "processes: expected at most 1, one an image, got 2"),
    ],
    ids=["shard", "images"],
)
def test_selections_that_cannot_be_shared_out(tmp_path, selection, group, message):
    with pytest.raises(InputError, match=message):
        shards(tmp_path / "log.tsv", group, selection)
    assert not names(tmp_path)


def test_processes_are_those_of_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("rs_plugins.core.engines.cores.cores", lambda: 8)
    assert processes() is None
    told = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (told | {"TORCHELASTIC_RESTART_COUNT": "2", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert processes() == Processes(rank=5, world=6, local_rank=1, local_world=4, restarts=2)
    assert processes().threads == 2
