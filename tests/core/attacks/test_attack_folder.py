import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from rs_plugins.core.attacks.folder import AttackFolder, count_done
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
    assert json.loads((place / "settings.json").read_text()) == {**SETTINGS, "format": "rs-plugins attack"}
    assert count_done(place) == 4


def test_a_finished_folder_is_one_file_and_can_be_extended(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0, 1))
        folder.finish(folder.read(), {"figures": 1})
    assert sorted(file.name for file in place.iterdir()) == [
        *(".lock", "adversarial.npz", "evaluation.json", "settings.json")
    ]
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
    with pytest.raises(ResultsError, match=re.escape(message)), AttackFolder(place, SETTINGS):
        pass


def test_results_of_another_run_are_refused(place):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
    message = "out: begun by another run (options: {'eps': 0.5} -> {'eps': 1}); choose another folder"
    other = AttackFolder(place, SETTINGS | {"options": {"eps": 1}}, resume=True)
    with pytest.raises(ResultsError, match=re.escape(message)), other:
        pass
    for content in ("{", "[]", "{}"):
        (place / "settings.json").write_text(content)
        folder = AttackFolder(place, SETTINGS, resume=True)
        with pytest.raises(ResultsError, match=r"cannot go on: settings\.json, .* is missing or damaged"), folder:
            pass


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("change", [{}, {"seed": 1}])
def test_two_processes_do_not_write_one_folder(place, change, stored):
    with AttackFolder(place, SETTINGS) as first:
        if stored:
            first.add(batch(0))
        second = AttackFolder(place, SETTINGS | change, resume=True)
        with pytest.raises(ResultsError, match="out: another process is writing this file"), second:
            pass
        assert json.loads((place / "settings.json").read_text())["seed"] == 0
        third = AttackFolder(place, SETTINGS | change)  # the first still holds the lock
        with pytest.raises(ResultsError, match="out: another process is writing this file"), third:
            pass
    with AttackFolder(place, SETTINGS, resume=True):
        pass


def test_what_another_process_began_since_is_not_mixed(place):
    early = AttackFolder(place, SETTINGS | {"seed": 1}, resume=True)
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
    with pytest.raises(ResultsError, match=r"begun by another run \(seed: 0 -> 1\)"), early:
        pass


@pytest.mark.parametrize("content", ['{"colour": "red"}', "[]", "colour = red"])
def test_somebody_elses_settings_are_left_alone(place, content):
    place.mkdir()
    (place / "settings.json").write_text(content)
    with pytest.raises(ResultsError, match=r"settings\.json: not written by an attack of rs-plugins; choose another"):
        AttackFolder(place, SETTINGS)
    assert [file.name for file in place.iterdir()] == ["settings.json"]
    assert (place / "settings.json").read_text() == content
    (place / "settings.json").unlink()
    folder = AttackFolder(place, SETTINGS)
    (place / "settings.json").write_text(content)
    with pytest.raises(ResultsError, match=r"settings\.json: not written by an attack"), folder:
        pass
    assert (place / "settings.json").read_text() == content


@pytest.mark.parametrize("value", [{"norm": float("inf")}, [float("nan")], {1, 2}, np.float32(1)])
def test_settings_that_are_not_plain_are_refused_at_the_start(place, value):
    message = f"settings: expected plain data without infinite numbers, got options={value!r}"
    with pytest.raises(InputError, match=re.escape(message)):
        AttackFolder(place, SETTINGS | {"options": value})
    assert not place.exists()


@pytest.mark.parametrize("name", ["adversarial.npz", "parts/0000000003.npz"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [3]}, "expected a column l2, got index"),
        ({"l2": [0.3]}, "expected a column index, got l2"),
        ({}, "expected a column index, got none"),
        ({"index": [3], "l2": [0.3, 0.4]}, "expected 1 rows, as index has, got l2 of shape (2,)"),
        ({"index": [3], "l2": 0.3}, "expected 1 rows, as index has, got l2 of shape ()"),
        ({"index": [3.0], "l2": [0.3]}, "expected whole numbers as index, got float64 of shape (1,)"),
        ({"index": [[3]], "l2": [0.3]}, "expected whole numbers as index, got int64 of shape (1, 1)"),
    ],
)
def test_files_without_the_columns_are_named(place, name, columns, message):
    with AttackFolder(place, SETTINGS, columns=("l2",)) as folder:
        folder.add(batch(0))
        np.savez(place / name, **columns)
        expected = re.escape(f"{place / name}: {message}")
        with pytest.raises(ResultsError, match=expected):
            folder.read()
        needed = "column l2" not in message
        with pytest.raises(ResultsError, match=expected) if needed else nullcontext():
            count_done(place)


@pytest.mark.parametrize("l2", [[[0.3]], ["far"]])
def test_files_whose_rows_do_not_fit_together_are_named(place, l2):
    with AttackFolder(place, SETTINGS) as folder:
        folder.add(batch(0))
        np.savez(place / "parts" / "0000000003.npz", index=[3], l2=l2)
        message = r"0000000003\.npz: expected l2 as in 0000000000\.npz, got rows of another shape or type"
        with pytest.raises(ResultsError, match=message):
            folder.read()


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
