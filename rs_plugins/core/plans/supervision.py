"""Plans, which may be anybody's, held to what they promise: votes within their most, and a verdict that can be."""

import math
from collections.abc import Generator
from typing import Any

from rs_plugins.core.checks import check_count, is_real
from rs_plugins.core.noise import Noise
from rs_plugins.core.plans.protocol import Case, Plan, Verdict
from rs_plugins.core.procedures import Procedure
from rs_plugins.errors import InputError, PluginError, RSPluginsError

_PARTS = ("alpha", "bound", "check", "most", "procedure")


def check_plan(plan: Any) -> Plan:
    """Return ``plan`` if it has all that a plan has.

    Raises:
        InputError: Otherwise; the message says what is missing.
    """
    missing = [part for part in _PARTS if not hasattr(plan, part)]
    if isinstance(plan, type) or len(missing) == len(_PARTS):
        raise InputError(f"plan: expected a plan such as FixedBudget(n=1000), got {plan!r:.200}")
    if missing:
        raise InputError(f"plan: {_name(plan)} has no {', '.join(missing)}; expected {', '.join(_PARTS)}")
    check_count(plan.most, f"plan: most of {_name(plan)}")
    return plan  # type: ignore[no-any-return]


def check_noise_of(plan: Plan, noise: Noise) -> None:
    """Ask ``plan`` whether it can do something with ``noise``.

    Raises:
        InputError: If not; whatever else it raises becomes one.
    """
    try:
        plan.check(noise)
    except RSPluginsError:
        raise
    except Exception as error:  # somebody else's plan may raise anything
        raise InputError(f"plan: {_name(plan)} refuses {noise.name} noise: {_said(error)}") from error


def supervised(plan: Plan, case: Case) -> Procedure[Verdict]:
    """Run the procedure of ``plan`` for ``case``.

    Raises:
        InputError: If it is no generator, asks for no number of votes or for more than its ``most``, or returns what
            cannot be a verdict.
        PluginError: If it raises anything that is not ours.
    """
    asked, most, votes = 0, plan.most, None
    procedure: Any = None
    while True:
        try:
            if procedure is None:
                procedure = _check_generator(plan.procedure(case), plan)
            wanted = procedure.send(votes)
        except StopIteration as end:
            return check_verdict(end.value, plan)
        except RSPluginsError:
            raise
        except Exception as error:  # somebody else's plan may raise anything
            raise PluginError(f"plan: {_name(plan)} fails: {_said(error)}") from error
        asked += check_count(wanted, f"plan: votes that {_name(plan)} asks for")
        if asked > most:
            raise InputError(f"plan: {_name(plan)} asks for {asked} votes of an image, its most is {most}")
        votes = yield wanted


def check_verdict(verdict: object, plan: Plan) -> Verdict:
    """Return ``verdict`` if ``plan`` may conclude it.

    Raises:
        InputError: If it is none, or a number in it cannot be.
    """
    if not isinstance(verdict, Verdict):
        raise InputError(f"plan: {_name(plan)}: expected its procedure to return a Verdict, got {verdict!r:.80}")
    for name, most in (("radius", math.inf), ("p_lower", 1), ("runner_up", 1)):
        value = getattr(verdict, name)
        if (name, value) != ("runner_up", None) and not (is_real(value) and 0 <= value <= most):
            expected = "a number >= 0" if most == math.inf else "a number from 0 to 1"
            raise InputError(f"plan: {_name(plan)}: expected {name} to be {expected}, got {value!r:.80}")
    return verdict


def _check_generator(procedure: object, plan: Plan) -> object:
    if not isinstance(procedure, Generator):
        got = f"{procedure!r:.80}"
        raise InputError(f"plan: {_name(plan)}: expected procedure to be a generator of numbers of votes, got {got}")
    return procedure


def _name(plan: object) -> str:
    return type(plan).__name__


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
