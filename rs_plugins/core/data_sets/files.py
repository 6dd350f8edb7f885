"""Finds the files of a data set."""

from collections.abc import Sequence
from pathlib import Path

from rs_plugins.errors import InputError


def first_existing(name: str, places: Sequence[Path]) -> Path:
    """Return the first of ``places`` that is a file.

    Raises:
        InputError: If none is.
    """
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"data: {name}: expected one of these files, found none: {', '.join(map(str, places))}")
