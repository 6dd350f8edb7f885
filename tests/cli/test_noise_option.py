"""Noise families by name on the command line: ours, a third party's, and what records and later verbs make of them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rs_plugins import LaplaceNoise, UniformLinfNoise, certify, load_trained, registry
from rs_plugins.cli import main
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import format_down

MODELS = """
from torch import nn
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
"""
CERTIFY = (
    "certify --model my_models:linear --weights w.pt --data npz:squares.npz --sigma 0.5 --plan fixed:n0=10,n=200 "
    "--device cpu --stop 4 --out log.tsv"
)
TRAIN = (
    "train --method gaussian --sigma 0.25 --data npz:squares.npz --arch my_models:linear --epochs 1 --batch-size 8 "
    "--device cpu --out run"
)
TRIANGULAR = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Triangular:
    \"\"\"The sum of two uniform numbers in each coordinate, certified as one of them is: by l1.\"\"\"
    name = "triangular"
    norm = "l1"
    sigma: float
    def draw_(self, out, generator):
        half = 1.5 ** 0.5 * self.sigma
        first = out.new_empty(out.shape).uniform_(-half, half, generator=generator)
        return out.uniform_(-half, half, generator=generator).add_(first)
    def radius(self, p_lower):
        return 1.5 ** 0.5 * self.sigma * (2 * p_lower - 1) * (1 - 1e-12)
class Elsewhere(Triangular):
    name = "triangular"
NUMBER = 5
"""
COMPONENTS = """
@hookimpl
def rs_plugins_components():
    yield Component("noise", "triangular", "triangular:Triangular")
    yield Component("noise", "tri", "triangular:Elsewhere")
    yield Component("noise", "number", "triangular:NUMBER")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a model's code, its weights and data, as the current one."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (work / "my_models.py").write_text(MODELS)
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4), dtype=np.uint8)
    np.savez("squares.npz", images=images, labels=np.arange(16) % 4)
    weights = 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"1.weight": weights, "1.bias": torch.zeros(4)}, "w.pt")
    return work


@pytest.fixture
def plugin(site):
    """A third party's package, installed."""
    site.write("triangular.py", TRIANGULAR)
    site.plugin("tri", COMPONENTS, distribution="rs-triangular")
    return site


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *more])


def done(command, *more):
    result = invoke(command, *more)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(command, *more):
    result = invoke(command, *more)
    assert result.exit_code != 0
    return result.output


def record(log="log.tsv"):
    return json.loads(Path(log + ".json").read_text())


@pytest.mark.parametrize(
    ("name", "norm", "noise"),
    [
        ("gaussian", "l2", "GaussianNoise(sigma=0.5)"),
        ("gaussian-linf", "linf", "GaussianLinfNoise(sigma=0.5, dimension=16)"),
        ("laplace", "l1", "LaplaceNoise(sigma=0.5)"),
        ("uniform", "l1", "UniformNoise(sigma=0.5)"),
        ("uniform-linf", "linf", "UniformLinfNoise(sigma=0.5, dimension=16)"),
    ],
)
def test_certify_by_name(name, norm, noise):
    shown = done(CERTIFY, "--noise", name)
    assert (f" in {norm}," in shown) == (norm != "l2")
    assert (record()["family"], record()["norm"], record()["noise"]) == (name, norm, noise)


def test_it_is_the_family_of_python():
    done(CERTIFY, "--noise", "uniform-linf")
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    model.load_state_dict(torch.load("w.pt"))
    images = open_data_set("npz:squares.npz").read([0, 1, 2, 3])
    found = certify(model, images, 0.5, plan=FixedBudget(n0=10, n=200), family=UniformLinfNoise)
    radii = [line.split("\t")[3] for line in Path("log.tsv").read_text().splitlines()[1:]]
    assert radii == [format_down(certificate.radius) for certificate in found]
    assert any(float(radius) for radius in radii)


def test_a_log_is_of_one_family():
    done(CERTIFY, "--noise", "laplace", "--shard", "0/2")
    done(CERTIFY, "--noise", "laplace", "--shard", "0/2", "--resume")
    assert (
        "log.tsv: begun by another run (family: 'laplace' -> 'uniform'; noise: 'LaplaceNoise(sigma=0.5)' -> "
        in refused(CERTIFY, "--noise", "uniform", "--shard", "0/2", "--resume")
    )
    changed = refused(CERTIFY, "--noise", "uniform-linf", "--shard", "0/2", "--resume")
    assert "family: 'laplace' -> 'uniform-linf'; norm: 'l1' -> 'linf'" in changed
    done(CERTIFY.replace("log.tsv", "other.tsv"), "--noise", "uniform", "--shard", "1/2")
    assert "of another run than log.tsv (family: 'laplace' -> 'uniform'" in refused(
        "merge log.tsv other.tsv --out all.tsv"
    )


def test_an_unknown_family_is_refused_with_what_there_is():
    known = "gaussian, gaussian-linf, laplace, "
    for command in (CERTIFY, TRAIN):
        assert f"Error: no noise is called 'cauchy'; known are: {known}" in refused(command, "--noise", "cauchy")


def test_a_third_partys_family_is_certified_by_name(plugin):
    environ = os.environ | {"PYTHONPATH": str(plugin.folder)}
    command = [str(Path(sys.executable).parent / "rs-plugins"), *shlex.split(CERTIFY), "--noise", "triangular"]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (record()["family"], record()["norm"], record()["noise"]) == ("triangular", "l1", "Triangular(sigma=0.5)")
    rows = [line.split("\t") for line in Path("log.tsv").read_text().splitlines()[1:]]
    for row in rows:
        assert float(row[3]) == pytest.approx(max(0.0, 1.5**0.5 * 0.5 * (2 * float(row[6]) - 1)), abs=1e-7)
    assert max(float(row[3]) for row in rows) > 0.1


@pytest.mark.usefixtures("plugin")
def test_a_plan_that_needs_more_than_a_third_partys_family_has(monkeypatch):
    monkeypatch.setattr(registry, "_DEFAULT", registry.Registry())
    refusal = refused(CERTIFY, "--noise", "triangular", "--plan", "at-radius:r=0.1")
    assert "family: expected noise with probability(radius) for this plan, got triangular noise" in refusal
    refusal = refused(CERTIFY, "--noise", "tri")
    number = refused(CERTIFY, "--noise", "number")
    assert "Error: noise: expected number to be a class that is called with sigma, got 5\n" in number
    assert "noise: expected a family that is called 'tri' in results, too, got 'triangular'" in refusal


def test_train_and_certify_under_the_same_noise():
    assert "gaussian, sigma 0.25 of laplace noise: my_models:linear" in done(TRAIN, "--noise", "laplace")
    trained = load_trained("run", trust=True)
    assert trained.record["family"] == "laplace"
    assert LaplaceNoise.__module__ in trained.record["objective"]
    assert "family: 'laplace' -> 'uniform'" in refused(TRAIN, "--noise", "uniform", "--resume")
    certify_it = "certify --model run --trust-model --data npz:squares.npz --plan fixed:n=20 --device cpu --stop 2"
    done(certify_it, "--out", "own.tsv")
    assert (record("own.tsv")["family"], record("own.tsv")["sigma"]) == ("laplace", 0.25)
    done(certify_it, "--out", "other.tsv", "--noise", "gaussian")
    assert record("other.tsv")["family"] == "gaussian"
    changed = json.loads(Path("run/model.json").read_text()) | {"family": "cauchy"}
    Path("run/model.json").write_text(json.dumps(changed))
    refusal = refused(certify_it, "--out", "third.tsv")
    assert "noise: run was trained with 'cauchy': no noise is called 'cauchy'; known are: gaussian, " in refusal
    assert "install its plugin, or choose by --noise" in refusal


def test_records_of_gaussian_training_are_as_they_were():
    done(TRAIN)
    assert "family" not in load_trained("run", trust=True).record


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (TRAIN.replace("--method gaussian --sigma 0.25", "--method gls:eps=0.1"), "noise: gls trains without noise"),
        (
            "train --preset smoothmix-mnist-0.5 --data npz:squares.npz --out run",
            "noise: the preset smoothmix-mnist-0.5 has its own, expected no --noise beside it",
        ),
        (
            "certify --model my_models:linear --weights w.pt --data npz:squares.npz --bounds ibp --eps 0.1 --out b.tsv",
            "--noise is for randomized smoothing, which --bounds is not",
        ),
    ],
    ids=["without noise", "preset", "bounds"],
)
def test_where_there_is_no_choice_of_noise(command, message):
    assert message in refused(command, "--noise", "laplace")


def test_attacks_and_their_judge_take_the_family():
    attack = (
        "attack --model my_models:linear --weights w.pt --data npz:squares.npz --sigma 0.25 --n 100 --device cpu "
        "--stop 4 --pictures 0 --noise uniform --out out --attack SmoothAdvPGD:eps=0.5,steps=2,samples=4"
    )
    done(attack)
    made_with = json.loads(Path("out/evaluation.json").read_text())["made_with"]
    assert made_with["noise"] == "UniformNoise(sigma=0.25)"
    refusal = refused(attack.replace("steps=2", "steps=2,gradient=stein").replace("--out out", "--out stein"))
    assert "family: expected Gaussian noise for a gradient by Stein's identity, got uniform" in refusal
