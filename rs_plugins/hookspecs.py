"""The whole plugin contract.

A plugin is a module that defines one or both hooks below and is named by an entry point of the group ``rs_plugins``.
Everything a plugin returns is frozen data; a target is a string ``"package.module:attribute"``, so that a plugin never
imports its host, or torch, to describe itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pluggy

PROJECT = "rs_plugins"
KINDS = ("attack", "certifier", "estimator", "noise", "trainer")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, order=True)
class Component:
    """Something to be looked up by name: ``kind`` is one of `KINDS`, ``target`` is ``"package.module:attribute"``."""

    kind: str
    name: str
    target: str


@dataclass(frozen=True, order=True)
class Export:
    """A name to place into the module ``host``, for example ``"torchattacks"`` or ``"art.attacks.evasion"``."""

    host: str
    name: str
    target: str


@hookspec
def rs_plugins_components() -> Iterable[Component]:  # type: ignore[empty-body]
    """Return what this plugin offers by name."""


@hookspec
def rs_plugins_exports() -> Iterable[Export]:  # type: ignore[empty-body]
    """Return the names that appear in a host's namespace once rs-plugins is activated."""
