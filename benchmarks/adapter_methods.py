"""The ways to a classifier that can be certified, from a clean-trained one or from none, to be compared."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from certify_networks import DATA, MODELS
from torch import Tensor, nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.denoised_smoothing import DENOISING, DenoisedClassifier, DnCNN, denoising_objective
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.objective import Objective

SHAPE = (3, 32, 32)
PLACE = f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}"
HELD_OUT = 2000  # the last images of the training part: settings were chosen on them


class Images(NamedTuple):
    """Images (n, *input) in [0, 1] with their labels (n,)."""

    x: Tensor
    y: Tensor


def training_images() -> Images:
    """Return the training part of CIFAR-10 (JPEG q75) but for the images that are held out."""
    data = open_data_set(PLACE, split="train")
    return _images(data, range(len(data) - HELD_OUT))


def held_out_images() -> Images:
    """Return the images of the training part on which settings were chosen."""
    data = open_data_set(PLACE, split="train")
    return _images(data, range(len(data) - HELD_OUT, len(data)))


def _images(data: DataSet, rows: range) -> Images:
    return Images(data.read(rows), torch.from_numpy(data.labels[rows.start : rows.stop]).long())


def clean_trained(base: str) -> nn.Module:
    """Return the clean-trained network ``base``, with its normalisation, in eval mode."""
    model = untrained(base)
    load_weights(model, MODELS / f"cifar10_{base}.safetensors")
    return model.eval()


def untrained(base: str) -> nn.Module:
    """Return the network ``base`` with initial weights."""
    return make_network(base, **STATISTICS["imagenet"]._asdict())


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to a classifier that can be certified.

    Attributes:
        make: Returns the network to train, of the name of the clean-trained one.
        objective: Returns what is minimised, for a sigma in pixels.
        adam: Whether by AdamW; otherwise by SGD with Nesterov's momentum.
        lr: The highest learning rate.
        trained: Whether it is trained at all.
    """

    make: Callable[[str], nn.Module]
    objective: Callable[[float], Objective] = gaussian
    adam: bool = False
    lr: float = 0.02
    trained: bool = True


def adapted(base: str, **design: Any) -> nn.Module:
    """Return ``base``, frozen, with a certifying adapter."""
    return adapt(clean_trained(base), SHAPE, AdapterDesign(**design))


def denoised(base: str, **size: int) -> nn.Module:
    """Return ``base``, frozen, behind a denoiser."""
    return DenoisedClassifier(DnCNN(**size), clean_trained(base))


def with_lora(base: str, rank: int) -> nn.Module:
    """Return ``base``, frozen but for matrices of low rank beside its convolutions (Hu et al. 2022), and its head."""
    from peft import LoraConfig, inject_adapter_in_model

    model = copy.deepcopy(clean_trained(base))
    convolutions = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    tuned = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=convolutions), model)
    tuned[1].linear.requires_grad_(True)
    return tuned


SMALL_DENOISER = {"depth": 6, "width": 32}  # about as many multiplications as a ResNet-20

WAYS: Mapping[str, Way] = {
    "bare": Way(make=clean_trained, trained=False),
    "image": Way(make=adapted, lr=0.05),
    "image-added": Way(make=partial(adapted, combine="add"), lr=0.05),
    "image-fresh": Way(make=partial(adapted, size="small"), lr=0.1),
    "image-paper": Way(make=partial(adapted, size="small", combine="add", head="fresh"), adam=True, lr=0.001),
    "feature": Way(make=partial(adapted, kind="feature"), adam=True, lr=0.002),
    **{
        f"denoised-{name}": Way(
            make=partial(denoised, **SMALL_DENOISER), objective=partial(denoising_objective, name), adam=True, lr=0.003
        )
        for name in DENOISING
    },
    "fine-tune": Way(make=clean_trained, lr=0.05),
    "scratch": Way(make=untrained, lr=0.1),
    "lora": Way(make=partial(with_lora, rank=8), adam=True, lr=0.002),
}
