"""What a worker does: it holds the model, is handed blocks of images, and sends their certificates back.

It knows nothing of Ray: an object of a process of its own, whose methods are called one after another.
"""

import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

import rs_plugins
from rs_plugins.core.certification import Certificate, Certificates, Provenance
from rs_plugins.core.engines.engine import Task
from rs_plugins.errors import InputError, ModelError, RSPluginsError

T = TypeVar("T")

_NOT_THE_USERS = tuple(Path(str(package.__file__)).parent for package in (rs_plugins, torch))


@dataclass(frozen=True)
class Orders:
    """What every worker of a job is told.

    Attributes:
        task: How images are certified, pickled with what it consists of, as a worker may be unable to read it.
        paths: Where the driver imports modules from.
        threads: Of torch, in each worker.
        device: The type of device on which each worker computes.
        matmul: torch's setting of the precision of products.
    """

    task: bytes
    paths: tuple[str, ...]
    threads: int
    device: str
    matmul: str


@dataclass(frozen=True)
class Begun:
    """What a worker says when it is ready: with what it makes certificates, of how many classes and which model."""

    made_with: Provenance
    classes: int
    identity: str


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What came of a call, as it can be sent: a value, or an error with the text of its traceback; and warnings."""

    value: T | None
    error: Exception | None = None
    trace: str = ""
    warnings: tuple[tuple[type[Warning], str], ...] = ()

    def unpack(self) -> T:
        """Return the value, and say again what was warned of; or raise the error."""
        for kind, text in self.warnings:
            warnings.warn(text, kind, stacklevel=3)
        if self.error is not None:
            raise self.error from WorkerTraceback(self.trace)
        assert self.value is not None
        return self.value


class WorkerTraceback(Exception):  # noqa: N818 (not raised: it shows where the error came from)
    """The traceback of an error in a worker, in words."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"


class Worker:
    """Certifies one block of images after another."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._certificates: Certificates | None = None

    def begin(self, images: Tensor, positions: Sequence[int]) -> Reply[Begun]:
        """Load the model, look at how it does on ``images`` (n, *input), and say what certificates are made with."""
        return _replied(lambda: self._begin(images, positions), positions)

    def certify(self, images: Tensor, positions: Sequence[int], ahead: int) -> Reply[list[Certificate]]:
        """Return the certificates of ``images`` (n, *input); about ``ahead`` others are to come after them."""
        return _replied(lambda: self._certify(images, positions, ahead), positions)

    def _begin(self, images: Tensor, positions: Sequence[int]) -> Begun:
        orders = self._orders
        torch.set_num_threads(orders.threads)
        torch.set_float32_matmul_precision(orders.matmul)
        sys.path += [path for path in orders.paths if path not in sys.path and os.path.isdir(path)]
        try:
            task: Task = pickle.loads(orders.task)
        except Exception as error:  # unpickling imports the user's modules
            raise InputError(
                f"model: a worker cannot load it: {type(error).__name__}: {error}; its module must be importable there"
            ) from error
        if isinstance(task.model, nn.Module):
            task.model.to(orders.device)
        self._certificates = task.begin(images, positions)
        return Begun(self._certificates.made_with, self._certificates.classes, task.identity())

    def _certify(self, images: Tensor, positions: Sequence[int], ahead: int) -> list[Certificate]:
        assert self._certificates is not None
        self._certificates = self._certificates.go_on(images, positions, ahead=ahead)
        return list(self._certificates)


def _replied(call: Callable[[], T], positions: Sequence[int]) -> Reply[T]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, error, trace = None, None, ""
        try:
            value = call()
        except Exception as raised:
            error, trace = _portable(raised, positions), traceback.format_exc()
    return Reply(value, error, trace, tuple((warning.category, str(warning.message)) for warning in caught))


def _portable(error: Exception, positions: Sequence[int]) -> Exception:
    """Return an error that can be sent: our own as it is, of others what they say, and where."""
    if isinstance(error, RSPluginsError):
        return type(error)(str(error))
    where = f"image {positions[0]}" if len(positions) == 1 else f"images {positions[0]} to {positions[-1]}"
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(o) for o in _NOT_THE_USERS)]
    place = f" ({Path(users[-1].filename).name}:{users[-1].lineno}, in {users[-1].name})" if users else ""
    return ModelError(f"model: it fails in a worker on {where}: {type(error).__name__}: {error}{place}")
