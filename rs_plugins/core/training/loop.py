"""The training loop; a method is an objective that it minimises."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count, check_images, check_seed
from rs_plugins.core.models import device_and_dtype, modes_restored
from rs_plugins.core.streams import fresh_seed, stream
from rs_plugins.errors import InputError, ModelError

Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


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
        objective: Maps (model, images, labels, generator for its noise) to a scalar loss.
        optimizer: Steps once per batch.
        epochs: Passes over the data.
        batch_size: Images per step.
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
    check_images(x)
    if len(x) != len(y) or not len(x):
        raise InputError(f"y: expected one label for each of at least one image, got {len(x)} images, {len(y)} labels")
    if drop_last and len(x) < batch_size:
        raise InputError(f"drop_last: nothing is left of {len(x)} images in batches of {batch_size}")
    device, _ = device_and_dtype(model)
    seed = fresh_seed() if seed is None else check_seed(seed)
    order, noise = stream(seed, "shuffle"), stream(seed, "training noise", device=device)
    losses: list[float] = []
    with modes_restored(model):
        model.train()
        title = progress if isinstance(progress, str) else "train"
        for _ in (bar := tqdm(range(epochs), desc=title, unit="epoch", disable=not progress)):
            batches = torch.randperm(len(x), generator=order).split(batch_size)
            total = seen = 0.0
            for batch in batches[:-1] if drop_last and len(x) % batch_size else batches:
                loss = objective(model, x[batch].to(device), y[batch].to(device), noise)
                if not bool(loss.isfinite()):
                    raise ModelError(f"loss: expected a finite value, got {loss.item()} in epoch {len(losses)}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, seen = total + loss.item() * len(batch), seen + len(batch)
            if scheduler is not None:
                scheduler.step()
            losses.append(total / seen)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses
