"""Hard votes: the base classifier's decisions on noisy copies of images, counted.

A *procedure* decides how many votes an image needs: it is a generator that yields a number of votes, is sent their
counts, and in the end returns its result. `Poll.run` serves many of them at once: it fills each forward pass with noisy
copies of whichever images are waiting for votes.

The counts of an image depend on (seed, image index, model, noise, procedure) alone, on the same machine and versions:
each image has its own noise stream, drawn in blocks of a fixed size, and `decisions` makes the class of a noisy image
independent of its batch.
"""

import heapq
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_images, check_indices, check_seed
from rs_plugins.core.chunks import calibrated_chunk, default_chunk
from rs_plugins.core.decisions import MARGIN, PROBES, Decider, probes, warn_invalid
from rs_plugins.core.execution import Runner, check_channels_last
from rs_plugins.core.memory import Room, is_of_memory, keep_freed_memory
from rs_plugins.core.models import check_noiseless, evaluating, probe
from rs_plugins.core.noise import Family, GaussianNoise, make_noise
from rs_plugins.core.perturbing import check_on_grid, perturb_
from rs_plugins.core.procedures import Ballot, Counts, Job, Procedure, Turn
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.transfers import fetch, to_device
from rs_plugins.errors import ModelWarning

R = TypeVar("R")

MOST_BEGUN = 4096  # images whose results are not out: those behind a slow one fill the passes, but are lost in a crash
SPACING = 16  # panels' worth of votes between two panels that are filled with zeros lest a result waits: 6 % at most


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
        chunk: At most this many noisy images per forward pass; found by a short trial if not given and the work is long
            enough for one. Changes the speed, never a count. Where memory is too small, passes are halved until they
            fit.
        device: Only needed for a model without parameters.
        dtype: Floating-point type of a copy of the model that votes in its place; None for the model itself. The noise
            is drawn and added in single precision at least, and the sum rounded once.
        channels_last: Whether a copy with the channels last in memory votes, on images (channels, height, width).
        compile: Whether to compile the model with torch.compile, for passes of exactly ``chunk`` images.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model does not return logits (1, classes) without NaN on the first image, what it says
            of a noisy copy depends on the batch, or it cannot be copied or compiled as asked.
        MissingDependencyError: If ``compile`` needs a C++ compiler that is not there.
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
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002 (torch's name for it)
    ) -> None:
        check_noiseless(model, "model")
        self.images = check_images(images, "images")
        self.noise = make_noise(family, sigma, images.shape[1:])
        channels_last = check_channels_last(channels_last, images)
        self.runner = Runner(model, device=device, dtype=dtype, channels_last=channels_last)
        self.model, self.device, self.dtype = self.runner.model, self.runner.device, self.runner.dtype
        self.indices = check_indices(indices, len(images))
        check_on_grid(self.noise, self.images, self.indices)
        self.seed = fresh_seed() if seed is None else check_seed(seed)
        self.chunk = 1 if chunk is None else check_count(chunk, "chunk")
        self.classes = 0 if classes is None else check_count(classes, "classes", least=2)
        self._to_calibrate = chunk is None and not compile
        self._room = Room()
        self.depth = 0 if self.device.type == "cpu" else 1  # passes whose votes nobody waits for
        if len(images):
            self.chunk = default_chunk(images[0], self.device) if chunk is None else self.chunk
            self.classes = probe(self.runner, images[:1].to(self.device, self.dtype), classes)
            self.decide = self._measure_rounding(compile)

    def votes(self, n: int, *, watch: Callable[[], object] | None = None) -> Counts:
        """Return how many of ``n`` noisy copies of each image voted for each class, (images, classes).

        Copies with NaN logits vote for no class, with a `ModelWarning`. ``watch`` is called after each image.

        Raises:
            InputError: If ``n`` is not a positive integer.
        """
        wanted = check_count(n, "n")

        def ask_once(_turn: Turn) -> Procedure[Counts]:
            return (yield wanted)

        rows = []
        for index, ballot in zip(self.indices, self.run(ask_once, most=wanted), strict=True):
            warn_invalid(index, ballot.invalid)
            rows.append(ballot.result)
            if watch is not None:
                watch()
        return np.stack(rows) if rows else np.zeros((0, self.classes), dtype=np.int64)

    def run(self, procedure: Callable[[Turn], Procedure[R]], *, most: int = 0) -> Iterator[Ballot[R]]:
        """Run one fresh procedure per image and yield their outcomes in the order of the images.

        The model is in eval mode during the forward passes, and as it was between any two results. An `autocast` of the
        caller is off: it would change the model. No image asks for more than ``most`` votes, as far as is known: where
        the work is long, the size of the passes is found by a trial first.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        if self._to_calibrate and len(self.images):
            with self._voting():
                self.chunk = calibrated_chunk(self._trial_pass, self.chunk, most * len(self.images))
            self._to_calibrate = False
        count = _Count(self, procedure)
        while count.unfinished:
            with self._voting():
                while not count.ready:
                    count.step()
            yield from count.outcomes()
        if len(self.images) and self.decide.surprises():
            warnings.warn(
                f"model: its logits differ between batches by more than {MARGIN // 4} times what was measured "
                "beforehand; another chunk, or another part of the data set, may count some votes differently. "
                "Certificates hold all the same.",
                ModelWarning,
                stacklevel=2,
            )

    @contextmanager
    def _voting(self) -> Iterator[None]:
        with evaluating(self.runner), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            yield

    def _measure_rounding(self, compile: bool) -> Decider:  # noqa: A002
        source, shape = stream(self.seed, "rounding", device=self.device), self.images.shape[1:]
        copies = probes(shape, self.noise, source, self.exact)  # not of an image: parts of a data set count alike
        panel, runner = self._panel(), self.runner
        if not compile:
            return self._measured(copies, panel)
        runner.compile_(shape, self.chunk, *[panel] * (panel > 1))
        return self._measured(copies, panel, quick=self._compiled, careful=partial(runner.compiled, size=panel))

    def _measured(self, copies: Tensor, panel: int, **computing: Callable[[Tensor], Tensor]) -> Decider:
        """Measure rounding on ``copies``, or on as many of them as fit into memory, and then without a panel."""
        try:
            return Decider.measured(self.runner, copies, self.classes, panel=panel, **computing)
        except Exception as error:
            if not is_of_memory(error) or len(copies) == 1:
                raise
        self._room.most = len(copies) // 2
        return self._measured(copies[: self._room.most], 1, **computing)

    def _compiled(self, batch: Tensor) -> Tensor:
        return self.runner.compiled(batch, min(self.chunk, self._room.most or self.chunk))

    def look(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `Decider.look` does, in parts where memory is too small for all of ``batch``."""
        parts = self._room.parts(self.decide.look, batch)
        if len(parts) == 1:
            return parts[0]
        winners = torch.cat([winners for winners, _ in parts])
        if all(close is None for _, close in parts):
            return winners, None
        unsure = [torch.zeros_like(won, dtype=torch.bool) if close is None else close for won, close in parts]
        return winners, torch.cat(unsure)

    def _panel(self) -> int:
        """Return the size of the batches in which close decisions are taken again: 1 where few are close."""
        if self.device.type == "cpu":
            return 1 if torch.finfo(self.dtype).eps <= torch.finfo(torch.float32).eps else PROBES
        return min(256, default_chunk(self.images[0], self.device))

    def _trial_pass(self, size: int) -> float:
        """Return the seconds that a pass of ``size`` noisy copies takes: no votes, and from noise of their own."""
        started = time.perf_counter()
        try:
            source = stream(self.seed, "calibration", device=self.device)
            batch = torch.empty(size, *self.images.shape[1:], dtype=self.exact, device=self.device)
            perturb_(self.noise, batch, self.images[0].to(self.device), source)
            self.look(batch)[0].cpu()
        except Exception as error:
            if not is_of_memory(error):
                raise
            return math.inf
        return math.inf if (self._room.most or size) < size else time.perf_counter() - started

    def buffers(self) -> tuple[Tensor, ...]:
        """Return room for the images of the passes that are under way, of fewer images each where memory is too small.

        Raises:
            RuntimeError: If there is none for a single image.
        """
        while True:
            try:
                rooms = (self.depth + 1, self.chunk, *self.images.shape[1:])
                return torch.empty(rooms, dtype=self.exact, device=self.device).unbind()
            except Exception as error:
                if not is_of_memory(error) or self.chunk == 1:
                    raise
            self.chunk //= 2

    @property
    def exact(self) -> torch.dtype:
        """The type in which noise is drawn and added; half precision then gets the sum, rounded once."""
        return torch.promote_types(self.dtype, torch.float32)


class _Count(Generic[R]):
    """One run of a poll: the images under way, and the passes whose votes are still out.

    On a GPU one pass is always queued behind the one whose votes are read, so that the device never waits for Python.
    """

    def __init__(self, poll: Poll, procedure: Callable[[Turn], Procedure[R]]) -> None:
        self._poll, self._procedure = poll, procedure
        self._buffers = poll.buffers()
        self._waiting = deque(range(len(poll.images)))
        self._begun: deque[Job[R]] = deque()  # in the order of the images, which is that of the results
        self._in_need: list[tuple[int, Job[R]]] = []  # a heap: the first image comes first
        self._open, self._most_open = 0, max(2, poll.chunk // 16)  # each may hold a block of noise
        self._flying: deque[_Pass[R]] = deque()
        self._launched = self._unflushed = 0  # passes; votes in passes since a panel was filled with zeros
        self._docket: list[tuple[Job[R], Tensor, Tensor]] = []  # copies (1, *input) to be decided again; winners (1,)
        self._clock = time.perf_counter()

    @property
    def unfinished(self) -> bool:
        """Whether there are results to come."""
        return bool(self._waiting or self._begun)

    @property
    def ready(self) -> bool:
        """Whether the next result is there."""
        return bool(self._begun and self._begun[0].ballot)

    def outcomes(self) -> Iterator[Ballot[R]]:
        """Yield the results that are there, in the order of the images."""
        while self._begun and (ballot := self._begun[0].ballot):
            self._begun.popleft()
            yield ballot
        self._clock = time.perf_counter()  # the caller's time is no image's

    def step(self) -> None:
        """Send off one pass, as full as can be, and count the votes of the passes that are due.

        Close copies wait for a full panel; but not where the passes are not full, nor where the next result needs them.
        """
        used = self._launch()
        self._unflushed += used
        due = self._launched - self._poll.depth
        if not used and self._flying:
            due = self._flying[0].number
        self._land_until(due)
        if used < self._poll.chunk or self._overdue:
            self._decide_again(least=1)
            self._land_until(due)

    @property
    def _overdue(self) -> bool:
        """Whether the next result waits for copies on the docket and for nothing else, and it is not too soon."""
        if not self._docket or self._unflushed < SPACING * self._poll.decide.panel:
            return False
        first = self._begun[0]
        return first.uncounted == sum(job is first for job, _, _ in self._docket)

    def _launch(self) -> int:
        """Fill a buffer with noisy copies of the images in need, let the model decide, return how many there were."""
        buffer = self._buffers[self._launched % len(self._buffers)]
        segments: list[tuple[Job[R], int]] = []
        failed: list[tuple[int, Tensor]] = []
        used = 0
        while used < len(buffer) and (job := self._next_in_need()) is not None:
            size = min(len(buffer) - used, job.unfilled)
            marks = job.fill(buffer[used : used + size])
            if marks is not None:
                failed.append((used, marks))
            if not job.unfilled:
                heapq.heappop(self._in_need)
            segments.append((job, size))
            used += size
        if used:
            self._launched += 1
            winners, close = self._poll.look(buffer[:used])
            for start, marks in failed:
                winners[start : start + len(marks)].masked_fill_(marks, self._poll.classes)
                if close is not None:
                    close[start : start + len(marks)].masked_fill_(marks, False)
            self._send(segments, winners, buffer[:used], close)
        return used

    def _next_in_need(self) -> Job[R] | None:
        while not self._in_need and self._waiting and self._open < self._most_open and len(self._begun) < MOST_BEGUN:
            self._begin(self._waiting.popleft())
        return self._in_need[0][1] if self._in_need else None

    def _begin(self, position: int) -> None:
        poll = self._poll
        source = stream(poll.seed, "votes", poll.indices[position], device=poll.device)
        image = to_device(poll.images[position], poll.device).to(poll.exact)
        job = Job(position, poll.indices[position], image, self._procedure, poll.noise, source, poll.classes)
        self._begun.append(job)
        self._open += 1
        self._file(job)

    def _file(self, job: Job[R]) -> None:
        """Put a job that has just spoken where it belongs."""
        if job.ballot is None:
            heapq.heappush(self._in_need, (job.position, job))
        else:
            self._open -= 1  # it holds no noise any more

    def _send(self, segments: list[tuple[Job[R], int]], winners: Tensor, batch: Tensor, close: Tensor | None) -> None:
        """Count the ``winners`` (n,) of each segment on the device, the ``close`` ones (n,) in their own column."""
        width = self._poll.classes + 2
        bins = winners if close is None else winners.masked_fill(close, width - 1)
        if len(segments) > 1:
            rows = torch.arange(len(segments)).repeat_interleave(torch.tensor([size for _, size in segments]))
            bins = bins + to_device(rows * width, bins.device)
        # Not bincount, which waits for a GPU.
        tally = bins.new_zeros(len(segments) * width).scatter_add_(0, bins, torch.ones_like(bins))
        self._flying.append(_Pass(self._launched, segments, batch, winners, *fetch(tally, close)))

    def _land_until(self, number: int) -> None:
        while self._flying and self._flying[0].number <= number:
            self._land(self._flying.popleft())

    def _land(self, landing: "_Pass[R]") -> None:
        """Read the votes of a pass, put close copies on the docket, settle the requests that are complete."""
        if landing.event is not None:
            landing.event.synchronize()
        now = time.perf_counter()
        pace, self._clock = (now - self._clock) / landing.batch.shape[0], now
        tally = landing.tally.view(len(landing.segments), -1).numpy()
        for (job, size), row in zip(landing.segments, tally, strict=True):
            job.count(row[:-1], size * pace)
        if landing.close is not None and tally[:, -1].any():
            where = to_device(landing.close.nonzero().flatten(), landing.batch.device)
            copies, winners = landing.batch[where].split(1), landing.winners[where].split(1)
            owners = [job for (job, _), row in zip(landing.segments, tally, strict=True) for _ in range(row[-1])]
            self._docket += zip(owners, copies, winners, strict=True)
            self._decide_again(least=self._poll.decide.panel)
        for job, _ in landing.segments:
            if job.complete:
                job.settle()
                self._file(job)

    def _decide_again(self, least: int) -> None:
        """Send off panels of close copies while there are at least so many, the oldest first."""
        panel = self._poll.decide.panel
        while len(self._docket) >= least and self._docket:
            chosen, self._docket = self._docket[:panel], self._docket[panel:]
            if len(chosen) < panel:
                self._unflushed = 0
            copies, before = (torch.cat(parts) for parts in list(zip(*chosen, strict=True))[1:])
            winners = self._poll.decide.again(copies, before)
            self._send([(job, 1) for job, _, _ in chosen], winners, copies, None)


@dataclass(frozen=True)
class _Pass(Generic[R]):
    """A forward pass whose votes have not been read: ``tally`` and ``close`` are in host memory after ``event``."""

    number: int
    segments: list[tuple[Job[R], int]]
    batch: Tensor
    winners: Tensor
    tally: Tensor
    close: Tensor | None
    event: torch.cuda.Event | None
