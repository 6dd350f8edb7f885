"""The folder of a training run: its settings, its checkpoints, and in the end the trained network.

``settings.json`` says of what run it is. ``checkpoints/epoch-0007`` is a trained network (`trained.py`) with
``optimizer.safetensors`` and ``progress.json`` beside it, enough to go on as if nothing had happened; where the
objective has a state, ``objective.safetensors`` too. A checkpoint gets its name when it is complete, so one that is
there is whole; what has another name is none of ours. ``history.csv`` has a line an epoch.
"""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rs_plugins.core.files import changes, record_text, write_whole
from rs_plugins.core.run_folder import SETTINGS, RunFolder, writing
from rs_plugins.core.training.loop import Mean
from rs_plugins.core.training.trained import RECORD, WEIGHTS, load_into, plain_tensors, save_trained
from rs_plugins.core.training.validation import NOISY
from rs_plugins.errors import InputError, ResultsError

CHECKPOINTS, HISTORY = "checkpoints", "history.csv"
_OPTIMIZER, _PROGRESS, _OBJECTIVE = "optimizer.safetensors", "progress.json", "objective.safetensors"
_START = "start"  # what of the settings a checkpoint makes up for
# settings that earlier versions did not have, and what they did
_BEFORE = {"algorithm": "sgd", "schedule": "step", "keep_best": False}
_NAME = re.compile(r"epoch-([0-9]{4,})(?:-step-([0-9]{6,}))?")


@dataclass(frozen=True)
class Epoch:
    """What is known of a finished epoch.

    Attributes:
        epoch: How many epochs are finished with it.
        loss: Mean of what was minimised.
        accuracy: Share of the validation images that the network does well on; None without any.
        lr: Learning rate.
        seconds: Wall-clock time of its steps, without what comes between them: validation, checkpoints.
        figure: What the accuracy is, such as ``"noisy accuracy"`` (`rs_plugins.core.training.validation`).
    """

    epoch: int
    loss: float
    accuracy: float | None
    lr: float
    seconds: float
    figure: str = NOISY

    @property
    def noisy_accuracy(self) -> float | None:
        """The accuracy, if it is that under one noise draw."""
        return self.accuracy if self.figure == NOISY else None

    @property
    def column(self) -> str:
        """What the accuracy is called in files, such as ``"noisy_accuracy"``."""
        return self.figure.replace(" ", "_")

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, the accuracy under its name, as earlier versions wrote ``"noisy_accuracy"``."""
        figures = {self.column: self.accuracy, "lr": self.lr, "seconds": self.seconds}
        return {"epoch": self.epoch, "loss": self.loss, **figures}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Epoch":
        """Return what `plain` has described.

        Raises:
            KeyError: If something is missing.
            ValueError: If there is not one accuracy.
        """
        epoch, loss, lr, seconds = (found[name] for name in ("epoch", "loss", "lr", "seconds"))
        (column,) = found.keys() - {"epoch", "loss", "lr", "seconds"}
        return cls(epoch, loss, found[column], lr, seconds, column.replace("_", " "))


@runtime_checkable
class Stateful(Protocol):
    """An objective that changes from step to step, so that a checkpoint has to keep its state."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``.

        Raises:
            KeyError: If something is missing.
            ValueError: If it does not fit.
        """


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        start: The digits of the network with its initial weights (`rs_plugins.core.models.digest`).
        epoch: Number of finished epochs.
        steps: Number of finished steps of the epoch under way.
        loss: Mean loss of its images so far.
        seconds: Time that its finished steps have taken.
        history: The finished epochs.
    """

    start: str
    epoch: int = 0
    steps: int = 0
    loss: Mean = field(default_factory=Mean)
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)

    def finish_epoch(self, epoch: Epoch) -> None:
        """Note that the epoch under way is finished, with these figures."""
        self.history.append(epoch)
        self.epoch, self.steps, self.loss, self.seconds = epoch.epoch, 0, Mean(), 0.0

    @property
    def name(self) -> str:
        """The name of its checkpoint."""
        return f"epoch-{self.epoch:04}" + (f"-step-{self.steps:06}" if self.steps else "")


class TrainingFolder(RunFolder):
    """Keeps a training run; a context, in which no other process may write the folder.

    Args:
        path: The folder; made if it is not there.
        settings: What the trained weights depend on, as plain data.
        start: The digits of the initial weights, on which they depend, too, until there is a checkpoint.
        resume: Go on with what is there. Without, a folder that holds checkpoints or a trained network is refused.
        keep: How many checkpoints are kept, the latest ones.

    Raises:
        InputError: If the folder cannot be made.
        ResultsError: On entering, if another process is writing it, or it holds a run that is not to be gone on with.
    """

    format = "rs-plugins training"

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], *, start: str, resume: bool = False, keep: int = 2
    ) -> None:
        super().__init__(path)
        self._settings: dict[str, Any] = json.loads(record_text({"format": self.format, **settings, _START: start}))
        self._resume, self._keep = resume, keep

    def begin(self) -> None:
        """Refuse a folder that is not for this run, and write its settings."""
        self._look()
        with writing(self.path):
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            for draft in _named(self.path, "."):  # of killed runs
                shutil.rmtree(draft, ignore_errors=True)
        if not (self.path / SETTINGS).exists() or not checkpoints_in(self.path):
            write_whole(self.path / SETTINGS, record_text(self._settings))

    def keep(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        record: Mapping[str, Any],
        objective: object = None,
    ) -> None:
        """Store a checkpoint, with the state of ``objective`` if it has one, and remove those that are too old.

        Raises:
            ResultsError: If it cannot be written.
        """
        place = self.path / CHECKPOINTS / progress.name
        tensors, rest = _flattened(optimizer.state_dict())
        with drafted(place) as draft:
            save_trained(draft, model, record)
            write_whole(draft / _OPTIMIZER, save(tensors))
            if isinstance(objective, Stateful):
                write_whole(draft / _OBJECTIVE, save(plain_tensors(objective.state_dict())))
            history = [epoch.plain() for epoch in progress.history]
            write_whole(draft / _PROGRESS, record_text({**asdict(progress), "history": history, "optimizer": rest}))
        write_whole(self.path / HISTORY, _table(progress.history))
        for old in checkpoints_in(self.path)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, model: nn.Module, record: Mapping[str, Any]) -> None:
        """Store the trained network in the folder itself.

        Raises:
            ResultsError: If it cannot be written.
        """
        save_trained(self.path, model, record)

    def _look(self) -> None:
        """Refuse a folder that is not for this run."""
        earlier, begun = self.earlier(), bool(checkpoints_in(self.path))
        trained = [name for name in (WEIGHTS, RECORD) if (self.path / name).exists()]
        if earlier is None and (self.path / SETTINGS).exists():
            raise ResultsError(f"{self.path / SETTINGS}: not written by rs-plugins train; choose another folder")
        if trained and not begun:
            raise ResultsError(
                f"{self.path}: it holds {trained[0]}, and no checkpoint to go on from; choose another folder"
            )
        if begun and not self._resume:
            raise ResultsError(
                f"{self.path}: it holds checkpoints; to go on use resume (--resume), else choose another folder"
            )
        if begun and earlier is None:
            raise ResultsError(f"{self.path}: cannot go on: {SETTINGS}, which says how it was begun, is missing")
        if earlier is not None and self._resume:
            self._compare(earlier, begun=begun)

    def _compare(self, earlier: Mapping[str, Any], *, begun: bool) -> None:
        earlier, now = ({**_BEFORE, **settings} for settings in (earlier, self._settings))
        if begun:  # a checkpoint has weights of its own
            earlier, now = ({**settings, _START: None} for settings in (earlier, now))
        if difference := changes(earlier, now):
            advice = "" if begun else "; there is no checkpoint yet, so without resume (--resume) it begins anew"
            raise ResultsError(f"{self.path}: begun by another run ({difference}); choose another folder{advice}")


@contextmanager
def drafted(place: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of the folder ``place`` when that is done."""
    draft = place.with_name(f".{place.name}")
    with writing(place):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    yield draft
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)
        os.replace(draft, place)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the latest last."""
    return _named(folder)


def epochs_of(checkpoint: Path) -> int:
    """Return how many epochs are finished in a checkpoint, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    return 0 if match is None else int(match[1])


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, objective: object = None
) -> Progress | None:
    """Put the latest checkpoint of a run into ``model``, ``optimizer`` and ``objective``, if that has a state.

    Returns:
        Where the run is; None without any checkpoint.

    Raises:
        InputError: If a file of it is damaged, or does not fit.
    """
    places = checkpoints_in(folder)
    if not places:
        return None
    place = places[-1]
    try:
        tensors = load_file(place / _OPTIMIZER)
        found = json.loads((place / _PROGRESS).read_text(encoding="utf-8"))
        rest = found.pop("optimizer")
        history = [Epoch.of(epoch) for epoch in found.pop("history")]
        progress = Progress(**found | {"loss": Mean(**found["loss"])}, history=history)
        load_into(model, place / WEIGHTS)
        optimizer.load_state_dict(_restored(tensors, rest))
        if isinstance(objective, Stateful):
            objective.load_state_dict(load_file(place / _OBJECTIVE))
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"resume: the checkpoint {place} is damaged ({error}); remove it to go on with the one before"
        ) from error
    return progress


def _named(folder: Path, before: str = "") -> list[Path]:
    """Return what is called like a checkpoint, with ``before`` in front of the name, in the order of time."""
    places = (folder / CHECKPOINTS).glob(f"{before}epoch-*")
    matches = ((_NAME.fullmatch(place.name.removeprefix(before)), place) for place in places)
    found = [(int(match[1]), int(match[2] or 0), place) for match, place in matches if match is not None]
    return [place for _, _, place in sorted(found)]


def _flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors in the state of an optimiser by a name, and the rest of it as plain data."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        rest[str(number)] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors |= {f"{number}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    return plain_tensors(tensors), {"param_groups": state["param_groups"], "state": rest}


def _restored(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in rest["state"].items()}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state[int(number)][name] = value
    return {"param_groups": rest["param_groups"], "state": state}


def _table(history: Sequence[Epoch]) -> bytes:
    text = io.StringIO()
    rows = [epoch.plain() for epoch in history]
    names = list(rows[0] if rows else Epoch(0, 0.0, None, 0.0, 0.0).plain())
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
