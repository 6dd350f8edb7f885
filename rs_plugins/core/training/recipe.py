"""A recipe: everything about a training run but the network's weights, the images and the seed."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from rs_plugins.core.checks import check_count, check_flag, check_nonnegative, check_positive
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError, RSPluginsWarning

Drop = Literal["documented", "reference"]
_COUNTED_IN_EPOCHS = {"warmup": 1, "deferred": 0}  # options of methods, each with its least value


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
        object.__setattr__(self, "sigma", getattr(self.objective(), "sigma", self.sigma))  # method and options, too
        self._check("augment", check_flag)
        self._check("epochs", check_count, least=0)
        for name in ("batch_size", "parts", "lr_step"):
            self._check(name, check_count)
        for name in ("lr", "lr_factor"):
            self._check(name, check_positive)
        for name in ("momentum", "weight_decay"):
            self._check(name, check_nonnegative)
        if self.lr_drop not in get_args(Drop):
            raise InputError(f"lr_drop: expected one of {', '.join(map(repr, get_args(Drop)))}, got {self.lr_drop!r}")

    def _check(self, name: str, check: Callable[..., Any], **how: Any) -> None:
        """Replace the setting ``name`` by what ``check`` makes of it."""
        object.__setattr__(self, name, check(getattr(self, name), name, **how))

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

        Warns:
            RSPluginsWarning: If there are so few that the deferred term of the objective would never act.

        Raises:
            InputError: If ``epochs`` is not an integer of at least 1, or the recipe has no epochs.
        """
        epochs = check_count(epochs, "epochs")
        if not self.epochs:
            raise InputError(f"epochs: nothing of a recipe of 0 epochs can be in proportion to {epochs}")
        if epochs == self.epochs:
            return self
        share = epochs / self.epochs
        objective, options = self.objective(), dict(self.options)
        for name, least in _COUNTED_IN_EPOCHS.items():
            value = getattr(objective, name, None)
            if value is not None:
                options[name] = max(least, round(value * share))
        if options.get("deferred") is not None and options["deferred"] >= epochs - 1:
            message = f"epochs: {epochs} are too few for {self.method!r}, whose deferred term would never act"
            warnings.warn(message, RSPluginsWarning, stacklevel=2)
        lr_step = max(1, round(self.lr_step * share))
        return replace(self, epochs=epochs, lr_step=lr_step, options=MappingProxyType(options))
