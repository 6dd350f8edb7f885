"""The network that training begins with: made to fit the images, with fresh weights or those of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rs_plugins.core.architectures.heads import replace_head
from rs_plugins.core.architectures.named import SIZED, make_network
from rs_plugins.core.architectures.normalise import STATISTICS, statistics
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.training.ibp_initial import ibp_initial
from rs_plugins.core.training.recipe import Initial
from rs_plugins.core.training.residual_initial import zero_residual
from rs_plugins.errors import InputError

NORMALISATIONS = ("data", *STATISTICS)


def describe_network(
    data: DataSet,
    architecture: str,
    *,
    normalise: str | None = None,
    activation: str = "relu",
    activation_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the arguments of `make_network` for a network of the images of ``data``, as plain data.

    Args:
        data: Its images tell the channels, and their size where the network is for one; its labels the classes, where
            it does not name their number itself.
        architecture: A name as `make_network` takes it.
        normalise: Whose mean and standard deviation the first layer has: ``"data"`` for those of ``data``,
            ``"cifar10"`` or ``"imagenet"`` for those in use; None for no such layer.
        activation: What is put in the place of ReLU, as in a `Recipe`.
        activation_options: Its options.
        seed: Of the initial weights.

    Raises:
        InputError: If there is no such normalisation, or the images do not fit the network.
    """
    if normalise not in (None, *NORMALISATIONS):
        expected = ", ".join(map(repr, NORMALISATIONS))
        raise InputError(f"normalise: expected one of {expected} or None, got {normalise!r}")
    classes = int(data.labels.max()) + 1 if data.classes is None else data.classes
    network = {"name": architecture, "classes": classes, "channels": data.shape[0], "seed": seed}
    if architecture in SIZED:
        if len(data.shape) != 3 or data.shape[1] != data.shape[2]:
            raise InputError(f"size: {architecture} takes square images, got shape {data.shape}")
        network["size"] = data.shape[1]
    if activation != "relu":
        network |= {"activation": activation, "shape": list(data.shape)}
        network |= {"activation_options": dict(activation_options)} if activation_options else {}
    if normalise is None:
        return network
    found = statistics(data) if normalise == "data" else STATISTICS[normalise]
    return {**network, "mean": list(found.mean), "std": list(found.std)}


def initial_network(
    network: Mapping[str, Any],
    weights: str | Path | None = None,
    *,
    classes: int | None = None,
    initial: Initial = "default",
) -> nn.Module:
    """Return the network that ``network`` describes, with fresh weights or those of a file.

    Args:
        network: The arguments of `make_network`.
        weights: A safetensors or torch file.
        classes: The file is of a network with so many classes, whose last linear layer gives way to a fresh one; None:
            the weights of the file fit as they are.
        initial: Which fresh weights, as in a `Recipe`; those of a file stay as they are.

    Raises:
        InputError: If the network cannot be made, the file does not fit, or the last linear layer does not give the
            logits, so that `make_network` could not make the result again.
        MissingDependencyError: If the network is of a package that is not installed.
        ModelError: If somebody else's code fails to make it.
    """
    model = make_network(**network)
    if weights is None:
        if initial == "ibp":
            return ibp_initial(model, seed=network.get("seed", 0))
        if initial != "zero-residual":
            return model
        plain = {name: value for name, value in network.items() if not name.startswith(("activation", "shape"))}
        return zero_residual(model, like=make_network(**plain))
    if classes is None:
        load_weights(model, weights)
        return model
    shapes = _shapes(model)
    load_weights(replace_head(model, classes), weights)
    replace_head(model, network["classes"], seed=network["seed"])
    if found := [key for key, shape in _shapes(model).items() if shapes[key] != shape]:
        raise InputError(
            f"replace_head: {network['name']} makes {found[0]} of shape {shapes[found[0]]}, and a last linear layer "
            f"for {network['classes']} classes has {_shapes(model)[found[0]]}"
        )
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
