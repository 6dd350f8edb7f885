"""What the demo does, and with what."""

from dataclasses import dataclass

from rs_plugins.core.checks import check_count, check_positive, check_seed
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.errors import InputError

TEST_IMAGES = 500  # the last of the shuffled digits; the others are for training


@dataclass(frozen=True)
class Settings:
    """What the demo does.

    Attributes:
        images: Test images, at most 500.
        sigma: Standard deviation of the noise, in pixels.
        n0: Selection votes of a certificate.
        n: Estimation votes of a certificate.
        alpha: Failure probability of a certificate.
        epochs: Training epochs of each network.
        eps: l2 budget of the attacks in the table, in pixels.
        judge: Votes on fresh noise that decide a smoothed classifier's answer.
        seed: Seed of everything.

    Raises:
        InputError: If a value is impossible, or there are more images asked for than there are.
    """

    images: int = 300
    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    epochs: int = 30
    eps: float = 0.5
    judge: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.images <= TEST_IMAGES:
            raise InputError(f"images: expected 1 to {TEST_IMAGES} of the digits' test images, got {self.images}")
        check_positive(self.sigma, "sigma")
        check_positive(self.eps, "eps")
        for name in ("epochs", "judge"):
            check_count(getattr(self, name), name)
        check_seed(self.seed)
        _ = self.plan  # checks n0, n and alpha

    @property
    def plan(self) -> FixedBudget:
        """The plan of every certificate."""
        return FixedBudget(n0=self.n0, n=self.n, alpha=self.alpha)

    @property
    def radii(self) -> tuple[float, ...]:
        """The certified radii of the table, in pixels."""
        return (0.0, self.sigma, 2 * self.sigma, 2.8 * self.sigma)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The attack budgets of the plot, in pixels."""
        return tuple(step / 4 * self.eps for step in range(1, 9))
