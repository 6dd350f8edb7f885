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

Counts = npt.NDArray[np.int64]
R = TypeVar("R")
Procedure = Generator[int, Counts, R]

BLOCK = 64  # noise draws per block: part of what a seed means, so never to be changed


@dataclass(frozen=True)
class Ballot(Generic[R]):
    """The outcome of one image's procedure.

    Attributes:
        result: What the procedure returned.
        invalid: Votes with NaN logits, which were counted for no class.
        seconds: The image's share of the forward passes that it took part in, wall-clock.
    """

    result: R
    invalid: int
    seconds: float


class Turn(Protocol):
    """What a procedure may know of the image that it is run for.

    Attributes:
        index: Position of the image in its data set.
        invalid: Votes with NaN logits so far.
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
        self._tally = np.zeros(classes + 1, dtype=np.int64)
        self._advance(lambda: next(self._procedure))

    def fill(self, out: Tensor) -> None:
        """Write the image plus its next draws of noise into ``out`` (k, *input), whole blocks straight into it."""
        n, rest = out.shape[0], self._rest.shape[0]
        self.unfilled -= n
        begun = min(rest, n)
        if begun:
            out[:begun] = self._rest[:begun]
            self._rest = self._rest[begun:] if begun < rest else self._image[:0]
        whole = begun + (n - begun) // BLOCK * BLOCK
        if whole > begun:
            for block in out[begun:whole].split(BLOCK):
                self._noise.draw_(block, self._source)
        if whole < n:
            block = self._noise.draw_(out.new_empty(BLOCK, *out.shape[1:]), self._source)
            out[whole:] = block[: n - whole]
            self._rest = block[n - whole :]
        out.add_(self._image)

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
            del self._image, self._rest, self._tally, self._noise, self._source, self._procedure
