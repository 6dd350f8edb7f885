"""How the radius grows at the beginning of certified training, and with it the weight of the certified loss."""

from dataclasses import dataclass
from typing import Literal, get_args

from rs_plugins.core.checks import check_nonnegative
from rs_plugins.errors import InputError

RampShape = Literal["smooth", "linear"]
BEND = 0.25  # of the ramp: where "smooth" goes over from t⁴ to a straight line


@dataclass(frozen=True)
class SmoothEps:
    """The radius in the course of training: 0 up to ``start``, then a ramp, ``eps`` from its end on.

    ``"smooth"`` is the ramp of CROWN-IBP's code (Zhang et al. 2020): q·t⁴ in its first quarter, then the tangent there.

    Attributes:
        eps: The radius that the ramp leads to, in pixels.
        start: When the ramp begins, in epochs.
        length: How long it is, in epochs; 0: there is none.
        shape: ``"smooth"`` or ``"linear"``.

    Raises:
        InputError: If a setting has an impossible value.
    """

    eps: float
    start: float = 0.0
    length: float = 20.0
    shape: RampShape = "smooth"

    def __post_init__(self) -> None:
        for name in ("eps", "start", "length"):
            object.__setattr__(self, name, check_nonnegative(getattr(self, name), name))
        if self.shape not in get_args(RampShape):
            expected = ", ".join(map(repr, get_args(RampShape)))
            raise InputError(f"shape: expected one of {expected}, got {self.shape!r}")

    @property
    def end(self) -> float:
        """When the ramp ends, in epochs."""
        return self.start + self.length

    def share(self, elapsed: float) -> float:
        """Return which part of ``eps`` there is after ``elapsed`` epochs, in [0, 1]."""
        if elapsed >= self.end:
            return 1.0
        if elapsed <= self.start:
            return 0.0
        t = (elapsed - self.start) / self.length
        if self.shape == "linear":
            return t
        whole = BEND**4 + 4 * BEND**3 * (1 - BEND)
        return (t**4 if t <= BEND else BEND**4 + 4 * BEND**3 * (t - BEND)) / whole

    def __call__(self, elapsed: float) -> float:
        """Return the radius after ``elapsed`` epochs, in pixels."""
        return self.eps * self.share(elapsed)


def clean_weight(share: float, w_rob: float) -> float:
    """Return kappa = 1 - w_rob · share, the weight of the clean loss while the radius is that ``share`` of the last.

    So training begins with the clean loss alone, and ends with 1 - w_rob of it.

    Args:
        share: eps now divided by eps at the end, in [0, 1].
        w_rob: Weight of the certified loss at the end, in [0, 1].
    """
    return 1 - w_rob * share
