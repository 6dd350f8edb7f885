"""The papers' recipes by name, for example ``smoothmix-mnist-0.5``.

MNIST: those of Jeong et al. (2021), who also ran the baselines. CIFAR-10: theirs for SmoothMix; SmoothAdv's are those
of Jeong et al. (2023, CAT-RS), Consistency's of Jeong and Shin (2020). Recipes of which not every number is known to us
are left out: Stability and MACER on CIFAR-10, SmoothAdv with Consistency, ImageNet.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Objective
from rs_plugins.errors import InputError

Drop = Literal["documented", "reference"]
SIGMAS = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a paper trained one model.

    Attributes:
        method: Name of the method.
        options: Its options.
        sigma: Standard deviation of the noise, in pixels.
        architecture: ``"lenet"`` or ``"resnet110"``.
        normalise: Whether the network subtracts the mean and divides by the standard deviation of the data first.
        augment: Whether images are cropped at random from 4 more pixels on each side, and flipped.
        epochs: Passes over the data.
        batch_size: Images per batch.
        parts: Into how many parts a batch is cut, each with an optimiser step of its own.
        lr: Learning rate of SGD.
        lr_step: Epochs after which it drops, each time.
        lr_factor: By what it is multiplied then.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
    """

    method: str
    options: Mapping[str, Any]
    sigma: float
    architecture: str
    normalise: bool
    augment: bool
    epochs: int
    batch_size: int = 256
    parts: int = 1
    lr: float
    lr_step: int
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def objective(self) -> Objective:
        """Return the objective."""
        return make_objective(self.method, self.sigma, **self.options)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimiser of ``model``."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, lr_drop: Drop = "documented"
    ) -> torch.optim.lr_scheduler.MultiStepLR:
        """Return the schedule of the learning rate, to be stepped after each epoch.

        Args:
            optimizer: What `optimizer` returned.
            lr_drop: ``"documented"``: it drops after ``lr_step``, 2·``lr_step``, … epochs. ``"reference"``: one epoch
                later, as in the code of Jeong et al., which steps the scheduler by the number of the epoch that ends.

        Raises:
            InputError: If ``lr_drop`` is neither.
        """
        if lr_drop not in get_args(Drop):
            raise InputError(f"lr_drop: expected one of {', '.join(map(repr, get_args(Drop)))}, got {lr_drop!r}")
        late = lr_drop == "reference"
        drops = [drop + late for drop in range(self.lr_step, self.epochs, self.lr_step)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=self.lr_factor)


def preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def _mnist() -> Iterator[tuple[str, Preset]]:
    for sigma, steps, weak_steps, lam, robust in zip(
        SIGMAS, (2, 4, 8), (3, 4, 8), (10, 5, 5), (16, 16, 6), strict=True
    ):
        yield _lenet("gaussian", sigma)
        yield _lenet("stability", sigma, lam=2.0)
        attack = PGD(eps=255 / 256, steps=10)
        yield _lenet("smoothadv", sigma, parts=4, attack=attack, samples=4, warmup=10)
        yield _lenet("macer", sigma, lam=float(robust), margin=8.0, inv_temp=16.0, samples=16, deferred=30)
        yield _lenet("consistency", sigma, parts=2, lam=float(lam), w_ent=0.5, samples=2)
        for mix_step, w_mix, note in ((0, 5.0, ""), (1, 5.0, "-onestep"), (0, 1.0, "-w1"), (1, 1.0, "-onestep-w1")):
            mix = {"steps": steps if w_mix == 5 else weak_steps, "mix_step": mix_step, "w_mix": w_mix}
            yield _lenet("smoothmix", sigma, note, parts=4, step=1.0, warmup=10, samples=4, **mix)


def _cifar10() -> Iterator[tuple[str, Preset]]:
    for sigma, eps, samples, lam, step in zip(
        SIGMAS, (1.0, 1.0, 2.0), (4, 8, 2), (20, 10, 10), (0.5, 1.0, 2.0), strict=True
    ):
        yield _resnet110("gaussian", sigma)
        attack = PGD(eps=eps, steps=10)
        yield _resnet110("smoothadv", sigma, parts=samples, attack=attack, samples=samples, warmup=10)
        yield _resnet110("consistency", sigma, parts=2, lam=float(lam), w_ent=0.5, samples=2)
        for mix_step, note in ((0, ""), (1, "-onestep")):
            mix = {"steps": 4, "step": step, "mix_step": mix_step, "w_mix": 5.0}
            yield _resnet110("smoothmix", sigma, note, parts=2, warmup=10, samples=2, **mix)


def _lenet(method: str, sigma: float, note: str = "", parts: int = 1, **options: Any) -> tuple[str, Preset]:
    return f"{method}-mnist-{sigma}{note}", Preset(
        method=method,
        options=MappingProxyType(options),
        sigma=sigma,
        architecture="lenet",
        normalise=False,
        augment=False,
        epochs=90,
        parts=parts,
        lr=0.01,
        lr_step=30,
    )


def _resnet110(method: str, sigma: float, note: str = "", parts: int = 1, **options: Any) -> tuple[str, Preset]:
    return f"{method}-cifar10-{sigma}{note}", Preset(
        method=method,
        options=MappingProxyType(options),
        sigma=sigma,
        architecture="resnet110",
        normalise=True,
        augment=True,
        epochs=150,
        parts=parts,
        lr=0.1,
        lr_step=50,
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(dict([*_mnist(), *_cifar10()]))
