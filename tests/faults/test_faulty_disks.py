"""Full disks, folders that cannot be written, files that are removed: what is finished stays, and one goes on."""

import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.files import write_whole
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import read_results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.errors import InputError, ResultsError

resource = pytest.importorskip("resource", reason="of POSIX")
PLAN = FixedBudget(n0=5, n=40)
DATA = in_memory("squares", np.random.default_rng(0).integers(0, 256, (24, 1, 3, 3), dtype=np.uint8), np.arange(24) % 4)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


def job(log, **options):
    return certify_data_set(network(), DATA, 0.5, log, plan=PLAN, chunk=20, **options)


def without_times(log):
    return [[*row.split("\t")[:5], *row.split("\t")[6:]] for row in log.read_text().splitlines()]


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good").mkdir()
    job(tmp_path / "good" / "log.tsv")
    return tmp_path / "good" / "log.tsv"


@pytest.fixture
def most_bytes():
    """Lets no file of this process become larger than so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("missing", [1, 30, 200, 300])
def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path, good, most_bytes, missing):
    log, size = tmp_path / "log.tsv", good.stat().st_size
    log.with_name("log.tsv.json").write_bytes(good.with_name("log.tsv.json").read_bytes())
    assert size - missing > good.with_name("log.tsv.json").stat().st_size  # else there is no room for the record
    most_bytes(size - missing)
    with pytest.raises(ResultsError, match=r"log.tsv: cannot be written \(File too large\); go on with it later"):
        job(log)
    held = log.read_bytes()
    assert held.endswith(b"\n")  # no half line
    assert 1 <= len(read_results(log)) < len(DATA)
    most_bytes(10**9)
    job(log, resume=True)
    assert log.read_bytes().startswith(held)
    assert without_times(log) == without_times(good)


def test_a_writer_that_is_used_again_after_the_disk_was_full_writes_whole_lines(tmp_path, good, monkeypatch):
    lines = good.read_bytes().splitlines(keepends=True)
    (tmp_path / "log.tsv").write_bytes(b"".join(lines[:2]))
    with ResultsWriter(tmp_path / "log.tsv") as writer:
        fsync = os.fsync
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(ResultsError, match="No space left on device"):
            writer._append(lines[2])
        monkeypatch.setattr("os.fsync", fsync)
        writer._append(lines[3])
    assert (tmp_path / "log.tsv").read_bytes() == b"".join([*lines[:2], lines[3]])


def full(_descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_record_that_does_not_fit_leaves_neither_a_half_one_nor_a_draft(tmp_path, most_bytes):
    (tmp_path / "record").write_bytes(b"as it was")
    most_bytes(1000)
    with pytest.raises(ResultsError, match=r"record: cannot be written \(File too large\)"):
        write_whole(tmp_path / "record", b"x" * 5000)
    most_bytes(10**9)
    assert (tmp_path / "record").read_bytes() == b"as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_log_that_is_removed_under_way_ends_the_job_at_once(tmp_path, replaced):
    log, calls = tmp_path / "log.tsv", []

    class Removes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            if log.exists() and log.stat().st_size > 400 and not calls:
                calls.append(1)
                log.unlink()
                if replaced:
                    log.write_text("another file\n")
            return self.net(x)

    with pytest.raises(ResultsError, match=r"log.tsv: it was removed or replaced while it was written; begin anew"):
        certify_data_set(Removes(), DATA, 0.5, log, plan=PLAN, chunk=20)
    assert log.read_text() == "another file\n" if replaced else not log.exists()


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero"])
def test_devices_are_no_logs(device):
    if not os.path.exists(device):
        pytest.skip(f"no {device} here")
    with pytest.raises(ResultsError, match="expected a file, got a device or a pipe"):
        job(device)


def test_a_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ResultsError, match="expected a file, got a device or a pipe"):
        job(tmp_path / "pipe")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "log.tsv.json").mkdir()
    with pytest.raises(ResultsError, match=r"log.tsv.json: cannot be written \(Is a directory\)"):
        job(tmp_path / "log.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["log.tsv.json"]


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(ResultsError, match=r"cannot be written \(File name too long\)"):
        job(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="log: there is no folder"):
        job(tmp_path / "file.txt" / "log.tsv")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ResultsError, match=r"log.tsv: cannot be written \(Permission denied\)"):
            job(tmp_path / "log.tsv")
    finally:
        tmp_path.chmod(0o700)
