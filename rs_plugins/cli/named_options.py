"""Short texts such as ``NAME:OPTION=VALUE,…`` of the command line: plans and attacks with their options."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from rs_plugins.errors import InputError

_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def split_text(text: str, subject: str) -> tuple[str, Mapping[str, str]]:
    """Return the name and the options in ``NAME:OPTION=VALUE,…``; ``subject`` is what messages call it.

    Raises:
        InputError: If what follows the name is not of this form.
    """
    name, colon, rest = text.partition(":")
    if colon and not rest.strip():
        raise InputError(f"{subject}: expected OPTION=VALUE after {name}:, got nothing")
    options: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in rest.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not option or not value or option in options:
            raise InputError(f"{subject}: expected OPTION=VALUE, each option once, with commas between, got {item!r}")
        options[option] = value
    return name.strip(), options


def convert(option: str, text: str, kind: Any, subject: str, *, number: Callable[[str], float] = float) -> Any:
    """Convert ``text`` to what the annotation ``kind`` of an option says, several values with a slash between them.

    Args:
        option: The option's name, for messages.
        text: What was given.
        kind: An annotation.
        subject: What the option is of, for messages.
        number: Reads a number that may be no integer.

    Raises:
        InputError: If it is no such value.
    """
    try:
        return _as(text, kind, number)
    except (ValueError, KeyError, ZeroDivisionError):
        names = {int: "an integer", float: "a number", bool: "true or false"}
        expected = names.get(kind) or names.get(_element(kind), "another value")
        several = ", or several with / between" if _is_sequence(kind) else ""
        raise InputError(f"{subject}: {option}: expected {expected}{several}, got {text!r}") from None


def fraction(text: str) -> float:
    """Read a number, also as 8/255."""
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def _as(text: str, kind: Any, number: Callable[[str], float]) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(kind):
            return None
        return _as(text, next(part for part in get_args(kind) if part is not type(None)), number)
    if _is_sequence(kind):
        return tuple(_as(part, _element(kind), float) for part in text.split("/"))
    if kind is bool:
        return _YES_NO[text.lower()]
    if kind is int:
        return int(text) if "e" not in text.lower() else _whole(float(text))
    return number(text) if kind is float else text


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(number)
    return int(number)


def _is_sequence(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, Sequence)


def _element(kind: Any) -> Any:
    """Return the annotation of one value: of a tuple's elements, or of what may be None."""
    return next((part for part in get_args(kind) if part not in (type(None), ...)), kind)
