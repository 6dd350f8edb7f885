"""The training loop; a method is an objective that it minimises."""

from collections.abc import Callable, Generator, Sequence
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
from rs_plugins.core.models import modes_restored
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.training.batches import Batches, Reader, Share, Source, Step, share_of, tensors
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.core.training.fabric import fabric_of
from rs_plugins.core.training.objective import Batch, Draws, Objective
from rs_plugins.errors import ModelError

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
        seed: Seed of shuffling and noise; None takes one from the operating system.
        progress: Whether to show a progress bar, or its title.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the loss becomes NaN or infinite.
    """
    check_count(epochs, "epochs", least=0)
    check_count(first_epoch, "first_epoch", least=0)
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

    Raises:
        ModelError: If the loss becomes NaN or infinite; the optimiser has not made that step.
    """
    loss_of, optimizer = fabric.setup(_Loss(model, objective, augment), optimizer)
    shares = (
        share_of(step, fabric.global_rank, fabric.world_size)
        for epoch in epochs
        for step in islice(batches.steps(epoch), skip if epoch == epochs.start else 0, None)
    )
    loader = DataLoader(
        Reader(sources),
        sampler=shares,
        batch_size=None,
        num_workers=workers,
        generator=stream(batches.seed, "data loader"),
    )
    with modes_restored(model):
        model.train()
        for share, x, y in loader:
            step = share.step
            draws = BlockDraws(batches.seed, f"training {step.name}", first=share.first, device=fabric.device)
            layers = stream(batches.seed, f"layers {step.name}", fabric.global_rank).initial_seed()
            with torch_randomness(layers):  # dropout and its like know no other generator
                loss = loss_of(x.to(fabric.device), y.to(fabric.device), step.epoch, draws)
            weight = sources[step.source].weight
            mean = weight * _mean_over_processes(fabric, loss, share)
            if not abs(mean) < float("inf"):
                raise ModelError(f"loss: expected a finite value, got {mean} in epoch {step.epoch}")
            optimizer.zero_grad()
            fabric.backward(loss * (weight * share.weight))
            optimizer.step()
            yield step, mean


class _Loss(nn.Module):
    """The objective as a module, whose ``forward`` several processes compute together."""

    def __init__(self, model: nn.Module, objective: Objective, augment: Augmentation | None) -> None:
        super().__init__()
        self.model = model
        self._objective, self._augment = objective, augment

    def forward(self, x: Tensor, y: Tensor, epoch: int, draws: Draws) -> Tensor:
        if self._augment is not None:
            x = self._augment(x, draws)
        return self._objective(self.model, Batch(x, y, epoch), draws)


def _mean_over_processes(fabric: "Fabric", loss: Tensor, share: Share) -> float:
    if fabric.world_size == 1:
        return loss.item()
    mean = fabric.all_reduce(loss.detach() * share.weight, reduce_op="mean")
    return mean.item()  # type: ignore[union-attr]  # of a tensor it returns a tensor
