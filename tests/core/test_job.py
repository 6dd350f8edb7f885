import json
import multiprocessing
import random
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.files import HEADER, read_results
from rs_plugins.core.results.merging import merge_results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.core.selection import Selection
from rs_plugins.errors import (
    InputError,
    ModelError,
    ModelWarning,
    PluginError,
    ResultsError,
    ResultsWarning,
    RSPluginsWarning,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 3), dtype=np.uint8)
LABELS = np.arange(12) % 4
PLAN = FixedBudget(n0=10, n=100)


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, classes))


def data(images=IMAGES, labels=LABELS):
    return in_memory("squares", images, labels)


def job(log, model=None, **options):
    options = {"plan": PLAN, "data": data(), "sigma": 0.5} | options
    sigma, images = options.pop("sigma"), options.pop("data")
    return certify_data_set(model or network(), images, sigma, log, **options)


def content(log):
    """A log without its times, and its record."""
    lines = log.read_text().split("\n")
    rows = ["\t".join(cell for place, cell in enumerate(line.split("\t")) if place != 5) for line in lines]
    return "\n".join(rows), log.with_name(log.name + ".json").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    log = tmp_path_factory.mktemp("whole") / "log.tsv"
    job(log)
    return log


def test_the_log_is_what_certify_says(whole):
    images = torch.from_numpy(IMAGES.astype(np.float32)) / 255
    expected = list(certify(network(), images, 0.5, plan=PLAN))
    results = read_results(whole)
    assert results.predict.tolist() == [certificate.prediction for certificate in expected]
    assert results.label.tolist() == LABELS.tolist()
    np.testing.assert_allclose(results.radius, [certificate.radius for certificate in expected], rtol=1e-7)
    assert results.samples.tolist() == [110] * 12
    record = json.loads(whole.with_name("log.tsv.json").read_text())
    assert record["model"] == expected[0].made_with.model
    assert (record["data"], record["images"], record["shape"]) == ("squares", 12, "1x3x3")
    assert record["digest"] == data().digest


def test_options_reach_the_engine(tmp_path):
    results = job(tmp_path / "log.tsv", seed=3, sigma=0.25, chunk=7, device="cpu")
    record = json.loads((tmp_path / "log.tsv.json").read_text())
    assert (record["seed"], record["sigma"], results.sigma, results.alpha) == (3, 0.25, 0.25, 0.001)
    with pytest.raises(InputError, match="chunk: expected an integer >= 1, got 0"):
        job(tmp_path / "other.tsv", chunk=0)
    with pytest.raises(TypeError, match="chunks"):
        job(tmp_path / "other.tsv", chunks=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv", "log.tsv.json"]


@pytest.mark.parametrize("memory", [1, 5 * 36])
def test_images_are_read_in_parts(tmp_path, whole, memory):
    asked = []

    def read(positions):
        asked.append(len(positions))
        return data().read(positions)

    lazy = data()
    object.__setattr__(lazy, "read", read)
    job(tmp_path / "log.tsv", data=lazy, memory=memory)
    assert content(tmp_path / "log.tsv") == content(whole)
    assert asked == ([1] * 13 if memory == 1 else [1, 5, 5, 2])


def test_parts_are_read_one_at_a_time(tmp_path):
    lazy, log, held = data(), tmp_path / "log.tsv", []

    def read(positions):
        held.append(log.read_bytes().count(b"\n") if log.exists() else None)
        return data().read(positions)

    object.__setattr__(lazy, "read", read)
    job(log, data=lazy, memory=5 * 36)
    assert held == [None, 0, 6, 11]  # lines: the header, and five images a part


@pytest.mark.parametrize(
    ("selection", "positions"),
    [
        (Selection(), list(range(12))),
        (Selection(start=3), list(range(3, 12))),
        (Selection(stop=5), list(range(5))),
        (Selection(stop=500), list(range(12))),
        (Selection(skip=5), [0, 5, 10]),
        (Selection(start=1, skip=5), [5, 10]),
        (Selection(skip=5, stop=7), [0, 5]),  # the reference looked for 7 itself, and went on to the end
        (Selection(shard=(1, 3)), [1, 4, 7, 10]),
        (Selection(skip=2, shard=(1, 2)), [2, 6, 10]),
    ],
)
def test_selections(selection, positions):
    assert selection.positions(12) == positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start: expected an integer >= 0, got -1"),
        ({"skip": 0}, "skip: expected an integer >= 1, got 0"),
        ({"start": 5, "stop": 5}, r"stop: expected more than start \(5\), got 5"),
        ({"shard": (3, 3)}, "shard: expected I/N with 0 <= I < N, got 3/3"),
        ({"shard": (-1, 3)}, "shard: expected I/N with 0 <= I < N, got -1/3"),
        ({"start": 12}, "selection: expected at least one image, got none of 12 by start 12"),
        ({"shard": (12, 13)}, "selection: expected at least one image, got none of 12"),
    ],
)
def test_selections_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Selection(**options).positions(12)


def test_a_log_that_exists_is_not_gone_on_with_unasked(tmp_path, whole):
    log = tmp_path / "log.tsv"
    log.write_bytes(b"anything")
    with pytest.raises(ResultsError, match=r"log.tsv: it exists; to go on with it use resume \(--resume\), else"):
        job(log)
    assert log.read_bytes() == b"anything"
    for first in (b"anything\n", b"idx\tof something else\n"):
        log.write_bytes(first)
        with pytest.raises(ResultsError, match=r"log.tsv: "):
            job(log)
        assert log.read_bytes() == first
    log.write_bytes(b"")
    job(log)
    assert content(log) == content(whole)


@pytest.mark.parametrize("resume", [False, True])
def test_a_log_without_a_row_is_not_in_the_way(tmp_path, whole, resume):
    log = tmp_path / "log.tsv"

    class Fails(FixedBudget):
        def procedure(self, case):
            raise ZeroDivisionError

    with pytest.raises(PluginError, match="plan: Fails fails: ZeroDivisionError"):
        job(log, plan=Fails(n=50))
    assert log.read_bytes().count(b"\n") == 1
    job(log, resume=resume)
    assert content(log) == content(whole)


def test_two_processes_do_not_begin_one_log(tmp_path):
    log, refused = tmp_path / "log.tsv", []

    class Asks(FixedBudget):
        def procedure(self, case):
            if log.read_bytes().count(b"\n") == 1:  # no row yet
                with pytest.raises(ResultsError, match=r"log.tsv: another process is writing this file"):
                    job(log)
                refused.append(log.read_bytes())
            return (yield from super().procedure(case))

    assert len(job(log, plan=Asks(n=50))) == 12
    assert set(refused) == {HEADER.encode()}


def cut(whole, log, size):
    log.write_bytes(whole.read_bytes()[:size])
    record = whole.with_name(whole.name + ".json")
    log.with_name(log.name + ".json").write_bytes(record.read_bytes())


@pytest.mark.parametrize("part", ["header", "last two rows"])
def test_cut_off_at_any_byte_it_goes_on(tmp_path, whole, part):
    """What a kill, or a full disk, can leave behind."""
    text = whole.read_bytes()
    ends = [end.start() + 1 for end in re.finditer(b"\n", text)]
    sizes = range(len(HEADER) + 1) if part == "header" else range(ends[-3], len(text) + 1)
    log = tmp_path / "log.tsv"
    small = {"data": data(IMAGES[:3], LABELS[:3])} if part == "header" else {}
    job(tmp_path / "expected.tsv", **small)
    for size in sizes:
        cut(tmp_path / "expected.tsv", log, size)
        job(log, resume=True, **small)
        assert content(log) == content(tmp_path / "expected.tsv"), size


@pytest.mark.parametrize("left", ["nothing", "an empty log", "a record", "half a record"])
def test_killed_before_the_first_image_it_goes_on(tmp_path, whole, left):
    log = tmp_path / "log.tsv"
    if left == "an empty log":
        log.touch()
    elif left == "a record":
        cut(whole, log, 0)
    elif left == "half a record":
        log.with_name("log.tsv.json.part").write_text('{"family": "gau')
    job(log, resume=True)
    assert content(log) == content(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv", "log.tsv.json"]


def test_a_smaller_part_can_be_extended(tmp_path, whole):
    log = tmp_path / "log.tsv"
    job(log, selection=Selection(stop=5))
    job(log, selection=Selection(stop=9), resume=True)
    assert len(read_results(log)) == 9
    job(log, resume=True)
    assert content(log) == content(whole)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            Selection(skip=3),
            r"begun with other images \(image 1 where this selection has image 3\); give the same start",
        ),
        (Selection(shard=(1, 3)), r"\(image 0 where this selection has image 1\)"),
        (Selection(stop=3), r"\(image 3 where this selection has an end\)"),
    ],
)
def test_a_log_of_other_images_is_refused(tmp_path, selection, message):
    log = tmp_path / "log.tsv"
    job(log, selection=Selection(stop=5))
    before = content(log)
    with pytest.raises(ResultsError, match=message):
        job(log, selection=selection, resume=True)
    assert content(log) == before


CHANGED = IMAGES.copy()
CHANGED[11, 0, 0, 0] ^= 1
OTHERS = {
    "model": ({"model": network(1)}, "model: '[0-9a-f]{64}' -> '[0-9a-f]{64}'"),
    "sigma": ({"sigma": 0.25}, "sigma: 0.5 -> 0.25"),
    "seed": ({"seed": 1}, "seed: 0 -> 1"),
    "plan": ({"plan": FixedBudget(n0=10, n=101)}, r"plan: 'FixedBudget\(n0=10, n=100.* -> 'FixedBudget\(n0=10, n=101"),
    "alpha": ({"plan": FixedBudget(n0=10, n=100, alpha=0.01)}, "alpha: 0.001 -> 0.01"),
    "pixels": ({"data": data(CHANGED)}, "digest: '[0-9a-f]{64}' -> "),
    "labels": ({"data": data(labels=LABELS[::-1])}, "digest: '[0-9a-f]{64}' -> "),
    "data": ({"data": in_memory("circles", IMAGES, LABELS)}, "data: 'squares' -> 'circles'"),
    "dtype": ({"model": network().double()}, "dtype: 'float32' -> 'float64'"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("state", ["begun", "in the middle of a line", "complete"])
def test_a_log_of_another_run_is_refused_before_any_work(tmp_path, whole, name, state):
    options, difference = OTHERS[name]
    log = tmp_path / "log.tsv"
    lines = whole.read_bytes().splitlines(keepends=True)
    cut(whole, log, {"begun": len(b"".join(lines[:3])), "complete": None}.get(state, len(b"".join(lines[:3])) + 7))
    before = log.read_bytes(), content(log)
    with pytest.raises(ResultsError, match=f"begun by another run .*{difference}.*; choose another file"):
        job(log, resume=True, **options)
    assert (log.read_bytes(), content(log)) == before


def test_other_versions_are_named(tmp_path, whole, monkeypatch):
    cut(whole, tmp_path / "log.tsv", 300)
    monkeypatch.setattr("rs_plugins.__version__", "9.9")
    with pytest.raises(ResultsError, match=r"versions: 'rs-plugins .*, torch .* -> 'rs-plugins 9\.9, torch"):
        job(tmp_path / "log.tsv", resume=True)


class Interrupted(nn.Module):
    """Stops with an error at the n-th large forward pass."""

    def __init__(self, passes):
        super().__init__()
        self.net, self.left = network(), passes

    def forward(self, x):
        self.left -= len(x) > 30
        if not self.left:
            raise KeyboardInterrupt
        return self.net(x)


def test_each_image_is_written_before_the_next(tmp_path):
    log = tmp_path / "log.tsv"
    with pytest.raises(KeyboardInterrupt):
        job(log, Interrupted(9), chunk=50)
    assert 2 <= len(read_results(log)) <= 4  # 110 votes each, of 8 passes
    job(log, Interrupted(-1), chunk=50, resume=True)
    job(tmp_path / "whole.tsv", Interrupted(-1))
    assert content(log) == content(tmp_path / "whole.tsv")


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(FixedBudget(n0=10, n=2000), id="fixed-budget"),
        pytest.param(OnGrid(radii=(0.0, 0.25, 0.5), n=5000), id="on-grid", marks=pytest.mark.slow),
    ],
)
def test_killed_twenty_times_it_makes_the_same_log(tmp_path, monkeypatch, plan):
    """SIGKILL at random moments, also before the first image; a fresh process goes on."""
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 3, 3), dtype=np.uint8)
    many, log, expected = data(images, np.arange(60) % 4), tmp_path / "log.tsv", tmp_path / "expected.tsv"
    job(expected, data=many, plan=plan)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:resource_tracker")  # tqdm's locks outlive a process that is killed
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rs_plugins.core.job"])
    work = partial(certify_data_set, network(), many, 0.5, log, plan=plan, resume=True, chunk=64)
    moments, span, size = random.Random(0), 0.2, 0
    kills = at_work = 0
    while kills < 20 or at_work < 5:
        process = server.Process(target=work)
        process.start()
        process.join(moments.uniform(0, span))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        before, size = size, log.stat().st_size if log.exists() else 0
        kills += process.exitcode != 0
        at_work += process.exitcode != 0 and size > before
        if process.exitcode == 0:  # it was faster: compare, and begin again
            assert content(log) == content(expected)
            log.unlink()
            span, size = span / 2, 0
        elif size == before:  # a slow machine had not come to work yet
            span *= 1.1
    certify_data_set(network(), many, 0.5, log, plan=plan, resume=True)
    assert content(log) == content(expected)


def shards(folder, n=3, **options):
    logs = [folder / f"{part}.tsv" for part in range(n)]
    for part, log in enumerate(logs):
        job(log, selection=Selection(shard=(part, n), **options))
    return logs


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_merged_are_the_log_of_one_run(tmp_path, whole, order):
    logs = shards(tmp_path)
    results = merge_results([logs[part] for part in order], tmp_path / "merged.tsv")
    assert content(tmp_path / "merged.tsv") == content(whole)
    assert results.idx.tolist() == list(range(12))


def test_shards_of_a_selection_are_merged(tmp_path):
    logs = shards(tmp_path, 2, skip=2, start=3)
    assert merge_results(logs, tmp_path / "merged.tsv").idx.tolist() == [4, 6, 8, 10]
    job(tmp_path / "one.tsv", selection=Selection(skip=2, start=3))
    assert content(tmp_path / "merged.tsv") == content(tmp_path / "one.tsv")


def selection(log):
    return json.loads(log.with_name(log.name + ".json").read_text())["selection"]


def test_a_missing_shard_is_named(tmp_path):
    logs, merged = shards(tmp_path), tmp_path / "merged.tsv"
    message = "4 images are missing, the first is image 2, so is shard 2/3"
    for some, text in ((logs[:2], message), (logs[2:], "8 images are missing, .* 0, so is shard 0/3, 1/3")):
        with pytest.raises(ResultsError, match=rf"{text}; partial \(--partial\) merges what there is"):
            merge_results(some, merged)
        assert not merged.exists()
    with pytest.warns(ResultsWarning, match=message):
        assert len(merge_results(logs[:2], merged, partial=True)) == 8
    assert selection(merged) == {"start": 0, "stop": 12, "skip": 1, "shard": [0, 1]}


@pytest.mark.parametrize("rows", [0, 2])
def test_an_unfinished_shard_is_named(tmp_path, rows):
    logs, merged = shards(tmp_path), tmp_path / "merged.tsv"
    lines = logs[1].read_bytes().splitlines(keepends=True)
    logs[1].write_bytes(b"".join(lines[: rows + 1]))
    message = rf"1.tsv: not finished: {rows} of 4 images, no image {1 + 3 * rows}; go on with that run first"
    with pytest.raises(ResultsError, match=message):
        merge_results(logs, merged)
    logs[1].write_bytes(b"".join(lines[: rows + 1]) + lines[rows + 1][:9])
    with pytest.warns(ResultsWarning, match=message):
        assert len(merge_results(logs, merged, partial=True)) == 8 + rows


def test_ranges_are_merged_as_well(tmp_path, whole):
    logs = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    job(logs[0], selection=Selection(stop=5))
    job(logs[1], selection=Selection(start=5))
    merge_results(logs, tmp_path / "merged.tsv")
    assert content(tmp_path / "merged.tsv") == content(whole)


def test_a_log_that_is_being_written_is_not_merged(tmp_path):
    logs = shards(tmp_path)
    with (
        ResultsWriter(logs[1]),
        pytest.raises(ResultsError, match=r"1.tsv: another process is writing this file"),
    ):
        merge_results(logs, tmp_path / "merged.tsv", partial=True)


def as_older_versions_wrote_it(log):
    rows = [line.rpartition("\t")[0] for line in log.read_text().splitlines()]
    log.write_text("\n".join(rows) + "\n")
    record = log.with_name(log.name + ".json")
    old = {name: value for name, value in json.loads(record.read_text()).items() if name != "selection"}
    record.write_text(json.dumps(old))


def test_logs_of_older_versions(tmp_path, whole):
    logs = shards(tmp_path)
    for log in logs:
        as_older_versions_wrote_it(log)
    with pytest.raises(ResultsError, match=r"0.tsv: begun by an older version, which alone can go on with it"):
        job(logs[0], selection=Selection(shard=(0, 3)), resume=True)
    with pytest.warns(ResultsWarning, match=r"image 2 is in none of the logs; is a shard missing or not finished\?"):
        merge_results(logs[:2], tmp_path / "some.tsv")
    merged = merge_results(logs, tmp_path / "merged.tsv")
    assert merged.radius.tolist() == read_results(whole).radius.tolist()
    job(tmp_path / "new.tsv", selection=Selection(shard=(2, 3)))
    with pytest.raises(ResultsError, match=r"new.tsv: of another run than .*0.tsv \(skip: None -> 1\)"):
        merge_results([*logs[:2], tmp_path / "new.tsv"], tmp_path / "mixed.tsv")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Selection(stop=5), "begun for other images .*'stop': 9, .* -> .*'stop': 5, "),
        (Selection(stop=9, shard=(0, 9)), r"begun for other images .*'shard': \[0, 1\].* -> .*'shard': \[0, 9\]"),
    ],
    ids=["stop", "shard"],
)
def test_a_log_begun_for_other_images_is_refused_by_its_record(tmp_path, whole, now, message):
    """Where the first rows do not tell."""
    log = tmp_path / "log.tsv"
    job(log, selection=Selection(stop=9))
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    before = content(log)
    with pytest.raises(ResultsError, match=message):
        job(log, selection=now, resume=True)
    assert content(log) == before
    job(log, resume=True)
    assert content(log) == content(whole)


def test_a_model_that_is_another_after_each_pass_is_refused_before_any_work(tmp_path):
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.sizes = network(), []

        def forward(self, x):
            self.sizes.append(len(x))
            return self.net(x)

    with pytest.raises(ModelError, match="model: running it changes what it is, so --resume would not know it again"):
        job(tmp_path / "log.tsv", Remembering())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [None, 3])
def test_a_function_with_fewer_classes_than_labels_is_refused_before_any_work(tmp_path, classes):
    with pytest.raises(ModelError, match="model: expected at least 4 classes, as squares has, got 3"):
        job(tmp_path / "log.tsv", lambda batch: batch.reshape(len(batch), -1)[:, :3], classes=classes)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged(tmp_path):
    logs = shards(tmp_path)
    merged = tmp_path / "merged.tsv"
    with pytest.raises(InputError, match="logs: expected at least one, got none"):
        merge_results([], merged)
    with pytest.raises(ResultsError, match=r"0.tsv: image 0 is in .*0.tsv already"):
        merge_results([*logs, logs[0]], merged)
    job(tmp_path / "other.tsv", seed=1, selection=Selection(shard=(2, 3)))
    with pytest.raises(ResultsError, match=r"other.tsv: of another run than .*0.tsv \(seed: 0 -> 1\)"):
        merge_results([*logs[:2], tmp_path / "other.tsv"], merged)
    logs[1].write_bytes(logs[1].read_bytes()[:-3])
    with pytest.raises(ResultsError, match=r"1.tsv: it ends in the middle of a line; go on with that run first"):
        merge_results(logs, merged)
    logs[1].write_text("idx\tlabel\n")
    with pytest.raises(ResultsError, match=r"1.tsv: expected a log begun by rs-plugins, got another file"):
        merge_results(logs, merged)
    logs[2].with_name("2.tsv.json").unlink()
    with pytest.raises(ResultsError, match=r"2.tsv: .*2.tsv.json, .*, is missing or damaged"):
        merge_results(logs, merged)
    assert not merged.exists()
    with pytest.raises(ResultsError, match=r"0.tsv: expected a new file, got one that exists"):
        merge_results(logs, logs[0])


def test_the_bar_counts_the_images_of_earlier_runs(tmp_path, capsys):
    class Half(FixedBudget):
        most = 220

    log = tmp_path / "log.tsv"
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0, 0, 0])  # right for a quarter of the images, under any noise
    job(log, model, selection=Selection(stop=4), plan=Half(10, 100))
    job(log, model, resume=True, plan=Half(10, 100), progress=True)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "12/12" in last
    assert "certified 25.0%, samples saved 50%" in last
    assert "image/s" in last or "s/image" in last


def test_options_of_the_engine_are_part_of_the_record(tmp_path):
    job(tmp_path / "log.tsv", dtype=torch.float64)
    assert json.loads((tmp_path / "log.tsv.json").read_text())["dtype"] == "float64"


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "log.tsv").mkdir()
    with pytest.raises(ResultsError, match=r"log.tsv: cannot be written \(Is a directory\)"):
        job(tmp_path / "log.tsv", resume=True)
    monkeypatch.setattr("os.fsync", disk_full(0))
    with pytest.raises(ResultsError, match=r"full.json: cannot be written \(No space left on device\)"):
        job(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["log.tsv"]
    monkeypatch.setattr("os.fsync", disk_full(4))
    with pytest.raises(ResultsError, match=r"full: cannot be written \(No space left on device\); go on with it later"):
        job(tmp_path / "full")
    monkeypatch.undo()
    job(tmp_path / "full", resume=True)
    assert len(read_results(tmp_path / "full")) == 12


def disk_full(after):
    calls = []

    def fsync(_descriptor):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")

    return fsync


def test_without_progress_it_is_silent(tmp_path, capsys):
    job(tmp_path / "log.tsv")
    assert capsys.readouterr() == ("", "")


def test_a_sigma_for_pixels_up_to_255_is_doubted(tmp_path):
    with pytest.warns(
        RSPluginsWarning, match=r"sigma: 64 is for pixels in \[0, 1\]; for noise of 64 in \[0, 255\] give 0.2"
    ):
        job(tmp_path / "log.tsv", sigma=64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": -1}, InputError, "sigma: expected a finite number > 0, got -1"),
        ({"seed": None}, InputError, "seed: expected an integer or None, got None"),
        ({"plan": 3}, InputError, "plan: expected a plan such as"),
        ({"model": nn.Linear(3, 2)}, ModelError, r"model: expected logits of shape \(1, classes\), got shape"),
        ({"model": network(classes=3)}, ModelError, "model: expected at least 4 classes, as squares has, got 3"),
    ],
)
def test_mistakes_are_found_before_a_file_is_made(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        job(tmp_path / "log.tsv", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"log: there is no folder .*nowhere"):
        job(tmp_path / "nowhere" / "log.tsv")


def test_more_classes_than_the_data_set_names_are_doubted(tmp_path):
    named = in_memory("squares", IMAGES, LABELS, classes=4)
    with pytest.warns(ModelWarning, match="model: it has 5 classes, squares has 4; do they mean the same"):
        job(tmp_path / "log.tsv", network(classes=5), data=named)


def test_a_function_of_arrays_is_certified_too(tmp_path):
    def labels(batch):
        return batch.reshape(len(batch), -1).argmax(1) % 4

    results = job(tmp_path / "log.tsv", labels, classes=4)
    assert len(results) == 12


def test_images_of_a_file(tmp_path, whole):
    np.savez(tmp_path / "x.npz", images=IMAGES[:, 0], labels=LABELS)
    job(tmp_path / "log.tsv", data=open_data_set(f"npz:{tmp_path / 'x.npz'}"))
    assert content(tmp_path / "log.tsv")[0] == content(whole)[0]


def test_data_by_its_name(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 3, 3), dtype=np.uint8), labels=np.arange(2))
    results = certify_data_set(
        network(), f"npz:{tmp_path / 'x.npz'}", 0.5, tmp_path / "log.tsv", plan=FixedBudget(n=20), device="cpu"
    )
    assert len(results) == 2
    with pytest.raises(
        InputError, match=r'data: expected a data set, as open_data_set\("mnist:DIR"\) makes it, got tuple'
    ):
        certify_data_set(network(), (IMAGES, LABELS), 0.5, tmp_path / "other.tsv")
    assert not (tmp_path / "other.tsv").exists()
