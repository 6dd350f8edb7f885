import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.core.certification import certify
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.ensembles import ConsensusEnsemble, SoftEnsemble
from rs_plugins.core.identity import identity
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import read_results
from rs_plugins.core.training.trained import save_trained

MODELS = """
import torch
from torch import nn

def model(seed):
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)))
        network[1].bias.zero_()
    return network

def a():
    return model(1)

def b():
    return model(2)

def c():
    return model(3)

def untrained():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
"""
COMMAND = (
    "certify --model some_models:a --data npz:squares.npz --sigma 0.5 --plan fixed:n0=10,n=100 --device cpu "
    "--out log.tsv"
)
MEMBERS = shlex.split("--member some_models:b --member some_models:c")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with models' code and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    (tmp_path / "some_models.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 3), dtype=np.uint8)
    np.savez("squares.npz", images=images, labels=np.arange(12) % 4)
    yield tmp_path
    sys.modules.pop("some_models", None)


def invoke(*more):
    return CliRunner().invoke(main, [*shlex.split(COMMAND), *more])


def models():
    import some_models

    return [some_models.a(), some_models.b(), some_models.c()]


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ([], SoftEnsemble),
        (
            ["soft:average=probabilities,weights=1/2/4"],
            lambda m: SoftEnsemble(m, average="probabilities", weights=[1, 2, 4]),
        ),
        (["consensus:k=2"], lambda m: ConsensusEnsemble(m, 2)),
    ],
    ids=["none", "soft", "consensus"],
)
def test_several_models_are_certified_as_one(rule, make):
    result = invoke(*MEMBERS, *[word for text in rule for word in ("--ensemble", text)])
    assert result.exit_code == 0, result.output
    ensemble, images = make(models()), open_data_set("npz:squares.npz").read(range(12))
    expected = list(certify(ensemble, images, 0.5, plan=FixedBudget(n0=10, n=100)))
    assert read_results("log.tsv").predict.tolist() == [c.prediction for c in expected]
    record = json.loads(Path("log.tsv.json").read_text())
    assert record["model"] == identity(ensemble)


def trained(name, number, **record):
    """Write a folder of a trained network, which a function of the user's makes."""
    Path(name).mkdir()
    save_trained(Path(name), models()[number], {"network": {"name": "some_models:a", "classes": 4}, **record})


@pytest.mark.parametrize(
    ("second", "more", "sigma"),
    [
        ({"sigma": 0.25}, [], 0.25),
        ({"sigma": None}, [], 0.25),
        ({"sigma": 0.5}, ["--sigma", "0.1"], 0.1),
        ({"sigma": 0.25, "family": "laplace"}, ["--noise", "gaussian"], 0.25),
    ],
    ids=["same", "none", "given", "noise"],
)
def test_the_noise_is_that_of_training_where_that_agrees(second, more, sigma):
    trained("first", 0, sigma=0.25)
    trained("second", 1, **second)
    folders = ["--model", "first", "--member", "second", "--trust-model"]
    result = CliRunner().invoke(main, [*shlex.split(COMMAND.replace("--sigma 0.5", "")), *folders, *more])
    assert result.exit_code == 0, result.output
    assert json.loads(Path("log.tsv.json").read_text())["sigma"] == sigma


@pytest.mark.parametrize("verb", ["certify", "attack"])
@pytest.mark.parametrize(
    ("places", "records", "more", "expected"),
    [
        ("some_models:a first", [{"sigma": 0.25, "family": "laplace"}], [], ("LaplaceNoise", 0.25)),
        ("some_models:a first", [{"sigma": 0.25, "family": "laplace"}], ["--sigma", "0.1"], ("LaplaceNoise", 0.1)),
        ("first some_models:a", [{"sigma": 0.25, "family": "laplace"}], [], ("LaplaceNoise", 0.25)),
        ("first second", [{"sigma": None}, {"sigma": 0.5, "family": "uniform"}], [], ("UniformNoise", 0.5)),
        ("some_models:a some_models:b", [], ["--sigma", "0.1"], ("GaussianNoise", 0.1)),
    ],
    ids=["member", "sigma", "model", "without noise", "functions"],
)
def test_the_known_noise_counts_for_all(verb, places, records, more, expected):
    for number, record in enumerate(records):
        trained(["first", "second"][number], number + 1, **record)
    command = COMMAND.replace("--sigma 0.5", "")
    if verb == "attack":
        command = "attack --data npz:squares.npz --attack SmoothAdvPGD:eps=0.5,steps=1,samples=1 --n 20 --pictures 0 "
        command += "--device cpu --stop 2 --out out --model some_models:a"
    model, member = places.split()
    folders = ["--model", model, "--member", member, "--trust-model"]
    result = CliRunner().invoke(main, [*shlex.split(command), *folders, *more])
    assert result.exit_code == 0, result.output
    log = Path("log.tsv.json" if verb == "certify" else "out/evaluation.json")
    record = json.loads(log.read_text())
    noise = record["noise"] if verb == "certify" else record["made_with"]["noise"]
    assert noise == f"{expected[0]}(sigma={expected[1]})"


@pytest.mark.parametrize("places", ["some_models:a first second", "first some_models:a second"])
def test_two_known_values_differ_beside_an_unknown_one(places):
    trained("first", 1, sigma=0.25)
    trained("second", 2, sigma=0.25, family="laplace")
    model, *members = places.split()
    folders = ["--model", model, *(word for place in members for word in ("--member", place)), "--trust-model"]
    result = CliRunner().invoke(main, [*shlex.split(COMMAND), *folders])
    assert result.exit_code == 1
    assert "Error: noise: expected --noise, as members were trained with gaussian and laplace" in result.output


@pytest.mark.parametrize("member", ["some_models:untrained", "some_models:a"])
def test_weights_are_those_of_the_model_alone(member):
    torch.save(models()[1].state_dict(), "w.pt")
    result = invoke("--model", "some_models:untrained", "--weights", "w.pt", "--member", member)
    if member == "some_models:a":
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1
    assert (
        "Error: member: some_models:untrained returns other weights each time; --weights is for --model alone, so a "
        "member has to be a folder that rs-plugins train wrote, or a function that returns trained weights"
    ) in result.output


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"sigma": 0.5}, "sigma: expected --sigma, as members were trained with 0.25 and 0.5"),
        (
            {"sigma": 0.25, "family": "laplace"},
            "noise: expected --noise, as members were trained with gaussian and",
        ),
    ],
    ids=["sigma", "family"],
)
def test_what_training_does_not_agree_in_has_to_be_said(second, message):
    trained("first", 0, sigma=0.25)
    trained("second", 1, **second)
    folders = ["--model", "first", "--member", "second", "--trust-model"]
    result = CliRunner().invoke(main, [*shlex.split(COMMAND.replace("--sigma 0.5", "")), *folders])
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ensemble", "soft"], "ensemble: expected --member beside --ensemble soft, got none"),
        ([*MEMBERS, "--ensemble", "best"], "ensemble: expected one of soft, consensus, got 'best'"),
        ([*MEMBERS, "--ensemble", "soft:k=2"], "ensemble: soft has no option 'k'; it has average, weights"),
        ([*MEMBERS, "--ensemble", "consensus"], "ensemble: consensus needs k, as in consensus:k=2"),
        ([*MEMBERS, "--ensemble", "consensus:k=two"], "ensemble: k: expected an integer, got 'two'"),
        (
            [*MEMBERS, "--ensemble", "consensus:k=3"],
            "k: expected an integer >= 2 and fewer than the number of models, 3, got 3",
        ),
        ([*MEMBERS, "--ensemble", "soft:weights=1/2"], "weights: expected one for each of 3 models, got 2"),
        (["--member", "some_models:a"], "member: expected different networks, got the same one twice"),
        (["--member", "some_models"], "member: expected PACKAGE.MODULE:FUNCTION, or a folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_no_log(more, message):
    result = invoke(*more)
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert not Path("log.tsv").exists()
