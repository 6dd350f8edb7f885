"""What an engine is: a way to run blocks of images; and the default one, which runs them in this process.

An engine is told what to do (`Task`) and which images, and returns their certificates in order (`Run`). A certificate
depends on the seed, the image's index, the model, the noise and the plan alone, so all engines return the same ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from torch import Tensor, nn

from rs_plugins.core.black_box import Predict
from rs_plugins.core.certification import Certificate, Certificates, Provenance, certify
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.identity import identity
from rs_plugins.core.plans.protocol import Plan
from rs_plugins.errors import ModelError

MEMORY = 2**28  # bytes of images that are held at a time
# What a module is known by is kept when it runs, but for attributes that its forward assigns (core/identity.py).
_ADVICE = "let no hook or list keep what forward computes, or assign it to an attribute in forward"


@dataclass(frozen=True)
class Task:
    """How images are certified: what `certify` takes beside the images.

    Attributes:
        model: The base classifier.
        sigma: Standard deviation of the noise, in pixels.
        plan: How many votes to spend.
        seed: Seed of the noise streams.
        options: Further options of `certify`.
    """

    model: nn.Module | Predict
    sigma: float
    plan: Plan
    seed: int
    options: Mapping[str, Any]

    def begin(self, images: Tensor, positions: Sequence[int]) -> Certificates:
        """Return the certificates of the first ``images`` (n, *input); `Certificates.go_on` has those of others.

        Raises:
            InputError: As `certify`.
            ModelError: As `certify`, or if running the model changes what it is.
        """
        before = self.identity()
        found = certify(
            self.model, images, self.sigma, plan=self.plan, seed=self.seed, indices=positions, **self.options
        )
        if self.identity() != before:
            raise ModelError("model: running it changes what it is, so --resume would not know it again; " + _ADVICE)
        return found

    def identity(self) -> str:
        """Return which model it is, nothing where it is a function."""
        return identity(self.model) if isinstance(self.model, nn.Module) else ""


@dataclass(frozen=True)
class Run:
    """What an engine returns.

    Attributes:
        made_with: With what all certificates will be made, known before the first is.
        classes: How many classes the model tells apart.
        certificates: Those of all images in order, each computed when it is asked for, or before.
    """

    made_with: Provenance
    classes: int
    certificates: Iterator[Certificate]


class Engine(Protocol):
    """A way to run blocks of images."""

    def run(
        self, task: Task, data: DataSet, positions: Sequence[int], memory: int = MEMORY
    ) -> AbstractContextManager[Run]:
        """Return the run of ``task`` over the images of ``data`` at ``positions``, at least one.

        It begins when the block is entered; when it is left, all that works for it ends. Images of at most ``memory``
        bytes are held at a time, but at least one image.
        """


class SingleProcess:
    """Runs all images in this process, as large a part at a time as memory allows."""

    @contextmanager
    def run(self, task: Task, data: DataSet, positions: Sequence[int], memory: int = MEMORY) -> Iterator[Run]:
        """Return the run of ``task``."""
        parts = blocks(positions, memory // bytes_of_image(data))
        part = next(parts)
        first = task.begin(data.read(part), part)
        yield Run(first.made_with, first.classes, _through(first, data, parts))


def bytes_of_image(data: DataSet) -> int:
    """Return how much memory an image takes in single precision."""
    return 4 * math.prod(data.shape)


def blocks(positions: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut ``positions`` into blocks of ``size``, at least 1, the last one maybe smaller."""
    rest = iter(positions)
    while block := list(islice(rest, max(1, size))):
        yield block


def _through(current: Certificates, data: DataSet, parts: Iterator[list[int]]) -> Iterator[Certificate]:
    yield from current
    for part in parts:
        current = current.go_on(data.read(part), part)
        yield from current
