"""Any function as a base classifier: scikit-learn's predict, an estimator of another framework, a remote service."""

from collections.abc import Callable, Hashable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_several
from rs_plugins.core.models import UnseenModule
from rs_plugins.errors import InputError, ModelError

Predict = Callable[[npt.NDArray[np.float32]], object]


class BlackBox(UnseenModule):
    """A base classifier that is a function of NumPy arrays; `certify` treats it like any other.

    ``predict`` is handed a copy of the noisy images, float32 (n, *input), on the CPU, and gives back either scores
    (n, classes), of which the largest decides and of equal ones the first, or labels (n,), one vote each. With labels
    nobody sees how close a decision was: where two batch sizes round differently, such a vote may change with the
    batch it is in. With scores it is taken again on that image alone, as for modules; where ties are frequent, as in a
    small forest, that takes time, and labels are better. A remote service is best asked with a ``chunk`` of its liking.

    What is behind the function cannot be seen, so certificates and resumed files know it by ``name`` alone. Give
    different models different names. No gradient flows through it.

    Args:
        predict: The function.
        classes: Number of classes, >= 2; needed for labels, which then are 0…classes-1, unless ``labels`` says what
            they are. Learnt from the first answer if ``predict`` gives scores.
        labels: The labels that ``predict`` gives, in the order of the class numbers in certificates, such as
            ``classes_`` of scikit-learn's classifiers.
        name: What certificates call it; the function's own name, with its module, if not given.

    Raises:
        InputError: If an argument has an impossible value.
    """

    place: Tensor

    def __init__(
        self,
        predict: Predict,
        classes: int | None = None,
        *,
        labels: Iterable[object] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(predict) or isinstance(predict, type | nn.Module):
            raise InputError(f"predict: expected a function of a NumPy batch, got {_kind(predict)}")
        several = None if labels is None else check_several(labels, "labels", "labels")
        self.labels = values = None if several is None else [_plain(label) for label in several]
        self.predict = predict
        self.classes = _number_of_classes(classes, values)
        self.name = _qualified_name(predict) if name is None else _check_name(name)
        self._position = {label: k for k, label in enumerate(range(self.classes or 0) if values is None else values)}
        # Where the noise is drawn. It has no floating-point type that a change of the model's could change.
        self.register_buffer("place", torch.empty(0, dtype=torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (n, classes) for the noisy images ``x`` (n, *input); of a label, the one-hot row.

        Raises:
            ModelError: If ``predict`` raises, or gives neither scores nor labels.
        """
        batch = np.array(x.detach().to("cpu", torch.float32).numpy(), order="C")  # a copy: it may be written into
        answer = self._ask(batch)
        rows = self._one_hot(answer) if answer.ndim == 1 else self._scores(answer)
        return torch.from_numpy(rows).to(x.device)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        labels = "" if self.labels is None else f", labels={self.labels}"
        return f"{self.name}, classes={self.classes}{labels}"

    def _ask(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Return what ``predict`` answers to ``batch``, as an array of as many rows."""
        n, shape = len(batch), batch.shape
        try:
            answer = self.predict(batch)
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"predict: it fails on a float32 NumPy batch of shape {shape}: {reason}") from error
        try:
            rows = np.asarray(answer.detach().cpu() if isinstance(answer, Tensor) else answer)
        except (TypeError, ValueError) as error:
            raise ModelError(f"predict: expected it to return an array, got {_kind(answer)} ({error})") from error
        if rows.ndim not in (1, 2) or len(rows) != n:
            got = f"shape {rows.shape}" if rows.ndim else _kind(answer)
            raise ModelError(f"predict: expected labels ({n},) or scores ({n}, classes), got {got}")
        return rows

    def _one_hot(self, answer: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self.classes is None:
            raise ModelError(
                "predict: it returns labels, so the number of classes must be given, as classes= or by labels="
            )
        rows = np.zeros((len(answer), self.classes), dtype=np.float32)
        rows[np.arange(len(answer)), [self._class(label) for label in answer.tolist()]] = 1
        return rows

    def _class(self, label: Any) -> int:
        try:
            return self._position[label]
        except (KeyError, TypeError):
            first, *_, last = self._position
            advice = "; name the labels with labels=" if isinstance(label, str) else ""
            if isinstance(label, float) and 0 < label < 1:
                advice = "; turn probabilities p of one class into two columns (1 - p, p)"
            message = f"predict: expected labels from {first!r} to {last!r}, got {label!r}{advice}"
            raise ModelError(message) from None

    def _scores(self, answer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return ``answer`` (n, classes) as floating point that torch knows."""
        n, columns = answer.shape
        if answer.dtype.kind not in "biuf":
            raise ModelError(f"predict: expected scores that are real numbers, got {answer.dtype}")
        if columns < 2 or columns != (self.classes or columns):
            advice = "; return labels as (n,), a probability p as two columns (1 - p, p)" if columns == 1 else ""
            wanted = self.classes or "classes"
            raise ModelError(f"predict: expected scores of shape ({n}, {wanted}), got {answer.shape}{advice}")
        known = answer.dtype in (np.float16, np.float32, np.float64)
        return np.ascontiguousarray(answer if known else answer.astype(np.float64))


def as_base_classifier(model: object, classes: int | None = None) -> nn.Module:
    """Return a module as it is, and a function ``predict`` as a `BlackBox` of ``classes`` classes.

    Raises:
        InputError: If ``model`` is neither.
    """
    if isinstance(model, nn.Module):
        return model
    if callable(model) and not isinstance(model, type):
        return BlackBox(model, classes)
    offers = next((name for name in ("base_model", "predict") if hasattr(model, name)), None)
    advice = f"; pass its {offers}" if offers and not isinstance(model, type) else ""
    raise InputError(f"model: expected a torch.nn.Module or a function predict(batch), got {_kind(model)}{advice}")


def _number_of_classes(classes: int | None, labels: list[object] | None) -> int | None:
    count = None if classes is None else check_count(classes, "classes", least=2)
    if labels is None:
        return count
    if not all(isinstance(label, Hashable) for label in labels):
        raise InputError(f"labels: expected plain labels, got {labels}")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise InputError(f"labels: expected at least 2 distinct labels, got {labels}")
    if count not in (None, len(labels)):
        raise InputError(f"classes: expected {len(labels)}, the number of labels, got {classes}")
    return len(labels)


def _check_name(name: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"name: expected a line of text, got {name!r}")
    return name


def _qualified_name(predict: Predict) -> str:
    """Return module and name of a function; of a method, of its object's class; of an object, its class's."""
    owner = getattr(predict, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        kind = owner if isinstance(owner, type) else type(owner)
        return f"{kind.__module__}.{kind.__qualname__}.{getattr(predict, '__name__', 'predict')}"
    named = predict if hasattr(predict, "__qualname__") else type(predict)
    return f"{named.__module__}.{named.__qualname__}"


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _plain(label: object) -> object:
    return label.item() if isinstance(label, np.generic) else label
