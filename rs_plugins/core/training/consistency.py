"""Consistency regularisation of the predictions under noise (Jeong and Shin 2020)."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_labels, check_nonnegative
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.inner_attacks import Attack, attacked, check_attack
from rs_plugins.core.training.losses import cross_entropy_between, kl, log_mean_probability, mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method, warm_up
from rs_plugins.errors import InputError

Form = Literal["default", "xent", "kl", "mse"]
W_ENT = 0.5


@dataclass(frozen=True, kw_only=True)
class Consistency(Method):
    """(1/m) Σ_i [CE(f(x + e_i), y) + lam · KL(F̄ ‖ F(x + e_i))] + w_ent · H(F̄), F̄ = (1/m) Σ_i F(x + e_i).

    Jeong and Shin (2020). KL pulls all predictions to their mean, H sharpens that. The gradient flows through F̄ as
    well. H is computed in log space, where their code bounds F̄ from below by 1e-20.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        lam: Weight of the regularisation.
        w_ent: Weight of the entropy H (the paper's eta), 0.5 if None; for ``form="default"`` only.
        form: ``"default"``: as above; ``"xent"``: lam · (KL + H); ``"kl"``: lam · KL; ``"mse"``: lam · ‖F(x + e_2) -
            F(x + e_1)‖², of the first two draws alone.
        samples: Noise draws per image and step (m), at least 2.
        attack: Perturbs the images first, as in `SmoothAdv`; theirs is `BallFirstPGD`. None: no attack.
        warmup: In epoch t, from 0, the attack has min(1, (t + 1)/warmup) of its budget.
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    lam: float = 10.0
    w_ent: float | None = None
    form: Form = "default"
    samples: int = 2
    attack: Attack | None = None
    warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lam", check_nonnegative)
        if self.form not in get_args(Form):
            raise InputError(f"form: expected one of {', '.join(map(repr, get_args(Form)))}, got {self.form!r}")
        if self.w_ent is not None:
            self.check("w_ent", check_nonnegative)
            if self.form != "default":
                raise InputError(f"w_ent: expected None with form={self.form!r}, which does not use it")
        self.check("samples", check_count, least=2)
        if self.attack is not None:
            self.check("attack", check_attack)
        self.check("warmup", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        e = draws.noise(self.noise, x, self.samples)
        if self.attack is not None:
            with attacked(model):
                x = self.attack(model, x, y, e, warm_up(batch.epoch, self.warmup))
        output = noisy_logits(model, x, e)
        return mean_cross_entropy(output, y) + self.regularisation(output).mean()

    def regularisation(self, output: Tensor) -> Tensor:
        """Return what is added to the cross-entropy, (n,), of the logits under noise (n, m, classes)."""
        log_f = output.log_softmax(dim=-1)
        if self.form == "mse":
            first, second = log_f[:, :2].exp().unbind(dim=1)
            return self.lam * (second - first).square().sum(dim=-1)
        log_mean = log_mean_probability(log_f)
        spread = kl(log_mean.unsqueeze(1), log_f).mean(dim=1)
        if self.form == "kl":
            return self.lam * spread
        entropy = cross_entropy_between(log_mean, log_mean)
        weight = self.lam if self.form == "xent" else W_ENT if self.w_ent is None else self.w_ent
        return self.lam * spread + weight * entropy
