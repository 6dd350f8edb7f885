"""``rs-plugins train`` of methods that train without noise on the images, and what comes after."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from rs_plugins import load_trained
from rs_plugins.cli import main
from rs_plugins.cli.recipes import CHANGES, choose_recipe, describe_methods, parse_method
from rs_plugins.cli.training_words import next_command
from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.training.folder import Epoch, checkpoints_in
from rs_plugins.core.training.gls import Gls
from rs_plugins.core.training.ibp_initial import ibp_initial
from rs_plugins.core.training.presets import preset, radius_of
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError
from rs_plugins.plots import save_training_curves

COMMAND = (
    "train --method gls:eps=2/255,bound=crown-ibp,gradient=rgs,ramp=1 --data npz:squares.npz --arch cnn3 --initial ibp "
    "--normalise data --epochs 2 --batch-size 8 --optimizer adam --lr 0.01 --lr-warmup 1 --schedule milestones "
    "--lr-milestones 1,2 --lr-factor 0.5 --gradient-clip 10 --validation npz:watched.npz --device cpu --out run"
)


def squares(name, seed, n):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 4, 4), dtype=np.uint8)
    np.savez(name, images=pixels, labels=(pixels.mean(axis=(1, 2)) > 127).astype(np.int64))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    squares("squares.npz", 0, 24)
    squares("watched.npz", 2, 9)
    return tmp_path


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def options(**given):
    return {**dict.fromkeys(["method", "sigma", "preset", *CHANGES]), **given}


@pytest.mark.usefixtures("folder")
def test_a_network_is_trained_without_noise_and_certified():
    result = invoke(COMMAND, "--keep-best")
    assert result.exit_code == 0, result.output
    lines = Path("run/history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,certified_accuracy,lr,seconds"
    shares = [f"{float(line.split(',')[2]):.1%}" for line in lines[1:]]
    pattern = (
        r"gls: cnn3 of 8,\d\d\d parameters on 24 images of npz\n\n"
        r"epoch +loss  certified accuracy +lr  seconds\n"
        rf"1 +\S+ +{shares[0]}   0.01 +\d+\.\d\n"
        rf"2 +\S+ +{shares[1]}  0.005 +\d+\.\d\n"
        r"the network of epoch \d, certified accuracy \d+\.\d%\n\n"
        r"  run/model.safetensors\n  run/model.json\n  run/history.csv\n  run/training.png\n\n"
        r"next: (rs-plugins certify --bounds crown --eps 0.00784314 --model run --data npz:watched.npz --out .*tsv)\n"
    )
    found = re.fullmatch(pattern, result.stdout)
    assert found, result.stdout
    assert f"epoch 1/2: loss {float(lines[1].split(',')[1]):.4f}, certified accuracy {shares[0]}, " in result.stderr
    record = json.loads(Path("run/model.json").read_text())
    assert record["sigma"] is None
    assert record["network"] | {"mean": 0, "std": 0} == {
        **{"name": "cnn3", "classes": 2, "channels": 1, "size": 4, "seed": 0, "mean": 0, "std": 0}
    }
    assert record["chosen_certified_accuracy"] == max(float(line.split(",")[2]) for line in lines[1:])
    named = {"initial": "ibp", "lr_warmup": 1, "lr_milestones": [1, 2], "gradient_clip": 10.0}
    assert named.items() <= record.items()
    certify = shlex.split(found[1])[1:]
    done = invoke(shlex.join(certify), "--device", "cpu")
    assert done.exit_code == 0, done.output
    for verb in ("certify --model run --data npz:watched.npz --out by_votes.tsv", "attack --model run --data npz:x"):
        refused = invoke(verb)
        assert refused.exit_code != 0
        if verb.startswith("certify"):
            assert refused.output == (
                "Error: sigma: the network in run was trained without noise; expected --sigma, or "
                "certify --bounds NAME --eps R, which does without\n"
            )
    by_votes = (
        "certify --model run --data npz:watched.npz --out by_votes.tsv --sigma 0.1 --plan fixed:n=100 --device cpu"
    )
    assert invoke(by_votes).exit_code == 0


@pytest.mark.usefixtures("folder")
def test_it_is_stopped_and_gone_on_with():
    assert invoke(COMMAND, "--epochs", "3").exit_code == 0
    whole = load_file("run/model.safetensors")
    for place in checkpoints_in(Path("run"))[-1:]:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    assert [place.name for place in checkpoints_in(Path("run"))] == ["epoch-0002"]
    assert invoke(COMMAND, "--epochs", "3", "--resume").exit_code == 0
    again = load_file("run/model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    other = invoke(COMMAND.replace("bound=crown-ibp", "bound=ibp"), "--resume")
    assert "begun by another run (objective: " in other.output


@pytest.mark.usefixtures("folder")
def test_the_initial_weights():
    """A learning rate of next to nothing leaves them as they are."""
    how = ["--lr", "1e-30", "--normalise", "none"]
    assert invoke(COMMAND, *how).exit_code == 0
    network = {"name": "cnn3", "classes": 2, "channels": 1, "size": 4}
    for key, value in ibp_initial(make_network(**network)).state_dict().items():
        torch.testing.assert_close(load_trained("run").model.state_dict()[key], value)
    refused = invoke(COMMAND, *how, "--out", "other", "--weights", "run/model.safetensors")
    assert refused.output == "Error: initial: expected --weights or --initial ibp, got both\n"
    more = ["--out", "other", "--weights", "run/model.safetensors", "--initial", "default", "--seed", "3"]
    assert invoke(COMMAND, *how, *more).exit_code == 0
    assert all(
        torch.equal(load_file("other/model.safetensors")[key], load_file("run/model.safetensors")[key])
        for key in load_file("run/model.safetensors")
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--sigma 0.25", "Error: sigma: gls trains without noise on the images, expected no --sigma beside it"),
        ("--lr-milestones 5,x", "expected epochs with commas between, such as 50,60, got '5,x'"),
        ("--gradient-clip 0", "Error: gradient_clip: expected a finite number > 0, got 0.0"),
        ("--schedule step", "Error: lr_milestones: only for the schedule milestones, got (1, 2) with step"),
        ("--method gls", "Error: eps: 'gls' needs this option, got none"),
        ("--method gls:eps=0.1,sigma=1", "Error: method: gls has no option 'sigma'; it has eps, bound, "),
        ("--method gls:eps=0.1,bound=lp", "Error: bound: expected one of 'ibp', 'crown-ibp', 'crown', got 'lp'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_does_not_go_together(more, message):
    result = invoke(COMMAND, *shlex.split(more))
    assert result.exit_code != 0
    assert message in result.output
    assert not Path("run").exists()


def test_what_to_do_next_is_at_the_radius_that_a_preset_is_meant_for():
    def command(recipe, **given):
        return next_command(Path("run"), recipe, options(data="digits", validation=None, **given))

    assert "--eps 0.1 " in command(preset("gls-mnist-0.1"), preset="gls-mnist-0.1")
    assert "--eps 0.2 " in command(preset("gls-mnist-0.1"))
    assert "--eps 0.0313725 " in command(preset("gls-cifar10-8-255-crown"), preset="gls-cifar10-8-255-crown")
    assert "--bounds" not in command(preset("gaussian-mnist-0.5"), preset="gaussian-mnist-0.5")
    assert [radius_of(name) for name in ("gls-mnist-0.1-crown-pgpe", "gls-cifar10-2-255", "macer-mnist-0.5")] == [
        *(0.1, 2 / 255, None)
    ]


def test_presets_and_changes():
    found = choose_recipe(options(preset="gls-mnist-0.1-crown", architecture="cnn3", epochs=7))
    assert found == preset("gls-mnist-0.1-crown").shortened(7).changed(architecture="cnn3")
    assert (found.lr_milestones, found.objective().ramp) == ((5, 6), pytest.approx(2))
    cosine = choose_recipe(options(preset="gls-mnist-0.1", schedule="cosine", initial="default", gradient_clip=2.0))
    assert (cosine.lr_milestones, cosine.initial, cosine.gradient_clip) == ((), "default", 2.0)
    message = "^sigma: the preset gls-mnist-0.1 trains without noise on the images, expected no --sigma beside it$"
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        choose_recipe(options(preset="gls-mnist-0.1", sigma=0.5))
    with pytest.raises(InputError, match=r"^sigma: expected --sigma beside --method, got none$"):
        choose_recipe(options(method="gaussian"))
    assert choose_recipe(options(method="gls:eps=0.1", lr_warmup=3)) == Recipe(
        method="gls", options={"eps": 0.1}, lr_warmup=3
    )


def test_the_method_as_a_text():
    text = "gls:eps=8/255,bound=crown,gradient=pgpe,population=64,ranks=yes,chunk=none,lower_slope=parallel,ramp=2.5"
    name, its = parse_method(text)
    assert Gls(**its) == Gls(
        8 / 255, bound="crown", gradient="pgpe", population=64, ranks=True, lower_slope="parallel", ramp=2.5
    )
    assert name == "gls"
    told = describe_methods()
    assert "gls:bound=crown-ibp,gradient=rgs," in told
    assert "        eps: Radius in l-infinity" in told


def test_the_picture_names_the_figure(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **how: labels.append(how["label"]) or plot(*args, **how))
    save_training_curves(tmp_path / "a.png", [Epoch(1, 2.0, 0.5, 0.1, 1.0, "certified accuracy")])
    save_training_curves(tmp_path / "b.png", [Epoch(1, 2.0, 0.5, 0.1, 1.0)])
    assert labels == ["loss", "certified accuracy", "loss", "accuracy under one noise draw"]
