"""The number of values of an image, on which certificates in the norm linf depend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rs_plugins.core.checks import check_count
from rs_plugins.errors import InputError

_Noise = TypeVar("_Noise", bound="WithDimension")


@dataclass(frozen=True)
class WithDimension:
    """A part of noise families that need to know how many values an image has.

    Attributes:
        sigma: Standard deviation in pixels.
        dimension: Values of an image, channels included; None until an image's shape is known.
    """

    sigma: float
    dimension: int | None = None

    def __post_init__(self) -> None:
        if self.dimension is not None:
            object.__setattr__(self, "dimension", check_count(self.dimension, "dimension"))

    def for_shape(self: _Noise, shape: Sequence[int], /) -> _Noise:
        """Return the noise for images of ``shape``, without the batch.

        Raises:
            InputError: If it was made for another number of values.
        """
        values = math.prod(shape)
        if self.dimension not in (None, values):
            raise InputError(
                f"dimension: expected {values}, as images of shape {tuple(shape)} have, got {self.dimension}"
            )
        return replace(self, dimension=values)

    @property
    def known_dimension(self) -> int:
        """The number of values of an image.

        Raises:
            InputError: If it is not known yet.
        """
        if self.dimension is None:
            raise InputError("dimension: expected the number of values of an image for a radius in linf, got None")
        return self.dimension
