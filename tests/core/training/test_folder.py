import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from rs_plugins.core.training.folder import Epoch, Progress, TrainingFolder, checkpoints_in, load_checkpoint
from rs_plugins.errors import InputError, ResultsError

SETTINGS = {"lr": 0.1, "data": "made up"}
RECORD = {"sigma": 0.25}


def network(value=0.0):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def opened(path, settings=SETTINGS, start="the weights", **options):
    return TrainingFolder(path, settings, start=start, **options)


def content(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != ".lock"}


def names(path):
    return [place.name for place in checkpoints_in(path)]


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints and the trained network."""
    path = tmp_path / "run"
    with opened(path) as folder:
        for number in (1, 2):
            progress = Progress("the weights")
            progress.finish_epoch(Epoch(number, 0.5, None, 0.1, 1.0))
            folder.keep(progress, *network(number), RECORD)
        folder.finish(network(2.0)[0], RECORD)
    return path


def test_checkpoints_are_in_the_order_of_time(tmp_path):
    ordered = [
        *("epoch-0000-step-999999", "epoch-0000-step-1000000", "epoch-0001", "epoch-0001-step-000002"),
        *("epoch-9998-step-000001", "epoch-9999", "epoch-10000", "epoch-10000-step-000001"),
    ]
    for name in reversed(ordered):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert names(tmp_path) == ordered
    assert Progress("", epoch=10000, steps=1_000_000).name == "epoch-10000-step-1000000"


def test_what_has_another_name_is_no_checkpoint(run):
    theirs = ["epoch-0003 copy", "epoch-best", "epoch-3", "epoch-0003-step-5", "my-epoch-0003", ".epoch-best"]
    for name in theirs:
        (run / "checkpoints" / name).mkdir()
    assert names(run) == ["epoch-0001", "epoch-0002"]
    model, optimizer = network()
    with opened(run, resume=True, keep=1) as folder:
        state = load_checkpoint(run, model, optimizer)
        state.finish_epoch(Epoch(3, 0.5, None, 0.1, 1.0))
        folder.keep(state, model, optimizer, RECORD)
    assert model.weight[0, 0].item() == 2
    assert sorted(os.listdir(run / "checkpoints")) == sorted([*theirs, "epoch-0003"])


def test_drafts_of_killed_runs_are_removed(run):
    for name in (".epoch-0003", ".epoch-0002-step-000004"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "model.safetensors").touch()
    with pytest.raises(ResultsError, match="it holds checkpoints"), opened(run):
        pass
    assert (run / "checkpoints" / ".epoch-0003").is_dir()  # a refused folder is left as it is
    with opened(run, resume=True):
        assert sorted(os.listdir(run / "checkpoints")) == ["epoch-0001", "epoch-0002"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("removed", [[], ["model.safetensors"], ["model.json"], ["settings.json"]], ids=repr)
def test_a_trained_network_without_checkpoints_is_left_alone(run, resume, removed):
    for place in checkpoints_in(run):
        place.rename(run / place.name)
    for name in removed:
        (run / name).unlink()
    before = content(run)
    held = "model.json" if "model.safetensors" in removed else r"model\.safetensors"
    message = f"run: it holds {held}, and no checkpoint to go on from; choose another folder"
    with pytest.raises(ResultsError, match=message), opened(run, resume=resume):
        pass
    assert content(run) == before


def test_the_initial_weights_count_until_there_is_a_checkpoint(run, tmp_path):
    path = tmp_path / "killed"
    with opened(path):
        pass
    before = content(path)
    message = (
        r"killed: begun by another run \(start: 'the weights' -> 'others'\); choose another folder; there is no "
        r"checkpoint yet, so without resume \(--resume\) it begins anew"
    )
    with pytest.raises(ResultsError, match=message), opened(path, start="others", resume=True):
        pass
    with pytest.raises(ResultsError, match=r"lr: 0\.1 -> 0\.2"), opened(path, {**SETTINGS, "lr": 0.2}, resume=True):
        pass
    assert content(path) == before
    with opened(path, resume=True):
        pass
    with opened(path, start="others"):
        pass
    assert json.loads((path / "settings.json").read_text())["start"] == "others"
    with opened(run, start="others", resume=True):
        pass
    assert json.loads((run / "settings.json").read_text())["start"] == "the weights"


def test_settings_that_are_missing_or_differ(run):
    with pytest.raises(ResultsError, match=r"\(lr: 0\.1 -> 0\.2\); choose another folder$"):
        opened(run, {**SETTINGS, "lr": 0.2}, resume=True).__enter__()
    (run / "settings.json").unlink()
    with pytest.raises(ResultsError, match=r"run: cannot go on: settings\.json, which says how it was begun, is miss"):
        opened(run, resume=True).__enter__()


@pytest.mark.parametrize("name", ["checkpoints", ".lock"])
def test_what_is_in_the_way_is_named(tmp_path, name):
    path = tmp_path / "run"
    path.mkdir()
    if name == "checkpoints":
        (path / name).touch()
    else:
        (path / name).mkdir()
    with pytest.raises(ResultsError, match=r"run: cannot be written \((File exists|Is a directory)\)"), opened(path):
        pass


def test_a_place_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ResultsError, match=r"run: cannot be written \(Permission denied\)"):
        opened(tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResultsError, match="cannot be written"), opened(tmp_path / "run"):
        pass
    tmp_path.chmod(0o700)


def test_a_checkpoint_that_cannot_be_written_is_named(run):
    with opened(run, resume=True) as folder:
        (run / "checkpoints" / "epoch-0003").touch()
        with pytest.raises(ResultsError, match=r"epoch-0003: cannot be written \(Not a directory\)"):
            folder.keep(Progress("", epoch=3), *network(), RECORD)


def test_a_folder_needs_a_parent_and_is_one(tmp_path):
    with pytest.raises(InputError, match="out: there is no folder"):
        opened(tmp_path / "no" / "where")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out: expected a folder, got .*file, which is something else"):
        opened(tmp_path / "file")
