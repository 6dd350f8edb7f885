"""A recipe: everything about a training run but the network's weights, the images and the seed."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from rs_plugins.core.activations import make_activation
from rs_plugins.core.checks import check_count, check_flag, check_nonnegative, check_positive
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.weight_noise import weighted_layers
from rs_plugins.errors import InputError, RSPluginsWarning

Algorithm = Literal["sgd", "adam", "adamw"]
Schedule = Literal["step", "milestones", "cosine"]
Drop = Literal["documented", "reference"]
Initial = Literal["default", "ibp", "zero-residual"]
Decayed = Literal["all", "weights"]
_CHOICES = {
    "algorithm": Algorithm,
    "schedule": Schedule,
    "lr_drop": Drop,
    "initial": Initial,
    "weight_decay_of": Decayed,
}
# options of methods, each with its least value; those that are no integers need not become any
_COUNTED_IN_EPOCHS = {"warmup": 1, "deferred": 0, "ramp_start": 0, "ramp": 0, "decay": 0}
# settings that not every algorithm or schedule has a use for, and what they are for
_ONLY_FOR = {
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
    "lr_step": ("step",),
    "lr_milestones": ("milestones",),
    "lr_factor": ("step", "milestones"),
    "lr_drop": ("step",),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    Attributes:
        method: Name of the method (`rs_plugins.core.training.methods`).
        options: Its options.
        sigma: Standard deviation of the noise on the images, in pixels; None for a method without.
        architecture: Name of the network (`rs_plugins.core.architectures`).
        activation: What is put in the place of its ReLU, a name that `make_activation` takes; ``"relu"`` leaves it.
        activation_options: The options of that activation.
        initial: The initial weights: ``"default"``, those of the layers; ``"ibp"``, those of Shi et al. (2021) for
            training by interval bounds (`rs_plugins.core.training.ibp_initial`); ``"zero-residual"``, the layers' but
            for scales of 0 at the ends of residual blocks (`rs_plugins.core.training.residual_initial`).
        normalise: Of which data the network subtracts the mean and divides by the standard deviation first.
        augment: Whether images are cropped at random from 4 more pixels on each side, and flipped.
        epochs: Passes over the data.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, each with an optimiser step of its own.
        algorithm: The optimiser: ``"sgd"``, ``"adam"`` or ``"adamw"``, the latter two with torch's own betas (0.9 and
            0.999); ``"adamw"`` alone decays weights apart from the gradient.
        lr: Learning rate.
        schedule: ``"step"``: it drops every ``lr_step`` epochs. ``"milestones"``: it drops after each of
            ``lr_milestones``. ``"cosine"``: in epoch e of E, from 0, it is lr · (1 + cos(π·e/E)) / 2, so that another
            number of epochs is another recipe from the start.
        lr_step: Epochs after which it drops, each time.
        lr_milestones: Numbers of epochs after which it drops, in ascending order.
        lr_factor: By what it is multiplied then.
        lr_drop: ``"documented"``: it drops after ``lr_step``, 2·``lr_step``, … epochs. ``"reference"``: one epoch
            later, as in the code of Jeong et al. (2021), whose scheduler is told the number of the epoch that ends.
        lr_warmup: In so many epochs at the beginning it rises in a straight line, from step to step: of T steps the
            t-th, from 1, has t/T of what it would have otherwise.
        momentum: Momentum of SGD.
        nesterov: Whether it is Nesterov's.
        weight_decay: Weight decay.
        weight_decay_of: What decays: ``"all"`` parameters, or the ``"weights"`` of linear and convolutional layers
            alone, neither biases nor normalisation nor activations.
        gradient_clip: If the l2 norm of the gradient by all parameters is above this, it is scaled down to it; None
            for no bound.

    Raises:
        InputError: If a setting has an impossible value, or one that the algorithm or the schedule has no use for is
            not at its default.
    """

    method: str
    sigma: float | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    architecture: str = "lenet"
    activation: str = "relu"
    activation_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    initial: Initial = "default"
    normalise: str | None = None
    augment: bool = False
    epochs: int = 90
    batch_size: int = 256
    parts: int = 1
    algorithm: Algorithm = "sgd"
    lr: float = 0.01
    schedule: Schedule = "step"
    lr_step: int = 30
    lr_milestones: tuple[int, ...] = ()
    lr_factor: float = 0.1
    lr_drop: Drop = "documented"
    lr_warmup: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    weight_decay_of: Decayed = "all"
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", getattr(self.objective(), "sigma", self.sigma))  # method and options, too
        make_activation(self.activation, **self.activation_options)  # refuses what is unknown
        for name in ("augment", "nesterov"):
            self._check(name, check_flag)
        for name in ("epochs", "lr_warmup"):
            self._check(name, check_count, least=0)
        self._check("lr_milestones", _check_milestones)
        if self.gradient_clip is not None:
            self._check("gradient_clip", check_positive)
        for name in ("batch_size", "parts", "lr_step"):
            self._check(name, check_count)
        for name in ("lr", "lr_factor"):
            self._check(name, check_positive)
        for name in ("momentum", "weight_decay"):
            self._check(name, check_nonnegative)
        for name, choice in _CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                expected = ", ".join(map(repr, get_args(choice)))
                raise InputError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        for name, value in self._defaults(self.idle).items():
            if getattr(self, name) != value:
                of_optimiser = name in ("momentum", "nesterov")
                kind, has = ("optimiser", self.algorithm) if of_optimiser else ("schedule", self.schedule)
                needs = f"{kind} {' or '.join(_ONLY_FOR[name])}"
                raise InputError(f"{name}: only for the {needs}, got {getattr(self, name)} with {has}")
        if self.schedule == "milestones" and not self.lr_milestones:
            raise InputError("lr_milestones: expected epochs beside the schedule milestones, got none")
        if self.nesterov and not self.momentum:
            raise InputError("nesterov: expected momentum above 0 beside it, got 0")

    def _check(self, name: str, check: Callable[..., Any], **how: Any) -> None:
        """Replace the setting ``name`` by what ``check`` makes of it."""
        object.__setattr__(self, name, check(getattr(self, name), name, **how))

    def objective(self) -> Objective:
        """Return the objective."""
        return make_objective(self.method, self.sigma, **self.options)

    @property
    def idle(self) -> tuple[str, ...]:
        """The settings that the algorithm or the schedule has no use for; they are at their defaults."""
        return _idle(self.algorithm, self.schedule)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of those parameters of ``model`` that are to be trained (``requires_grad``).

        Raises:
            InputError: If there are none.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("model: expected a parameter that is to be trained, got none with requires_grad")
        groups: Any = trained
        if self.weight_decay_of == "weights":
            weights = {id(layer.weight) for layer in weighted_layers(model)}
            decayed, others = ([one for one in trained if (id(one) in weights) == decays] for decays in (True, False))
            groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        how: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.algorithm == "sgd":
            return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, **how)
        return (torch.optim.Adam if self.algorithm == "adam" else torch.optim.AdamW)(groups, **how)

    def learning_rate(self, epoch: int, passed: float | None = None) -> float:
        """Return the learning rate in ``epoch``, from 0.

        Args:
            epoch: The epoch.
            passed: How many epochs have passed at the end of the step, by which ``lr_warmup`` goes; None for the end of
                the epoch.
        """
        rate = self.lr * self._share(epoch)
        if not self.lr_warmup:
            return rate
        return rate * min(1.0, (epoch + 1 if passed is None else passed) / self.lr_warmup)

    def _share(self, epoch: int) -> float:
        """Return which share of ``lr`` the schedule leaves in ``epoch``."""
        if self.schedule == "cosine":
            share = min(1.0, epoch / max(1, self.epochs))
            return (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "milestones":
            drops = sum(epoch >= milestone for milestone in self.lr_milestones)
        else:
            drops = max(0, epoch - (self.lr_drop == "reference")) // self.lr_step
        return float(self.lr_factor**drops)

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
            if isinstance(value, float):
                options[name] = value * share
            elif value is not None:
                options[name] = max(least, round(value * share))
        if options.get("deferred") is not None and options["deferred"] >= epochs - 1:
            message = f"epochs: {epochs} are too few for {self.method!r}, whose deferred term would never act"
            warnings.warn(message, RSPluginsWarning, stacklevel=2)
        return replace(
            self,
            epochs=epochs,
            lr_step=self.lr_step if "lr_step" in self.idle else max(1, round(self.lr_step * share)),
            lr_milestones=tuple(max(1, round(milestone * share)) for milestone in self.lr_milestones),
            lr_warmup=round(self.lr_warmup * share),
            options=MappingProxyType(options),
        )

    def changed(self, **changes: Any) -> "Recipe":
        """Return the recipe with other settings; those that they leave without a use go back to their defaults.

        Raises:
            InputError: As for a recipe, so also if one of the ``changes`` is of no use.
        """
        idle = _idle(changes.get("algorithm", self.algorithm), changes.get("schedule", self.schedule))
        return replace(self, **{**self._defaults(idle), **changes})

    def _defaults(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {setting.name: setting.default for setting in fields(self) if setting.name in names}


def _idle(algorithm: str, schedule: str) -> tuple[str, ...]:
    return tuple(name for name, users in _ONLY_FOR.items() if not {algorithm, schedule} & set(users))


def _check_milestones(values: Sequence[int], name: str) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"{name}: expected numbers of epochs in ascending order, got {values!r}")
    found = tuple(check_count(value, name) for value in values)
    if list(found) != sorted(found):
        raise InputError(f"{name}: expected numbers of epochs in ascending order, got {found}")
    return found
