"""The plan of a log, as its record names it: what tables call it, and which radii it can certify at all."""

import ast
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rs_plugins.core.results.writer import record_beside

_WITH_RADII = {"OnGrid": "radii", "AtRadius": "r"}  # plan → what it calls them


@dataclass(frozen=True)
class LoggedPlan:
    """The plan of a log.

    Attributes:
        text: As the record has it.
        short: A short form of it.
        radii: The only radii in pixels, increasing, that its certificates can have; empty if they can have any.
    """

    text: str
    short: str
    radii: tuple[float, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether an abstention means that nothing is certified; else it means: not the smallest of ``radii``."""
        return not self.radii or self.radii[0] == 0


def read_plan(log: str | os.PathLike[str]) -> LoggedPlan | None:
    """Return the plan in the record beside ``log``; None where there is none that can be read."""
    text = (record_beside(Path(log)) or {}).get("plan")
    return understood(text) if isinstance(text, str) and text else None


def understood(text: str) -> LoggedPlan:
    """Return the plan that is printed as ``text``; of one in another form than ours nothing but the text is known."""
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return LoggedPlan(text, text)
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        first = ast.literal_eval(call.args[0]) if call.args else ()
        name = call.func.id
        radii = _radii(options.get(_WITH_RADII[name], first)) if name in _WITH_RADII else ()
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):  # all of them of a text
        return LoggedPlan(text, text)
    parts = [name, "/".join(f"{radius:g}" for radius in radii), f"n={options['n']}" if "n" in options else ""]
    return LoggedPlan(text, " ".join(filter(None, parts)), radii)


def _radii(value: Any) -> tuple[float, ...]:
    several = value if isinstance(value, tuple | list) else [value]
    return tuple(sorted(float(radius) for radius in several))
