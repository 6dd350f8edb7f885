"""Is the prediction certified at one radius? Votes only until the answer is known."""

from dataclasses import dataclass, fields
from typing import ClassVar

from rs_plugins.core.checks import check_nonnegative
from rs_plugins.core.noise import Noise
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.plans.protocol import Case, Verdict
from rs_plugins.core.procedures import Procedure


@dataclass(frozen=True)
class AtRadius:
    """Whether the prediction is certified at radius ``r``: `OnGrid` with a single radius.

    The certificate has radius ``r`` or is an abstention, which here means "not certified at ``r``".

    Args:
        r: The radius in pixels, >= 0.
        n0: Selection votes, >= 1.
        n: The most estimation votes.
        alpha: Failure probability of each certificate, in (0, 1).
        slack: How much it may miss: an image whose true radius is less than about ``slack``·sigma above ``r`` may be
            given up. Larger values take fewer votes and certify fewer images, with the same guarantee.
        beta: The share of images at ``slack``·sigma above ``r`` that may be given up early, in (0, 1).
        test: "exact" or "betting", as in `OnGrid`.

    Raises:
        InputError: If a value is outside its range.
    """

    interim: ClassVar[bool] = True
    r: float
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    slack: float = 0.04
    beta: float = 0.3
    test: str = "exact"

    def __post_init__(self) -> None:
        grid = self.grid
        object.__setattr__(self, "r", grid.radii[0])
        for field in fields(self)[1:]:
            object.__setattr__(self, field.name, getattr(grid, field.name))

    @property
    def grid(self) -> OnGrid:
        """The grid of this one radius."""
        options = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return OnGrid((check_nonnegative(self.r, "r"),), **options)

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""
        return self.grid.bound

    @property
    def most(self) -> int:
        """The largest number of votes that an image can need."""
        return self.grid.most

    def check(self, noise: Noise) -> None:
        """Raise `InputError` if ``noise`` cannot say which probability a radius takes, or ``r`` is out of reach."""
        self.grid.check(noise)

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        return self.grid.procedure(case)
