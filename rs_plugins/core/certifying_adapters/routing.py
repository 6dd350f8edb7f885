"""Which member of an ensemble decides on a noisy image: a question to that noisy image alone."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_positive
from rs_plugins.core.models import check_unchanged
from rs_plugins.errors import InputError, ModelError

Router = Callable[[Tensor], Tensor]

_UNIT = 2.0**24  # responses are summed as whole numbers of 1/_UNIT
_MOST = 2.0**16  # larger responses count as this, so that no sum leaves 64 bits


class NoiseLevelRouter(nn.Module):
    """Chooses the member trained at the noise level that a noisy image seems to have (Immerkær 1996).

    The mask [[1, -2, 1], [-2, 4, -2], [1, -2, 1]] takes away what is smooth in an image and leaves the noise, with 6
    times its standard deviation. Edges and textures stay too, so that little noise is taken for somewhat more. What is
    nearest is decided on a logarithmic scale, as a level is misjudged by a factor.

    The choice for an image is the same in every batch, to the bit.

    Args:
        sigmas: The noise level of each member, in pixels, in the order of the members; no two alike.

    Raises:
        InputError: If a level is no finite number above 0, there are none, or two are alike.
    """

    row_wise: ClassVar[bool] = True

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        self.sigmas = tuple(check_positive(sigma, "sigmas") for sigma in sigmas)
        if not self.sigmas or len(set(self.sigmas)) < len(self.sigmas):
            raise InputError(f"sigmas: expected one or more different noise levels, got {self.sigmas}")
        self._order = sorted(range(len(self.sigmas)), key=self.sigmas.__getitem__)
        self._between = [math.sqrt(low * high) for low, high in pairwise(sorted(self.sigmas))]

    def forward(self, x: Tensor) -> Tensor:
        """Return the number of the member for each noisy image of ``x`` (n, channels, height, width), (n,).

        Raises:
            InputError: If images have fewer than 3 pixels a side, or another number of axes.
        """
        levels = self.estimate(x)
        ranks = torch.bucketize(levels, levels.new_tensor(self._between), right=True)
        return torch.tensor(self._order, device=x.device)[ranks]

    def estimate(self, x: Tensor) -> Tensor:
        """Return the standard deviation of the noise in each image of ``x`` (n, channels, height, width), in pixels.

        It is the mean size of the mask's responses times √(π/2)/6, over all channels; (n,), float32.

        Raises:
            InputError: If images have fewer than 3 pixels a side, or another number of axes.
        """
        if x.ndim != 4 or min(x.shape[2:]) < 3:
            raise InputError(
                "x: expected images (n, channels, height, width) of at least 3x3 pixels to estimate their noise, "
                f"got shape {tuple(x.shape)}"
            )
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        responses = _second_difference(_second_difference(x, 2), 3).flatten(1).abs()
        # Sums of whole numbers do not depend on their order, which for others changes with the size of the batch.
        whole = (responses.nan_to_num(0.0).clamp(max=_MOST) * _UNIT).round().to(torch.int64)
        return whole.sum(1).to(torch.float32) * (math.sqrt(math.pi / 2) / (6 * _UNIT * responses.shape[1]))

    def extra_repr(self) -> str:
        """Return the levels for `repr`."""
        return f"sigmas={self.sigmas}"


def _second_difference(x: Tensor, axis: int) -> Tensor:
    inner = x.shape[axis] - 2
    before, here, after = (x.narrow(axis, start, inner) for start in range(3))
    return before - 2 * here + after  # to double is exact, so a fused multiply-add gives the same


def choices(router: Router, x: Tensor, members: int) -> Tensor:
    """Return which of so many ``members`` the ``router`` chooses for each noisy image of ``x`` (n, *input), (n,).

    The router is given one image at a time, so it cannot look at others. One with a true attribute ``row_wise``, which
    promises as much by itself, is given all at once, and the first image once more alone, to see whether that holds.

    Raises:
        ModelError: If the router does not give an integer from 0 to ``members`` - 1 for each image, changes the images,
            or is seen to break its promise.
    """
    with torch.no_grad(), check_unchanged(x):
        if not getattr(router, "row_wise", False):
            chosen = [_checked(router(row), 1, members) for row in x.detach().split(1)] if len(x) else []
            return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=x.device)
        together = _checked(router(x.detach()), len(x), members)
        if len(x) > 1 and not torch.equal(_checked(router(x[:1].detach()), 1, members), together[:1]):
            raise ModelError(
                "router: its choice for an image depends on the batch that the image is in; without the attribute "
                "row_wise it is asked one image at a time"
            )
        return together


def _checked(choice: object, n: int, members: int) -> Tensor:
    expected = f"router: expected a tensor of int64 of shape ({n},), one number of a member for each image"
    if not isinstance(choice, Tensor) or choice.dtype != torch.int64:
        got = str(choice.dtype) if isinstance(choice, Tensor) else type(choice).__name__
        raise ModelError(f"{expected}, got {got}")
    if choice.shape != (n,):
        raise ModelError(f"{expected}, got shape {tuple(choice.shape)}")
    if n and not bool(((choice >= 0) & (choice < members)).all()):
        low, high = (int(bound) for bound in choice.aminmax())
        raise ModelError(f"router: expected members from 0 to {members - 1}, got values from {low} to {high}")
    return choice
