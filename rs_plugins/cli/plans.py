"""Plans as short texts: ``fixed-budget:n=1000,alpha=0.01``, ``on-grid:radii=0/0.25/0.5``."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from rs_plugins.cli.named_options import convert, split_text
from rs_plugins.errors import InputError, RSPluginsError


def parse_plan(text: str, names: Sequence[str], lookup: Callable[[str], Any]) -> Any:
    """Return the plan that ``text`` describes: a name, or the beginning of one, and options after a colon.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,…``; several values of one option with a slash between them.
        names: What plans there are.
        lookup: Returns the dataclass of a plan.

    Raises:
        InputError: If there is no such plan or option, or a value is none for it; the message says what there is.
    """
    full = _full_name(text.partition(":")[0].strip(), names)
    name, given = split_text(text, "plan")
    plan = lookup(full)
    if not (isinstance(plan, type) and is_dataclass(plan)):
        raise InputError(f"plan: expected {full} to be a dataclass of its options, got {plan!r:.80}")
    hints = _hints(plan)
    known = {item.name: item for item in fields(plan) if item.init}
    for option in given:
        if option not in known:
            raise InputError(f"plan: {name} has no option {option!r}; it has {', '.join(known)}")
    for option, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and option not in given:
            raise InputError(f"plan: {name} needs {option}, as in {name}:{option}=…")
    options = {option: convert(option, value, hints[option], "plan") for option, value in given.items()}
    try:
        return plan(**options)
    except RSPluginsError:
        raise
    except Exception as error:  # somebody else's constructor
        from rs_plugins import registry

        raise InputError(f"plan: {full} cannot be set up: {registry.describe(error)}") from error


def _hints(plan: type) -> dict[str, Any]:
    """Return the annotations of a plan's options; as they are written where that cannot be told."""
    try:
        return get_type_hints(plan)
    except Exception:  # names that only a type checker imports
        return {item.name: item.type for item in fields(plan)}


def _full_name(name: str, names: Sequence[str]) -> str:
    found = [known for known in names if known.startswith(name)]
    if name in names or len(found) == 1:
        return name if name in names else found[0]
    raise InputError(
        f"plan: expected one of {', '.join(names)}, or the beginning of just one, with options as in fixed:n=10000, "
        f"got {name!r}"
    )
