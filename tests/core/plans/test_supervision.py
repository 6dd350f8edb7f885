"""Plans of anybody are held to what they promise."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins import Anytime, AtRadius, FixedBudget, OnGrid, certify
from rs_plugins.core.confidence import clopper_pearson_lower
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.plans.protocol import Case, Verdict, concluded
from rs_plugins.core.plans.supervision import check_plan, check_verdict, supervised
from rs_plugins.errors import InputError, PluginError

X = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
CASE = Case(GaussianNoise(0.5), 0.5, lambda: 0.0, lambda verdict: False)


@dataclass(frozen=True)
class Mine:
    """A plan of somebody else's."""

    n: int = 50
    alpha: float = 0.01
    bound = "clopper-pearson"

    @property
    def most(self):
        return 2 * self.n

    def check(self, noise):
        """Every noise will do."""

    def procedure(self, case):
        chosen = yield self.n
        guess = chosen.argmax()
        votes = yield self.n
        p_lower = clopper_pearson_lower(votes[guess], self.n, self.alpha)
        return self.conclude(case, guess=guess, count=votes[guess], n=self.n, n0=self.n, p_lower=p_lower)

    def conclude(self, case, **figures):
        return concluded(case, **figures)


def network():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.copy_(torch.tensor([3.0, 0.0]))
    return model


def certified(**changes):
    plan = type("Theirs", (Mine,), changes)()
    return list(certify(network(), X, 0.5, plan=plan))


def test_a_plan_that_keeps_its_promises():
    found = certified()
    p_lower = clopper_pearson_lower(50, 50, 0.01)
    figures = [(each.prediction, each.count, each.n, each.n0, each.p_lower) for each in found]
    assert figures == [(0, 50, 50, 50, p_lower)] * 2
    assert {type(getattr(found[0], name)) for name in ("prediction", "guess", "count")} == {int}  # not NumPy's


@pytest.mark.parametrize("part", ["alpha", "bound", "check", "most", "procedure"])
def test_what_a_plan_lacks_is_said(part):
    has = {"alpha": 0.01, "bound": "", "check": print, "most": 10, "procedure": print}
    del has[part]
    plan = type("Half", (), has)()
    with pytest.raises(InputError, match=f"^plan: Half has no {part}; expected alpha, bound, check, most, procedure$"):
        certify(network(), X, 0.5, plan=plan)


def test_the_most_is_a_number_of_votes():
    with pytest.raises(InputError, match=r"^plan: most of Theirs: expected an integer >= 1, got 0$"):
        certified(most=0)
    assert check_plan(Mine()) == Mine()


def endless(self, case):
    while True:
        yield self.n


def raising(self, case):
    yield self.n
    raise RuntimeError("boom")


def returning(value):
    def procedure(self, case):
        yield self.n
        return value

    return procedure


def asking(value):
    def procedure(self, case):
        yield value

    return procedure


def refusing(self, noise):
    raise ValueError("not this one")


def claiming(**claims):
    return lambda self, case, **figures: concluded(case, **{**figures, **claims})


BAD = {
    "it never ends": (
        {"procedure": endless},
        InputError,
        "plan: Theirs asks for 150 votes of an image, its most is 100",
    ),
    "its most is too low": ({"most": 99}, InputError, "plan: Theirs asks for 100 votes of an image, its most is 99"),
    "it raises": ({"procedure": raising}, PluginError, "plan: Theirs fails: RuntimeError: boom"),
    "it raises at once": (
        {"procedure": lambda self, case: 1 / 0},
        PluginError,
        "plan: Theirs fails: ZeroDivisionError",
    ),
    "no generator": (
        {"procedure": lambda self, case: 3},
        InputError,
        "plan: Theirs: expected procedure to be a generator of numbers of votes, got 3",
    ),
    "no verdict": (
        {"procedure": returning(None)},
        InputError,
        "plan: Theirs: expected its procedure to return a Verdict, got None",
    ),
    "no number": (
        {"procedure": asking("many")},
        InputError,
        "plan: votes that Theirs asks for: expected an integer >= 1, got 'many'",
    ),
    "no votes": (
        {"procedure": asking(0)},
        InputError,
        "plan: votes that Theirs asks for: expected an integer >= 1, got 0",
    ),
    "it refuses": (
        {"check": refusing},
        InputError,
        "plan: Theirs refuses gaussian noise: ValueError: not this one",
    ),
    "too sure": (
        {"conclude": claiming(p_lower=1.2)},
        InputError,
        "p_lower: expected a probability, from 0 to 1, got 1.2",
    ),
    "no bound": (
        {"conclude": claiming(p_lower=math.nan)},
        InputError,
        "p_lower: expected a probability, from 0 to 1, got nan",
    ),
    "no bound on the others": (
        {"conclude": claiming(runner_up=-0.1)},
        InputError,
        "runner_up: expected a probability, from 0 to 1, got -0.1",
    ),
    "a radius of its own": (
        {"conclude": lambda self, case, **figures: Verdict(0, math.nan, 0, 50, 50, 50, 0.9)},
        InputError,
        "plan: Theirs: expected radius to be a number >= 0, got nan",
    ),
    "a bound of its own": (
        {"conclude": lambda self, case, **figures: Verdict(0, 0.1, 0, 50, 50, 50, 1.1)},
        InputError,
        "plan: Theirs: expected p_lower to be a number from 0 to 1, got 1.1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_plan_that_breaks_them_is_named(case):
    changes, error, message = BAD[case]
    with pytest.raises(error) as caught:
        certified(**changes)
    assert str(caught.value).startswith(message)
    assert (caught.value.__cause__ is not None) is (error is PluginError or "refuses" in message)


def test_interim_verdicts_are_looked_at_too():
    def procedure(self, case):
        yield self.n
        case.report(Verdict(0, -1.0, 0, 50, 50, 0, 0.9))

    plan = type("Theirs", (Mine,), {"procedure": procedure, "interim": True})()
    with pytest.raises(InputError, match=r"plan: Theirs: expected radius to be a number >= 0, got -1.0"):
        list(certify(network(), X, 0.5, plan=plan, watch=lambda certificate: None))


@pytest.mark.parametrize("radius", ["0.2", torch.tensor(0.2), None, True], ids=repr)
def test_a_radius_is_a_number(radius):
    with pytest.raises(InputError, match="plan: Mine: expected radius to be a number >= 0, got "):
        check_verdict(Verdict(0, radius, 0, 50, 50, 50, 0.9), Mine())


def test_a_verdict_that_can_be():
    for radius in (0.0, math.inf, np.float64(0.5), 1):
        verdict = Verdict(0, radius, 0, 50, 50, 50, 0.9, runner_up=0.05)
        assert check_verdict(verdict, Mine()) is verdict


@pytest.mark.parametrize(
    "plan",
    [
        FixedBudget(n0=7, n=40),
        Anytime(n0=7, n=200, fraction=1),
        Anytime(n0=7, n=200, seconds=1e-9),
        OnGrid((0.0, 0.1), n0=7, n=200),
        AtRadius(0.05, n0=7, n=200),
    ],
    ids=repr,
)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_our_own_plans_ask_for_no_more_than_their_most(plan, share):
    verdict, asked = outcome(supervised(plan, CASE), share)
    assert asked <= plan.most
    assert verdict.guess == 0


def outcome(procedure, share):
    """Return what a procedure concludes if the first of two classes gets ``share`` of all votes; how many it took."""
    votes, asked = None, 0
    while True:
        try:
            wanted = procedure.send(votes)
        except StopIteration as stop:
            return stop.value, asked
        asked += wanted
        votes = np.array([round(share * wanted), wanted - round(share * wanted)])
