"""Places the plugins' exports on their hosts' namespaces: now if a host is loaded, else as soon as it is imported.

Existing code finds names by ``getattr``, ``vars``, ``__all__``, ``inspect.getmembers`` and ``import *``. Only a real
attribute together with an ``__all__`` entry serves all of these, so both are set, once, and taken away again by
`deactivate`. A finder on ``sys.meta_path`` waits for hosts that are not imported yet. Importing this module does
nothing, and activating imports neither torch nor a host.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from rs_plugins import registry
from rs_plugins.errors import PluginError
from rs_plugins.hookspecs import Export
from rs_plugins.import_hook import ImportWatcher
from rs_plugins.registry import FAILURES, Plugin, Registry

_MISSING = object()


@dataclass(frozen=True)
class Landing:
    """Where one export is now.

    ``state`` is *placed*, *waiting* (the host, or that part of it, is not imported), *nowhere* (the host has no such
    part), *kept* (the host has that name itself, and keeps it), *failed* (``detail`` says why) or *inactive*.
    """

    plugin: Plugin
    export: Export
    state: Literal["placed", "waiting", "nowhere", "kept", "failed", "inactive"]
    detail: str = ""


@dataclass
class _Placed:
    """One name on one module, and what has to be undone."""

    module: ModuleType
    name: str
    value: object
    attribute_is_ours: bool
    entry_is_ours: bool


class Activation:
    """Keeps a registry's exports placed for as long as somebody holds it active.

    `activate` is one holder, however often it is called, and `deactivate` lets go of it; every `activated` block and
    every `hold` is another. The names go when the last holder does.
    """

    def __init__(self, source: Registry | None = None) -> None:
        self._registry = source
        self._lock = threading.RLock()
        self._holders: set[object] = set()
        self._session: _Session | None = None

    def activate(self) -> None:
        """Place every export whose host is imported, and from now on those of each host as it is imported.

        Raises:
            PluginError: A plugin is broken, or an export cannot be placed, and ``RS_PLUGINS_STRICT`` is set.
        """
        self._acquire(self)

    def deactivate(self) -> None:
        """Undo `activate`; the names stay while an `activated` block is still open. Harmless if not active."""
        self._release(self)

    def hold(self) -> Callable[[], None]:
        """Be active until the function that is returned is called, or for the rest of the process."""
        holder = object()
        self._acquire(holder)
        return lambda: self._release(holder)

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Be active inside a ``with`` block; blocks nest."""
        release = self.hold()
        try:
            yield
        finally:
            release()

    def landings(self) -> list[Landing]:
        """Say for every export where it is."""
        session = self._session
        if session is not None:
            return session.landings()
        return [Landing(plugin, export, "inactive") for plugin, export in self._pairs()]

    def _pairs(self) -> list[tuple[Plugin, Export]]:
        source = self._registry or registry.default()
        return [(plugin, export) for plugin in source.plugins() for export in plugin.exports]

    def _acquire(self, holder: object) -> None:
        pairs = self._pairs()  # imports plugins, so not under the lock
        strict = (self._registry or registry.default()).strict
        with self._lock:
            is_new = holder not in self._holders
            self._holders.add(holder)
            if self._session is None:
                self._session = _Session(pairs, strict=strict)
                self._session.open()
            session = self._session
        try:
            session.wait_for_imports()
            session.settle()
        except BaseException:
            if is_new:
                self._release(holder)
            raise

    def _release(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            if not self._holders and self._session is not None:
                self._session.close()
                self._session = None


class _Session:
    """From the first holder to the last: the exports, the finder, what was placed and what was not.

    The lock guards bookkeeping only and is never held during an import, because a thread that imports holds import
    locks which another one may be waiting for.
    """

    def __init__(self, pairs: Sequence[tuple[Plugin, Export]], *, strict: bool) -> None:
        self._pairs = pairs
        self._strict = strict
        self._lock = threading.RLock()
        self._open = False
        self._finder = ImportWatcher(self.watches, self.importing)
        # A host's own modules that matter, parents included, and whole packages that targets live in.
        self._hosts = {prefix for _, export in pairs for prefix in _prefixes(export.host)}
        self._targets = {_root(export.target.partition(":")[0]) for _, export in pairs}
        self._running: list[str] = []
        # Watched modules that have been executed. importlib calls them initialising for a moment longer, in which two
        # threads that finish a host and its adapter would each leave the placing to the other.
        self._executed: set[str] = set()
        self._loading: set[tuple[str, int]] = set()  # targets, and the threads that are importing them for us
        self._placed: dict[tuple[str, int, str], _Placed] = {}
        self._kept: dict[Export, str] = {}
        self._failed: dict[str, str] = {}
        self._raised: list[PluginError] = []  # under strict: about which plugin something was said already

    def open(self) -> None:
        """Start watching imports."""
        with self._lock:
            self._open = True
            sys.meta_path.insert(0, self._finder)

    def close(self) -> None:
        """Stop watching, and take every name away again."""
        with self._lock:
            self._open = False
            # A new list: another thread may be iterating over this one, and would skip a finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self._finder]
            while self._placed:
                _take_away(self._placed.popitem()[1])

    def watches(self, name: str) -> bool:
        """Whether somebody needs to know when the module called ``name`` has been imported."""
        return self._open and (name in self._hosts or _root(name) in self._targets)

    def wait_for_imports(self) -> None:
        """Let another thread finish a host or an adapter that it began to import before we were watching."""
        targets = {prefix for _, export in self._pairs for prefix in _prefixes(export.target.partition(":")[0])}
        for name in sorted(self._hosts | targets):
            if _is_initialising(name) or _another_thread_imports(name):
                with contextlib.suppress(Exception):
                    import_module(name)

    @contextlib.contextmanager
    def importing(self, name: str) -> Iterator[None]:
        """Surround the execution of a watched module; afterwards place what its end has made possible."""
        with self._lock:
            self._running.append(name)
            self._executed.discard(name)
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._running.remove(name)
            if isinstance(error, Exception):
                self.settle()
            raise
        with self._lock:
            self._running.remove(name)
            self._executed.add(name)
        self.settle()

    def settle(self) -> None:
        """Place every export that can be placed.

        Raises:
            PluginError: One cannot be, and the session is strict.
        """
        for plugin, export in self._pairs:
            if self._open and export.target not in self._failed:
                self._try(plugin, export)

    def landings(self) -> list[Landing]:
        """Say for every export where it is."""
        return [self._landing(plugin, export) for plugin, export in self._pairs]

    def _landing(self, plugin: Plugin, export: Export) -> Landing:
        if export in self._kept:
            return Landing(plugin, export, "kept", self._kept[export])
        if export.target in self._failed:
            return Landing(plugin, export, "failed", self._failed[export.target])
        module = sys.modules.get(export.host)
        if (export.host, id(module), export.name) in self._placed:
            return Landing(plugin, export, "placed")
        if module is None and _is_nowhere(export.host):
            package, _, part = export.host.rpartition(".")
            return Landing(plugin, export, "nowhere", f"{package} has no module {part}")
        return Landing(plugin, export, "waiting")

    def _is_ready(self, export: Export) -> bool:
        """Whether the host is complete, and no part of the target's package is half imported."""
        if sys.modules.get(export.host) is None:
            return False
        target = export.target.partition(":")[0]
        with self._lock:
            running, executed = set(self._running), set(self._executed)
        for name in (*_prefixes(export.host), *_prefixes(target)):
            if name not in executed and _is_initialising(name):
                return False
        return not any(name in _prefixes(export.host) or _root(name) == _root(target) for name in running)

    def _try(self, plugin: Plugin, export: Export) -> None:
        attempt = (export.target, threading.get_ident())
        if attempt in self._loading:  # an import of ours ends in here, and will go on where it began
            return
        self._loading.add(attempt)
        try:
            self._load_and_place(plugin, export)
        finally:
            self._loading.discard(attempt)

    def _load_and_place(self, plugin: Plugin, export: Export) -> None:
        try:
            if not self._is_ready(export):
                return
            value = registry.load_target(export.target)
            is_kept = not self._place(export, value)
        except FAILURES as error:
            if any(error is said for said in self._raised):  # what we import may place another plugin's names
                raise
            self._fail(plugin, export, error)
            return
        if is_kept and export not in self._kept:
            self._kept[export] = problem = f"{export.host} has a {export.name} of its own, which stays"
            self._report(f"{plugin}: {problem}; the plugin's is {export.target}")

    def _place(self, export: Export, value: object) -> bool:
        """Set the attribute and the ``__all__`` entry, unless the host has that name; say whether it is ours."""
        module, name = sys.modules[export.host], export.name
        if _has_own(module, name, value):
            return False
        with self._lock:
            if not self._open:
                return True
            is_new = name not in vars(module)
            if is_new:
                setattr(module, name, value)
            is_listed = _add_to_all(module, name)
            key = (export.host, id(module), name)
            before = self._placed.get(key)  # a reloaded host has kept its attributes and has a new __all__
            if before is not None:
                is_new |= before.attribute_is_ours
                is_listed |= before.entry_is_ours
            self._placed[key] = _Placed(module, name, value, is_new, is_listed)
        return True

    def _fail(self, plugin: Plugin, export: Export, error: BaseException) -> None:
        with self._lock:
            if self._running:  # something watched is half imported, perhaps the cause; its end brings us here again
                return
            self._failed[export.target] = cause = registry.describe(error)
        hosts = [other.host for _, other in self._pairs if other.target == export.target]
        self._report(
            f"{plugin}: cannot place {export.name} on {', '.join(hosts)}: loading {export.target}: {cause}", error
        )

    def _report(self, problem: str, cause: BaseException | None = None) -> None:
        try:
            registry.report(problem, cause, strict=self._strict)
        except PluginError as error:
            self._raised.append(error)
            raise


def _root(name: str) -> str:
    return name.partition(".")[0]


def _prefixes(name: str) -> list[str]:
    """``"a.b.c"`` → ``["a", "a.b", "a.b.c"]``."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _is_nowhere(name: str) -> bool:
    """Whether the package that the module called ``name`` should be in is imported, and has no such module."""
    package = sys.modules.get(name.rpartition(".")[0])
    if package is None:
        return False
    try:
        return find_spec(name) is None
    except (ImportError, ValueError):  # the package is a module
        return True


def _is_initialising(name: str) -> bool:
    """Whether an import of that module has begun and not ended; what importlib itself looks at."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _another_thread_imports(name: str) -> bool:
    """Whether another thread holds the import lock of that module, which it does before the module exists."""
    locks: dict[str, Callable[[], object]] = getattr(sys.modules["importlib._bootstrap"], "_module_locks", {})
    lock = locks.get(name, lambda: None)()
    return getattr(lock, "owner", None) not in (None, threading.get_ident())


def _has_own(module: ModuleType, name: str, ours: object) -> bool:
    """Whether the host means something else by that name, be it a lazy name served by its ``__getattr__``."""
    if name in vars(module):
        return vars(module)[name] is not ours
    return hasattr(module, name)


def _add_to_all(module: ModuleType, name: str) -> bool:
    """List the name in the module's ``__all__``, if it has one and does not list it; say whether this was done."""
    names = getattr(module, "__all__", None)
    if names is None or name in names:
        return False
    if isinstance(names, list):
        names.append(name)
    else:
        vars(module)["__all__"] = (*names, name)
    return True


def _take_away(placed: _Placed) -> None:
    """Undo what was done to one module, unless somebody has put something else there meanwhile."""
    module, name = placed.module, placed.name
    if placed.attribute_is_ours and vars(module).get(name, _MISSING) is placed.value:
        delattr(module, name)
    names = getattr(module, "__all__", None)
    if not placed.entry_is_ours or names is None or name not in names:
        return
    if isinstance(names, list):
        names.remove(name)
    else:
        vars(module)["__all__"] = tuple(other for other in names if other != name)


_DEFAULT = Activation()


def activate() -> None:
    """Make the names of all plugins available on ART, torchattacks and every other host that a plugin exports to.

    Hosts that are imported already get their names at once, the others when they are imported. Calling it again
    changes nothing; `deactivate` undoes it.

    Raises:
        PluginError: A plugin is broken, or an export cannot be placed, and ``RS_PLUGINS_STRICT`` is set.
    """
    _DEFAULT.activate()


def deactivate() -> None:
    """Undo `activate`; the names stay while an `activated` block is still open. Harmless if not active."""
    _DEFAULT.deactivate()


def activated() -> contextlib.AbstractContextManager[None]:
    """Be active inside a ``with`` block; blocks nest, within each other and within `activate` and `deactivate`."""
    return _DEFAULT.activated()


def hold() -> Callable[[], None]:
    """Be active until the function that is returned is called, or for the rest of the process."""
    return _DEFAULT.hold()


def landings() -> list[Landing]:
    """Say for every export where it is."""
    return _DEFAULT.landings()
