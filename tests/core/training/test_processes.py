"""Two processes that torchrun starts train the network that one trains alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rs_plugins.core.training.folder import checkpoints_in

SCRIPT = """
import sys
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe

out, method, epochs, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:] == ["--resume"]
torch.set_num_threads(1)
source = np.random.default_rng(0)
images = source.random((45, 1, 4, 4)).astype("float32")
data = in_memory("made up", images, (images.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64))
more = in_memory("others", 1 - images[:11], source.integers(0, 2, 11))
gls = {"eps": 0.1, "ramp": 2.0, "regulariser": 0.0, "l1": 1e-4}  # the regulariser looks at all images of a batch
options = {"smoothmix": {"steps": 2, "samples": 2, "mix_step": 1}, "gls": gls}.get(method, {})
recipe = Recipe(
    method=method, sigma=None if method == "gls" else 0.25, options=MappingProxyType(options), epochs=epochs,
    batch_size=20, parts=3, lr=0.2, lr_step=2, augment=True, gradient_clip=0.5 if method == "gls" else None,
)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
if sys.argv[4:] == ["--unused"]:
    model.spare = nn.Linear(1, 1)
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
train_data_set(model, data, recipe, out, extra=more, extra_weight=0.5, validation=more, seed=3, resume=resume)
"""
ALONE = [sys.executable]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


def start(launcher, script, out, method, epochs, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), str(out), method, str(epochs), *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    errors = process.communicate(timeout=600)[1]
    assert (process.returncode == 0) == (code == 0), errors
    return errors


def weights(out):
    return load_file(Path(out) / "model.safetensors")


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("gaussian", "gls")), "smoothmix"]
)
def test_the_same_weights_but_for_the_rounding_of_sums(tmp_path, script, method):
    """20 images in 3 parts over 2 processes are 4 + 3 at a time, the extra images 2 + 2."""
    running = [
        start(launcher, script, tmp_path / name, method, 3) for launcher, name in ((ALONE, "one"), (TOGETHER, "two"))
    ]
    for process in running:
        finish(process)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)
    histories = [(tmp_path / name / "history.csv").read_text().splitlines() for name in ("one", "two")]
    for ours, theirs in zip(*histories, strict=True):
        if not ours.startswith("epoch"):
            loss, accuracy = ([float(line.split(",")[column]) for line in (ours, theirs)] for column in (1, 2))
            assert loss[0] == pytest.approx(loss[1], rel=1e-5)
            assert accuracy[0] == accuracy[1]


@pytest.mark.slow
def test_stopped_together_and_gone_on_with_bit_for_bit(tmp_path, script):
    whole, stopped = (start(TOGETHER, script, tmp_path / name, "gaussian", 60) for name in ("whole", "run"))
    deadline = time.monotonic() + 120
    while not checkpoints_in(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    finish(stopped, code=1)
    (*_, place) = checkpoints_in(tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert place.name < "epoch-0060"
    finish(start(TOGETHER, script, tmp_path / "run", "gaussian", 60, "--resume"))
    finish(whole)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_a_parameter_without_a_part_in_the_loss_is_named(tmp_path, script):
    errors = finish(start(TOGETHER, script, tmp_path / "run", "gaussian", 1, "--unused"), code=1)
    assert "model: expected all parameters to have a part in the loss, spare.weight has none" in errors
    finish(start(ALONE, script, tmp_path / "one", "gaussian", 1, "--unused"))
