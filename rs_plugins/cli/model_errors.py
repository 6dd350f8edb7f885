"""Errors of a user's model as one line and the place in the user's file: our own frames tell the user nothing."""

import site
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import click

from rs_plugins.errors import RSPluginsError

_PACKAGES = ("rs_plugins", "rs_plugins_art", "rs_plugins_torchattacks")
_OURS = tuple(str(Path(spec.origin).parent) for name in _PACKAGES if (spec := find_spec(name)) and spec.origin)
_INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")


@contextmanager
def plain_model_errors() -> Iterator[None]:
    """Show what a model raises as a message with the place where it did; what is raised by our own code passes."""
    try:
        yield
    except RSPluginsError as error:
        place = None if error.__cause__ is None else _place(error.__cause__)
        if place is None:
            raise
        raise click.ClickException(f"{error}\n{place}") from error
    except Exception as error:
        if not _of_a_model(error):
            raise
        reason = str(error).strip() or "no message"
        lines = [f"model: it fails: {type(error).__name__}: {reason}", _place(error)]
        raise click.ClickException("\n".join(filter(None, lines))) from error


def _of_a_model(error: BaseException) -> bool:
    """Whether code that we call raised ``error``, by way of a model, and not our own."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((place for place, file in enumerate(files) if any(map(file.is_relative_to, _OURS))), default=-1)
    return any(file.parts[-4:] == ("torch", "nn", "modules", "module.py") for file in files[ours + 1 :])


def _place(error: BaseException) -> str | None:
    """Return the innermost frame of ``error`` in a file of the user's, which is one that was not installed."""
    libraries = {*_OURS, *site.getsitepackages(), site.getusersitepackages(), *map(sysconfig.get_path, _INSTALLED)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(library) for library in libraries):
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            return f"  {shown}:{frame.lineno}, in {frame.name}: {frame.line}"
    return None
