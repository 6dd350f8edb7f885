"""What all our ART trainers share: the host's contract, validation after each epoch, a history."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from art.defences.trainer import Trainer
from torch import Tensor, nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.models import evaluating
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import Array, to_classes
from rs_plugins_art.pixel_estimator import PixelEstimator


class Validation(NamedTuple):
    """Images (n, *input) and labels (n,) after the checks."""

    images: Array
    labels: Array


class LoopTrainer(Trainer):
    """An ART trainer that trains a classifier of ours in place, through core's loop and with its own optimiser.

    Args:
        classifier: What the user has.
        ours: What is trained: it, or a classifier of ours around its module.
        parts: Into how many parts a batch is cut, each with a step of the optimiser of its own.

    Attributes:
        parts: As given.
        history: What is known of each finished pass over the data, of all calls, also of those that ended in an error.
    """

    def __init__(self, classifier: Any, ours: PixelEstimator, parts: int) -> None:
        super().__init__(classifier)
        self._ours = ours
        self.parts = check_count(parts, "parts")
        self.history: list[Any] = []

    def predict(self, x: Array, **kwargs: Any) -> Array:
        """Return what the classifier's own ``predict`` returns."""
        rows: Array = self._classifier.predict(x, **kwargs)
        return rows

    def _train(
        self,
        fit: Callable[..., object],
        objective: Callable[[], Objective],
        validation_data: tuple[Array, Array] | None,
        **how: Any,
    ) -> None:
        """Call ``fit`` with what ``objective`` then returns, and add each epoch to the history as it ends."""
        self._refresh()
        judged = None if validation_data is None else self._validation(validation_data)

        def add(number: int, loss: float) -> None:
            self.history.append(self._epoch(number, loss, judged))

        fit(objective=objective(), parts=self.parts, after_epoch=add, **how)

    def _refresh(self) -> None:
        """Check the classifier again, whose settings may have changed, and take over what is the host's."""
        raise NotImplementedError

    def _epoch(self, number: int, loss: float, judged: Validation | None) -> Any:
        """Return what is known of a finished pass over the data."""
        raise NotImplementedError

    def _validation(self, data: Any) -> Validation:
        """Return images and labels of ``data`` after the checks."""
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise InputError(f"validation_data: expected a pair of images and labels, got {type(data).__name__}")
        images = self._ours._images(data[0]).cpu().numpy()
        if not len(images):
            raise InputError("validation_data: expected at least one image, got none")
        labels = to_classes(data[1], n=len(images), classes=self._ours.nb_classes, name="validation_data: labels")
        return Validation(images, labels.cpu().numpy())

    def _accuracy(self, judged: Validation) -> float:
        """Return the share of the images that the classifier gets right."""
        return float((self._ours.predict(judged.images).argmax(axis=1) == judged.labels).mean())

    def _validated(
        self, validate: Callable[[nn.Module, Tensor, Tensor], int], judged: Validation, batch_size: int
    ) -> float:
        """Return the share of the images that ``validate`` of an objective counts, the model in eval mode."""
        model, (device, dtype) = self._ours.base_model, self._ours._place()
        count = 0
        with evaluating(model), torch.no_grad():
            for start in range(0, len(judged.images), batch_size):
                part = slice(start, start + batch_size)
                x = torch.as_tensor(judged.images[part]).to(device, dtype)
                count += validate(model, x, torch.as_tensor(judged.labels[part]).to(device))
        return count / len(judged.images)
