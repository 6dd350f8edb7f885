"""A recipe: everything about a training run but the network's weights, the images and the seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from rs_plugins.core.checks import check_count, check_flag, check_nonnegative, check_positive
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError

Drop = Literal["documented", "reference"]
_COUNTED_IN_EPOCHS = ("warmup", "deferred")  # options of methods


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    Attributes:
        method: Name of the method (`rs_plugins.core.training.methods`).
        options: Its options.
        sigma: Standard deviation of the noise, in pixels.
        architecture: Name of the network (`rs_plugins.core.architectures`).
        normalise: Of which data the network subtracts the mean and divides by the standard deviation first.
        augment: Whether images are cropped at random from 4 more pixels on each side, and flipped.
        epochs: Passes over the data.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, each with an optimiser step of its own.
        lr: Learning rate of SGD.
        lr_step: Epochs after which it drops, each time.
        lr_factor: By what it is multiplied then.
        lr_drop: ``"documented"``: it drops after ``lr_step``, 2·``lr_step``, … epochs. ``"reference"``: one epoch
            later, as in the code of Jeong et al. (2021), whose scheduler is told the number of the epoch that ends.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.

    Raises:
        InputError: If a setting has an impossible value.
    """

    method: str
    sigma: float
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    architecture: str = "lenet"
    normalise: str | None = None
    augment: bool = False
    epochs: int = 90
    batch_size: int = 256
    parts: int = 1
    lr: float = 0.01
    lr_step: int = 30
    lr_factor: float = 0.1
    lr_drop: Drop = "documented"
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        self.objective()  # checks method, options and sigma
        check_flag(self.augment, "augment")
        check_count(self.epochs, "epochs", least=0)
        for name in ("batch_size", "parts", "lr_step"):
            check_count(getattr(self, name), name)
        for name in ("lr", "lr_factor"):
            check_positive(getattr(self, name), name)
        for name in ("momentum", "weight_decay"):
            check_nonnegative(getattr(self, name), name)
        if self.lr_drop not in get_args(Drop):
            raise InputError(f"lr_drop: expected one of {', '.join(map(repr, get_args(Drop)))}, got {self.lr_drop!r}")

    def objective(self) -> Objective:
        """Return the objective."""
        return make_objective(self.method, self.sigma, **self.options)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimiser of ``model``."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate in ``epoch``, from 0."""
        drops = max(0, epoch - (self.lr_drop == "reference")) // self.lr_step
        return self.lr * self.lr_factor**drops

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Return `learning_rate` as a scheduler of what `optimizer` returned, to be stepped after each epoch."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.learning_rate(epoch) / self.lr)

    def shortened(self, epochs: int) -> "Recipe":
        """Return the recipe with another number of epochs, and all that is counted in epochs in the same proportion.

        Raises:
            InputError: If ``epochs`` is not an integer of at least 1.
        """
        share = check_count(epochs, "epochs") / self.epochs
        options = {
            name: max(1, round(value * share)) if name in _COUNTED_IN_EPOCHS else value
            for name, value in self.options.items()
        }
        lr_step = max(1, round(self.lr_step * share))
        return replace(self, epochs=epochs, lr_step=lr_step, options=MappingProxyType(options))
