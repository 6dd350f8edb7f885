"""Training within a budget of images or of processor seconds, with a learning rate that falls to 0 at its end."""

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from machine import Clock
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.training.augmentation import crop_and_flip
from rs_plugins.core.training.batches import Batches, tensors
from rs_plugins.core.training.fabric import launched_fabric
from rs_plugins.core.training.loop import minimise
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.recipe import Decayed, Recipe

WARM_UP = 0.1  # of the budget
BATCH_SIZE = 128
_MOST_EPOCHS = 10_000


@dataclass(frozen=True)
class Budget:
    """How much training may take.

    Attributes:
        amount: How much of it.
        unit: ``"images"`` or ``"seconds"``.
    """

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:g}-{self.unit}"


@dataclass(frozen=True)
class Spent:
    """What a training took.

    Attributes:
        images: Number of images seen.
        seconds: Time of its steps, by the clock of the benchmark.
        loss: Mean loss of the last hundred steps.
    """

    images: int
    seconds: float
    loss: float


def train_within(
    budget: Budget,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    *,
    adam: bool,
    lr: float,
    weight_decay_of: Decayed = "all",
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    title: str = "train",
) -> Spent:
    """Train ``model`` in place until ``budget`` is spent, in bfloat16 mixed precision.

    The learning rate rises to ``lr`` in a tenth of the budget and falls with a cosine to 0 at its end. All parameters
    decay, or the weights of layers alone, as ``weight_decay_of`` of a `Recipe` says.
    """
    model.to(device, memory_format=torch.channels_last)
    optimizer = optimizer_of(model, adam=adam, lr=lr, weight_decay_of=weight_decay_of)
    fabric = launched_fabric(device, "bf16-mixed")
    steps = minimise(
        *(fabric, model, objective, [tensors(x, y)], Batches([len(x)], BATCH_SIZE, seed=seed), optimizer),
        epochs=range(_MOST_EPOCHS),
        augment=crop_and_flip,
    )
    clock, images, losses = Clock(device, threads), 0, list[float]()
    _set(optimizer, 0.0)
    start = clock()
    with closing(steps), tqdm(total=100, desc=title, unit="%") as bar:
        for step, loss in steps:
            images += len(step.rows)
            losses.append(loss)
            seconds = clock() - start
            share = (images if budget.unit == "images" else seconds) / budget.amount
            bar.update(min(100, int(100 * share)) - bar.n)
            if share >= 1:
                break
            _set(optimizer, lr * learning_rate(share))
    last = losses[-100:]
    return Spent(images, seconds, sum(last) / len(last))


def learning_rate(share: float) -> float:
    """Return the learning rate when ``share`` of the budget is spent, as a share of the highest."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def optimizer_of(
    model: nn.Module, *, adam: bool = False, lr: float, weight_decay_of: Decayed = "all"
) -> torch.optim.Optimizer:
    """Return AdamW or SGD with Nesterov's momentum for ``model``, with a weight decay of 5e-4."""
    how: dict[str, Any] = {"algorithm": "adamw"} if adam else {"momentum": 0.9, "nesterov": True}
    recipe = Recipe(method="gaussian", sigma=1.0, lr=lr, weight_decay=5e-4, weight_decay_of=weight_decay_of, **how)
    return recipe.optimizer(model)


def _set(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
