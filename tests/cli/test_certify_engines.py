"""``rs-plugins certify`` in several processes: --engine ray, and under torchrun."""

import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.core.results.files import read_results

MODELS = """
import os, signal, time, torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    def forward(self, x):
        if len(x) > 60 and os.path.exists("slow"):
            time.sleep(0.5)
        if len(x) > 60 and os.environ.get("RANK") == "1" and os.path.exists("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)
def net():
    torch.manual_seed(0)
    return Net()
"""
COMMAND = (
    "certify --model my_models:net --data npz:squares.npz --sigma 0.5 --plan fixed:n0=10,n=100 --device cpu "
    "--chunk 128 --out log.tsv"
)
ALONE = [sys.executable, "-m", "rs_plugins"]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rs_plugins"]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install rs-plugins[ray])")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 3), dtype=np.uint8)
    np.savez("squares.npz", images=images, labels=np.arange(12) % 4)
    return tmp_path


def start(launcher, *more):
    return subprocess.Popen(
        [*launcher, *shlex.split(COMMAND), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(launcher, *more):
    process = start(launcher, *more)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def content(log):
    rows = [line.split("\t") for line in Path(log).read_text().split("\n")]
    return [[*row[:5], *row[6:]] for row in rows], Path(f"{log}.json").read_bytes()


def wait_for_rows(process, log, rows):
    while not (log.exists() and log.read_bytes().count(b"\n") > rows):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--workers", "2"], 2, "--workers is for --engine ray, which is missing"),
        (["--address", "auto"], 2, "--address is for --engine ray, which is missing"),
        (["--engine", "ray", "--workers", "0"], 2, "expected a number above 0 or auto, got '0'"),
        (["--engine", "ray", "--workers", "all"], 2, "expected a number above 0 or auto, got 'all'"),
        (["--engine", "dask"], 2, "'dask' is not"),
    ],
)
def test_options_that_do_not_go_together(more, code, message):
    result = CliRunner().invoke(main, [*shlex.split(COMMAND), *more])
    assert result.exit_code == code
    assert message in " ".join(result.output.split())
    assert not Path("log.tsv").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("more", [["--engine", "ray"], ["--workers", "3"]])
def test_bounds_have_no_engine(more):
    command = "certify --model my_models:net --data npz:squares.npz --bounds ibp --eps 0.1 --out log.tsv"
    result = CliRunner().invoke(main, [*shlex.split(command), *more])
    assert result.exit_code == 2
    assert f"{more[0]} is for randomized smoothing, which --bounds is not" in " ".join(result.output.split())


@pytest.mark.usefixtures("folder")
def test_what_torchrun_is_not_for(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    result = CliRunner().invoke(main, [*shlex.split(COMMAND), "--engine", "ray"])
    assert (result.exit_code, "--engine: expected none under torchrun" in result.output) == (2, True)
    command = "certify --model my_models:net --data npz:squares.npz --bounds ibp --eps 0.1 --out log.tsv"
    result = CliRunner().invoke(main, shlex.split(command))
    assert (result.exit_code, "--bounds: expected one process, got those of torchrun" in result.output) == (2, True)


@pytest.mark.usefixtures("folder")
def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, [*shlex.split(COMMAND), "--engine", "ray"])
    assert result.exit_code == 1
    assert 'install it with: pip install "rs-plugins[ray]"' in result.output
    assert not Path("log.tsv").exists()


@pytest.mark.slow
@needs_ray
def test_ctrl_c_on_ray(folder):
    """What is done is kept, the workers end, and any engine goes on."""
    (folder / "slow").touch()
    process = start(ALONE, "--engine", "ray", "--workers", "2")
    wait_for_rows(process, folder / "log.tsv", 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    written = len(read_results("log.tsv"))
    assert f"stopped; {written} images are in log.tsv; go on with the same command and --resume" in errors
    assert 3 <= written < 12
    (folder / "slow").unlink()
    assert finish(ALONE, "--engine", "ray", "--workers", "auto", "--resume").startswith("log.tsv: 12 images, certified")
    finish(ALONE, "--out", "one.tsv")
    assert content("log.tsv") == content("one.tsv")


@pytest.mark.slow
@needs_ray
def test_a_driver_that_is_killed_takes_its_workers_along(folder):
    (folder / "slow").touch()
    process = start(ALONE, "--engine", "ray", "--workers", "2")
    wait_for_rows(process, folder / "log.tsv", 1)
    process.kill()
    process.communicate(timeout=600)
    (folder / "slow").unlink()
    finish(ALONE, "--engine", "ray", "--workers", "2", "--resume")
    finish(ALONE, "--out", "one.tsv")
    assert content("log.tsv") == content("one.tsv")


@pytest.mark.slow
def test_torchrun(folder):
    """One process dies in the middle; with --resume all go on, and the log is that of a single process."""
    finish(ALONE, "--out", "one.tsv")
    (folder / "die").touch()
    process = start(TOGETHER)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not Path("log.tsv").exists()
    result = CliRunner().invoke(main, shlex.split("merge log.tsv.shard-0-of-2 log.tsv.shard-1-of-2 --out log.tsv"))
    assert result.exit_code != 0
    (folder / "die").unlink()
    out = finish(TOGETHER, "--resume")
    assert out.count("log.tsv: 12 images, certified") == 1
    assert content("log.tsv") == content("one.tsv")
    assert not list(folder.glob("*.shard-*"))
    assert finish(TOGETHER, "--resume") == out
