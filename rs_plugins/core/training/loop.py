"""The training loop; a method is an objective that it minimises."""

import math
import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count, check_seed
from rs_plugins.core.global_randomness import torch_randomness
from rs_plugins.core.models import device_and_dtype, modes_restored
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.training.batches import Batches, Reader, Share, Source, Step, share_of, tensors
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.core.training.fabric import fabric_of
from rs_plugins.core.training.objective import Batch, Draws, Objective
from rs_plugins.errors import DivergedError, InputError, ModelError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Augmentation = Callable[[Tensor, Draws], Tensor]  # (n, *input) in [0, 1] to the same


class Scheduler(Protocol):
    """A learning-rate scheduler."""

    def step(self) -> None:
        """Advance by one epoch."""


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 128,
    parts: int = 1,
    scheduler: Scheduler | None = None,
    drop_last: bool = False,
    extra: Source | None = None,
    augment: Augmentation | None = None,
    first_epoch: int = 0,
    after_epoch: Callable[[int, float], None] | None = None,
    seed: int | None = 0,
    progress: bool | str = False,
) -> list[float]:
    """Minimise ``objective`` over ``x``, ``y`` and return the mean loss of each epoch.

    The modes of the submodules are as before afterwards; shuffling and noise come from private streams.

    Args:
        model: Trained in place, in train mode.
        x: (n, *input), pixels in [0, 1], moved to the model's device batch by batch.
        y: Labels (n,) or class probabilities (n, classes).
        objective: Maps (model, batch, source of its noise) to a scalar loss, a mean over images.
        optimizer: Steps once per part of a batch.
        epochs: Passes over the data.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, each with a step of its own. Salman et al. (2019) and those after
            them take as many as they take noise draws per image, so that a step's noisy images are those of a batch.
            They leave out the remainder; here the parts are nearly equal and hold every image.
        scheduler: Stepped after each epoch.
        drop_last: Whether to leave out an incomplete last batch.
        extra: More images, such as ones with pseudo-labels: as many batches of them an epoch as of ``x``.
        augment: Changes images at random before the objective sees them.
        first_epoch: The number of the first epoch, by which warm-up goes.
        after_epoch: Called with the number of a finished epoch and its mean loss, after the scheduler's step.
        seed: Seed of shuffling and noise; None takes one from the operating system.
        progress: Whether to show a progress bar, or its title.

    Raises:
        InputError: If an argument has an impossible value.
        DivergedError: If the loss becomes NaN or infinite, or a weight has after an epoch.
    """
    epochs = check_count(epochs, "epochs", least=0)
    first_epoch = check_count(first_epoch, "first_epoch", least=0)
    sources = [tensors(x, y), *([] if extra is None else [extra])]
    seed = fresh_seed() if seed is None else check_seed(seed)
    batches = Batches([source.size for source in sources], batch_size, parts, drop_last, seed)
    steps = minimise(
        *(fabric_of(model), model, objective, sources, batches, optimizer),
        epochs=range(first_epoch, first_epoch + epochs),
        augment=augment,
    )
    losses: list[float] = []
    mean = Mean()
    title = progress if isinstance(progress, str) else "train"
    with closing(steps), tqdm(total=epochs, desc=title, unit="epoch", disable=not progress) as bar:
        for step, loss in steps:
            mean.add(loss, len(step.rows))
            if step.last:
                losses.append(mean.value)
                mean = Mean()
                if scheduler is not None:
                    scheduler.step()
                if after_epoch is not None:
                    after_epoch(step.epoch, losses[-1])
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
    return losses


@dataclass
class Mean:
    """A mean over images that are added part by part.

    Attributes:
        total: The sum.
        count: Number of images.
    """

    total: float = 0.0
    count: int = 0

    def add(self, mean: float, count: int) -> None:
        """Add ``count`` images with the given mean."""
        self.total += mean * count
        self.count += count

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


def minimise(
    fabric: "Fabric",
    model: nn.Module,
    objective: Objective,
    sources: Sequence[Source],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: range,
    skip: int = 0,
    augment: Augmentation | None = None,
    workers: int = 0,
    gradient_clip: float | None = None,
    before_step: Callable[[Step], None] | None = None,
) -> Generator[tuple[Step, float], None, None]:
    """Take one step of the optimiser after the other and yield each with its mean loss.

    A step depends on the weights, the optimiser's state, the seed and its place in the run alone. So a run can stop
    after any step and go on later, and with several processes it is the same run, but for the rounding of sums and for
    layers that look at the batch or draw by themselves (batch normalisation, dropout). Whoever stops early closes the
    iterator, and the modes of the submodules are as before.

    Args:
        fabric: On what to compute, with how many processes.
        model: Trained in place, in train mode.
        objective: A mean over images.
        sources: Where the images are.
        batches: How they are put into steps.
        optimizer: Over the parameters of ``model``.
        epochs: Numbers of the epochs.
        skip: How many steps of the first one are done already.
        augment: Changes images at random before the objective sees them.
        workers: Processes that read images ahead; 0: this one reads.
        gradient_clip: To what l2 norm the gradient by all parameters, of all processes, is scaled down if it is larger.
        before_step: Called before each step of the optimiser, to set its learning rate, say.

    Raises:
        InputError: If no parameter of the model is to be trained.
        DivergedError: If the loss becomes NaN or infinite, and the optimiser has not made that step; or if a weight is
            so after the last step of an epoch.
        ModelError: If several processes cannot train the model, as a parameter of it gets no gradient.
    """
    _, dtype = device_and_dtype(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: expected a parameter that is to be trained, got none with requires_grad")
    loss_of, optimizer = fabric.setup(_Loss(model, objective, augment), optimizer)

    @torch.enable_grad()
    def take(share: Share, x: Tensor, y: Tensor) -> float:
        """Make a step and return the mean loss of its images, of all processes."""
        step, weight = share.step, sources[share.step.source].weight
        draws = BlockDraws(batches.seed, f"training {step.name}", first=share.first, device=fabric.device)
        layers = stream(batches.seed, f"layers {step.name}", fabric.global_rank).initial_seed()
        with torch_randomness(layers):  # dropout and its like know no other generator
            images, labels = _on(x, fabric.device, dtype), _on(y, fabric.device, dtype)
            loss = weight * loss_of(images, labels, step.epoch, step.elapsed, draws)
        optimizer.zero_grad()
        fabric.backward(loss * share.weight)
        mean = _mean_over_processes(fabric, loss, share)
        if not math.isfinite(mean):
            raise DivergedError(f"loss: expected a finite value, got {mean} in epoch {step.epoch}")
        if gradient_clip is not None:  # infinite ones become NaN, which `check_finite` finds
            fabric.clip_gradients(loss_of, optimizer, max_norm=gradient_clip, error_if_nonfinite=False)
        if before_step is not None:
            before_step(step)
        optimizer.step()
        return mean

    shares = (
        share_of(step, fabric.global_rank, fabric.world_size)
        for epoch in epochs
        for step in islice(batches.steps(epoch), skip if epoch == epochs.start else 0, None)
    )
    with modes_restored(model):
        model.train()
        for number, (share, x, y) in enumerate(_loader(sources, shares, batches.seed, workers)):
            mean = take(share, x, y)
            if number == 0 and fabric.world_size > 1:
                _check_gradients(model)
            if share.step.last:
                check_finite(model)
            yield share.step, mean


def check_finite(model: nn.Module) -> None:
    """Look for NaN and infinity in weights and buffers.

    Raises:
        DivergedError: If there are any: they come of gradients that are no numbers, also where the loss is one.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DivergedError(f"model: expected finite weights, got NaN or infinity in {name}")


def _check_gradients(model: nn.Module) -> None:
    """Look for parameters that the first backward pass has not reached: processes would wait for them in vain.

    Raises:
        ModelError: If there are any.
    """
    names = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if names:
        raise ModelError(
            f"model: expected all parameters to have a part in the loss, {names[0]} has none; for several processes "
            "freeze such parameters (requires_grad_(False))"
        )


def _on(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return images, labels or class probabilities on the model's device, and in its type if they are no integers."""
    return values.to(device, dtype) if values.is_floating_point() else values.to(device)


def _loader(
    sources: Sequence[Source], shares: Iterable[Share], seed: int, workers: int
) -> "DataLoader[tuple[Share, Tensor, Tensor]]":
    return DataLoader(
        Reader(sources),
        sampler=shares,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=stream(seed, "data loader"),
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Let a reader live until the process that asked for it ends: signals often go to all of a group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Loss(nn.Module):
    """The objective as a module, whose ``forward`` several processes compute together."""

    def __init__(self, model: nn.Module, objective: Objective, augment: Augmentation | None) -> None:
        super().__init__()
        self.model = model
        self._objective, self._augment = objective, augment

    def forward(self, x: Tensor, y: Tensor, epoch: int, elapsed: float, draws: Draws) -> Tensor:
        if self._augment is not None:
            x = self._augment(x, draws)
        loss: object = self._objective(self.model, Batch(x, y, epoch, elapsed), draws)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.80}"
            raise InputError(f"objective: the objective must return a scalar tensor, got {got}")
        return loss


def _mean_over_processes(fabric: "Fabric", loss: Tensor, share: Share) -> float:
    if fabric.world_size == 1:
        return loss.item()
    mean = fabric.all_reduce(loss.detach() * share.weight, reduce_op="mean")
    return mean.item()  # type: ignore[union-attr]  # of a tensor it returns a tensor
