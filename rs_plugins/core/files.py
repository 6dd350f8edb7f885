"""Files of jobs: locked while they are written, whole or not there, and the records that tell one run from another."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from rs_plugins.errors import ResultsError

fcntl: ModuleType | None = None
with contextlib.suppress(ImportError):  # POSIX only
    import fcntl


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at every moment it is there with the whole content, or as it was before."""
    with whole(path) as draft:
        draft.write_bytes(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path for a draft of the file ``path``, which takes its place when it is written, on disk and all.

    Raises:
        ResultsError: If it cannot be written; ``path`` is as it was before.
    """
    draft = path.with_name(path.name + ".part")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()  # on a full disk it takes the room that others need
        if isinstance(error, OSError):
            raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Force the names of a folder's files to disk, where that is possible."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: IO[bytes], path: Path, *, shared: bool = False) -> None:
    """Lock an open log where that is possible: one process at a time may write it, and none while it is read.

    Raises:
        ResultsError: If another process is writing it.
    """
    if fcntl is None:  # Windows
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResultsError(f"{path}: another process is writing this file") from None
    except OSError:  # a file system without locks
        return


def complete_lines(path: Path) -> tuple[bytes, bytes]:
    """Return the complete lines of a file, and the rest of it."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def record_text(record: Mapping[str, Any]) -> bytes:
    """Return the content of the file of a record."""
    return (json.dumps(record, indent=2) + "\n").encode()


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two records, old -> new."""
    names = [*earlier, *(name for name in now if name not in earlier)]
    return "; ".join(
        f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}" for name in names if earlier.get(name) != now.get(name)
    )
