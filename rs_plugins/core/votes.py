"""Hard votes: the base classifier's decisions on noisy copies of images, counted.

A *procedure* decides how many votes an image needs: it is a generator that yields a number of votes, is sent their
counts, and in the end returns its result. `Poll.run` serves many of them at once: it fills each forward pass with noisy
copies of whichever images are waiting for votes.

The counts of an image depend on (seed, image index, model, noise, procedure) alone, on the same machine and versions:
each image has its own noise stream, drawn in blocks of a fixed size, and `decisions` makes the class of a noisy image
independent of its batch.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count, check_images, check_indices, check_seed
from rs_plugins.core.decisions import PROBES, Decider
from rs_plugins.core.models import check_noiseless, device_and_dtype, evaluating, probe
from rs_plugins.core.noise import Family, GaussianNoise, Noise, make_noise
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.errors import ModelWarning

Counts = npt.NDArray[np.int64]
R = TypeVar("R")
Procedure = Generator[int, Counts, R]

BLOCK = 64  # noise draws per block: part of what a seed means, so never to be changed


def default_chunk(image: Tensor, device: torch.device) -> int:
    """Return how many noisy copies of ``image`` (*input) to put into one forward pass on ``device``.

    On a CPU modest batches are fastest, because the activations then stay in the cache; a GPU wants large ones.
    """
    pixels = max(1, image.numel())
    if device.type == "cpu":
        return min(max(2**18 // pixels, 16), 512)
    return min(max(2**25 // pixels, 64), 8192)


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


class Poll:
    """Votes of a base classifier on noisy copies of images: everything that they depend on, checked once.

    Args:
        model: The base classifier: (n, *input) in pixels to logits (n, classes), normalisation inside.
        images: (n, *input), floating point, pixels in [0, 1]; read while voting, so not to be changed meanwhile.
        sigma: Standard deviation of the noise, in pixels.
        family: The noise family.
        seed: Seed of the noise streams; None takes one from the operating system.
        indices: Position of each image in its data set, (n,); 0…n-1 by default. An image's noise depends on it.
        classes: The number of classes; found by running the model once if not given.
        chunk: At most this many noisy images per forward pass. Changes the speed, never a count.
        device: Only needed for a model without parameters.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits (1, classes) without NaN on the first image, or what it says
            of a noisy copy depends on the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        sigma: float,
        *,
        family: Family = GaussianNoise,
        seed: int | None = 0,
        indices: Sequence[int] | None = None,
        classes: int | None = None,
        chunk: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = check_noiseless(model, "model")
        self.noise = make_noise(family, sigma)
        self.device, self.dtype = device_and_dtype(model, device)
        self.images = check_images(images, "images")
        self.indices = check_indices(indices, len(images))
        self.seed = fresh_seed() if seed is None else check_seed(seed)
        self.chunk = 1
        self.classes = 0 if classes is None else check_count(classes, "classes", least=2)
        if len(images):
            self.chunk = default_chunk(images[0], self.device) if chunk is None else check_count(chunk, "chunk")
            self.classes = probe(model, images[:1].to(self.device, self.dtype), classes)
            self._decide = self._measure_rounding()

    def votes(self, n: int) -> Counts:
        """Return how many of ``n`` noisy copies of each image voted for each class, (images, classes).

        Copies with NaN logits vote for no class, with a `ModelWarning`.

        Raises:
            InputError: If ``n`` is not a positive integer.
        """
        wanted = check_count(n, "n")

        def ask_once(_turn: Turn) -> Procedure[Counts]:
            return (yield wanted)

        rows = []
        for index, ballot in zip(self.indices, self.run(ask_once), strict=True):
            warn_invalid(index, ballot.invalid)
            rows.append(ballot.result)
        return np.stack(rows) if rows else np.zeros((0, self.classes), dtype=np.int64)

    def _measure_rounding(self) -> Decider:
        source = stream(self.seed, "rounding", device=self.device)
        image = self.images[0].to(self.device, self._exact)
        copies = image + self.noise.draw_(image.new_empty(PROBES, *image.shape), source)
        return Decider.measured(self.model, copies.to(self.dtype), self.classes)

    @property
    def _exact(self) -> torch.dtype:
        """The type in which noise is drawn and added; half precision then gets the sum, rounded once."""
        return torch.promote_types(self.dtype, torch.float32)

    def run(
        self, procedure: Callable[[Turn], Procedure[R]], *, progress: "tqdm[object] | None" = None
    ) -> Iterator[Ballot[R]]:
        """Run one fresh procedure per image and yield their outcomes in the order of the images.

        The model is in eval mode during the forward passes, and as it was between any two results. An `autocast` of the
        caller is off: it would change the model. The bar ``progress`` is advanced by the votes of each pass.
        """
        if self.device.type == "cpu":
            _keep_freed_memory()
        buffer = torch.empty(self.chunk, *self.images.shape[1:], dtype=self._exact, device=self.device)
        most_live = max(2, self.chunk // 16)  # each holds a block of noise
        waiting = deque(range(len(self.images)))
        live: deque[_Job[R]] = deque()

        def next_in_need() -> _Job[R] | None:
            for job in live:
                if job.unfilled:
                    return job
            while waiting and len(live) < most_live:
                position = waiting.popleft()
                index = self.indices[position]
                source = stream(self.seed, "votes", index, device=self.device)
                image = self.images[position].to(self.device, self._exact)
                live.append(_Job(index, image, procedure, self.noise, source, self.classes))
                if live[-1].unfilled:
                    return live[-1]
            return None

        def forward_pass() -> None:
            """Fill one batch, count its votes, settle the requests that it completes."""
            started, used = time.perf_counter(), 0
            segments: list[tuple[_Job[R], int, int]] = []
            while used < self.chunk and (job := next_in_need()) is not None:
                end = min(self.chunk, used + job.unfilled)
                job.fill(buffer[used:end])
                segments.append((job, used, end))
                used = end
            if not segments:
                return
            winners = self._decide(buffer[:used].to(self.dtype))
            for job, begin, end in segments:
                job.count(winners[begin:end])
            pace = (time.perf_counter() - started) / used
            for job, begin, end in segments:
                job.seconds += pace * (end - begin)
                if not job.unfilled:
                    job.settle()
            if progress is not None:
                progress.update(used)

        while waiting or live:
            with evaluating(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                while not (live and live[0].ballot):
                    forward_pass()
            while live and (ballot := live[0].ballot):
                live.popleft()
                yield ballot


class _Job(Generic[R]):
    """An image under way: its noise, the request it is waiting for, and the votes that came in."""

    def __init__(
        self,
        index: int,
        image: Tensor,
        procedure: Callable[[Turn], Procedure[R]],
        noise: Noise,
        source: torch.Generator,
        classes: int,
    ) -> None:
        self.index, self.invalid, self.seconds = index, 0, 0.0
        self.unfilled = 0  # votes of the running request that are in no batch yet
        self.ballot: Ballot[R] | None = None
        self._image, self._procedure, self._noise, self._source = image, procedure(self), noise, source
        self._block, self._used = torch.empty(0), BLOCK
        self._tally = torch.zeros(classes + 1, dtype=torch.int64, device=image.device)
        self._advance(lambda: next(self._procedure))

    def fill(self, out: Tensor) -> None:
        """Write the image plus its next ``len(out)`` noise draws into ``out`` (k, *input)."""
        done = 0
        while done < len(out):
            if self._used == BLOCK:
                if not len(self._block):
                    self._block = torch.empty(BLOCK, *self._image.shape, dtype=out.dtype, device=out.device)
                self._noise.draw_(self._block, self._source)
                self._used = 0
            take = min(BLOCK - self._used, len(out) - done)
            torch.add(self._image, self._block[self._used : self._used + take], out=out[done : done + take])
            self._used += take
            done += take
        self.unfilled -= len(out)

    def count(self, winners: Tensor) -> None:
        """Add the votes ``winners`` (k,) to the running request's, on the device."""
        self._tally.scatter_add_(0, winners, torch.ones_like(winners))

    def settle(self) -> None:
        """Hand the counts of the completed request to the procedure, which asks for more votes or returns."""
        counts = self._tally.cpu().numpy().copy()
        self._tally.zero_()
        self.invalid += int(counts[-1])
        self._advance(lambda: self._procedure.send(counts[:-1]))

    def _advance(self, step: Callable[[], int]) -> None:
        try:
            self.unfilled = check_count(step(), "votes asked for by the procedure")
        except StopIteration as stop:
            self.unfilled = 0
            self._block = torch.empty(0)  # release the memory: the result may wait for its predecessors
            self.ballot = Ballot(stop.value, self.invalid, self.seconds)


def _keep_freed_memory() -> None:
    """Make glibc keep the memory of activations between passes, once it has seen a large block freed.

    Until then it returns each to the kernel and asks for it again, page by page, which can take as long as the network.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)  # below the 32 MiB up to which it learns; no page of it is touched


def warn_invalid(index: int, invalid: int) -> None:
    """Warn that some noisy copies of an image gave NaN logits."""
    if invalid:
        warnings.warn(
            f"image {index}: {invalid} noisy copies gave NaN logits; they count as votes for no class",
            ModelWarning,
            stacklevel=3,
        )
