"""Noise families of anybody are held to what they promise, wherever they are called."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins import AtRadius, FixedBudget, SmoothedModel, certify
from rs_plugins.core.noise import GaussianNoise, make_noise
from rs_plugins.core.noise_promises import draw_into, promised_number
from rs_plugins.core.perturbing import perturb_
from rs_plugins.core.training.objective import StreamDraws
from rs_plugins.errors import InputError, PluginError

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Mine(GaussianNoise):
    """A family of somebody else's: ``draws`` and ``gives`` say what it does."""

    name = "mine"
    draws = gives = staticmethod(lambda given: given)

    def draw_(self, out, generator):
        return self.draws(super().draw_(out, generator))

    def radius(self, p_lower):
        return self.gives(super().radius(p_lower))

    def probability(self, radius):
        return self.gives(super().probability(radius))

    def radius_between(self, p_lower, runner_up):
        return self.gives(super().radius_between(p_lower, runner_up))


def network(lead=0.0):
    """A linear classifier whose first class is ``lead`` ahead."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.5, -1.0]]))
        model.bias.copy_(torch.tensor([lead, 0.0]))
    return model


def family(**how):
    return type("Family", (Mine,), {name: staticmethod(function) for name, function in how.items()})


def fails(given):
    raise ZeroDivisionError("oops")


def too_little_memory(given):
    raise RuntimeError("DefaultCPUAllocator: not enough memory")


def generator():
    return torch.Generator().manual_seed(1)


BAD_DRAWS = {
    "a new tensor": (lambda out: out.clone(), InputError, r"got another tensor of shape \(.*\)$"),
    "another shape": (lambda out: torch.zeros(7), InputError, r"got another tensor of shape \(7,\)$"),
    "nothing": (lambda out: None, InputError, "got None$"),
    "it raises": (fails, PluginError, "^noise 'mine': draw_ fails: ZeroDivisionError: oops$"),
}
# wherever draws are made
USES = {
    "votes": lambda noise: perturb_(noise(0.5), torch.empty(2, 4), X[0], generator()),
    "training": lambda noise: StreamDraws(generator()).noise(noise(0.5), X, 2),
    "soft vote": lambda noise: SmoothedModel(network(), 0.5, family=noise).eval()(X),
    "certificates": lambda noise: list(certify(network(), X, 0.5, family=noise, plan=FixedBudget(n=100))),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", BAD_DRAWS)
def test_draws_fill_the_tensor_that_is_given(case, use):
    draws, error, message = BAD_DRAWS[case]
    with pytest.raises(error, match=message) as caught:
        USES[use](family(draws=draws))
    assert str(caught.value).startswith("noise 'mine': draw_ ")


@pytest.mark.parametrize("use", USES)
def test_draws_that_do_are_those_of_the_family(use):
    ours, theirs = (USES[use](noise) for noise in (GaussianNoise, family()))
    if use == "certificates":
        ours, theirs = ([vars(each) | {"made_with": None, "seconds": 0} for each in found] for found in (ours, theirs))
    assert ours is theirs is None or (torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs)


def test_drawn_is_what_was_given():
    out = torch.empty(5)
    assert draw_into(GaussianNoise(0.5), out, generator()) is out
    assert torch.equal(out, torch.empty(5).normal_(0, 0.5, generator=generator()))


def test_an_error_of_memory_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: not enough memory$"):
        draw_into(family(draws=too_little_memory)(0.5), torch.empty(5), generator())


BAD_NUMBERS = {
    "nan": (math.nan, "gave nan; expected a number >= 0"),
    "negative": (-1.0, "gave -1.0; expected a number >= 0"),
    "text": ("0.2", "gave '0.2'; expected a number >= 0"),
    "a tensor": (torch.tensor(0.25), r"gave tensor\(0.2500\); expected a number >= 0"),
    "a truth": (True, "gave True; expected a number >= 0"),
    "nothing": (None, "gave None; expected a number >= 0"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
@pytest.mark.parametrize("runner_up", [False, True])
def test_a_certificate_has_a_radius(case, runner_up):
    value, message = BAD_NUMBERS[case]
    noise, method = family(gives=lambda given: value), "radius_between" if runner_up else "radius"
    arguments = r"0\.9\d+, 0\.0\d+" if runner_up else r"0\.9\d+"
    with pytest.raises(InputError, match=rf"^noise 'mine': {method}\({arguments}\) {message}$"):
        next(certify(network(lead=5.0), X, 0.5, family=noise, plan=FixedBudget(n=300, runner_up=runner_up)))


def test_what_a_radius_may_be():
    for value in (0, 0.25, math.inf, np.float64(0.25), np.float32(0.25), np.int64(3)):
        given = promised_number(family(gives=lambda given, value=value: value)(0.5), "radius", 0.7)
        assert (given, type(given)) == (value, float)


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        (lambda given: 1.5, InputError, r"probability\(0.1\) gave 1.5; expected a number from 0 to 1"),
        (lambda given: math.nan, InputError, r"probability\(0.1\) gave nan; expected a number from 0 to 1"),
        (fails, PluginError, "probability fails: ZeroDivisionError: oops"),
    ],
)
def test_a_probability_is_one(gives, error, message):
    with pytest.raises(error, match=f"^noise 'mine': {message}$"):
        certify(network(), X, 0.5, family=family(gives=gives), plan=AtRadius(0.1, n=100))


def test_a_radius_that_raises_is_said_with_its_cause():
    with pytest.raises(PluginError, match=r"^noise 'mine': radius fails: ZeroDivisionError: oops$") as caught:
        next(certify(network(lead=5.0), X, 0.5, family=family(gives=fails), plan=FixedBudget(n=100)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_is_ours_is_handed_on():
    with pytest.raises(InputError, match=r"^p_lower: expected a probability in \[1/2, 1\], got 0.2$"):
        promised_number(family()(0.5), "radius", 0.2)


def test_a_constructor_that_raises_names_the_noise():
    class Never(Mine):
        name = "never"

        def __post_init__(self):
            raise ValueError("no such sigma")

    with pytest.raises(
        InputError, match=r"^noise 'never': cannot be made with sigma = 0.25: ValueError: no such sigma$"
    ):
        make_noise(Never, 0.25)
