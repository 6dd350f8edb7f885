"""Bounds on a data set as a job: certified into a log, which can be killed at any moment and gone on with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import as_data_set, check_classes
from rs_plugins.core.relaxations.bound_files import BoundsWriter, read_bounds
from rs_plugins.core.relaxations.bound_results import BoundCertificate, BoundResults
from rs_plugins.core.relaxations.certifying import BoundCertifier
from rs_plugins.core.results.writer import check_log, positions_left
from rs_plugins.core.selection import Selection


def certify_bounds_data_set(
    model: nn.Module,
    data: DataSet | str,
    eps: float,
    log: str | Path,
    *,
    selection: Selection | None = None,
    batch_size: int = 32,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> BoundResults:
    """Find out for each image of ``data`` whether a ball around it is classified rightly, as `certify_bounds` does.

    A finished batch is on disk before the next begins. A run that was killed goes on with ``resume``; it takes the
    batch in which it was killed again as a whole, so that the log becomes what it would have been, but for the times.

    Args:
        model: The classifier, normalisation inside.
        data: The images with their labels, as `open_data_set` returns them, or the text that it takes.
        eps: Radius of the ball, in pixels.
        log: The file to write, in a folder that exists; beside it goes its record, ``log.json``.
        selection: Which images; all by default. A log that exists can be extended by a later ``stop``.
        batch_size: Images at once. Another one changes margins in digits that the log does not have, as a rule.
        resume: Go on with ``log`` if it exists. Without, a log that exists is refused.
        progress: Whether to show a progress bar.
        options: Further options of `certify_bounds`, such as ``norm`` and ``cascade``.

    Returns:
        All rows of the log.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model cannot be run on the images, gives fewer classes than there are labels, or has a module
            that bounds do not know.
        ResultsError: If ``log`` exists and was begun with something else, or for other images.
    """
    log, data, size = check_log(log, resume=resume), as_data_set(data), check_count(batch_size, "batch_size")
    selection = selection or Selection()
    positions = selection.positions(len(data))
    certifier = BoundCertifier(model, data.shape, eps, **options)
    check_classes(certifier.classes, data)
    with BoundsWriter(log) as writer:
        done = len(positions) - len(positions_left(writer, positions))
        first = done if done == len(positions) else done - done % size
        writer.begin(certifier.made_with, data.identity, selection)
        with tqdm(total=len(positions), initial=done, desc="certify", unit="image", disable=not progress) as bar:
            for start in range(first, len(positions), size):
                for certificate in _batch(certifier, data, positions[start : start + size]):
                    if certificate.index not in writer.done:
                        writer.write(certificate)
                        bar.update()
    return read_bounds(log)


def _batch(certifier: BoundCertifier, data: DataSet, positions: Sequence[int]) -> list[BoundCertificate]:
    return certifier.batch(data.read(positions), torch.from_numpy(data.labels[positions]), positions)
