"""Certification under torchrun: each process certifies a shard into a log of its own, the first one merges them."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import distributed
from torch.distributed.rendezvous import rendezvous

from rs_plugins.core.engines.cores import share_of_cores
from rs_plugins.core.files import complete_lines
from rs_plugins.core.results.kinds import LogKind, Rows_co
from rs_plugins.core.results.merging import merge_logs
from rs_plugins.core.results.writer import check_log, record_of
from rs_plugins.core.selection import Selection
from rs_plugins.errors import InputError, ResultsError

PAUSE = 0.2  # seconds between two looks at whether the others are done


@dataclass(frozen=True)
class Processes:
    """The processes that torchrun started, and which of them this one is.

    Attributes:
        rank: The number of this one, from 0.
        world: How many there are.
        local_rank: The number of this one on its machine.
        local_world: How many there are on its machine.
        restarts: How often torchrun has started all of them again.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int

    @property
    def threads(self) -> int:
        """How many threads each gets; torchrun itself says one to all of them, so one counts as no wish."""
        return share_of_cores(self.local_world, no_wish=1)

    def shard_of(self, log: Path) -> Path:
        """Return the log of this process, where all make the ``log`` together."""
        return _shard(log, self.rank, self.world)


def processes() -> Processes | None:
    """Return the processes that torchrun started; None if this one was started alone."""
    if not distributed.is_torchelastic_launched():
        return None
    rank, world, local_rank, local_world = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    return Processes(rank, world, local_rank, local_world, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def certify_in_shards(
    log: str | Path,
    certify: Callable[[Path, Selection, bool], object],
    group: Processes,
    kind: LogKind[Rows_co],
    *,
    images: int,
    selection: Selection,
    resume: bool = False,
) -> Rows_co | None:
    """Certify a shard in each process of ``group`` into ``log.shard-I-of-N``; merge them when all are done.

    The shards are taken away when ``log`` is there. Where a process died they stay, and all go on with ``resume``, as
    they do where torchrun starts them again.

    Args:
        log: The log to write, in a folder that all processes see.
        certify: Certifies a selection into a log; its third argument is whether to go on with it.
        group: The processes.
        kind: What kind of log.
        images: The size of the data set.
        selection: Which images; not a shard.
        resume: Go on with what is there.

    Returns:
        All rows of the log in process 0, None in the others.

    Raises:
        InputError: If the selection is a shard, or has fewer images than there are processes.
        ResultsError: As the merging of shards, or if there are logs of another number of processes, or an unfinished
            ``log``.
    """
    going_on = resume or group.restarts > 0
    log, positions = check_log(log, resume=going_on), selection.positions(images)
    if selection.shard != (0, 1):
        raise InputError("shard: torchrun makes its own; expected 0/1, got {}/{}".format(*selection.shard))
    if len(positions) < group.world:
        raise InputError(f"processes: expected at most {len(positions)}, one an image, got {group.world}")
    _check_others(log, group.world)
    if os.path.exists(log) and log.stat().st_size:
        return _finished(log, certify, group, kind, selection, len(positions))
    certify(group.shard_of(log), replace(selection, shard=(group.rank, group.world)), going_on)
    _wait_for_all(group)
    if group.rank:
        return None
    shards = [_shard(log, rank, group.world) for rank in range(group.world)]
    rows = merge_logs(shards, log, kind)
    _take_away(shards)
    return rows


def _finished(
    log: Path,
    certify: Callable[[Path, Selection, bool], object],
    group: Processes,
    kind: LogKind[Rows_co],
    selection: Selection,
    images: int,
) -> Rows_co | None:
    """Make sure that a log which is there is that of this run, and whole."""
    rows = kind.parse(complete_lines(log)[0], log)
    if len(rows) != images:
        raise ResultsError(
            f"{log}: it holds {len(rows)} of {images} images, and torchrun goes on with logs of its processes alone; "
            "go on with it without torchrun, or choose another file"
        )
    if group.rank:
        return None
    certify(log, selection, True)
    _take_away([_shard(log, rank, group.world) for rank in range(group.world)])
    return rows


def _wait_for_all(group: Processes) -> None:
    """Tell the others that this process is done; in process 0, wait for them. If one dies, torchrun ends all."""
    store, _, _ = next(iter(rendezvous("env://")))
    store.add("rs-plugins shards done", 1)
    while group.rank == 0 and store.add("rs-plugins shards done", 0) < group.world:
        time.sleep(PAUSE)


def _shard(log: Path, rank: int, world: int) -> Path:
    return log.with_name(f"{log.name}.shard-{rank}-of-{world}")


def _check_others(log: Path, world: int) -> None:
    pattern = re.compile(re.escape(log.name) + r"\.shard-\d+-of-(\d+)")
    for path in sorted(log.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found and int(found[1]) != world:
            raise ResultsError(
                f"{path}: of a run with {found[1]} processes, this one has {world}; start as many, or take it away"
            )


def _take_away(shards: list[Path]) -> None:
    for shard in shards:
        shard.unlink(missing_ok=True)
        record_of(shard).unlink(missing_ok=True)
