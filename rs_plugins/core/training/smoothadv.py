"""SmoothAdv: adversarial training of a smoothed classifier (Salman et al. 2019)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_flag, check_labels
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.inner_attacks import PGD, Attack, attacked, check_attack
from rs_plugins.core.training.losses import mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method, warm_up


@dataclass(frozen=True, kw_only=True)
class SmoothAdv(Method):
    """(1/m) Σ_i CE(f(x' + e_i), y), x' = argmax -log((1/m) Σ_i F_y(x' + e_i)) with the same e_i (Salman et al. 2019).

    Args:
        sigma: Standard deviation of the noise, in pixels.
        attack: How to look for x': `PGD`, `DDN` or `BallFirstPGD`, which say with what budget.
        samples: Noise draws per image and step (m).
        multi_noise: Whether the loss is on all m copies; else on the first one alone, while the attack uses all.
        warmup: In epoch t, from 0, the attack has min(1, (t + 1)/warmup) of its budget; 1: all of it at once.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    attack: Attack = field(default_factory=PGD)
    samples: int = 4
    multi_noise: bool = True
    warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("attack", check_attack)
        self.check("samples", check_count)
        self.check("multi_noise", check_flag)
        self.check("warmup", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        e = draws.noise(self.noise, x, self.samples)
        with attacked(model):
            x_adv = self.attack(model, x, y, e, warm_up(batch.epoch, self.warmup))
        return mean_cross_entropy(noisy_logits(model, x_adv, e if self.multi_noise else e[:, :1]), y)
