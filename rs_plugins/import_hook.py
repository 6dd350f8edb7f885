"""A finder for ``sys.meta_path`` that is told when chosen modules are executed, and leaves no trace on them."""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_Importing = Callable[[str], AbstractContextManager[None]]


class ImportWatcher(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a watched module, and wraps its loader.

    Args:
        watches: Whether somebody wants to know of the import of the module of that name.
        importing: Makes the context, given that name, in which the module is executed.
    """

    def __init__(self, watches: Callable[[str], bool], importing: _Importing) -> None:
        self._watches = watches
        self._importing = importing
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, with the loader wrapped."""
        if not self._watches(fullname):
            return None
        asking: set[str] = self._asking.__dict__.setdefault("names", set())
        if fullname in asking:  # another such finder, or importlib.util.find_spec called by one, asks us in turn
            return None
        asking.add(fullname)
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            asking.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._importing)
        return spec

    def _ask_others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader(Loader):
    """The module's own loader in all but one respect: it executes the module in a context."""

    def __init__(self, loader: Any, importing: _Importing) -> None:
        self._loader = loader
        self._importing = importing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put the module's own loader back, so that nothing can tell the difference, and execute the module with it."""
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        with self._importing(module.__name__):
            self._loader.exec_module(module)
