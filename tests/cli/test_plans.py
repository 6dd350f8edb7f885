import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from rs_plugins.cli.certify import _plan
from rs_plugins.cli.plans import parse_plan
from rs_plugins.core.plans.anytime import Anytime
from rs_plugins.core.plans.at_radius import AtRadius
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class Everything:
    radii: tuple[float, ...]
    n: int = 10
    share: float = 0.5
    sure: bool = False
    name: str = "x"
    seconds: float | None = 3.0
    counts: Sequence[int] = ()
    limits: list[int] | None = None
    derived: int = field(default=0, init=False)


@dataclass(frozen=True)
class Early:
    n: int = 3


PLANS = {"every-thing": Everything, "early": Early, "early-stop": Early}


UNKNOWN = (
    "plan: expected one of every-thing, early, early-stop, or the beginning of just one, with options as in "
    "fixed:n=10000,"
)


def parsed(text):
    return parse_plan(text, list(PLANS), PLANS.get)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("every-thing:radii=0/0.25/1", Everything(radii=(0.0, 0.25, 1.0))),
        ("every:radii=1,n=1000", Everything(radii=(1.0,), n=1000)),
        ("ev:radii=1,n=100_000", Everything(radii=(1.0,), n=100_000)),
        ("ev:radii=1,n=1e5", Everything(radii=(1.0,), n=100_000)),
        ("ev:radii=1, share = 1e-3", Everything(radii=(1.0,), share=0.001)),
        ("ev:radii=1,sure=true", Everything(radii=(1.0,), sure=True)),
        ("ev:radii=1,sure=No", Everything(radii=(1.0,), sure=False)),
        ("ev:radii=1,name=kt", Everything(radii=(1.0,), name="kt")),
        ("ev:radii=1,seconds=none", Everything(radii=(1.0,), seconds=None)),
        ("ev:radii=1,seconds=2", Everything(radii=(1.0,), seconds=2.0)),
        ("ev:radii=1,counts=3/4", Everything(radii=(1.0,), counts=(3, 4))),
        ("ev:radii=1,limits=3/4", Everything(radii=(1.0,), limits=(3, 4))),
        ("early", Early()),
        ("early:n=4", Early(4)),
    ],
)
def test_plans(text, plan):
    assert parsed(text) == plan
    assert type(parsed(text)) is type(plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("late", f"{UNKNOWN} got 'late'"),
        ("e", f"{UNKNOWN} got 'e'"),
        ("", f"{UNKNOWN} got ''"),
        ("early:m=3", "plan: early has no option 'm'; it has n"),
        ("ev:radii=1,derived=3", "plan: ev has no option 'derived'; it has radii, n, share"),
        ("ev:n=3", "plan: ev needs radii, as in ev:radii=…"),
        ("early:", "plan: expected OPTION=VALUE after early:, got nothing"),
        ("early:n", "plan: expected OPTION=VALUE, each option once, with commas between, got 'n'"),
        ("early:n=", "plan: expected OPTION=VALUE, each option once, with commas between, got 'n='"),
        ("early:n=3,n=4", "plan: expected OPTION=VALUE, each option once, with commas between, got 'n=4'"),
        ("early:n=many", "plan: n: expected an integer, got 'many'"),
        ("early:n=2.5", "plan: n: expected an integer, got '2.5'"),
        ("early:n=25e-1", "plan: n: expected an integer, got '25e-1'"),
        ("ev:radii=1,share=half", "plan: share: expected a number, got 'half'"),
        ("ev:radii=1,sure=perhaps", "plan: sure: expected true or false, got 'perhaps'"),
        ("ev:radii=1,seconds=soon", "plan: seconds: expected a number, got 'soon'"),
        ("ev:radii=1/x", "plan: radii: expected a number, or several with / between, got '1/x'"),
    ],
)
def test_plans_that_cannot_be(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parsed(text)


def test_plans_of_plugins_are_looked_up():
    assert _plan("fixed:n0=10,n=200,alpha=0.01") == FixedBudget(n0=10, n=200, alpha=0.01)
    assert _plan("on-grid:radii=0/0.25/0.5") == OnGrid(radii=(0.0, 0.25, 0.5))
    assert _plan("at-radius:r=0.5,n=2e4") == AtRadius(r=0.5, n=20_000)
    assert _plan("anytime:fraction=0.9,seconds=10,runner_up=yes") == Anytime(fraction=0.9, seconds=10.0, runner_up=True)
    with pytest.raises(InputError, match=r"plan: expected one of .*fixed-budget.*, got 'bogus'"):
        _plan("bogus")
    with pytest.raises(InputError, match="n: expected at least 10, got 5"):
        _plan("fixed:n=5")


class NoDataclass:
    def __init__(self, n=3):
        self.n = n


@dataclass(frozen=True)
class Fussy:
    n: int = 3

    def __post_init__(self):
        raise (InputError("n: expected an even number, got 3") if self.n == 3 else KeyError("n"))


@dataclass(frozen=True)
class Unreadable:
    n: "NobodyKnows" = 3  # noqa: F821

    def __repr__(self):
        return f"n is {self.n!r}"


@pytest.mark.parametrize(
    ("plan", "text", "message"),
    [
        (NoDataclass, "mine", "plan: expected mine to be a dataclass of its options, got <class "),
        (5, "mine", "plan: expected mine to be a dataclass of its options, got 5"),
        (Early(), "mine", "plan: expected mine to be a dataclass of its options, got Early(n=3)"),
        (Fussy, "mine:n=4", "plan: mine cannot be set up: KeyError: 'n'"),
        (Fussy, "mine", "n: expected an even number, got 3"),
    ],
    ids=str,
)
def test_targets_that_are_no_plans(plan, text, message):
    with pytest.raises(InputError) as caught:
        parse_plan(text, ["mine"], lambda name: plan)
    assert str(caught.value).startswith(message)


def test_an_option_whose_annotation_cannot_be_told_is_text():
    assert repr(parse_plan("mine:n=4", ["mine"], lambda name: Unreadable)) == "n is '4'"
