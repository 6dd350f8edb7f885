import json
import re
from pathlib import Path

import numpy as np
import pytest

from rs_plugins.core.attack_folder import AttackFolder, count_done
from rs_plugins.errors import InputError, ResultsError

SETTINGS = {"attack": "move", "options": {"eps": 0.5}, "seed": 0}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "out"


def batch(*indices):
    return {"index": np.array(indices), "l2": np.array(indices) / 10}


def test_batches_are_put_together_by_index(place):
    with AttackFolder(place, SETTINGS) as folder:
        assert folder.read() == {}
        folder.add(batch(4, 5))
        folder.add(batch(0, 2))
        assert {name: column.tolist() for name, column in folder.read().items()} == {
            "index": [0, 2, 4, 5],
            "l2": [0.0, 0.2, 0.4, 0.5],
        }
    assert json.loads((place / "settings.json").read_text()) == SETTINGS
    assert count_done(place) == 4


def test_a_finished_folder_is_one_file_and_can_be_extended(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0, 1))
        folder.finish(folder.read(), {"figures": 1})
    assert sorted(file.name for file in place.iterdir()) == ["adversarial.npz", "evaluation.json", "settings.json"]
    assert json.loads((place / "evaluation.json").read_text()) == {"figures": 1}
    with AttackFolder(place, SETTINGS, resume=True) as folder:
        folder.add(batch(7))
        assert folder.read()["index"].tolist() == [0, 1, 7]
    assert count_done(place) == 3


def test_killed_between_writing_all_and_removing_the_parts(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0, 1))
        part = (place / "parts" / "0000000000.npz").read_bytes()
        folder.finish(folder.read(), {})
    (place / "parts").mkdir()
    (place / "parts" / "0000000000.npz").write_bytes(part)
    with AttackFolder(place, SETTINGS, resume=True) as folder:
        assert folder.read()["l2"].tolist() == [0.0, 0.1]
    assert count_done(place) == 2


def test_a_draft_that_a_killed_run_left_is_no_batch(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
        (place / "parts" / "0000000001.npz.part").write_bytes(b"half")
        assert folder.read()["index"].tolist() == [0]


def test_a_column_that_not_all_batches_have_is_left_out(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
        folder.add(batch(1) | {"claimed": np.array([True])})
        assert sorted(folder.read()) == ["index", "l2"]


def test_a_folder_without_results_may_be_there(place):
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with AttackFolder(place, SETTINGS):
        pass
    with AttackFolder(place, SETTINGS | {"seed": 1}):  # nothing was stored
        pass
    assert json.loads((place / "settings.json").read_text())["seed"] == 1


def test_nothing_is_made_before_the_context(place):
    AttackFolder(place, SETTINGS)
    assert not place.exists()


def test_results_are_not_overwritten(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
    message = "out: it holds parts; to go on with it use resume (--resume), else choose another folder"
    with pytest.raises(ResultsError, match=re.escape(message)):
        AttackFolder(place, SETTINGS)


def test_results_of_another_run_are_refused(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
    message = "out: begun by another run (options: {'eps': 0.5} -> {'eps': 1}); choose another folder"
    with pytest.raises(ResultsError, match=re.escape(message)):
        AttackFolder(place, SETTINGS | {"options": {"eps": 1}}, resume=True)
    (place / "settings.json").write_text("{")
    with pytest.raises(ResultsError, match=r"cannot go on: settings\.json, .* is missing or damaged"):
        AttackFolder(place, SETTINGS, resume=True)


def test_two_processes_do_not_write_one_folder(place):
    with (
        AttackFolder(place, SETTINGS),
        pytest.raises(ResultsError, match="out: another process is writing this file"),
        AttackFolder(place, SETTINGS),
    ):
        pass


def test_a_damaged_batch_is_named(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
        (place / "parts" / "0000000003.npz").write_bytes(b"rubbish")
        with pytest.raises(ResultsError, match=r"0000000003\.npz: expected an archive of plain arrays, got"):
            folder.read()


def test_places_where_no_folder_can_be(place):
    with pytest.raises(InputError, match=r"out: there is no folder .*nowhere"):
        AttackFolder(place / "nowhere" / "x", SETTINGS)
    Path(place).write_text("a file")
    with pytest.raises(InputError, match=r"out: expected a folder, got .*out, which is something else"):
        AttackFolder(place, SETTINGS)
