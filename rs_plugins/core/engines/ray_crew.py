"""The workers of a job on Ray: who does which block, and what is done where one of them dies."""

import heapq
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rs_plugins.core.certification import Certificate
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.engines.ray_worker import Begun, Reply
from rs_plugins.core.files import changes
from rs_plugins.errors import ModelError, RSPluginsWarning, WorkerError

AHEAD = 16  # blocks per worker that may be done before an earlier one is: they are lost if the driver is killed
DEATHS = 3  # of workers at one block, or before they began
PATIENCE = 30.0  # seconds without a worker after which the user is told


@dataclass
class Crew:
    """The workers of a job, what each is doing, and what came of it.

    Args:
        ray: The module, connected.
        hire: Starts an actor that is a `rs_plugins.core.engines.ray_worker.Worker`.
        data: The images.
        blocks: Positions of the images of each block.
        size: How many workers.
        identity: Of the model.
    """

    ray: Any
    hire: Callable[[], Any]
    data: DataSet
    blocks: list[list[int]]
    size: int
    identity: str
    _busy: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)  # a call: worker and block, None to begin
    _idle: list[Any] = field(default_factory=list)
    _replies: dict[int, Reply[list[Certificate]]] = field(default_factory=dict)
    _begun: Begun | None = None
    _false_starts: int = 0

    def __post_init__(self) -> None:
        self._waiting = list(range(len(self.blocks)))  # a heap
        self._deaths = [0] * len(self.blocks)
        self._end = len(self.blocks)  # the first block that failed: later ones are in vain

    def begin(self) -> Begun:
        """Start the workers, and return what the first one says."""
        for _ in range(self.size):
            self._hire()
        warned = False
        while self._begun is None:
            if not self._hear(PATIENCE) and not warned:
                warnings.warn(
                    f"workers: none has begun within {PATIENCE:g} s; is the cluster busy?",
                    RSPluginsWarning,
                    stacklevel=4,
                )
                warned = True
        return self._begun

    def certificates(self) -> Iterator[Certificate]:
        """Yield the certificates of all blocks in order."""
        for number in range(len(self.blocks)):
            while number not in self._replies:
                self._hand_out(number + AHEAD * self.size)
                self._hear(None)
            yield from self._replies.pop(number).unpack()

    def close(self) -> None:
        """End all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self.ray.kill(worker)

    def _hire(self) -> None:
        worker, first = self.hire(), self.blocks[0][:1]
        self._busy[worker.begin.remote(self.data.read(first), first)] = worker, None

    def _hand_out(self, end: int) -> None:
        """Give each idle worker a block before the one numbered ``end``."""
        while self._idle and self._waiting and self._waiting[0] < min(end, self._end):
            worker, number = self._idle.pop(), heapq.heappop(self._waiting)
            positions = self.blocks[number]
            ahead = len(self._waiting) * len(positions) // self.size
            self._busy[worker.certify.remote(self.data.read(positions), positions, ahead)] = worker, number

    def _hear(self, timeout: float | None) -> bool:
        """Wait until a call is answered or its worker died; return whether one was within ``timeout`` seconds."""
        ready, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        for call in ready:
            worker, number = self._busy.pop(call)
            try:
                reply = self.ray.get(call)
            except self.ray.exceptions.RayTaskError:  # a mistake of ours
                raise
            except self.ray.exceptions.RayError as error:
                self._mourn(worker, number, error)
                continue
            self._idle.append(worker)
            if number is None:
                self._welcome(reply.unpack())
            else:
                self._replies[number] = reply
                self._end = self._end if reply.error is None else min(self._end, number)
        return bool(ready)

    def _welcome(self, begun: Begun) -> None:
        self._false_starts = 0
        if begun.identity != self.identity:
            raise ModelError("model: in a worker it is another one; does what it is depend on the process?")
        first = self._begun = self._begun or begun
        if difference := changes(asdict(first.made_with), asdict(begun.made_with)):
            raise WorkerError(f"workers: expected machines of one kind with the same versions, got {difference}")

    def _mourn(self, worker: Any, number: int | None, error: Exception) -> None:
        """Have the block of a worker that died done again, or give it up; have another worker take its place."""
        self.ray.kill(worker)
        reason = " ".join(str(error).split())
        if number is None:
            self._false_starts += 1
            if self._false_starts == DEATHS:
                raise WorkerError(f"workers: {DEATHS} in a row died before they had begun: {reason}") from error
            self._hire()
            return
        images = ", ".join(map(str, self.blocks[number]))
        self._deaths[number] += 1
        if self._deaths[number] == DEATHS:
            refusal = WorkerError(f"workers: {DEATHS} died at work on images {images}: {reason}")
            self._replies[number], self._end = Reply(None, refusal), min(self._end, number)
        else:
            warnings.warn(
                f"workers: one died at work on images {images}, which are done again", RSPluginsWarning, stacklevel=5
            )
            heapq.heappush(self._waiting, number)
            self._hire()
