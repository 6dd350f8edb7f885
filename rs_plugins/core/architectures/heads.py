"""Another number of classes for a network that is trained already."""

from torch import nn

from rs_plugins.core.checks import check_count, check_seed
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError


def replace_head(model: nn.Module, classes: int, *, seed: int = 0) -> nn.Module:
    """Put a fresh linear layer in the place of the last one of ``model``, and return ``model``.

    The last one is the last `torch.nn.Linear` in the order of its modules, which in the usual classifiers gives the
    logits. Salman et al. (2019) tune networks of 1000 classes for CIFAR-10 so. An optimiser made before does not know
    the new layer.

    Args:
        model: The network; changed in place.
        classes: Number of logits.
        seed: Of the new layer's initial weights; the same on every device. The global generators are as before.

    Raises:
        InputError: If there is no linear layer in ``model``, or ``classes`` is no integer >= 2.
    """
    layers = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, nn.Linear)}
    last = next(reversed(layers), "")
    if not last:
        got = "that layer alone" if layers else "none in it"
        raise InputError(f"model: expected a network with a torch.nn.Linear to replace, got {got}")
    new = _fresh(layers[last], check_count(classes, "classes", least=2), seed)
    for place, layer in layers.items():
        if layer is layers[last]:
            parent, _, attribute = place.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
    return model


def _fresh(old: nn.Linear, classes: int, seed: int) -> nn.Linear:
    """Return a layer like ``old`` with other weights and as many outputs as there are classes."""
    with global_randomness(stream(check_seed(seed), "head").initial_seed()):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None, device="cpu")
    return new.to(old.weight.device, old.weight.dtype).train(old.training)
