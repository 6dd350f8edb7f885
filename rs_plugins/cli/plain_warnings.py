"""Our own warnings as one line each: where in our code they come from tells the user nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from rs_plugins.errors import RSPluginsWarning


@contextmanager
def plain_warnings(*, shown: bool = True) -> Iterator[None]:
    """Write our own warnings to stderr as ``warning: …``, or nowhere if not ``shown``; others as Python does."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, RSPluginsWarning):
            if shown:
                click.echo(f"warning: {message}", err=True)
        else:
            before(message, category, *rest, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
