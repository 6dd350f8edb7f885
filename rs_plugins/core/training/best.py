"""The best network of a training run so far, kept beside the checkpoints.

``best/epoch-0007`` is a trained network (`trained.py`). It is whole before the checkpoint of its epoch is written, and
stays while the history of any checkpoint names it: a run that goes on from any of them ends with the right one.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rs_plugins.core.checkpoints import read_weights
from rs_plugins.core.run_folder import writing
from rs_plugins.core.training.folder import Epoch, Progress, checkpoints_in, drafted, epochs_of
from rs_plugins.core.training.trained import WEIGHTS, load_into, read_record, save_trained
from rs_plugins.errors import InputError

BEST = "best"
_NAME = re.compile(r"\.?epoch-[0-9]{4,}")  # with a dot: the draft of a killed run


def best_of(history: Sequence[Epoch]) -> Epoch | None:
    """Return the epoch with the best accuracy on the validation images, the latest of equals; None of no epochs.

    On few images many epochs are equal, and of these the later ones have had more training, at a lower learning rate.
    """
    return max(reversed(history), key=lambda epoch: epoch.accuracy or 0.0, default=None)


class BestNetworks:
    """Keeps the best network so far of a run in a folder.

    Args:
        folder: That of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, progress: Progress, model: nn.Module, record: Mapping[str, Any]) -> None:
        """Store ``model``, which has just finished an epoch, if that is the best one; its checkpoint is still to come.

        Raises:
            ResultsError: If it cannot be written.
        """
        best = best_of(progress.history)
        if best is None or best is not progress.history[-1]:
            return
        place = self._place(best)
        with writing(place):
            place.parent.mkdir(exist_ok=True)
        with drafted(place) as draft:
            save_trained(draft, model, record)

    def forget(self, progress: Progress) -> None:
        """Remove all networks that the history of no checkpoint names as its best."""
        found = (best_of(progress.history[: epochs_of(place)]) for place in checkpoints_in(self._folder))
        wanted = {self._place(best).name for best in found if best is not None}
        for place in (self._folder / BEST).glob("*"):
            if _NAME.fullmatch(place.name) and place.name not in wanted:
                shutil.rmtree(place, ignore_errors=True)

    def check(self, progress: Progress) -> None:
        """Make sure before long work that the best network so far is there.

        Raises:
            InputError: If it is missing or damaged.
        """
        best = best_of(progress.history)
        if best is None:
            return
        try:
            read_weights(self._weights(best))
        except InputError as error:
            raise self._lost(best, f"{error}") from error

    def put_into(self, model: nn.Module, best: Epoch) -> None:
        """Put the weights of epoch ``best`` into ``model``.

        Raises:
            InputError: If they are missing, damaged, of another epoch, or beside another extractor.
        """
        try:
            load_into(model, self._weights(best))
        except InputError as error:
            raise self._lost(best, f"{error}") from error

    def _place(self, best: Epoch) -> Path:
        return self._folder / BEST / f"epoch-{best.epoch:04}"

    def _weights(self, best: Epoch) -> Path:
        """Return where the weights are, if the record beside them is of that epoch."""
        place = self._place(best)
        found = read_record(place).get("trained_epochs")
        if found != best.epoch:
            raise InputError(f"model: {place} is of epoch {found}")
        return place / WEIGHTS

    def _lost(self, best: Epoch, why: str) -> InputError:
        return InputError(
            f"keep_best: the network of epoch {best.epoch}, the best so far, is missing or damaged ({why}); remove the "
            "checkpoints from that epoch on to go on with the one before, or choose another folder"
        )
