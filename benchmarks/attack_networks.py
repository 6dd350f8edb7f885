"""Noise-trained networks to attack: a ResNet-20 for CIFAR-10 and the LeNet of the SmoothMix paper for MNIST.

Both are trained here, on noisy images (Cohen et al. 2019), once; the weights are kept in the folder ``cache`` beside
this file, and trained anew where they are missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from certify_networks import DATA, cifar10_resnet20
from safetensors.torch import save_file
from torch import Tensor, nn

from rs_plugins.core.architectures.lenet import lenet as published_lenet
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.loop import train

CACHE = Path(__file__).parent / "cache"
SIGMA = 0.25


class Victim(NamedTuple):
    """A network in eval mode, and test images with their labels.

    Attributes:
        name: The network and its data.
        training: How it was trained.
        model: Pixels to logits.
        x: (n, *input), pixels.
        y: Labels (n,).
    """

    name: str
    training: str
    model: nn.Module
    x: Tensor
    y: Tensor


def lenet(images: int) -> Victim:
    """Return the LeNet of the SmoothMix paper, 3 epochs on the 60,000 training images of MNIST, and test images."""
    with global_randomness(0):
        model = published_lenet()
    place = f"mnist:{DATA / 'MNIST'}"
    trained(model, "lenet", place, count=60_000, epochs=3, rate=0.02)
    test = open_data_set(place)
    x, y = test.read(range(images)), torch.tensor(test.labels[:images]).long()
    return Victim("MNIST, LeNet", "3 epochs from scratch on 60,000 noisy images", model.eval(), x, y)


def resnet20(images: int) -> Victim:
    """Return the pretrained ResNet-20, tuned for 6 epochs on 20,000 noisy training images, and test images."""
    model, x, y = cifar10_resnet20(images)
    trained(model, "resnet20", f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}", count=20_000, epochs=6, rate=0.02)
    training = "weights trained on clean images, then 6 epochs on 20,000 noisy ones"
    return Victim("CIFAR-10 (JPEG q75), ResNet-20", training, model.eval(), x, y.long())


def trained(model: nn.Module, name: str, place: str, *, count: int, epochs: int, rate: float) -> None:
    """Train ``model`` by SGD with Nesterov's momentum and a cosine schedule, or take its weights from the cache."""
    kept = CACHE / f"{name}-sigma-{SIGMA}-{count}-images-{epochs}-epochs-rate-{rate}.safetensors"
    if kept.exists():
        load_weights(model, kept)
        return
    data = open_data_set(place, split="train")
    x, y = data.read(range(count)), torch.tensor(data.labels[:count]).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    how = {"epochs": epochs, "scheduler": scheduler, "seed": 0, "progress": f"train {name}"}
    losses = train(model, x, y, gaussian(SIGMA), optimizer=optimizer, **how)
    click.echo(f"{name}: training loss {losses[-1]:.3f} after {epochs} epochs")
    CACHE.mkdir(exist_ok=True)
    save_file(model.state_dict(), kept)


VICTIMS: dict[str, Callable[[int], Victim]] = {"resnet20": resnet20, "lenet": lenet}
