"""The folder of a job: ``settings.json`` says of what run it is, and one process at a time writes it.

``.lock`` is locked while a process writes: a file of its own, as a lock on one that is replaced holds nobody off.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, TypeVar

from rs_plugins.core.files import lock
from rs_plugins.errors import InputError, ResultsError

SETTINGS, LOCK = "settings.json", ".lock"

_Folder = TypeVar("_Folder", bound="RunFolder")


class RunFolder:
    """A folder that no other process may write within the context.

    Args:
        path: The folder; made on entering.

    Raises:
        InputError: If it could not be made.
        ResultsError: On entering, if another process is writing it, or what `begin` of a subclass raises.
    """

    format: ClassVar[str]  # by which our settings.json is told from others' files of that name

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None
        with writing(self.path):
            if not self.path.parent.is_dir():
                raise InputError(f"out: there is no folder {self.path.parent}")
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"out: expected a folder, got {self.path}, which is something else")

    def begin(self) -> None:
        """Refuse a folder that is not for this run, and write its settings; no other process writes it meanwhile."""
        raise NotImplementedError

    def __enter__(self: _Folder) -> _Folder:
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
            self._file = (self.path / LOCK).open("ab")
        try:
            lock(self._file, self.path)
            self.begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def earlier(self) -> dict[str, Any] | None:
        """Return the settings in the folder; None if there are none of ours."""
        try:
            found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and found.get("format") == self.format else None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say that ``path`` cannot be written where the system says so.

    Raises:
        ResultsError: Then.
    """
    try:
        yield
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error
