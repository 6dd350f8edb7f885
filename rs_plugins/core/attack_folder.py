"""The folder in which an attack on a data set keeps its results, each finished batch on disk before the next begins.

``settings.json`` says what was attacked and how, ``parts`` holds finished batches, ``adversarial.npz`` all of them once
the attack is complete, ``evaluation.json`` the settings and figures.
"""

import contextlib
import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.results_writer import changes, lock, record_text, write_whole
from rs_plugins.errors import InputError, ResultsError

Columns = dict[str, npt.NDArray[Any]]  # of equal length, ``index`` among them, increasing

SETTINGS, PARTS, IMAGES, EVALUATION = "settings.json", "parts", "adversarial.npz", "evaluation.json"


class AttackFolder:
    """Keeps columns of results by image; a context, in which no other process may write the folder.

    Args:
        path: The folder; made when the first batch is to be stored.
        settings: What the results depend on, as plain data.
        resume: Go on with what is there. Without, a folder that holds results is refused.

    Raises:
        InputError: If the folder could not be made.
        ResultsError: If it holds results and ``resume`` is not set, or results of other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self._settings: dict[str, Any] = json.loads(record_text(settings))
        self._file: IO[bytes] | None = None
        if not self.path.parent.is_dir():
            raise InputError(f"out: there is no folder {self.path.parent}")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: expected a folder, got {self.path}, which is something else")
        held = [name for name in (PARTS, IMAGES, EVALUATION) if (self.path / name).exists()]
        if held and not resume:
            raise ResultsError(
                f"{self.path}: it holds {held[0]}; to go on with it use resume (--resume), else choose another folder"
            )
        if held:
            self._compare()

    def __enter__(self) -> "AttackFolder":
        self._write_settings()
        self._file = (self.path / SETTINGS).open("rb")
        try:
            lock(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def read(self) -> Columns:
        """Return the columns of all images that are done, by index; nothing if there are none.

        Raises:
            ResultsError: If a file is damaged.
        """
        batches = [_read(file) for file in _files(self.path)]
        if not batches:
            return {}
        names = set.intersection(*(set(batch) for batch in batches))
        together = {name: np.concatenate([batch[name] for batch in batches]) for name in sorted(names)}
        _, first = np.unique(together["index"], return_index=True)  # killed between the last two steps of `finish`
        return {name: column[first] for name, column in together.items()}

    def add(self, batch: Columns) -> None:
        """Store a finished batch.

        Raises:
            ResultsError: If it cannot be written.
        """
        with _writing(self.path):
            (self.path / PARTS).mkdir(exist_ok=True)
        write_whole(self.path / PARTS / f"{int(batch['index'][0]):010}.npz", _archive(batch))

    def finish(self, results: Columns, evaluation: Mapping[str, Any]) -> None:
        """Store all images in one file, and the evaluation; the parts are not needed any more.

        Raises:
            ResultsError: If they cannot be written.
        """
        write_whole(self.path / IMAGES, _archive(results))
        write_whole(self.path / EVALUATION, (json.dumps(evaluation, allow_nan=False) + "\n").encode())
        shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def _compare(self) -> None:
        place = self.path / SETTINGS
        try:
            earlier = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if not isinstance(earlier, dict):
            raise ResultsError(
                f"{self.path}: cannot go on: {SETTINGS}, which says what it was made with, is missing or damaged"
            )
        if difference := changes(earlier, self._settings):
            raise ResultsError(f"{self.path}: begun by another run ({difference}); choose another folder")

    def _write_settings(self) -> None:
        with _writing(self.path):
            self.path.mkdir(exist_ok=True)
        place, content = self.path / SETTINGS, record_text(self._settings)
        if not place.is_file() or place.read_bytes() != content:  # of a run that stored nothing
            write_whole(place, content)


def count_done(path: Path) -> int:
    """Return how many images the folder ``path`` holds results of.

    Raises:
        ResultsError: If a file is damaged.
    """
    return len({index for file in _files(path) for index in _read(file)["index"].tolist()})


def _files(path: Path) -> list[Path]:
    return [file for file in (path / IMAGES, *sorted((path / PARTS).glob("*.npz"))) if file.is_file()]


def _archive(columns: Columns) -> bytes:
    file = io.BytesIO()
    np.savez(file, **columns)  # type: ignore[arg-type]
    return file.getvalue()


def _read(file: Path) -> Columns:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ResultsError(f"{file}: expected an archive of plain arrays, got {error}") from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error
