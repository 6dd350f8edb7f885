"""Training as a job: a network trained on a data set into a folder, which can be stopped and gone on with."""

import hashlib
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

import rs_plugins
from rs_plugins.core.checks import check_count, check_flag, check_positive, check_seed, check_sigma
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import as_data_set, as_training_set, check_classes
from rs_plugins.core.models import device_and_dtype, digest, modes_restored, probe, without_addresses
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training.augmentation import crop_and_flip
from rs_plugins.core.training.batches import Batches, Source, Step, data_set
from rs_plugins.core.training.best import BestNetworks, best_of
from rs_plugins.core.training.eps_schedule import SmoothEps
from rs_plugins.core.training.fabric import Precision, launched_fabric
from rs_plugins.core.training.folder import Epoch, Progress, TrainingFolder, checkpoints_in, load_checkpoint
from rs_plugins.core.training.loop import check_finite, minimise
from rs_plugins.core.training.objective import Choosy, Objective
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.stopping import Stop, stop_noted
from rs_plugins.core.training.trained import check_network
from rs_plugins.core.training.validation import figure_of, measured
from rs_plugins.errors import DivergedError, InputError, RSPluginsWarning

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# settings of a recipe that earlier versions did not have: named where they are not at their defaults
_LATER = (
    *("initial", "lr_warmup", "gradient_clip", "activation", "activation_options", "nesterov", "weight_decay_of"),
)


def train_data_set(
    model: nn.Module,
    data: DataSet | str,
    recipe: Recipe,
    folder: str | Path,
    *,
    network: Mapping[str, Any] | None = None,
    extra: DataSet | str | None = None,
    extra_weight: float = 1.0,
    validation: DataSet | str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: Precision = "32-true",
    channels_last: bool = False,
    workers: int = 0,
    keep: int = 2,
    keep_best: bool = False,
    resume: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
) -> list[Epoch]:
    """Train ``model`` on ``data`` by ``recipe``, with a checkpoint in ``folder`` after each epoch, and when stopped.

    Stopped by SIGINT or SIGTERM, it writes a checkpoint after the step under way; killed, it has that of the epoch
    before. Called again with ``resume``, it goes on, and on a CPU the weights become those of an uninterrupted run, bit
    for bit. Started by torchrun, all its processes train one network together, on the batches that a single one would
    have; only batch normalisation sees each process's share alone, and dropout draws otherwise.

    Args:
        model: The base classifier, with its initial weights; trained in place.
        data: The images with their labels, or a text as `open_training_set` takes it.
        recipe: How to train.
        folder: Where to keep the run (`rs_plugins.core.training.folder`).
        network: The arguments of `make_network` that made ``model``, so that `load_trained` can make it again.
        extra: More images, such as ones with pseudo-labels: as many batches of them an epoch as of ``data``.
        extra_weight: By what their loss is multiplied (w of Salman et al. 2019).
        validation: Images on which an accuracy is measured after each epoch: for methods under noise that under one
            draw of it, for others that which the method names (`rs_plugins.core.training.validation.figure_of`).
        seed: Seed of shuffling, noise and augmentation.
        device: ``"cpu"`` or ``"cuda"``; without torchrun also one of several, such as ``"cuda:1"``.
        precision: ``"32-true"``, or ``"bf16-mixed"``: faster where the hardware has bfloat16.
        channels_last: Whether the weights of convolutions lie in memory with the channels last, which may be faster.
        workers: Processes that read images ahead; 0: this one reads.
        keep: How many checkpoints are kept, the latest ones.
        keep_best: Whether to end with the weights of the epoch with the best accuracy on ``validation``, the latest
            of equals, not with those of the last; ``model.json`` says which (``chosen_epoch``). Take images held out of
            the training images (`split_off`): chosen on test images, a network looks better on them than it is.
        resume: Go on with what is in ``folder``, with the same arguments; ``recipe.epochs`` may have become more, but
            for a cosine. Without, a folder that holds checkpoints or a trained network is refused.
        after_epoch: Called with what is known of an epoch when its checkpoint is written, by the first process alone.
        progress: Whether to show a progress bar.

    Returns:
        What is known of each epoch.

    Warns:
        RSPluginsWarning: If the ramp of a certified training is longer than the training.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the model cannot be run on the images or has fewer outputs than there are classes.
        DivergedError: If the loss or a weight becomes NaN or infinite; no checkpoint holds such weights.
        ResultsError: If ``folder`` holds another run, or is being written by another process.
        KeyboardInterrupt: If a signal came; the checkpoint is written.
    """
    data, more = as_training_set(data), None if extra is None else as_training_set(extra)
    watched = None if validation is None else as_data_set(validation)
    extra_weight = check_positive(extra_weight, "extra_weight")
    channels_last = check_flag(channels_last, "channels_last")
    resume = check_flag(resume, "resume")
    workers, keep = check_count(workers, "workers", least=0), check_count(keep, "keep")
    seed = check_seed(seed)
    keep_best = check_flag(keep_best, "keep_best")
    if keep_best and watched is None:
        raise InputError("keep_best: expected validation images to choose an epoch by, got none")
    if keep_best and not recipe.epochs:
        raise InputError("keep_best: expected a recipe of at least 1 epoch to choose one, got 0")
    if recipe.sigma is not None:
        check_sigma(recipe.sigma)
    _check_images(model, *(one for one in (data, more, watched) if one is not None))
    settings = {
        **_account(recipe),
        **data.identity,
        "seed": seed,
        "extra": None if more is None else {**more.identity, "weight": extra_weight},
        "network": None if network is None else check_network(network, "network"),
        "architecture_digits": hashlib.sha256(without_addresses(repr(model)).encode()).hexdigest(),
        "precision": precision,
        "channels_last": channels_last,
        **_frozen(model),
        "keep_best": keep_best,
        **_family(recipe),
        **({"validation": watched.identity} if watched is not None and keep_best else {}),
    }
    start = digest(model)
    fabric = launched_fabric(device, precision)
    record = {**settings, "processes": fabric.world_size, "versions": _versions()}
    model.to(fabric.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = recipe.objective()
    _check_objective(objective, model, data)
    run = _Run(
        fabric=fabric,
        model=model,
        recipe=recipe,
        objective=objective,
        optimizer=recipe.optimizer(model),
        sources=[data_set(data), *([] if more is None else [data_set(more, weight=extra_weight)])],
        watched=watched,
        seed=seed,
        workers=workers,
        kept=TrainingFolder(folder, settings, start=start, resume=resume, keep=keep),
        best=BestNetworks(Path(folder)) if keep_best else None,
        record=record,
        start=start,
    )
    if fabric.is_global_zero:
        _warn_of_a_long_ramp(recipe)
    with run.kept if fabric.is_global_zero else nullcontext():
        fabric.barrier()  # the others read what the first one has found fit
        return run.go_on(after_epoch, progress=progress and fabric.is_global_zero)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run works on; its arguments are those of `train_data_set`, checked."""

    fabric: "Fabric"
    model: nn.Module
    recipe: Recipe
    objective: Objective
    optimizer: torch.optim.Optimizer
    sources: Sequence[Source]
    watched: DataSet | None
    seed: int
    workers: int
    kept: TrainingFolder
    best: BestNetworks | None
    record: Mapping[str, Any]
    start: str

    def go_on(self, after_epoch: Callable[[Epoch], None] | None, *, progress: bool) -> list[Epoch]:
        """Train from the latest checkpoint to the end, or until a signal comes."""
        state = load_checkpoint(self.kept.path, self.model, self.optimizer, self.objective) or Progress(self.start)
        if state.epoch > self.recipe.epochs:
            got = self.recipe.epochs
            raise InputError(f"epochs: expected at least {state.epoch}, which {self.kept.path} has, got {got}")
        if self.best is not None:
            self.best.check(state)
        sizes = [source.size for source in self.sources]
        batches = Batches(sizes, self.recipe.batch_size, self.recipe.parts, seed=self.seed)
        with (
            _advice(self.kept.path),
            closing(self._steps(batches, state)) as steps,
            stop_noted() as stop,
            _bar(state, self.recipe, batches, shown=progress) as bar,
        ):
            for step in _counted(steps, state):
                _show(bar, state)
                if step.last:
                    self._finish_epoch(state)
                stopped = _agreed(self.fabric, stop)
                if stopped and not step.last:  # `minimise` looks after the last one
                    check_finite(self.model)
                if step.last or stopped:
                    self._keep(state)
                if step.last and after_epoch is not None and self.fabric.is_global_zero:
                    after_epoch(state.history[-1])
                if stopped:
                    raise KeyboardInterrupt
        chosen = self._choose(state)
        if self.fabric.is_global_zero:
            self.kept.finish(self.model, {**self._record(state), **chosen})
        return state.history

    def _steps(self, batches: Batches, state: Progress) -> Generator[tuple[Step, float], None, None]:
        return minimise(
            *(self.fabric, self.model, self.objective, self.sources, batches, self.optimizer),
            epochs=range(state.epoch, self.recipe.epochs),
            skip=state.steps,
            augment=crop_and_flip if self.recipe.augment else None,
            workers=self.workers,
            gradient_clip=self.recipe.gradient_clip,
            before_step=self._set_learning_rate,
        )

    def _finish_epoch(self, state: Progress) -> None:
        accuracy = None
        if self.watched is not None and self.fabric.is_global_zero:
            accuracy = measured(self.objective, self.model, self.watched, self.seed)
        figure, rate = figure_of(self.objective), self.recipe.learning_rate(state.epoch)
        state.finish_epoch(Epoch(state.epoch + 1, state.loss.value, accuracy, rate, state.seconds, figure))

    def _set_learning_rate(self, step: Step) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(step.epoch, step.passed)

    def _keep(self, state: Progress) -> None:
        if not self.fabric.is_global_zero:
            return
        if self.best is not None and not state.steps:
            self.best.keep(state, self.model, self._record(state))
        self.kept.keep(state, self.model, self.optimizer, self._record(state), self.objective)
        if self.best is not None:
            self.best.forget(state)

    def _choose(self, state: Progress) -> dict[str, Any]:
        """Put the best weights into the model if that is asked for, and return of which epoch they are."""
        if self.best is None:
            return {}
        chosen = self.fabric.broadcast(best_of(state.history))  # only the first process has measured
        if chosen is None:
            return {}
        self.best.put_into(self.model, chosen)
        return {"chosen_epoch": chosen.epoch, f"chosen_{chosen.column}": chosen.accuracy}

    def _record(self, state: Progress) -> dict[str, Any]:
        return {**self.record, "start": state.start, "trained_epochs": state.epoch}


def _check_images(model: nn.Module, *sets: DataSet) -> None:
    device, dtype = device_and_dtype(model)
    for data in sets:
        check_classes(probe(model, data.read([0]).to(device, dtype)), data)


def _warn_of_a_long_ramp(recipe: Recipe) -> None:
    schedule = getattr(recipe.objective(), "schedule", None)
    if isinstance(schedule, SmoothEps) and 0 < recipe.epochs < schedule.end:
        reached = schedule(recipe.epochs)
        warnings.warn(
            f"ramp: it ends after {schedule.end:g} epochs, and there are {recipe.epochs}, in which the radius gets to "
            f"{reached:.3g} of {schedule.eps:.3g}; take fewer epochs for ramp_start and ramp, or train for more",
            RSPluginsWarning,
            stacklevel=3,
        )


def _check_objective(objective: Objective, model: nn.Module, data: DataSet) -> None:
    """Refuse, before anything is written, a model that ``objective`` cannot take."""
    if isinstance(objective, Choosy):
        device, dtype = device_and_dtype(model)
        with modes_restored(model):
            model.train()
            objective.check_model(model, data.read([0]).to(device, dtype))


def _account(recipe: Recipe) -> dict[str, Any]:
    """Return what of ``recipe`` decides the weights, as plain data.

    That is after any number of epochs, so their number is part of it only where it decides the steps from the first on.
    """
    plain = Recipe(method=recipe.method, sigma=recipe.sigma, options=recipe.options)
    later = (name for name in _LATER if getattr(recipe, name) == getattr(plain, name))
    without = {"options", *recipe.idle, *later, *(() if recipe.schedule == "cosine" else ("epochs",))}
    names = [field.name for field in fields(recipe) if field.name not in without]
    account = {name: getattr(recipe, name) for name in names}
    if "activation_options" in account:
        account["activation_options"] = dict(recipe.activation_options)
    return {**account, "objective": without_addresses(repr(recipe.objective()))}


def _family(recipe: Recipe) -> dict[str, Any]:
    """Return the name of the noise family, if it is another than in records of earlier versions."""
    name = getattr(getattr(recipe.objective(), "noise", None), "name", GaussianNoise.name)
    return {} if name == GaussianNoise.name else {"family": name}


def _frozen(model: nn.Module) -> dict[str, Any]:
    """Return which parameters are not trained, as far as there are any."""
    names = [name for name, value in model.named_parameters() if not value.requires_grad]
    digits = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"frozen": {"parameters": len(names), "digits": digits}} if names else {}


def _versions() -> str:
    return f"rs-plugins {rs_plugins.__version__}, torch {torch.__version__}, numpy {np.__version__}"


def _counted(steps: Iterator[tuple[Step, float]], state: Progress) -> Iterator[Step]:
    """Yield each step when it is in ``state``."""
    before = time.perf_counter()
    for step, loss in steps:
        state.seconds += time.perf_counter() - before
        state.steps += 1
        state.loss.add(loss, len(step.rows))
        yield step
        before = time.perf_counter()


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """Say of a training that diverges where it was still good."""
    try:
        yield
    except DivergedError as error:
        places = checkpoints_in(folder)
        good = f"the last good checkpoint is {places[-1]}" if places else "there is no checkpoint yet"
        raise DivergedError(f"{error}; {good}; a smaller learning rate may help") from error


def _agreed(fabric: "Fabric", stop: Stop) -> bool:
    """Whether any of the processes was asked to stop: all have to stop after the same step."""
    if fabric.world_size == 1:
        return stop.asked
    asked = fabric.all_reduce(torch.tensor(float(stop.asked), device=fabric.device), reduce_op="sum")
    return bool(asked)


def _bar(state: Progress, recipe: Recipe, batches: Batches, *, shown: bool) -> "tqdm[Any]":
    an_epoch = batches.steps_an_epoch() if shown else 0
    done = state.epoch * an_epoch + state.steps
    return tqdm(total=recipe.epochs * an_epoch, initial=done, desc=recipe.method, unit="step", disable=not shown)


def _show(bar: "tqdm[Any]", state: Progress) -> None:
    last = state.history[-1] if state.history else None
    accuracy = {} if last is None or last.accuracy is None else {last.column: f"{last.accuracy:.1%}"}
    bar.set_postfix(epoch=state.epoch + 1, loss=f"{state.loss.value:.4f}", **accuracy, refresh=False)
    bar.update()
