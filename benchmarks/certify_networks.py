"""The pretrained CIFAR-10 ResNet-20 (He et al. 2016) and test images, where their files are there."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.opening import open_data_set

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(os.environ.get("RS_PLUGINS_DATA", SHARED / "data"))
MODELS = Path(os.environ.get("RS_PLUGINS_MODELS", SHARED / "models"))


def cifar10_resnet20(images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network with its normalisation, in eval mode, the first ``images`` test images, and their labels.

    Raises:
        InputError: If the weights or the images are not there.
    """
    model = make_network("resnet20", **STATISTICS["imagenet"]._asdict())  # what it was trained with
    load_weights(model, MODELS / "cifar10_resnet20.safetensors")
    data = open_data_set(f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}")
    chosen = list(range(images))
    return model.eval(), data.read(chosen), torch.tensor(data.labels[:images])
