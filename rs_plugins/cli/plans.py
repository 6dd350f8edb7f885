"""Plans as short texts: ``fixed-budget:n=1000,alpha=0.01``, ``on-grid:radii=0/0.25/0.5``."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from rs_plugins.cli.named_options import convert, split_text
from rs_plugins.errors import InputError


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
    hints = get_type_hints(plan)
    known = {item.name: item for item in fields(plan) if item.init}
    for option in given:
        if option not in known:
            raise InputError(f"plan: {name} has no option {option!r}; it has {', '.join(known)}")
    for option, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and option not in given:
            raise InputError(f"plan: {name} needs {option}, as in {name}:{option}=…")
    return plan(**{option: convert(option, value, hints[option], "plan") for option, value in given.items()})


def _full_name(name: str, names: Sequence[str]) -> str:
    found = [known for known in names if known.startswith(name)]
    if name in names or len(found) == 1:
        return name if name in names else found[0]
    raise InputError(
        f"plan: expected one of {', '.join(names)}, or the beginning of just one, with options as in fixed:n=10000, "
        f"got {name!r}"
    )
