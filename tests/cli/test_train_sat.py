"""``rs-plugins train --method sat --activation …``, and the network that it leaves."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rs_plugins import load_trained
from rs_plugins.cli import main
from rs_plugins.cli.recipes import CHANGES, choose_recipe
from rs_plugins.cli.training_words import next_command
from rs_plugins.core.activations import SmoothReLU

COMMAND = (
    "train --method sat:eps=2/255,steps=2,norm=linf --data npz:colours.npz --arch resnet20 --normalise data --epochs 1 "
    "--batch-size 8 --lr 0.05 --validation npz:watched.npz --device cpu --out run"
)


def colours(name, seed, n):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    np.savez(name, images=pixels, labels=(pixels.mean(axis=(1, 2, 3)) > 127).astype(np.int64))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    colours("colours.npz", 0, 16)
    colours("watched.npz", 1, 6)


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


@pytest.mark.parametrize(
    ("text", "arch", "kind", "count"),
    [
        ("silu", "resnet20", nn.SiLU, 19),
        ("celu:alpha=0.5", "cnn3", nn.CELU, 2),
        ("smooth-relu:initial=3", "cnn3", SmoothReLU, 2),
    ],
)
def test_a_network_with_another_activation_is_trained_and_loaded_again(text, arch, kind, count):
    result = invoke(COMMAND, "--activation", text, "--arch", arch, "--weight-decay-of", "weights", "--nesterov")
    assert result.exit_code == 0, result.output
    assert Path("run/history.csv").read_text().startswith("epoch,loss,adversarial_accuracy,lr,seconds\n")
    assert "next: torchattacks.PGD(load_trained('run').model, eps=0.00784314)(x, y) in Python" in result.output
    record = json.loads(Path("run/model.json").read_text())
    name, _, options = text.partition(":")
    assert record["network"]["activation"] == record["activation"] == name
    assert record["network"]["shape"] == [3, 8, 8]
    assert ("activation_options" in record["network"]) is bool(options)
    assert (record["weight_decay_of"], record["nesterov"], record["sigma"]) == ("weights", True, None)

    loaded = load_trained("run")
    made = [part for part in loaded.model.modules() if isinstance(part, kind)]
    assert len(made) == count
    assert not any(isinstance(part, nn.ReLU) for part in loaded.model.modules())
    if kind is nn.CELU:
        assert {part.alpha for part in made} == {0.5}
    x = torch.rand(3, 3, 8, 8)
    assert loaded.model(x).shape == (3, 2)
    assert loaded.sigma is None


def test_stopped_and_gone_on_with_it_is_the_same_network():
    small = COMMAND.replace("--arch resnet20", "--arch cnn3")
    assert invoke(small, "--activation", "gelu", "--epochs", "2").exit_code == 0
    whole = load_trained("run").model.state_dict()
    parts = small.replace("--out run", "--out parts")
    assert invoke(parts, "--activation", "gelu").exit_code == 0
    assert invoke(parts, "--activation", "gelu", "--epochs", "2", "--resume").exit_code == 0
    assert all(torch.equal(value, whole[name]) for name, value in load_trained("parts").model.state_dict().items())
    refused = invoke(parts, "--activation", "silu", "--epochs", "2", "--resume")
    assert refused.exit_code != 0
    assert "activation: 'gelu' -> 'silu'" in refused.output


def test_residual_blocks_begin_as_their_shortcut():
    result = invoke(COMMAND, "--activation", "silu", "--initial", "zero-residual", "--epochs", "0")
    assert result.exit_code == 0, result.output
    scales = {key: value for key, value in load_trained("run").model.state_dict().items() if key.endswith("bn2.weight")}
    assert len(scales) == 9
    assert all(not value.any() for value in scales.values())


def test_what_is_trained_with_a_smooth_activation_is_certified_by_votes_and_by_bounds():
    small = COMMAND.replace("--arch resnet20", "--arch cnn3")
    assert invoke(small, "--activation", "silu").exit_code == 0
    votes = invoke("certify --model run --sigma 0.25 --data npz:watched.npz --plan fixed-budget:n=100 --out votes.tsv")
    assert votes.exit_code == 0, votes.output
    bounds = invoke("certify --bounds crown-ibp --eps 0.001 --model run --data npz:watched.npz --out bounds.tsv")
    assert bounds.exit_code == 0, bounds.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--activation", "swish"], "activation: expected one of relu, silu, gelu"),
        (["--sigma", "0.25"], "sigma: sat trains without noise on the images, expected no --sigma beside it"),
        (["--method", "sat"], "eps: 'sat' needs this option, got none"),
        (["--method", "sat:eps=8"], "eps: expected a radius in pixels of [0, 1], got 8.0; divide by 255"),
        (
            ["--initial", "zero-residual", "--arch", "cnn3"],
            "initial: zero-residual is for ResNets, whose blocks have a downsample",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(more, message):
    result = invoke(COMMAND, *more)
    assert result.exit_code != 0
    assert re.search(re.escape(message), result.output), result.output
    assert not Path("run").exists()


def test_after_l2_training_the_next_step_is_an_l2_attack():
    options = {**dict.fromkeys(["sigma", "preset", *CHANGES]), "method": "sat:eps=0.5,norm=l2"}
    assert next_command(Path("run"), choose_recipe(options), {}).startswith("torchattacks.PGDL2(load_trained('run')")


def test_smoothadv_is_trained_with_a_smooth_activation():
    command = COMMAND.replace("sat:eps=2/255,steps=2,norm=linf", "smoothadv:eps=0.1,steps=1,samples=1")
    result = invoke(command, "--sigma", "0.25", "--activation", "silu", "--arch", "cnn3")
    assert result.exit_code == 0, result.output
    assert any(isinstance(part, nn.SiLU) for part in load_trained("run").model.modules())
