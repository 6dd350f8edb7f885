"""The log of workers on Ray is that of a single process."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.engines.cores import cores, share_of_cores
from rs_plugins.core.engines.engine import Task
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.files import read_results
from rs_plugins.core.selection import Selection
from rs_plugins.errors import (
    InputError,
    MissingDependencyError,
    ModelError,
    ModelWarning,
    RSPluginsWarning,
    WorkerError,
)

ray = pytest.importorskip("ray", reason="ray is not installed (pip install rs-plugins[ray])")

from rs_plugins.core.engines.ray_cluster import connected  # noqa: E402
from rs_plugins.core.engines.ray_engine import RayEngine, _Room  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:workers. none has begun")  # on a slow machine

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 1, 3, 3), dtype=np.uint8)
DATA = in_memory("squares", IMAGES, np.arange(20) % 4)
PLAN = FixedBudget(n0=10, n=200)
MODELS = """
import os, signal
from pathlib import Path
import torch
from torch import nn

class Troubled(nn.Module):
    '''In a worker, at the first copies of an image whose corner is as dark as the file says: dies, or worse.'''

    def __init__(self, place, home):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.place, self.home = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), place, home

    def forward(self, x):
        logits = self.net(x)
        if os.getpid() == self.home or len(x) < 20:
            return logits
        for trouble in sorted(Path(self.place).glob("trouble-*")):
            word = trouble.read_text()
            if word == "fail":
                raise ZeroDivisionError("nothing left")
            if word == "nan":
                return logits.masked_fill(torch.arange(len(x))[:, None] == 0, float("nan"))
            trouble.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return logits
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4))


def job(log, model=None, **options):
    return certify_data_set(model or network(), DATA, 0.5, log, **{"plan": PLAN, "chunk": 64} | options)


def content(log):
    """A log without its times, and its record."""
    rows = [line.split("\t") for line in log.read_text().split("\n")]
    return [[*row[:5], *row[6:]] for row in rows], log.with_name(log.name + ".json").read_bytes()


@pytest.fixture(scope="class")
def cluster():
    with connected(None, cpus=2, gpus=False) as connection:
        yield connection


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """A model that does in workers what files in a folder say."""
    (tmp_path / "troubled_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import troubled_models

    yield troubled_models.Troubled(str(tmp_path), os.getpid())
    del sys.modules["troubled_models"]


@pytest.mark.slow
def test_a_cluster_of_its_own(tmp_path):
    """It ends with the job, and leaves nothing behind."""
    job(tmp_path / "one.tsv")
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), set(Path("/tmp").glob("rs-*"))
    home = Path.home() / ".ray"
    had_home = home.exists()
    results = job(tmp_path / "log.tsv", engine=RayEngine(workers=2))
    assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")
    assert results.idx.tolist() == list(range(20))
    assert not ray.is_initialized()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM), set(Path("/tmp").glob("rs-*"))) == before
    assert home.exists() == had_home


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestOnACluster:
    @pytest.mark.parametrize("block", [None, 1, 7, 100])
    def test_the_log_is_that_of_a_single_process(self, tmp_path, block):
        job(tmp_path / "one.tsv")
        job(tmp_path / "log.tsv", engine=RayEngine(workers=2, block=block))
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")
        assert ray.is_initialized()

    def test_options_reach_the_workers(self, tmp_path):
        options = {
            "plan": OnGrid(radii=(0.0, 0.25), n=1000),
            "seed": 3,
            "dtype": torch.float64,
            "selection": Selection(start=2, skip=3),
            "device": "cpu",
        }
        job(tmp_path / "one.tsv", **options)
        job(tmp_path / "log.tsv", engine=RayEngine(workers=2), **options)
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")
        record = json.loads((tmp_path / "log.tsv.json").read_text())
        assert (record["seed"], record["dtype"], record["device"]) == (3, "float64", "cpu")

    def test_a_job_goes_on_on_another_engine(self, tmp_path):
        engine = RayEngine(workers=2)
        job(tmp_path / "one.tsv")
        job(tmp_path / "log.tsv", selection=Selection(stop=5))
        job(tmp_path / "log.tsv", selection=Selection(stop=12), engine=engine, resume=True)
        assert len(read_results(tmp_path / "log.tsv")) == 12
        job(tmp_path / "log.tsv", resume=True)
        job(tmp_path / "log.tsv", engine=engine, resume=True)
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")

    def test_two_workers_killed_it_is_still_equal(self, tmp_path, troubled):
        job(tmp_path / "one.tsv", troubled)
        for number in range(2):
            (tmp_path / f"trouble-{number}").write_text("die")
        with pytest.warns(RSPluginsWarning, match="workers: one died at work on image") as caught:
            job(tmp_path / "log.tsv", troubled, engine=RayEngine(workers=2, block=3))
        assert len(caught) == 2
        assert not list(tmp_path.glob("trouble-*"))
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")

    @pytest.mark.filterwarnings("ignore:workers. one died")
    def test_images_that_kill_end_the_job_and_what_is_done_is_kept(self, tmp_path, troubled):
        log = tmp_path / "log.tsv"
        job(log, troubled, selection=Selection(stop=4))
        for number in range(9):
            (tmp_path / f"trouble-{number}").write_text("die")
        with pytest.raises(WorkerError, match=r"workers: 3 died at work on images 4, 5, 6: "):
            job(log, troubled, engine=RayEngine(workers=1, block=3), resume=True)
        assert len(read_results(log)) == 4
        for trouble in tmp_path.glob("trouble-*"):
            trouble.unlink()
        job(log, troubled, engine=RayEngine(workers=1, block=3), resume=True)
        job(tmp_path / "one.tsv", troubled)
        assert content(log) == content(tmp_path / "one.tsv")

    def test_what_a_model_raises_is_said_with_its_place(self, tmp_path, troubled):
        (tmp_path / "trouble-0").write_text("fail")
        line = 1 + MODELS.split("\n").index('                raise ZeroDivisionError("nothing left")')
        message = (
            r"^model: it fails in a worker on images 0 to 4: ZeroDivisionError: nothing left "
            rf"\(troubled_models.py:{line}, in forward\)$"
        )
        with pytest.raises(ModelError, match=message) as caught:
            job(tmp_path / "log.tsv", troubled, engine=RayEngine(workers=1, block=5))
        assert "Traceback" in str(caught.value.__cause__)

    def test_warnings_come_from_the_workers(self, tmp_path, troubled):
        (tmp_path / "trouble-0").write_text("nan")
        with pytest.warns(ModelWarning, match="image [01]: [0-9]+ noisy copies gave NaN logits"):
            job(tmp_path / "log.tsv", troubled, engine=RayEngine(workers=2), selection=Selection(stop=2))

    def test_a_model_of_the_main_script(self, tmp_path):
        """Its class is not importable in a worker, so it travels with the weights; it is still the same model."""
        space = {"__name__": "__main__", "nn": nn, "torch": torch}
        exec(
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.net = nn.Linear(9, 4)\n"
            "    def forward(self, x):\n"
            "        return torch.tanh(self.net(x.flatten(1)))\n",
            space,
        )
        model = space["Net"]()
        job(tmp_path / "one.tsv", model)
        job(tmp_path / "log.tsv", model, engine=RayEngine(workers=1))
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")

    def test_a_function_of_arrays(self, tmp_path):
        def labels(batch):
            return batch.reshape(len(batch), -1).argmax(1) % 4

        job(tmp_path / "one.tsv", labels, classes=4)
        job(tmp_path / "log.tsv", labels, classes=4, engine=RayEngine(workers=2))
        assert content(tmp_path / "log.tsv") == content(tmp_path / "one.tsv")

    def test_a_model_that_cannot_be_sent(self, tmp_path):
        model = network()
        model.lock = threading.Lock()
        with pytest.raises(InputError, match="model: it cannot be sent to workers: "):
            job(tmp_path / "log.tsv", model, engine=RayEngine(workers=1))
        assert list(tmp_path.iterdir()) == []

    def test_more_workers_than_there_is_room_for(self, tmp_path):
        with pytest.raises(InputError, match="workers: expected at most 2, the processors of the cluster, got 3"):
            job(tmp_path / "log.tsv", engine=RayEngine(workers=3))
        with pytest.raises(
            InputError, match="device: expected one that the cluster has, got 'cuda'; there are no GPUs"
        ):
            job(tmp_path / "log.tsv", engine=RayEngine(device="cuda"))
        with pytest.raises(InputError, match="address: expected none, as this process is connected to Ray already"):
            job(tmp_path / "log.tsv", engine=RayEngine(address="127.0.0.1:1"))
        assert list(tmp_path.iterdir()) == []

    def test_workers_end_with_the_job(self, tmp_path, cluster):
        job(tmp_path / "log.tsv", engine=RayEngine(workers=2))
        until = time.monotonic() + 60
        while cluster.available_resources().get("CPU") != 2:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_cluster_that_does_not_start_is_an_error_in_a_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise Exception("the node\n  timed out")

    monkeypatch.setattr(ray, "init", fail)
    before, folders = dict(os.environ), set(Path("/tmp").glob("rs-*"))
    with pytest.raises(WorkerError) as caught:
        job(tmp_path / "log.tsv", engine=RayEngine(workers=2))
    what, advice = str(caught.value).split("; ")
    assert what == "ray: no cluster could be started here: the node timed out"
    assert advice == "the machine may be too busy: try again, or leave the engine away (--engine)"
    with pytest.raises(WorkerError, match=r"^ray: no cluster answers at 10.0.0.1:6379: the node timed out$"):
        job(tmp_path / "log.tsv", engine=RayEngine(workers=2, address="10.0.0.1:6379"))
    assert (dict(os.environ), set(Path("/tmp").glob("rs-*"))) == (before, folders)
    assert list(tmp_path.iterdir()) == []


def test_the_engine_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="workers: expected a number or \"auto\", got 'many'"):
        RayEngine(workers="many")
    with pytest.raises(InputError, match="workers: expected an integer >= 1, got 0"):
        RayEngine(workers=0)
    with pytest.raises(InputError, match="block: expected an integer >= 1, got 0"):
        RayEngine(block=0)
    with pytest.raises(InputError, match="watch: expected none"):
        job(tmp_path / "log.tsv", engine=RayEngine(), watch=lambda certificate: False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r'ray is not installed .*pip install "rs-plugins\[ray\]"'):
        RayEngine()


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "share"),
    [
        ([8], 0, 2, (4, 0.0)),
        ([8], 0, 3, (2, 0.0)),
        ([16, 16], 0, 3, (8, 0.0)),  # of 10 each, the third would find no place
        ([2, 1], 0, 3, (1, 0.0)),
        ([32], 4, 4, (8, 1.0)),
        ([32], 4, 2, (16, 1.0)),
        ([32], 1, 3, (10, 0.3333)),
    ],
)
def test_how_workers_share_a_cluster(cpus, gpus, workers, share):
    assert _Room("cuda" if gpus else "cpu", cpus, gpus).share(workers) == share


def test_how_many_workers_there_are_if_nobody_says():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    with_gpus, without = SimpleNamespace(nodes=lambda: nodes), SimpleNamespace(nodes=lambda: nodes[1:])
    assert _Room.of(with_gpus, None) == _Room("cuda", [8, 4], 2)
    assert (_Room.of(with_gpus, None).auto, _Room.of(with_gpus, "cpu").auto, _Room.of(without, None).auto) == (2, 12, 4)


@dataclass(frozen=True)
class SomePlan:
    most: int
    interim: bool = False


@pytest.mark.parametrize(
    ("most", "interim", "images", "size"),
    [
        (1000, False, 10**4, 33),
        (100_100, False, 10**4, 1),
        (100_100, True, 10**4, 8),
        (1000, False, 80, 10),
        (9, True, 3, 1),
    ],
)
def test_the_size_of_blocks(most, interim, images, size):
    task = Task(network(), 0.5, SomePlan(most, interim), 0, {})
    assert RayEngine()._block_size(task, images, 2) == size
    assert RayEngine(block=3)._block_size(task, images, 2) == 3


@pytest.mark.parametrize(
    ("wish", "no_wish", "limit"), [(None, 0, 99), ("1", 0, 1), ("1", 1, 99), ("2", 1, 2), ("x", 0, 99)]
)
def test_threads(monkeypatch, wish, no_wish, limit):
    monkeypatch.setattr("rs_plugins.core.engines.cores.cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    assert share_of_cores(4, no_wish=no_wish) == min(4, limit)
    assert share_of_cores(40, no_wish=no_wish) == 1
    assert cores() >= 1
