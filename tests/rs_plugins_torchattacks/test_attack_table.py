"""Every attack with every option: what the option does, what holds whatever it is, and that none is left out."""

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import ModelError
from rs_plugins_torchattacks.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD
from rs_plugins_torchattacks.plugin import rs_plugins_components

from .conftest import BATCHNORM, Fuse, picture

ATTACKS = (SmoothAdvPGD, SmoothAdvLinfPGD, SmoothAdvDDN)
SIGMA = 0.3
# Short, and where an option has something to change.
USUAL = {
    SmoothAdvPGD: {"eps": 0.4, "steps": 4, "sigma": SIGMA, "samples": 5},
    SmoothAdvLinfPGD: {"eps": 0.2, "steps": 4, "sigma": SIGMA, "samples": 5},
    SmoothAdvDDN: {"steps": 6, "max_norm": 0.4, "sigma": SIGMA, "samples": 5},
}
LENGTHS = torch.tensor([0.05, 0.1, 0.2, 0.3])  # one per image
WIDE = LENGTHS.reshape(4, 1, 1, 1)


@dataclass
class Case:
    attack: type
    option: str
    value: Any
    same: bool = False  # whether the option leaves the result as it is
    usual: dict[str, Any] = field(default_factory=dict)  # what it needs to have an effect

    def __str__(self) -> str:
        value = f"tensor{tuple(self.value.shape)}" if isinstance(self.value, torch.Tensor) else self.value
        return f"{self.attack.__name__}-{self.option}={value}"

    def make(self, model, **changed):
        return self.attack(model, **{**USUAL[self.attack], **self.usual, **changed})

    def with_it(self, model):
        return self.make(model, **{self.option: self.value})


def noise(attack):
    yield Case(attack, "sigma", 0.6)
    yield Case(attack, "samples", 8)
    yield Case(attack, "objective", "mean-cross-entropy")
    yield Case(attack, "objective", "mean-logits")
    yield Case(attack, "gradient", "stein")
    yield Case(attack, "gradient", "centred-stein")
    yield Case(attack, "chunk", 3, same=True)
    yield Case(attack, "seed", 7)
    yield Case(attack, "seed", None)


def pgd(attack, short):
    yield Case(attack, "eps", 2 * short)
    yield Case(attack, "eps", LENGTHS)
    yield Case(attack, "eps", WIDE)
    yield Case(attack, "alpha", short)
    yield Case(attack, "alpha", short, usual={"rule": "projected"})
    yield Case(attack, "alpha", LENGTHS / 10)
    yield Case(attack, "alpha", WIDE / 10)
    yield Case(attack, "steps", 2)
    yield Case(attack, "noise", "fixed")
    yield Case(attack, "antithetic", False)
    yield Case(attack, "rule", "projected")
    yield Case(attack, "random_start", True)
    yield Case(attack, "restarts", 3, usual={"steps": 1, "alpha": short, "random_start": True})
    yield Case(attack, "early_stop", 0.1, usual={"eps": 10 * short})


CASES = [
    *noise(SmoothAdvPGD),
    *pgd(SmoothAdvPGD, 0.1),
    *noise(SmoothAdvLinfPGD),
    *pgd(SmoothAdvLinfPGD, 0.05),
    *noise(SmoothAdvDDN),
    Case(SmoothAdvDDN, "steps", 3),
    Case(SmoothAdvDDN, "gamma", 0.2),
    Case(SmoothAdvDDN, "init_norm", 0.1),
    Case(SmoothAdvDDN, "init_norm", LENGTHS),
    Case(SmoothAdvDDN, "init_norm", WIDE),
    Case(SmoothAdvDDN, "max_norm", 0.1),
    Case(SmoothAdvDDN, "max_norm", LENGTHS),
    Case(SmoothAdvDDN, "max_norm", WIDE),
    Case(SmoothAdvDDN, "levels", None),
    Case(SmoothAdvDDN, "levels", 16),
    Case(SmoothAdvDDN, "noise", "fresh"),
    Case(SmoothAdvDDN, "antithetic", False),
    Case(SmoothAdvDDN, "confirm", 0.1, usual={"max_norm": 3.0}),
]
table = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def cnn(cnn):
    """That network, but curved, so that the signs of gradients depend on the point too."""
    with torch.no_grad():
        cnn[0].weight.mul_(4)
    return cnn


@pytest.fixture
def y(cnn, x):
    """What the smoothed classifier says, so that there is something to attack."""
    with torch.no_grad():
        return SmoothedModel(cnn, SIGMA, samples=100)(x).argmax(1)


def length(attack, delta):
    """The length of each image of ``delta``, in the norm of the attack, and the most that it may be."""
    flat = delta.flatten(1)
    found = flat.abs().amax(dim=1) if isinstance(attack, SmoothAdvLinfPGD) else flat.norm(dim=1)
    budget = attack.max_norm if isinstance(attack, SmoothAdvDDN) else attack.eps
    return found, torch.as_tensor(budget).flatten()


def options(attack):
    first, *rest = inspect.signature(attack).parameters.values()
    assert first.name == "model"
    return {parameter.name: parameter.default for parameter in rest}


def test_the_table_has_every_attack_that_is_offered():
    offered = {component.target.split(":")[1] for component in rs_plugins_components()}
    assert {attack.__name__ for attack in ATTACKS} == offered
    homes = {component.target.split(":")[0] for component in rs_plugins_components()}
    assert {vars(import_module(home))[name] for home in homes for name in offered} == set(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_table_has_every_option(attack):
    assert {case.option for case in CASES if case.attack is attack} == options(attack).keys()


@table
def test_the_value_is_neither_the_default_nor_the_usual_one(case):
    default = options(case.attack)[case.option]
    usual = {**USUAL[case.attack], **case.usual}.get(case.option, default)
    assert not any(type(other) is type(case.value) and other == case.value for other in (default, usual))


@table
def test_an_option_changes_the_result_or_is_one_that_must_not(cnn, x, y, seen, case):
    usual = case.make(cnn)(x, y)
    with seen(cnn) as batches:
        found = case.with_it(cnn)(x, y)
    if case.same:
        assert case.option == "chunk"
        assert max(len(batch) for batch in batches) == case.value
        torch.testing.assert_close(found, usual, atol=1e-5, rtol=0)
    else:
        assert (found - usual).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@table
def test_budget_box_and_state_hold_whatever_the_option(cnn, x, y, case, dtype):
    attack, x = case.with_it(disordered(cnn.to(dtype))), x.to(dtype)
    given, before = x.clone(), state(attack)
    found = attack(x, y)
    assert state(attack) == before
    assert torch.equal(x, given)
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, dtype, False)
    assert found.min() >= 0
    assert found.max() <= 1
    lengths, budget = length(attack, found - x)
    assert (lengths <= budget + 1e-6).all()


@table
def test_the_state_is_as_before_after_an_exception_at_any_pass(cnn, x, y, normalisation, case):
    mean, std, normalise, _ = normalisation
    model = nn.Sequential(disordered(cnn), Fuse(1000))
    attack = case.with_it(model)
    attack.set_normalization_used(mean, std)
    before = state(attack)
    found = attack(normalise(x), y)
    passes = 1000 - model[1].left
    for calls in (0, 1, passes // 2, passes - 1):
        model[1].left = calls
        with pytest.raises((RuntimeError, ModelError), match="out of memory"):
            attack(normalise(x), y)
        assert state(attack) == before
        assert getattr(attack, "success", None) is None
    model[1].left = 1000
    if case.value is not None or case.option != "seed":
        torch.testing.assert_close(attack(normalise(x), y), found, atol=1e-6, rtol=0)


def disordered(cnn):
    """A model in which everything that must come back is unusual: modes, frozen parameters, gradients."""
    cnn.train()[BATCHNORM].eval()
    cnn[0].weight.requires_grad_(False)
    cnn[0].bias.grad = torch.ones_like(cnn[0].bias)
    return cnn


def state(attack):
    return picture(attack.model), torch.get_rng_state().tolist(), attack._normalization_applied
