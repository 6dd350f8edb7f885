"""Certification on Ray: workers on this machine or on a cluster pull blocks of images from the driver.

The driver is the process that writes the log. Each worker is an actor that holds the model. The blocks are small, so
that all are busy to the end. The block of a worker that dies is done again by another.
"""

import math
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.engines.cores import cores, share_of_cores
from rs_plugins.core.engines.engine import MEMORY, Run, Task, blocks, bytes_of_image
from rs_plugins.core.engines.ray_cluster import connected, import_ray
from rs_plugins.core.engines.ray_crew import Crew
from rs_plugins.core.engines.ray_worker import Orders, Worker
from rs_plugins.errors import InputError

VOTES = 2**15  # of a block: enough to fill the passes, few enough to be done in seconds
ADAPTIVE = 8  # least images of a block where most need only a few of the votes that they may ask for
SHARES = 4  # at least so many blocks for each worker, as far as there are images
CORES = 1  # of a CPU for each worker, by default


@dataclass(frozen=True)
class RayEngine:
    """Runs blocks of images on workers of Ray.

    Certificates, log and record are those of a single process on the same kind of machine, whatever the number of
    workers. A worker on other hardware or with other versions ends the job, as its certificates could not stand in the
    same log. The images are read by the process that writes the log, and sent; the model is sent as well, but its code
    has to be importable where the workers are.

    Args:
        workers: How many; ``"auto"`` for one per GPU, or per core where there is no GPU.
        address: Of a running cluster, as Ray writes it, such as ``"auto"``; by default one is started on this machine
            and ends with the job. Where the process is connected to Ray already, that cluster is used.
        device: The type of device that workers compute on; by default that which the job is told, else ``"cuda"`` if
            there are GPUs, else ``"cpu"``.
        block: Images that a worker is handed at once; by default so many that they take a few seconds.

    Raises:
        InputError: If a number is impossible.
        MissingDependencyError: If Ray is not installed.
    """

    workers: int | Literal["auto"] = "auto"
    address: str | None = None
    device: str | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.workers, str) and self.workers != "auto":
            raise InputError(f'workers: expected a number or "auto", got {self.workers!r}')
        if self.workers != "auto":
            check_count(self.workers, "workers")
        if self.block is not None:
            check_count(self.block, "block")
        import_ray()

    @contextmanager
    def run(self, task: Task, data: DataSet, positions: Sequence[int], memory: int = MEMORY) -> Iterator[Run]:
        """Return the run of ``task`` over the images of ``data`` at ``positions``.

        Raises:
            InputError: If the task cannot be sent to workers, or there are more than the cluster has room for.
            ModelError: If the model fails in a worker, or is another one there.
            WorkerError: If workers cannot be started, are not alike, or three died at one block.
        """
        if task.options.get("watch") is not None:
            raise InputError("watch: expected none, as images are not sampled in this process; use no engine")
        device = self._device(task)
        local = self.address is None and not import_ray().is_initialized()
        on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
        with connected(self.address, cpus=self._of_this_machine(on_gpu), gpus=on_gpu) as ray:
            room = _Room.of(ray, device)
            workers = min(room.auto if self.workers == "auto" else self.workers, len(positions))
            cpus, gpus = room.share(workers)
            orders = ray.put(_orders(task, share_of_cores(workers) if local else cpus, room.device))
            size = min(self._block_size(task, len(positions), workers), memory // workers // bytes_of_image(data))
            parts = list(blocks(positions, size))
            actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
            crew = Crew(ray, lambda: actor.remote(orders), data, parts, min(workers, len(parts)), task.identity())
            with closing(crew):
                begun = crew.begin()
                yield Run(begun.made_with, begun.classes, crew.certificates())

    def _device(self, task: Task) -> str | None:
        """Return the type of device that is asked for, None for that of the cluster."""
        asked = self.device or task.options.get("device") or (None if isinstance(task.model, nn.Module) else "cpu")
        return None if asked is None else str(asked).partition(":")[0]

    def _of_this_machine(self, on_gpu: bool) -> int:
        """Return how many processors a local cluster is said to have: one a worker, as Ray starts as many processes."""
        if self.workers != "auto":
            return self.workers
        return torch.cuda.device_count() if on_gpu else max(1, cores() // CORES)

    def _block_size(self, task: Task, images: int, workers: int) -> int:
        if self.block is not None:
            return self.block
        least = ADAPTIVE if getattr(task.plan, "interim", False) else 1
        return min(max(least, math.ceil(VOTES / task.plan.most)), math.ceil(images / (SHARES * workers)))


@dataclass(frozen=True)
class _Room:
    """What a cluster has.

    Attributes:
        device: The type of device that workers compute on.
        cpus: Processors of each node.
        gpus: GPUs of all nodes.
    """

    device: str
    cpus: list[int]
    gpus: float

    @classmethod
    def of(cls, ray: Any, device: str | None) -> "_Room":
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(node.get("GPU", 0) for node in nodes)
        device = device or ("cuda" if gpus else "cpu")
        if device == "cuda" and not gpus:
            raise InputError("device: expected one that the cluster has, got 'cuda'; there are no GPUs")
        return cls(device, [int(node.get("CPU", 0)) for node in nodes], gpus if device == "cuda" else 0)

    @property
    def auto(self) -> int:
        """How many workers there are if nobody says."""
        return max(1, int(self.gpus) or sum(self.cpus) // CORES)

    def share(self, workers: int) -> tuple[int, float]:
        """Return the processors of each worker, with which all find a place, and its GPUs.

        Raises:
            InputError: If there is no room for so many.
        """
        threads = max(1, sum(self.cpus) // workers)
        while threads > 1 and sum(cpus // threads for cpus in self.cpus) < workers:
            threads -= 1
        if sum(self.cpus) < workers:
            raise InputError(
                f"workers: expected at most {sum(self.cpus)}, the processors of the cluster, got {workers}"
            )
        return threads, min(1.0, math.floor(1e4 * self.gpus / workers) / 1e4)


def _orders(task: Task, threads: int, device: str) -> Orders:
    from ray import cloudpickle

    options, model = {**task.options}, task.model
    if isinstance(model, nn.Module):
        options["device"] = device
    if isinstance(model, nn.Module) and not all(t.is_cpu for t in chain(model.parameters(), model.buffers())):
        model = deepcopy(model).cpu()
    try:
        sent = cloudpickle.dumps(replace(task, model=model, options=options))
    except (TypeError, AttributeError, ValueError, RuntimeError, pickle.PicklingError) as error:
        raise InputError(f"model: it cannot be sent to workers: {error}") from error
    paths = tuple(os.path.abspath(path) for path in sys.path)
    return Orders(sent, paths, threads, device, torch.get_float32_matmul_precision())
