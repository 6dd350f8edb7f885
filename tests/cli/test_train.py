import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from rs_plugins import load_trained
from rs_plugins.cli import main, train
from rs_plugins.cli.training_words import table
from rs_plugins.core.data_sets.data_set import spaced_images, split_off
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.results.files import read_results
from rs_plugins.core.training.folder import Epoch, checkpoints_in
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.presets import PRESETS
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError

PAGE = (Path(__file__).parents[2] / "docs/methods/smoothmix.md").read_text(encoding="utf-8")
MODELS = """
import os, time, torch
from torch import nn
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
class Slow(nn.Linear):
    def forward(self, x):
        if os.path.exists("slow"):
            time.sleep(0.02)
        return super().forward(x)
def slow():
    return nn.Sequential(nn.Flatten(), Slow(16, 4))
def fails():
    class Fails(nn.Linear):
        def forward(self, x):
            if self.training:
                torch.zeros(3) + torch.zeros(4)
            return super().forward(x)
    return nn.Sequential(nn.Flatten(), Fails(16, 4))
def interrupted():
    raise KeyboardInterrupt
"""
COMMAND = (
    "train --method gaussian --sigma 0.25 --data npz:squares.npz --arch my_models:linear --epochs 2 --batch-size 8 "
    "--lr 0.1 --device cpu --out run"
)
PROGRAM = [sys.executable, "-m", "rs_plugins"]


def squares(name, seed, n=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 4, 4), dtype=np.uint8)
    np.savez(name, images=pixels, labels=np.arange(n) % 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with networks and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODELS)
    squares("squares.npz", 0)
    squares("more.npz", 1)
    squares("watched.npz", 2, n=7)
    return tmp_path


@pytest.fixture
def call(monkeypatch, folder):
    """What the command asks of the job, which does nothing."""
    asked = {}

    def note(model, data, recipe, out, **more):
        asked.update(model=model, data=data, recipe=recipe, out=out, **more)
        return [Epoch(1, 2.5, None, 0.1, 1.0)]

    monkeypatch.setattr("rs_plugins.core.training.job.train_data_set", note)

    def run(*more):
        asked.clear()
        folder.joinpath("run").mkdir(exist_ok=True)
        result = invoke(COMMAND, *more)
        assert result.exit_code == 0, result.output
        return asked

    return run


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def weights(out="run"):
    return load_file(Path(out, "model.safetensors"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("folder")
def test_a_network_is_trained_and_is_a_model_everywhere():
    result = invoke(COMMAND, "--validation", "npz:watched.npz")
    assert result.exit_code == 0, result.output
    first, second = (line.split(",") for line in Path("run/history.csv").read_text().splitlines()[1:])
    pattern = (
        r"gaussian, sigma 0.25: my_models:linear of 68 parameters on 24 images of npz\n\n"
        r"epoch +loss  noisy accuracy +lr  seconds\n"
        rf"1 +{float(first[1]):.4f} +{float(first[2]):.1%}  0.1 +\d+\.\d\n"
        rf"2 +{float(second[1]):.4f} +{float(second[2]):.1%}  0.1 +\d+\.\d\n\n"
        r"  run/model.safetensors\n  run/model.json\n  run/history.csv\n  run/training.png\n\n"
        r"next: (rs-plugins certify --model run --trust-model --data npz:watched.npz --out run/certified.tsv)\n"
    )
    found = re.fullmatch(pattern, result.stdout)
    assert found, result.stdout
    assert re.fullmatch(r"(epoch \d/2: loss .* s\n){2}", result.stderr)
    assert Path("run/training.png").read_bytes().startswith(b"\x89PNG")
    model = load_trained("run", trust=True).model
    certify = shlex.split(found[1])[1:]
    assert invoke(shlex.join(certify), "--plan", "fixed:n=200", "--device", "cpu").exit_code == 0
    assert len(read_results("run/certified.tsv")) == 7
    assert json.loads(Path("run/certified.tsv.json").read_text())["sigma"] == 0.25
    torch.testing.assert_close(dict(model.state_dict()), weights())


@pytest.mark.usefixtures("folder")
def test_python_trains_the_same_network():
    assert invoke(COMMAND, "--seed", "3").exit_code == 0
    network = {"name": "my_models:linear", "classes": 4, "channels": 1, "seed": 3}
    from rs_plugins.core.architectures.named import make_network

    recipe = Recipe(method="gaussian", sigma=0.25, epochs=2, batch_size=8, lr=0.1)
    train_data_set(make_network(**network), "npz:squares.npz", recipe, "python", seed=3)
    assert same(weights(), weights("python"))
    record = json.loads(Path("run/model.json").read_text())
    assert record["network"] == network
    assert (record["method"], record["sigma"], record["seed"]) == ("gaussian", 0.25, 3)


@pytest.mark.parametrize(
    ("more", "setting", "value"),
    [
        ("--method smoothmix:steps=2", "method", "smoothmix"),
        ("--method smoothmix:steps=2", "options", {"steps": 2}),
        ("--sigma 0.5", "sigma", 0.5),
        ("--normalise imagenet --data digits --arch my_models:small", "normalise", "imagenet"),
        ("--normalise none", "normalise", None),
        ("--augment", "augment", True),
        ("--epochs 7", "epochs", 7),
        ("--batch-size 5", "batch_size", 5),
        ("--parts 2", "parts", 2),
        ("--lr 0.2", "lr", 0.2),
        ("--lr-step 4", "lr_step", 4),
        ("--lr-factor 0.3", "lr_factor", 0.3),
        ("--lr-drop reference", "lr_drop", "reference"),
        ("--momentum 0.5", "momentum", 0.5),
        ("--weight-decay 0.01", "weight_decay", 0.01),
        ("--optimizer adam", "algorithm", "adam"),
        ("--optimizer adamw", "algorithm", "adamw"),
        ("--schedule cosine", "schedule", "cosine"),
    ],
)
def test_options_reach_the_recipe(call, more, setting, value):
    assert getattr(call(*shlex.split(more))["recipe"], setting) == value


@pytest.mark.parametrize(
    ("more", "argument", "value"),
    [
        ("", "resume", False),
        ("--resume", "resume", True),
        ("--seed 5", "seed", 5),
        ("--precision bf16-mixed", "precision", "bf16-mixed"),
        ("--channels-last", "channels_last", True),
        ("--no-channels-last", "channels_last", False),
        ("--workers 2", "workers", 2),
        ("--keep 3", "keep", 3),
        ("", "keep_best", False),
        ("--keep-best --held-out 4", "keep_best", True),
        ("--keep-best --validation npz:watched.npz", "keep_best", True),
        ("--extra npz:more.npz --extra-weight 0.5", "extra_weight", 0.5),
        ("--device cpu", "device", torch.device("cpu")),
        ("--out other", "out", Path("other")),
        ("--quiet", "progress", False),
        ("", "extra", None),
        ("", "validation", None),
    ],
)
def test_options_reach_the_job(call, folder, more, argument, value):
    folder.joinpath("other").mkdir()
    assert call(*shlex.split(more))[argument] == value


def test_which_images(call):
    whole = open_data_set("npz:squares.npz")
    assert call()["data"].identity == whole.identity
    part = call("--train-images", "5")
    assert (len(part["data"]), part["network"]["classes"]) == (5, 4)
    assert call("--train-images", "3")["network"]["classes"] == 4  # those of all, though the 3 that are left have 3
    assert call("--extra", "npz:more.npz")["extra"].identity == open_data_set("npz:more.npz").identity
    watched = call("--validation", "npz:watched.npz")["validation"]
    assert watched.identity == open_data_set("npz:watched.npz").identity
    assert len(call("--validation", "npz:watched.npz", "--validation-images", "3")["validation"]) == 3
    assert call("--validation", "npz:watched.npz", "--validation-images", "0")["validation"] is None


def test_images_that_are_held_out(call):
    others, held = split_off(open_data_set("npz:squares.npz"), 5)
    found = call("--held-out", "5")
    assert (found["data"].identity, found["validation"].identity) == (others.identity, held.identity)
    found = call("--held-out", "5", "--train-images", "7")
    assert found["data"].identity == spaced_images(others, 7).identity
    assert found["validation"].identity == held.identity
    found = call("--held-out", "23")  # one image is left, and the network is for all classes
    assert (len(found["data"]), found["network"]["classes"]) == (1, 4)
    digits = call("--data", "digits", "--arch", "my_models:small", "--held-out", "1200")
    names = [digits[name].name for name in ("data", "validation")]
    assert names == ["digits train, all but 1200", "digits train, 1200 held out"]
    assert len(digits["validation"]) == 1200


@pytest.mark.usefixtures("folder")
def test_the_best_epoch_by_images_that_are_held_out():
    more = "--held-out 8 --keep-best --epochs 6 --lr 0.9 --optimizer adam --schedule cosine"
    result = invoke(COMMAND, *shlex.split(more))
    assert result.exit_code == 0, result.output
    record = json.loads(Path("run/model.json").read_text())
    epoch, accuracy = record["chosen_epoch"], record["chosen_noisy_accuracy"]
    assert (
        f"\nthe network of epoch {epoch}, noisy accuracy {accuracy:.1%}\n\n  run/model.safetensors\n" in result.stdout
    )
    rows = [line.split(",") for line in Path("run/history.csv").read_text().splitlines()[1:]]
    accuracies = [float(row[2]) for row in rows]
    assert (epoch, accuracy) == (len(accuracies) - accuracies[::-1].index(max(accuracies)), max(accuracies))
    assert "on 16 images of npz, all but 8\n" in result.stdout
    assert "--data FORMAT:PLACE" in result.stdout
    assert same(weights(), weights(f"run/best/epoch-{epoch:04}"))
    result = invoke(COMMAND, "--out", "last", "--held-out", "8")
    assert "the network of epoch" not in result.stdout
    result = invoke(COMMAND, *shlex.split(more), "--resume", "--held-out", "9")
    assert (
        "Error: run: begun by another run (data: 'npz, all but 8' -> 'npz, all but 9'; images: 16 -> 15;"
        in result.output
    )


def test_parts_of_the_digits(call):
    digits = ["--data", "digits", "--arch", "my_models:small"]
    found = call(*digits)
    assert (found["data"].name, found["validation"].name, len(found["validation"])) == (
        *("digits train", "digits test"),
        297,
    )
    assert len(call(*digits, "--validation-images", "10")["validation"]) == 10
    assert call(*digits, "--validation-images", "0")["validation"] is None
    assert call(*digits, "--extra", "digits")["extra"].name == "digits train"
    assert call(*digits, "--normalise", "data")["network"]["mean"] == pytest.approx([0.3051], abs=1e-4)


def test_image_folders_are_scaled(call):
    Image = pytest.importorskip("PIL.Image")
    for name, size in (("a", (9, 4)), ("b", (5, 5))):
        Path("pictures", name).mkdir(parents=True)
        Image.new("RGB", size).save(f"pictures/{name}/x.png")
    pictures = ["--data", "imagefolder:pictures", "--image-size", "3", "--validation", "npz:watched.npz"]
    found = call(*pictures, "--extra", "imagefolder:pictures", "--arch", "resnet20")
    assert found["data"].shape == found["extra"].shape == (3, 3, 3)
    assert found["network"] == {"name": "resnet20", "classes": 2, "channels": 3, "seed": 0}


def test_a_preset_brings_its_network(folder, monkeypatch):
    found = {}
    monkeypatch.setattr(
        "rs_plugins.core.training.job.train_data_set",
        lambda model, data, recipe, out, **more: found.update(recipe=recipe, **more) or [],
    )
    np.savez("colour.npz", images=np.zeros((4, 32, 32, 3), dtype=np.uint8), labels=np.arange(4))
    command = "train --preset smoothmix-cifar10-0.5 --data npz:colour.npz --out run --device cpu --epochs 3"
    result = invoke(command, "--arch", "resnet20", "--lr", "0.2")
    assert result.exit_code == 0, result.output
    assert (found["recipe"].epochs, found["recipe"].lr_step, found["recipe"].lr) == (3, 1, 0.2)
    assert (found["network"]["name"], found["network"]["mean"][0]) == ("resnet20", 0.4914)
    assert "training.png" not in result.stdout  # no epoch, no picture
    assert invoke(command, "--normalise", "none", "--arch", "resnet20").exit_code == 0
    assert "mean" not in found["network"]
    assert invoke(command).exit_code == 0
    assert found["network"]["name"] == "resnet110"


@pytest.mark.usefixtures("folder")
def test_weights_to_begin_with():
    assert invoke(COMMAND).exit_code == 0
    result = invoke(COMMAND, "--weights", "run/model.safetensors", "--epochs", "0", "--out", "same")
    assert result.exit_code == 0, result.output
    assert same(weights(), weights("same"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(16, 9)).state_dict(), "nine.pt")
    more = ["--weights", "nine.pt", "--epochs", "0"]
    result = invoke(COMMAND, *more, "--out", "head")
    assert "Error: weights: nine.pt: 1.weight: expected shape (4, 16), got (9, 16)" in result.output
    assert invoke(COMMAND, *more, "--out", "head", "--replace-head", "--weights-classes", "9").exit_code == 0
    assert load_trained("head", trust=True).model[1].out_features == 4
    more = ["--weights", "run/model.safetensors", "--epochs", "0", "--replace-head", "--out", "fresh"]
    assert invoke(COMMAND, *more).exit_code == 0
    assert not same(weights(), weights("fresh"))


@pytest.mark.usefixtures("folder")
def test_more_images_change_what_is_learnt():
    found = {}
    for name, more in {"run": [], "w1": ["--extra", "npz:more.npz"], "w2": ["--extra", "npz:more.npz"]}.items():
        weight = ("--extra-weight", name[-1]) if more else ()
        assert invoke(COMMAND, *more, *weight, "--out", name).exit_code == 0
        found[name] = weights(name)
    assert not same(found["run"], found["w1"])
    assert not same(found["w1"], found["w2"])
    record = json.loads(Path("w2/model.json").read_text())["extra"]
    assert (record["images"], record["weight"]) == (24, 2.0)


@pytest.mark.usefixtures("folder")
def test_a_folder_is_gone_on_with_on_request():
    assert invoke(COMMAND, "--epochs", "1").exit_code == 0
    result = invoke(COMMAND)
    assert result.exit_code == 1
    assert (
        "Error: run: it holds checkpoints; to go on use resume (--resume), else choose another folder" in result.output
    )
    assert invoke(COMMAND, "--resume").exit_code == 0
    assert invoke(COMMAND, "--out", "whole").exit_code == 0
    assert same(weights(), weights("whole"))
    assert [path.name for path in checkpoints_in(Path("run"))] == ["epoch-0001", "epoch-0002"]
    result = invoke(COMMAND, "--resume", "--lr", "0.2")
    assert "Error: run: begun by another run (lr: 0.1 -> 0.2); choose another folder" in result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--method smooth", "method: expected one of consistency, gaussian, gls, macer, sat, smoothadv, "),
        ("--method gaussian:lam=1", "method: gaussian has no option 'lam'; it has samples"),
        ("--preset gaussian-mnist-0.5", "method: expected --method or --preset, got both"),
        ("--sigma 0", "sigma: expected a finite number > 0, got 0"),
        ("--epochs -1", "epochs: expected an integer >= 0, got -1"),
        ("--lr 0", "lr: expected a finite number > 0, got 0.0"),
        ("--optimizer adam --momentum 0.5", "momentum: only for the optimiser sgd, got 0.5 with adam"),
        ("--schedule cosine --lr-step 5", "lr_step: only for the schedule step, got 5 with cosine"),
        ("--train-images 0", "train_images: expected an integer >= 1, got 0"),
        ("--held-out 0", "held_out: expected an integer from 1 to 23, got 0"),
        ("--held-out 24", "held_out: expected an integer from 1 to 23, got 24"),
        (
            "--held-out 3 --validation npz:watched.npz",
            "validation: expected none beside --held-out, got npz:watched.npz",
        ),
        ("--held-out 3 --validation-images 0", "validation_images: expected none beside --held-out, got 0"),
        (
            "--data digits --arch my_models:small --keep-best",
            "keep_best: expected --held-out N beside it (or --validation), got neither; the part test of --data is",
        ),
        (
            "--keep-best --validation npz:watched.npz --validation-images 0",
            "keep_best: expected validation images to choose an epoch by, got none",
        ),
        ("--validation-images -1", "validation_images: expected an integer >= 0, got -1"),
        ("--workers -1", "workers: expected an integer >= 0, got -1"),
        ("--keep 0", "keep: expected an integer >= 1, got 0"),
        ("--extra npz:more.npz --extra-weight 0", "extra_weight: expected a finite number > 0, got 0.0"),
        ("--extra nothing", "data: expected digits, mnist:DIR, "),
        ("--validation npz:no.npz", "data: npz: there is no no.npz"),
        ("--data mnist:.", "data: mnist: expected one of these files, found none"),
        ("--image-size 32", "image_size: only for imagefolder, got it with npz"),
        ("--arch lenet5", "model: "),  # what else depends on the packages that are installed
        ("--arch nowhere:net", "model: cannot import nowhere"),
        ("--arch lenet", "model: it fails on an input of shape (1, 1, 4, 4): "),
        ("--arch my_models:small", "model: it fails on an input of shape (1, 1, 4, 4): "),
        ("--normalise cifar10", "model: it fails on an input of shape (1, 1, 4, 4): InputError: x: expected shape"),
        ("--weights no.pt", "weights: there is no file no.pt"),
        ("--replace-head", "replace_head: expected --weights beside it, got none"),
        ("--weights-classes 9", "weights_classes: only with --replace-head, got it without"),
        ("--device abacus", "device: expected a device of this machine, got 'abacus'"),
        ("--out no/where", "out: there is no folder no"),
    ],
)
def test_mistakes_are_one_line_and_no_folder(more, message):
    result = invoke(COMMAND, *shlex.split(more))
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert not Path("run").exists()


@pytest.mark.usefixtures("folder")
def test_what_a_network_raises_is_a_line_and_the_place():
    result = invoke(COMMAND, "--arch", "my_models:fails")
    line = 1 + MODELS.splitlines().index("                torch.zeros(3) + torch.zeros(4)")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert "Error: model: it fails: RuntimeError: The size of tensor a (3) must match" in result.stderr
    assert f"\n  my_models.py:{line}, in forward: torch.zeros(3) + torch.zeros(4)\n" in result.stderr


@pytest.mark.usefixtures("folder")
def test_a_loss_that_is_no_number():
    result = invoke(COMMAND, "--lr", "1e30", "--epochs", "30")
    assert result.exit_code == 1
    assert re.search(r"Error: loss: expected a finite value, got \S+ in epoch \d+; the(re|) ", result.output)
    assert "a smaller learning rate may help" in result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default::rs_plugins.errors.RSPluginsWarning")
def test_without_matplotlib_there_is_no_picture(monkeypatch):
    find_spec = train.find_spec
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = invoke(COMMAND)
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "warning: training.png needs matplotlib: pip install 'rs-plugins[plots]'\nepoch 1/2"
    )
    assert not Path("run/training.png").exists()
    assert "training.png" not in result.stdout


@pytest.mark.usefixtures("folder")
def test_the_table_is_shown_though_the_picture_cannot_be_written():
    Path("run/training.png").mkdir(parents=True)
    result = invoke(COMMAND)
    assert result.exit_code == 1
    assert "  run/history.csv\n" in result.stdout
    assert result.stderr.endswith(
        "\nError: run/training.png: cannot be written (Is a directory); the rest is complete\n"
    )
    load_trained("run", trust=True)


def test_the_table_shows_some_of_many_epochs():
    lines = table([Epoch(place + 1, 1 / (place + 1), 0.5, 0.1, 2.0) for place in range(150)]).splitlines()
    shown = [int(line.split()[0]) for line in lines[1:]]
    assert (len(shown), shown[0], shown[-1]) == (12, 1, 150)
    assert {late - early for early, late in itertools.pairwise(shown)} <= {13, 14}
    assert lines[-1].split() == ["150", "0.0067", "50.0%", "0.1", "300.0"]
    assert len(table([]).splitlines()) == 1


@pytest.mark.usefixtures("folder")
def test_only_the_first_process_speaks(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("rs_plugins.core.training.job.train_data_set", lambda *_, **__: [])
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert bool(invoke(COMMAND).output) == speaks
        result = invoke(COMMAND, "--arch", "my_models:interrupted")
        assert (result.exit_code, bool(result.output)) == (130, speaks)


@pytest.mark.usefixtures("folder")
def test_interrupted_before_the_first_step():
    result = invoke(COMMAND, "--arch", "my_models:interrupted")
    assert result.exit_code == 130
    assert "stopped; nothing is trained yet; go on with the same command and --resume" in result.stderr
    Path("run").mkdir()
    result = invoke(COMMAND, "--arch", "my_models:interrupted")
    assert "stopped; there is no checkpoint yet; go on with" in result.stderr


def test_ctrl_c_and_the_same_weights_in_the_end(folder):
    """In a process of its own, with a real signal in the midst of an epoch."""
    command = [*PROGRAM, *shlex.split(COMMAND), "--arch", "my_models:slow", "--epochs", "3", "--batch-size", "1"]
    (folder / "slow").touch()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not checkpoints_in(folder / "run"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    last = checkpoints_in(folder / "run")[-1]
    assert re.fullmatch(r"epoch-000[12]-step-\d{6}", last.name)
    assert (
        f"stopped; the last checkpoint is run/checkpoints/{last.name}; go on with the same command and --res" in errors
    )
    assert not (folder / "run" / "model.safetensors").exists()
    (folder / "slow").unlink()
    words = command[len(PROGRAM) :]
    for result in (invoke(shlex.join(words), "--resume"), invoke(shlex.join(words), "--out", "whole")):
        assert result.exit_code == 0, result.output
    assert same(weights(), weights("whole"))


@pytest.mark.slow
def test_a_signal_to_all_of_a_group_and_the_same_weights_in_the_end(folder):
    """As schedulers send it: to the process and to those that read for it."""
    more = ["--arch", "my_models:slow", "--epochs", "3", "--batch-size", "1"]
    command = [*PROGRAM, *shlex.split(COMMAND), *more, "--workers", "2"]
    (folder / "slow").touch()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not checkpoints_in(folder / "run"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    last = checkpoints_in(folder / "run")[-1]
    assert re.fullmatch(r"epoch-000[12]-step-\d{6}", last.name)
    assert f"stopped; the last checkpoint is run/checkpoints/{last.name}; go on" in errors
    (folder / "slow").unlink()
    for how in (["--resume"], ["--out", "whole"]):
        result = invoke(COMMAND, *more, *how)
        assert result.exit_code == 0, result.output
    assert same(weights(), weights("whole"))


@pytest.mark.slow
def test_torchrun(folder):
    """Two processes train the network of one, and one of them speaks."""
    assert invoke(COMMAND).exit_code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rs_plugins = Path(sys.executable).with_name("rs-plugins")
    for place, program in {"module": ["-m", "rs_plugins"], "script": ["--no-python", str(rs_plugins)]}.items():
        command = [*launch, *program, *shlex.split(COMMAND), "--out", place]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next: rs-plugins certify") == 1
        assert json.loads(Path(place, "model.json").read_text())["processes"] == 2
        torch.testing.assert_close(weights(place), weights(), rtol=1e-4, atol=1e-6)


def test_the_methods_of_the_page_are_those_there_are():
    from rs_plugins.core.training.methods import METHODS

    section = PAGE.partition("## The methods")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(.*?)`", " ".join(rows))) == list(METHODS)


def test_the_module_is_the_command_line(tmp_path):
    done = subprocess.run([*PROGRAM, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.startswith("Usage: rs-plugins ")
    assert "  train " in done.stdout


def test_help_says_the_defaults_and_loads_neither_torch_nor_numpy():
    result = invoke("train --help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "Examples: rs-plugins train " in text
    default = Recipe(method="gaussian", sigma=1.0)
    helps = {option.name: option.help for option in train.train.params}
    settings = ("epochs", "batch_size", "parts", "lr", "lr_step", "lr_factor", "momentum", "weight_decay", "lr_drop")
    for name in (*settings, "algorithm", "schedule", "initial", "lr_warmup"):
        assert helps[name].endswith(f"[the preset's, else {getattr(default, name)}]")
    assert (default.architecture, default.normalise, default.augment) == ("lenet", None, False)
    code = """
import sys
from rs_plugins.cli import recipes, train
import rs_plugins.__main__
assert not {"torch", "numpy", "scipy", "lightning_fabric", "rs_plugins.registry"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_the_names_in_help_are_those_there_are():
    from rs_plugins.core.training.initial import NORMALISATIONS
    from rs_plugins.core.training.methods import METHODS
    from rs_plugins.core.training.recipe import Algorithm, Drop, Initial, Schedule

    options = {option.name: option for option in train.train.params}
    assert options["normalise"].type.choices == ("none", *NORMALISATIONS)
    for name, choice in {"algorithm": Algorithm, "schedule": Schedule, "lr_drop": Drop, "initial": Initial}.items():
        assert options[name].type.choices == get_args(choice)
    assert set(METHODS) <= set(re.findall(r"[\w-]+", options["method"].help))


def test_the_presets_are_listed():
    result = invoke("train --presets")
    assert result.exit_code == 0
    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert header == ["preset", "trained", "for", "arch", "epochs", "batch", "size", "parts", "lr"]
    assert [row[0] for row in rows] == list(PRESETS)
    assert ["smoothmix-cifar10-0.5", "sigma", "0.5", "resnet110", "150", "256", "2", "0.1"] in rows
    assert ["gls-mnist-0.3", "eps", "0.3", "cnn7", "70", "256", "1", "0.0005"] in rows
    certify = ["eps", "0.2,", "to", "certify", "0.1"]
    assert ["gls-mnist-0.1-pgpe", *certify, "cnn3", "70", "256", "1", "0.0005"] in rows


@pytest.mark.usefixtures("folder")
def test_a_trained_folder_is_certified_and_attacked():
    assert invoke(COMMAND).exit_code == 0
    certify = "certify --model run --trust-model --data npz:watched.npz --plan fixed:n=100 --device cpu"
    assert invoke(certify, "--out", "own.tsv").exit_code == 0
    assert invoke(certify, "--out", "other.tsv", "--sigma", "0.5").exit_code == 0
    assert invoke(certify, "--out", "earlier.tsv", "--model", "run/checkpoints/epoch-0001").exit_code == 0
    records = [json.loads(Path(f"{name}.tsv.json").read_text()) for name in ("own", "other", "earlier")]
    assert [record["sigma"] for record in records] == [0.25, 0.5, 0.25]
    assert records[0]["model"] == records[1]["model"] != records[2]["model"]
    by_name = "certify --model my_models:linear --weights run/model.safetensors --sigma 0.25 --out named.tsv"
    assert invoke(certify, *shlex.split(by_name)[1:]).exit_code == 0
    assert read_results("named.tsv").radius.tolist() == read_results("own.tsv").radius.tolist()
    attack = certify.replace("certify", "attack").replace("--plan fixed:n=100", "--attack SmoothAdvPGD:steps=1 --n 100")
    for sigma, more in ((0.25, []), (0.5, ["--sigma", "0.5"])):
        result = invoke(attack, "--pictures", "0", "--out", f"attacked{sigma}", *more)
        assert result.exit_code == 0, result.output
        assert json.loads(Path(f"attacked{sigma}/evaluation.json").read_text())["settings"]["sigma"] == sigma


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("verb", ["certify --plan fixed:n=100", "attack --attack SmoothAdvPGD:steps=1 --pictures 0"])
def test_a_function_that_a_folder_names_is_called_on_request(verb):
    assert invoke(COMMAND, "--epochs", "0").exit_code == 0
    sys.modules.pop("my_models")
    command = f"{verb} --data npz:watched.npz --out out --device cpu --model"
    result = invoke(command, "run")
    assert result.exit_code == 1
    message = (
        "Error: model: run/model.json names a function, my_models:linear, which would be imported and called; if you "
        "trust it, say trust=True (--trust-model), or pass the network yourself, model=… "
    )
    words = "--model my_models:linear --weights run/model.safetensors --sigma 0.25"
    assert f"{message}({words})\n" in result.output
    assert "my_models" not in sys.modules
    assert not Path("out").exists()
    for more in (["run", "--trust-model"], shlex.split(words)[1:]):
        result = invoke(command, *more, "--out", f"out-{len(more)}")
        assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("folder")
def test_a_network_of_ours_needs_no_trust():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    np.savez("large.npz", images=pixels, labels=np.arange(8) % 4)
    more = "--data npz:large.npz --arch lenet --epochs 0 --validation npz:large.npz"
    result = invoke(COMMAND, *shlex.split(more))
    command = result.stdout.partition("next: rs-plugins ")[2]
    assert command.startswith("certify --model run --data npz:large.npz --out"), result.output
    result = invoke(command, "--device", "cpu", "--plan", "fixed:n=20")
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model run --weights w.pt", "weights: the folder run has its own, expected no --weights beside it"),
        ("--model .", "model: expected a folder with model.json and model.safetensors, got ."),
        (
            "--model nowhere",
            "model: expected PACKAGE.MODULE:FUNCTION, or a folder that rs-plugins train wrote, got 'nowhere'",
        ),
        (
            "--model my_models:linear",
            "sigma: expected --sigma beside my_models:linear, got none; only a folder of a trained model says it",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["certify", "attack --attack SmoothAdvPGD"])
def test_models_that_are_none(verb, more, message):
    Path("run").mkdir()
    result = invoke(f"{verb} --data npz:watched.npz --out out --device cpu {more}")
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert not Path("out").exists()


# ---- help for those who begin ----------------------------------------------------------------------------------------


def test_methods_are_explained():
    shown = CliRunner().invoke(main, ["train", "--methods"]).output
    assert "smoothmix:step=1.0,steps=8,mix_step=0,max_norm=none,max_norm_s=none,w_mix=1.0,warmup=10,samples=4" in shown
    assert "w_mix: Weight of the second term (the paper's eta)." in shown
    assert "attack=ddn:eps=1.0,steps=10" in shown
    assert "Raises" not in shown


def test_a_network_for_other_images_is_named_with_the_option(folder):
    result = CliRunner().invoke(main, shlex.split("train --method gaussian --sigma 0.1 --data digits --out lenet"))
    assert result.exit_code == 1
    assert "model: it fails on an input of shape (1, 1, 8, 8)" in result.output
    assert "; --arch lenet is not for such images, choose another" in result.output
    np.savez("colour.npz", images=np.zeros((4, 28, 28, 3), dtype=np.uint8), labels=np.arange(4))
    command = "train --method gaussian --sigma 0.1 --data npz:colour.npz --out lenet"
    assert "got 3; --arch lenet is not for such images" in CliRunner().invoke(main, shlex.split(command)).output


def test_a_weight_without_more_images_is_refused(folder):
    result = CliRunner().invoke(main, [*shlex.split(COMMAND), "--extra-weight", "0.5"])
    assert "extra_weight: expected --extra beside it, got none" in result.output


def test_without_a_terminal_each_epoch_is_a_line(folder):
    result = CliRunner().invoke(main, shlex.split(COMMAND))
    assert re.search(r"epoch 1/2: loss \d\.\d{4}, \d+\.\d s\nepoch 2/2: loss", result.stderr)
    quiet = CliRunner().invoke(main, [*shlex.split(COMMAND), "--out", "quiet", "--quiet"])
    assert "epoch 1/2" not in quiet.output
    assert quiet.exit_code == 0


def test_a_run_that_has_not_ended_names_its_checkpoint(folder):
    assert CliRunner().invoke(main, shlex.split(COMMAND)).exit_code == 0
    (folder / "run" / "model.json").unlink()
    with pytest.raises(InputError, match=r"its training has not ended, a checkpoint is run/checkpoints/epoch-0002"):
        load_trained("run")
