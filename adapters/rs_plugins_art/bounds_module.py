"""A network and the bounds on its logits as one module, with the modes of ART's interval classifier."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.models import evaluating
from rs_plugins.core.relaxations.network import Method, RelaxedNetwork
from rs_plugins.core.relaxations.precision import full_precision
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.errors import InputError
from rs_plugins_art.arrays import to_images

MODES = ("abstract", "concrete", "attack")


class Box(Region):
    """All images from ``lower`` to ``upper``, both (n, *input), which need not be within [0, 1]."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        parts = {"lower": lower, "upper": upper, "centre": centre, "radius": radius}
        for name, value in (parts | {"x": centre, "eps": 0.0, "norm": "linf"}).items():
            object.__setattr__(self, name, value)


class BoundedModel(nn.Module):
    """A network that returns logits for images, and bounds on them for boxes of images.

    ART's interval classifier has such a module too; there the network is converted, here it is ``module`` itself. Modes
    are those of ART: in ``"abstract"`` boxes are taken as well as images, which are told apart by their shape; in
    ``"concrete"`` and ``"attack"``, which are the same here, images alone.

    Args:
        module: The network, (n, *input) in pixels to logits (n, classes).
        bound: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``.

    Attributes:
        forward_mode: The mode.
        bound: By which bounds boxes are judged.
        shape: Shape of one image; None if it is not known yet.
    """

    forward_mode: str
    bound: Method
    shape: tuple[int, ...] | None

    def __init__(self, module: nn.Module, bound: Method = "crown") -> None:
        super().__init__()
        self.module = module
        self.forward_mode, self.bound, self.shape = "abstract", check_bound(bound), None
        self._network: tuple[RelaxedNetwork, ...] = ()  # in a tuple, so that its parameters are not counted again

    @property
    def network(self) -> RelaxedNetwork:
        """The network as bounds see it.

        Raises:
            InputError: If the shape of an image is not known yet.
        """
        if not self._network:
            raise InputError("input_shape: not known before the first batch; pass input_shape=... to the constructor")
        return self._network[0]

    def meet(self, shape: tuple[int, ...]) -> None:
        """Look at the network for images of ``shape``.

        Raises:
            ModelError: If it has a module that bounds do not know, by its name.
        """
        self._network, self.shape = (RelaxedNetwork(self.module, shape),), shape

    def set_forward_mode(self, mode: str) -> None:
        """Set the mode.

        Raises:
            InputError: If there is no such mode.
        """
        if mode not in MODES:
            raise InputError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
        self.forward_mode = mode

    def re_convert(self) -> None:
        """Do nothing: bounds look up the weights at each call. ART's module makes dense matrices anew."""

    def forward(self, x: Any) -> Tensor:
        """Return logits (n, classes) for images (n, *input), or their bounds (n, 2, classes) for boxes (n, 2, *input).

        Args:
            x: A tensor or an array; of a box the lower ends come first.
        """
        place = next(self.module.parameters(), None)
        if not isinstance(x, Tensor):
            x = to_images(x, torch.float32 if place is None else place.dtype)
            x = x if place is None else x.to(place.device)
        if self.forward_mode == "abstract" and self.shape is not None and x.ndim == len(self.shape) + 2:
            return self.bounds(Box(x[:, 0], x[:, 1]))
        logits: Tensor = self.module(x)
        return logits

    def bounds(self, region: Region) -> Tensor:
        """Return the least and the greatest value of each logit over ``region``, (n, 2, classes)."""
        with full_precision(region.lower.device, region.lower.dtype):
            return torch.stack(self.network.output_bounds(region, method=self.bound), dim=1)

    def margins(self, region: Region, y: Tensor, method: Method | None = None) -> Tensor:
        """Return lower bounds of logit_y - logit_k over ``region``, k in order without y, (n, classes - 1)."""
        with evaluating(self.module), full_precision(region.x.device, region.x.dtype):
            return self.network.margins(region, y, method=self.bound if method is None else method)


def check_bound(bound: Any) -> Method:
    """Return ``bound`` if there is such a one.

    Raises:
        InputError: Otherwise.
    """
    if bound not in get_args(Method):
        raise InputError(f"bound: expected one of {', '.join(map(repr, get_args(Method)))}, got {bound!r}")
    return bound  # type: ignore[no-any-return]
