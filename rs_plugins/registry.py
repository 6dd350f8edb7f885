"""Finds the installed plugins, keeps a broken one from harming the others, and looks components up by name.

Entry points of the group ``rs_plugins`` are loaded one by one, each with a plugin manager of its own: pluggy's own
loading stops at the first broken one and loses the rest. Nothing happens before the first question is asked.
"""

import contextlib
import importlib.metadata
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from typing import Literal, TypeVar

import pluggy

from rs_plugins import hookspecs
from rs_plugins.errors import PluginError, PluginWarning, UnknownNameError
from rs_plugins.hookspecs import KINDS, PROJECT, Component, Export

STRICT = "RS_PLUGINS_STRICT"
DISABLE = "RS_PLUGINS_DISABLE"
OWN = "rs-plugins"  # the distribution of our own plugins

_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_T = TypeVar("_T", Component, Export)

# What a plugin may raise while it is loaded. SystemExit, because some modules parse the command line when imported.
FAILURES = (Exception, SystemExit)


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: where it comes from, what it offers, and what became of it."""

    name: str
    distribution: str
    version: str
    value: str
    status: Literal["loaded", "quarantined", "disabled"] = "loaded"
    cause: str = ""
    components: tuple[Component, ...] = ()
    exports: tuple[Export, ...] = ()

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


class Registry:
    """The plugins of one environment, loaded when first asked for.

    Args:
        entry_points: What to load; the installed entry points of the group ``rs_plugins`` if omitted.
        strict: Raise at the first broken plugin instead of leaving it out; ``RS_PLUGINS_STRICT`` if omitted.
        disabled: Names of plugins to block; ``RS_PLUGINS_DISABLE`` if omitted.
    """

    def __init__(
        self,
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
        *,
        strict: bool | None = None,
        disabled: Iterable[str] | None = None,
    ) -> None:
        self._entry_points = entry_points
        self._strict = strict
        self._disabled = disabled
        self._lock = threading.RLock()
        self._plugins: tuple[Plugin, ...] | None = None
        self._loading = False
        self._unknown: tuple[str, ...] = ()

    @property
    def strict(self) -> bool:
        """Whether a broken plugin raises instead of being left out."""
        return os.environ.get(STRICT, "") not in ("", "0") if self._strict is None else self._strict

    def plugins(self) -> tuple[Plugin, ...]:
        """Return every installed plugin, the quarantined and disabled ones included.

        Raises:
            PluginError: A plugin is broken and the registry is strict.
        """
        with self._lock:
            if self._plugins is None:
                if self._loading:
                    raise PluginError("the plugins were asked for by a plugin that is itself still being loaded")
                self._loading = True
                try:
                    self._plugins = self._load()
                finally:
                    self._loading = False
            return self._plugins

    def unknown(self) -> tuple[str, ...]:
        """Return the names that are to be disabled and that no plugin has."""
        self.plugins()
        return self._unknown

    def components(self, kind: str | None = None) -> tuple[Component, ...]:
        """Return what the plugins offer, of one ``kind`` or of all.

        Raises:
            UnknownNameError: ``kind`` is not one of `hookspecs.KINDS`.
        """
        if kind is not None and kind not in KINDS:
            raise UnknownNameError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
        found = (component for plugin in self.plugins() for component in plugin.components)
        return tuple(sorted(component for component in found if kind in (None, component.kind)))

    def component(self, kind: str, name: str) -> object:
        """Import and return the component called ``name``.

        Raises:
            UnknownNameError: No plugin offers it; the message lists what there is.
            PluginError: It cannot be imported.
        """
        known = {component.name: component for component in self.components(kind)}
        if name not in known:
            raise UnknownNameError(f"no {kind} is called {name!r}; known are: {', '.join(known) or 'none'}")
        target = known[name].target
        try:
            return load_target(target)
        except FAILURES as error:
            owner = next(plugin for plugin in self.plugins() if known[name] in plugin.components)
            raise PluginError(f"{owner}: cannot load {kind} {name!r} from {target}: {describe(error)}") from error

    def exports(self) -> tuple[Export, ...]:
        """Return the names that the plugins want to place into a host's namespace."""
        return tuple(export for plugin in self.plugins() for export in plugin.exports)

    def _load(self) -> tuple[Plugin, ...]:
        found = importlib.metadata.entry_points(group=PROJECT) if self._entry_points is None else self._entry_points
        disabled = _names(os.environ.get(DISABLE, "")) if self._disabled is None else set(self._disabled)
        loaded: list[Plugin] = []
        for plugin, entry_point in sorted(((_identify(point), point) for point in found), key=_ours_first):
            if plugin.name in disabled:
                loaded.append(replace(plugin, status="disabled"))
                continue
            try:
                loaded.append(_checked(_load_one(plugin, entry_point), loaded))
            except FAILURES as error:
                cause = describe(error)
                report(f"{plugin} is left out: {cause}", error, strict=self.strict)
                loaded.append(replace(plugin, status="quarantined", cause=cause))
        self._unknown = tuple(sorted(disabled - {plugin.name for plugin in loaded}))
        if self._unknown:
            names, known = (", ".join(names) for names in (self._unknown, (plugin.name for plugin in loaded)))
            report(f"{DISABLE} names {names}, not installed here; known are: {known or 'none'}", strict=self.strict)
        return tuple(loaded)


def load_target(target: str) -> object:
    """Import what a target string ``"package.module:attribute"`` names."""
    module, _, attribute = target.partition(":")
    found: object = attrgetter(attribute)(import_module(module))
    return found


def describe(error: BaseException) -> str:
    """Say an exception in one line, its type first."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report(problem: str, cause: BaseException | None = None, *, strict: bool) -> None:
    """Raise under strict, else warn.

    A warning that the user's filters turn into an exception goes to stderr instead: one broken plugin must not take
    the others, or the user's import of a host, down with it. Who wants an exception sets ``RS_PLUGINS_STRICT``.

    Raises:
        PluginError: If ``strict``.
    """
    if strict:
        raise PluginError(problem) from cause
    try:
        warnings.warn(problem, PluginWarning, stacklevel=3)
    except PluginWarning:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"rs-plugins: {problem}\n")


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",")} - {""}


def _identify(entry_point: importlib.metadata.EntryPoint) -> Plugin:
    distribution = entry_point.dist
    name, version = (distribution.name, distribution.version) if distribution else ("unknown distribution", "?")
    return Plugin(entry_point.name, name, version, entry_point.value)


def _ours_first(pair: tuple[Plugin, object]) -> tuple[bool, str, str]:
    """Load our own first, so that of two plugins that claim a name a third party's is the one left out."""
    plugin, _ = pair
    return plugin.distribution != OWN, plugin.distribution, plugin.name


def _load_one(plugin: Plugin, entry_point: importlib.metadata.EntryPoint) -> Plugin:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    module = entry_point.load()
    manager.register(module, name=plugin.name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hooks = ", ".join(name for name in vars(hookspecs) if name.startswith(PROJECT))
        raise PluginError(f"{error}; the hooks are {hooks}") from error
    if not manager.get_hookcallers(module):
        raise PluginError(f"{entry_point.value} implements no rs_plugins hook; is @hookimpl missing?")
    return replace(
        plugin,
        components=_collect(manager.hook.rs_plugins_components, Component),
        exports=_collect(manager.hook.rs_plugins_exports, Export),
    )


def _collect(hook: pluggy.HookCaller, kind: type[_T]) -> tuple[_T, ...]:
    """Call the plugin's implementation of ``hook``, if it has one, and check every item."""
    if not hook.get_hookimpls():
        return ()
    results = hook()
    if not results:  # pluggy drops None
        raise PluginError(f"{hook.name} returned None; expected an iterable of {kind.__name__}")
    if not isinstance(results[0], Iterable):
        raise PluginError(f"{hook.name} returned {results[0]!r}; expected an iterable of {kind.__name__}")
    items: list[_T] = []
    for item in results[0]:
        if not isinstance(item, kind):
            raise PluginError(f"{hook.name} returned {item!r}; expected a {kind.__name__}")
        _check(item)
        items.append(item)
    return tuple(items)


def _check(item: Component | Export) -> None:
    """Refuse fields that could only fail later, and far from their cause."""
    if not re.fullmatch(f"{_DOTTED}:{_DOTTED}", str(item.target)):
        raise PluginError(f"{item!r}: target must look like 'package.module:attribute', got {item.target!r}")
    if isinstance(item, Component):
        if item.kind not in KINDS:
            raise PluginError(f"{item!r}: unknown kind {item.kind!r}; the kinds are {', '.join(KINDS)}")
        if not isinstance(item.name, str) or not re.fullmatch(r"[^\s:,]+", item.name):
            raise PluginError(
                f"{item!r}: name must be a non-empty string without colons, commas and spaces, got {item.name!r}"
            )
        return
    if not re.fullmatch(_DOTTED, str(item.host)):
        raise PluginError(f"{item!r}: host must be a module's dotted name, got {item.host!r}")
    if not str(item.name).isidentifier():
        raise PluginError(f"{item!r}: name must be an identifier, got {item.name!r}")


def _checked(plugin: Plugin, others: Sequence[Plugin]) -> Plugin:
    """Refuse a plugin that claims a name which is already taken, or one name twice."""
    taken: dict[str, Plugin] = {}
    for other in (*(other for other in others if other.status == "loaded"), plugin):
        if other is not plugin and other.name == plugin.name:
            raise PluginError(f"the plugin name {plugin.name!r} is already taken by {other}")
        items: tuple[Component | Export, ...] = (*other.components, *other.exports)
        for item in items:
            if _key(item) in taken:
                raise PluginError(f"{_key(item)} is already offered by {taken[_key(item)]}")
            taken[_key(item)] = other
    return plugin


def _key(item: Component | Export) -> str:
    return f"{item.kind} {item.name!r}" if isinstance(item, Component) else f"{item.host}.{item.name}"


_DEFAULT = Registry()


def default() -> Registry:
    """Return the registry of the installed plugins, the one that the functions below ask."""
    return _DEFAULT


def plugins() -> tuple[Plugin, ...]:
    """Return every installed plugin, the quarantined and disabled ones included."""
    return _DEFAULT.plugins()


def components(kind: str | None = None) -> tuple[Component, ...]:
    """Return what the plugins offer, of one ``kind`` or of all."""
    return _DEFAULT.components(kind)


def component(kind: str, name: str) -> object:
    """Import and return the component called ``name``; an unknown name raises an error that lists the known ones."""
    return _DEFAULT.component(kind, name)


def exports() -> tuple[Export, ...]:
    """Return the names that the plugins want to place into a host's namespace."""
    return _DEFAULT.exports()
