"""Plans as short texts: ``fixed-budget:n=1000,alpha=0.01``, ``on-grid:radii=0/0.25/0.5``."""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from rs_plugins.errors import InputError

_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_plan(text: str, names: Sequence[str], lookup: Callable[[str], Any]) -> Any:
    """Return the plan that ``text`` describes: a name, or the beginning of one, and options after a colon.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,…``; several values of one option with a slash between them.
        names: What plans there are.
        lookup: Returns the dataclass of a plan.

    Raises:
        InputError: If there is no such plan or option, or a value is none for it; the message says what there is.
    """
    name, colon, rest = text.partition(":")
    plan = lookup(_full_name(name.strip(), names))
    if colon and not rest.strip():
        raise InputError(f"plan: expected OPTION=VALUE after {name}:, got nothing")
    hints, given = get_type_hints(plan), _options(rest)
    known = {item.name: item for item in fields(plan) if item.init}
    for option in given:
        if option not in known:
            raise InputError(f"plan: {name} has no option {option!r}; it has {', '.join(known)}")
    for option, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and option not in given:
            raise InputError(f"plan: {name} needs {option}, as in {name}:{option}=…")
    return plan(**{option: _convert(option, value, hints[option]) for option, value in given.items()})


def _full_name(name: str, names: Sequence[str]) -> str:
    found = [known for known in names if known.startswith(name)]
    if name in names or len(found) == 1:
        return name if name in names else found[0]
    raise InputError(
        f"plan: expected one of {', '.join(names)}, or the beginning of just one, with options as in fixed:n=10000, "
        f"got {name!r}"
    )


def _options(text: str) -> Mapping[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not option or not value or option in options:
            raise InputError(f"plan: expected OPTION=VALUE, each option once, with commas between, got {item!r}")
        options[option] = value
    return options


def _convert(option: str, text: str, kind: Any) -> Any:
    try:
        return _as(text, kind)
    except (ValueError, KeyError):
        names = {int: "an integer", float: "a number", bool: "true or false"}
        expected = names.get(kind) or names.get(_element(kind), "another value")
        several = ", or several with / between" if _is_sequence(kind) else ""
        raise InputError(f"plan: {option}: expected {expected}{several}, got {text!r}") from None


def _as(text: str, kind: Any) -> Any:
    """Convert ``text`` to what the annotation ``kind`` of a dataclass field says."""
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(kind):
            return None
        return _as(text, next(part for part in get_args(kind) if part is not type(None)))
    if _is_sequence(kind):
        return tuple(_as(part, _element(kind)) for part in text.split("/"))
    if kind is bool:
        return _YES_NO[text.lower()]
    if kind is int:
        return int(text) if "e" not in text.lower() else _whole(float(text))
    return float(text) if kind is float else text


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(number)
    return int(number)


def _is_sequence(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, Sequence)


def _element(kind: Any) -> Any:
    """Return the annotation of one value: of a tuple's elements, or of what may be None."""
    return next((part for part in get_args(kind) if part not in (type(None), ...)), kind)
