"""Certification as a job: a data set certified into a log, which can be killed at any moment and gone on with."""

from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from rs_plugins.core.black_box import Predict
from rs_plugins.core.certification import Certificate
from rs_plugins.core.checks import check_seed, check_sigma
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import as_data_set, check_classes
from rs_plugins.core.engines.engine import MEMORY, Engine, SingleProcess, Task
from rs_plugins.core.models import device_and_dtype, probe
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.protocol import Plan
from rs_plugins.core.results.files import read_results
from rs_plugins.core.results.table import Results
from rs_plugins.core.results.writer import ResultsWriter, check_log, positions_left
from rs_plugins.core.selection import Selection


def certify_data_set(
    model: nn.Module | Predict,
    data: DataSet | str,
    sigma: float,
    log: str | Path,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    resume: bool = False,
    progress: bool = False,
    memory: int = MEMORY,
    engine: Engine | None = None,
    **options: Any,
) -> Results:
    """Certify images of ``data`` into the file ``log``, each finished image on disk before the next result is taken.

    Several images are under way at a time; of those that are not finished nothing is kept. Killed at any moment and
    called again with ``resume``, it goes on, and the log becomes what it would have been, but for the times.
    `rs_plugins.core.results.merging.merge_results` makes the same log of the logs of all shards.

    Args:
        model: The base classifier, as in `certify`.
        data: The images with their labels, as `open_data_set` returns them, or the text that it takes, ``"mnist:DIR"``.
        sigma: Standard deviation of the noise, in pixels.
        log: The file to write; beside it ``log.json`` with what the certificates are made with.
        plan: How many votes to spend; `FixedBudget` with the paper's numbers by default.
        seed: Seed of the noise streams.
        selection: Which images; all by default. A log that exists can be extended by a later ``stop``.
        resume: Go on with ``log`` if it exists. Without, a log that exists is refused.
        progress: Whether to show a progress bar.
        memory: At most this many bytes of images are held at a time, but at least one image.
        engine: What runs the images, this process by default; `rs_plugins.core.engines.ray_engine.RayEngine` has
            several. It changes no certificate.
        options: Further options of `certify`, such as ``chunk`` and ``device``.

    Returns:
        All rows of the log.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model cannot be run on the images, or gives fewer classes than there are labels.
        ResultsError: If ``log`` exists and was begun with something else, or for other images.
    """
    log, plan = check_log(log, resume=resume), FixedBudget() if plan is None else plan
    check_sigma(sigma)
    data = as_data_set(data)
    selection = selection or Selection()
    positions = selection.positions(len(data))
    task = Task(model, sigma, plan, check_seed(seed), options)
    if isinstance(model, nn.Module):
        home, dtype = device_and_dtype(model, options.get("device"))
        check_classes(probe(model, data.read(positions[:1]).to(home, dtype)), data)
    with ResultsWriter(log) as writer:
        left = positions_left(writer, positions)
        with (engine or SingleProcess()).run(task, data, left or positions[:1], memory) as run:
            if not isinstance(model, nn.Module):
                check_classes(run.classes, data)
            writer.begin(run.made_with, data.identity, selection)
            with _Progress(read_results(log), len(positions), plan, shown=progress) as bar:
                for certificate in run.certificates if left else ():
                    label = int(data.labels[certificate.index])
                    writer.write(certificate, label)
                    bar.add(certificate, label)
    return read_results(log)


class _Progress:
    """A bar over all images of a run, those that the log ``held`` before included."""

    def __init__(self, held: Results, images: int, plan: Plan, *, shown: bool) -> None:
        self._most, self._done = plan.most, len(held)
        self._votes = 0 if held.samples is None else int(held.samples.sum())
        self._certified = int(held.correct.sum())
        self._bar = tqdm(total=images, initial=len(held), desc="certify", unit="image", disable=not shown)

    def add(self, certificate: Certificate, label: int) -> None:
        """Count one more image."""
        self._done += 1
        self._votes += certificate.n0 + certificate.n
        self._certified += certificate.prediction == label
        saved = 1 - self._votes / (self._most * self._done)
        text = f"certified {self._certified / self._done:.1%}, samples saved {saved:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
