"""Where training computes: devices, precision and processes are Lightning Fabric's business.

Fabric and not Accelerate: it keeps no state of the process (Accelerate's is one object for all), has few dependencies,
and nothing in it talks to a hub. It is imported when training begins, as that takes a second.
"""

import os
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import distributed, nn

from rs_plugins.core.models import check_device, device_and_dtype
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Gradients of single images are taken inside an attack, where no loss scale keeps those of float16 from vanishing.
Precision = Literal["32-true", "bf16-mixed"]


def fabric_of(model: nn.Module) -> "Fabric":
    """Return a Fabric for this process alone, on the device where ``model`` is.

    Raises:
        InputError: If ``model`` has no parameters.
    """
    device, _ = device_and_dtype(model)
    return _alone(device.type, device.index, "32-true")


@cache
def _alone(kind: str, index: int | None, precision: Precision) -> "Fabric":
    """Return the Fabric of a single process; making one takes longer than many a step."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    # named, as it would be guessed from the variables of SLURM and torchrun, and those be taken to task
    environment = LightningEnvironment()
    devices = 1 if index is None else [index]
    return Fabric(accelerator=kind, devices=devices, precision=precision, plugins=[environment])


def launched_fabric(device: str | torch.device = "cpu", precision: Precision = "32-true") -> "Fabric":
    """Return a Fabric for all processes that torchrun has started, or for this one if it was started alone.

    Args:
        device: ``"cpu"`` or ``"cuda"``; for a process alone also one of several, such as ``"cuda:1"``.
        precision: ``"32-true"``, or ``"bf16-mixed"``: weights in float32, convolutions and products in bfloat16.

    Raises:
        InputError: If there is no such device or precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision: expected one of {', '.join(map(repr, get_args(Precision)))}, got {precision!r}")
    place = check_device(device)
    if not distributed.is_torchelastic_launched():
        return _alone(place.type, place.index, precision)
    if place.index is not None:
        raise InputError(f"device: torchrun gives each process its own; expected {place.type!r}, got {str(device)!r}")

    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=place.type,
        devices=local,
        num_nodes=world // local,
        strategy="ddp",
        precision=precision,
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric
