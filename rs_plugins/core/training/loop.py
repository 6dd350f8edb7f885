"""The training loop; a method is an objective that it minimises."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count, check_images, check_seed
from rs_plugins.core.models import device_and_dtype, modes_restored
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.core.training.objective import Batch, Objective, StreamDraws
from rs_plugins.errors import InputError, ModelError


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
    seed: int | None = 0,
    progress: bool | str = False,
) -> list[float]:
    """Minimise ``objective`` over ``x``, ``y`` and return the mean loss of each epoch.

    The modes of the submodules are as before afterwards; shuffling and noise come from private streams.

    Args:
        model: Trained in place, in train mode.
        x: (n, *input), pixels in [0, 1], moved to the model's device batch by batch.
        y: Labels (n,) or class probabilities (n, classes).
        objective: Maps (model, batch, source of its noise) to a scalar loss.
        optimizer: Steps once per part of a batch.
        epochs: Passes over the data.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, each with a step of its own. Salman et al. (2019) and those after
            them take as many as they take noise draws per image, so that a step's noisy images are those of a batch.
            They leave out the remainder; here the parts are nearly equal and hold every image.
        scheduler: Stepped after each epoch.
        drop_last: Whether to leave out an incomplete last batch.
        seed: Seed of shuffling and noise; None takes one from the operating system.
        progress: Whether to show a progress bar, or its title.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If the loss becomes NaN or infinite.
    """
    check_count(epochs, "epochs", least=0)
    check_count(batch_size, "batch_size")
    check_count(parts, "parts")
    check_images(x)
    if len(x) != len(y) or not len(x):
        raise InputError(f"y: expected one label for each of at least one image, got {len(x)} images, {len(y)} labels")
    if drop_last and len(x) < batch_size:
        raise InputError(f"drop_last: nothing is left of {len(x)} images in batches of {batch_size}")
    device, _ = device_and_dtype(model)
    seed = fresh_seed() if seed is None else check_seed(seed)
    order, draws = stream(seed, "shuffle"), StreamDraws(stream(seed, "training noise", device=device))
    losses: list[float] = []
    with modes_restored(model):
        model.train()
        title = progress if isinstance(progress, str) else "train"
        for epoch in (bar := tqdm(range(epochs), desc=title, unit="epoch", disable=not progress)):
            batches = torch.randperm(len(x), generator=order).split(batch_size)
            total = seen = 0.0
            for rows in cut(batches[:-1] if drop_last and len(x) % batch_size else batches, parts):
                loss = objective(model, Batch(x[rows].to(device), y[rows].to(device), epoch), draws)
                if not bool(loss.isfinite()):
                    raise ModelError(f"loss: expected a finite value, got {loss.item()} in epoch {epoch}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, seen = total + loss.item() * len(rows), seen + len(rows)
            if scheduler is not None:
                scheduler.step()
            losses.append(total / seen)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def cut(batches: Sequence[Tensor], parts: int) -> Iterator[Tensor]:
    """Yield each batch (n,) in ``parts`` nearly equal parts, or n where that is less."""
    for batch in batches:
        yield from batch.tensor_split(min(parts, len(batch)))
