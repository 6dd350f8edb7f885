"""Lower bounds of margins in one call, with everything that is handed in looked at first."""

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_images, check_labels
from rs_plugins.core.relaxations.network import LowerSlope, Method, RelaxedNetwork
from rs_plugins.core.relaxations.normalising import batch_statistics
from rs_plugins.core.relaxations.precision import full_precision
from rs_plugins.core.relaxations.propagation import Ends
from rs_plugins.core.relaxations.regions import Norm, Region
from rs_plugins.core.relaxations.slack import SLACK, slack
from rs_plugins.errors import InputError

__all__ = ["SLACK", "batch_statistics", "margins", "output_bounds", "slack"]


def margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    method: Method = "crown",
    norm: Norm = "linf",
    lower_slope: LowerSlope = "adaptive",
    chunk: int | None = None,
) -> Tensor:
    """Return lower bounds of logit_y - logit_k in a region around each image, (n, classes - 1), k ascending without y.

    The class of an image is proved where all of them are above `slack`, which wants to know the terms of networks with
    large logits. Bounds are differentiable in the parameters, and computed in the type of ``x``, also under autocast.

    Args:
        model: From images to logits, or a `RelaxedNetwork` of it, which is read once and not at each call.
        x: Images (n, *input), pixels in [0, 1].
        y: Labels (n,).
        eps: Radius in pixels, a number or one per image (n,). Pixels stay in [0, 1].
        method: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``, from the fastest to the tightest.
        norm: Of the radius.
        lower_slope: See `RelaxedNetwork.margins`.
        chunk: See `RelaxedNetwork.margins`.

    Raises:
        InputError: If an argument makes no sense.
        ModelError: If something in the model is not supported; the message names it.
    """
    network, region = _prepared(model, x, eps, norm)
    labels = check_labels(y, n=len(x), classes=network.classes).to(x.device, torch.long)
    with full_precision(x.device, x.dtype):
        return network.margins(region, labels, method=method, lower_slope=lower_slope, chunk=chunk)


def output_bounds(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    method: Method = "crown",
    norm: Norm = "linf",
    lower_slope: LowerSlope = "adaptive",
    chunk: int | None = None,
) -> Ends:
    """Return bounds (lower, upper) of each logit in a region around each image, both (n, classes).

    Arguments and errors are those of `margins`.
    """
    network, region = _prepared(model, x, eps, norm)
    with full_precision(x.device, x.dtype):
        return network.output_bounds(region, method=method, lower_slope=lower_slope, chunk=chunk)


def _prepared(model: nn.Module, x: Tensor, eps: float | Tensor, norm: Norm) -> tuple[RelaxedNetwork, Region]:
    region = Region(check_images(x), eps, norm)
    network = model if isinstance(model, RelaxedNetwork) else RelaxedNetwork(model, tuple(x.shape[1:]))
    own = next((parameter for parameter in network.parameters()), x)
    if (own.dtype, own.device) != (x.dtype, x.device):
        raise InputError(
            f"x: expected the type and device of the model ({own.dtype}, {own.device}), got {x.dtype} on {x.device}; "
            "for certificates use double precision: model.double(), x.double()"
        )
    return network, region
