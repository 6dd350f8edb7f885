"""What a procedure is, and an image that one is run for: its noise, its requests and the votes that came in."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_plugins.core.checks import check_count
from rs_plugins.core.noise import Noise
from rs_plugins.core.perturbing import perturb_

Counts = npt.NDArray[np.int64]
R = TypeVar("R")
Procedure = Generator[int, Counts, R]

BLOCK = 64  # noise draws per block: part of what a seed means, so never to be changed


@dataclass(frozen=True)
class Ballot(Generic[R]):
    """The outcome of one image's procedure.

    Attributes:
        result: What the procedure returned.
        invalid: Votes that were counted for no class: NaN logits, or a failed draw of the noise.
        seconds: The image's share of the forward passes that it took part in, wall-clock.
    """

    result: R
    invalid: int
    seconds: float


class Turn(Protocol):
    """What a procedure may know of the image that it is run for.

    Attributes:
        index: Position of the image in its data set.
        invalid: Votes for no class so far.
        seconds: The image's share of the wall-clock time so far.
    """

    index: int
    invalid: int
    seconds: float


class Job(Generic[R]):
    """An image under way: its noise, the request it is waiting for, and the votes that came in."""

    def __init__(
        self,
        position: int,
        index: int,
        image: Tensor,
        procedure: Callable[[Turn], Procedure[R]],
        noise: Noise,
        source: torch.Generator,
        classes: int,
    ) -> None:
        self.position, self.index, self.invalid, self.seconds = position, index, 0, 0.0
        self.unfilled = self.uncounted = 0  # votes of the running request that are in no pass yet, not counted yet
        self.ballot: Ballot[R] | None = None
        self._image, self._procedure, self._noise, self._source = image, procedure(self), noise, source
        self._rest = image[:0]  # what is left of a block that two passes share
        self._rest_failed: Tensor | None = None  # which of these are failures of the noise
        self._tally = np.zeros(classes + 1, dtype=np.int64)
        self._advance(lambda: next(self._procedure))

    def fill(self, out: Tensor) -> Tensor | None:
        """Write the image plus its next draws of noise into ``out`` (k, *input), whole blocks straight into it.

        Returns:
            Which of them are failed draws, whose votes count for no class, as booleans (k,); None for none.
        """
        n = out.shape[0]
        self.unfilled -= n
        begun = min(self._rest.shape[0], n)
        whole = begun + (n - begun) // BLOCK * BLOCK
        failures = []
        if begun:
            out[:begun] = self._rest[:begun]
            failures.append((0, self._take_failures(begun)))
            self._rest = self._rest[begun:] if begun < self._rest.shape[0] else self._image[:0]
        failures += [(start, self._draw_(out[start : start + BLOCK])) for start in range(begun, whole, BLOCK)]
        if whole < n:
            self._rest = out.new_empty(BLOCK, *out.shape[1:])
            self._rest_failed = self._draw_(self._rest)
            out[whole:] = self._rest[: n - whole]
            failures.append((whole, self._take_failures(n - whole)))
            self._rest = self._rest[n - whole :]
        return _gathered(failures, n)

    def _draw_(self, block: Tensor) -> Tensor | None:
        return perturb_(self._noise, block, self._image, self._source)

    def _take_failures(self, n: int) -> Tensor | None:
        """Return the first ``n`` marks of the rest, and keep the others."""
        if self._rest_failed is None:
            return None
        first, self._rest_failed = self._rest_failed[:n], self._rest_failed[n:]
        return first

    def count(self, votes: Counts, seconds: float) -> None:
        """Add ``votes`` (classes + 1,), the last of them invalid, and the image's share of the time they took."""
        self._tally += votes
        self.uncounted -= int(votes.sum())
        self.seconds += seconds

    @property
    def complete(self) -> bool:
        """Whether all votes of the running request have been counted."""
        return self.ballot is None and not self.uncounted

    def settle(self) -> None:
        """Hand the counts of the completed request to the procedure, which asks for more votes or returns."""
        counts, self._tally = self._tally, np.zeros_like(self._tally)
        self.invalid += int(counts[-1])
        self._advance(lambda: self._procedure.send(counts[:-1]))

    def _advance(self, step: Callable[[], int]) -> None:
        try:
            self.unfilled = self.uncounted = check_count(step(), "votes asked for by the procedure")
        except StopIteration as stop:
            self.ballot = Ballot(stop.value, self.invalid, self.seconds)
            # The result may wait for thousands of predecessors, and then holds next to nothing.
            del self._image, self._rest, self._rest_failed
            del self._tally, self._noise, self._source, self._procedure


def _gathered(failures: list[tuple[int, Tensor | None]], n: int) -> Tensor | None:
    """Return the marks of the parts of ``n`` copies, each with the place where it starts, in one tensor (n,)."""
    marked = [(start, marks) for start, marks in failures if marks is not None]
    if not marked:
        return None
    together = torch.zeros(n, dtype=torch.bool, device=marked[0][1].device)
    for start, marks in marked:
        together[start : start + len(marks)] = marks
    return together
