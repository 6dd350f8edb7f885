"""The folder in which an attack on a data set keeps its results, each finished batch on disk before the next begins.

``settings.json`` says what was attacked and how, ``parts`` holds finished batches, ``adversarial.npz`` all of them once
the attack is complete, ``evaluation.json`` the settings and figures.
"""

import io
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.checks import check_plain
from rs_plugins.core.files import changes, record_text, write_whole
from rs_plugins.core.run_folder import SETTINGS, RunFolder, writing
from rs_plugins.errors import ResultsError

Columns = dict[str, npt.NDArray[Any]]  # of equal length, ``index`` among them, increasing

PARTS, IMAGES, EVALUATION = "parts", "adversarial.npz", "evaluation.json"
FINISHED = ("images", "labels", "counts_before", "counts_after", "l2", "linf")  # ``claimed`` not by all attacks


class AttackFolder(RunFolder):
    """Keeps columns of results by image; a context, in which no other process may write the folder.

    Args:
        path: The folder; made when the first batch is to be stored.
        settings: What the results depend on, as plain data: what JSON has, so no infinite numbers.
        resume: Go on with what is there. Without, a folder that holds results is refused.
        columns: What every batch has, besides ``index``.

    Raises:
        InputError: If the folder could not be made, or ``settings`` are not plain data.
        ResultsError: If the folder has a ``settings.json`` of somebody else; on entering, if another process is writing
            it, if it holds results and ``resume`` is not set, or results of other settings.
    """

    format = "rs-plugins attack"

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        columns: Collection[str] = (),
    ) -> None:
        plain = check_plain(settings, "settings")
        super().__init__(path)
        self._settings: dict[str, Any] = json.loads(record_text({**plain, "format": self.format}))
        self._resume = resume
        self._columns = columns
        if not self._held():
            self._refuse_others()  # already here: nothing is to be left in such a folder, not even a lock

    def begin(self) -> None:
        """Refuse a folder that is not for this run, and write its settings."""
        self._look()
        place, content = self.path / SETTINGS, record_text(self._settings)
        if not place.is_file() or place.read_bytes() != content:  # of a run that stored nothing
            write_whole(place, content)

    def read(self) -> Columns:
        """Return the columns of all images that are done, by index; nothing if there are none.

        Raises:
            ResultsError: If a file is damaged, or does not have the columns.
        """
        files = _files(self.path)
        batches = [_read(file, self._columns) for file in files]
        if not batches:
            return {}
        names = set.intersection(*(set(batch) for batch in batches))
        for file, batch in zip(files, batches, strict=True):
            for name in sorted(names):
                rows = [(column.dtype.kind, column.shape[1:]) for column in (batches[0][name], batch[name])]
                if rows[0] != rows[1]:
                    raise ResultsError(
                        f"{file}: expected {name} as in {files[0].name}, got rows of another shape or type"
                    )
        together = {name: np.concatenate([batch[name] for batch in batches]) for name in sorted(names)}
        _, first = np.unique(together["index"], return_index=True)  # killed between the last two steps of `finish`
        return {name: column[first] for name, column in together.items()}

    def add(self, batch: Columns) -> None:
        """Store a finished batch.

        Raises:
            ResultsError: If it cannot be written.
        """
        with writing(self.path):
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

    def _held(self) -> list[str]:
        return [name for name in (PARTS, IMAGES, EVALUATION) if (self.path / name).exists()]

    def _look(self) -> None:
        """Refuse a folder that is not for this run."""
        held = self._held()
        if not held:
            self._refuse_others()
            return
        if not self._resume:
            raise ResultsError(
                f"{self.path}: it holds {held[0]}; to go on with it use resume (--resume), else choose another folder"
            )
        earlier = self.earlier()
        if earlier is None:
            raise ResultsError(
                f"{self.path}: cannot go on: {SETTINGS}, which says what it was made with, is missing or damaged"
            )
        if difference := changes(earlier, self._settings):
            raise ResultsError(f"{self.path}: begun by another run ({difference}); choose another folder")

    def _refuse_others(self) -> None:
        place = self.path / SETTINGS
        if place.exists() and self.earlier() is None:
            raise ResultsError(f"{place}: not written by an attack of rs-plugins; choose another folder")


def read_finished(path: str | Path) -> tuple[Columns, dict[str, Any]]:
    """Return what the folder of a finished attack holds: columns by image, and settings and figures.

    Raises:
        ResultsError: If it is no such folder, the attack has not finished, or a file is damaged.
    """
    folder = Path(path)
    missing = [name for name in (IMAGES, EVALUATION) if not (folder / name).is_file()]
    if missing:
        raise ResultsError(f"{folder}: expected the folder of a finished rs-plugins attack, but it has no {missing[0]}")
    try:
        evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        evaluation = None
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("made_with"), dict):
        raise ResultsError(f"{folder / EVALUATION}: it is damaged, or of another program")
    return _read(folder / IMAGES, FINISHED), evaluation


def count_done(path: Path) -> int:
    """Return how many images the folder ``path`` holds results of.

    Raises:
        ResultsError: If a file is damaged, or has no ``index``.
    """
    return len({index for file in _files(path) for index in _read(file)["index"].tolist()})


def _files(path: Path) -> list[Path]:
    return [file for file in (path / IMAGES, *sorted((path / PARTS).glob("*.npz"))) if file.is_file()]


def _archive(columns: Columns) -> bytes:
    file = io.BytesIO()
    np.savez(file, **columns)  # type: ignore[arg-type]
    return file.getvalue()


def _read(file: Path, columns: Collection[str] = ()) -> Columns:
    """Return what ``file`` holds.

    Raises:
        ResultsError: If it is damaged, or has not all of ``columns`` and ``index``, a row per image in each.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            batch = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive can raise anything
        raise ResultsError(f"{file}: expected an archive of plain arrays, got {error}") from None
    if missing := [name for name in ("index", *columns) if name not in batch]:
        raise ResultsError(f"{file}: expected a column {missing[0]}, got {', '.join(batch) or 'none'}")
    index = batch["index"]
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ResultsError(f"{file}: expected whole numbers as index, got {index.dtype} of shape {index.shape}")
    for name, column in batch.items():
        if column.shape[:1] != index.shape:
            raise ResultsError(f"{file}: expected {len(index)} rows, as index has, got {name} of shape {column.shape}")
    return batch
