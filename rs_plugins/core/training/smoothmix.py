"""SmoothMix: training on mixtures of images with where an unrestricted attack ends (Jeong et al. 2021)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_labels, check_nonnegative, check_positive
from rs_plugins.core.geometry import expand_like
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.inner_attacks import ascend, attacked, ball_then_box
from rs_plugins.core.training.losses import kl, mean_cross_entropy
from rs_plugins.core.training.objective import Batch, Draws, Method, warm_up


@dataclass(frozen=True, kw_only=True)
class SmoothMix(Method):
    """(1/m) Σ_i CE(f(x_0 + e_i), y) + w_mix · w · (1/m) Σ_i [argmax p = y] KL(y_mix ‖ F(x_mix + e_i)).

    x_mix = (1 - u) x_0 + u a_T and y_mix = (1 - u) p + u/K with u ~ U(0, 1/2) per image, p = (1/m) Σ_i F(x_0 + e_i) and
    K classes (Jeong et al. 2021, section 3). a_T is where an attack on the same draws comes to in T steps, with no ball
    around x. x_0 is x, or the adversary of few steps; w = min(1, (epoch + 1)/warmup). The gradient flows through p too.
    There are two forward passes, so batch normalisation sees both distributions.

    Args:
        sigma: Standard deviation of the noise, in pixels.
        step: Length of an attack step, in pixels (the paper's alpha).
        steps: Number of attack steps (T).
        mix_step: x_0 is the image after this many steps of the attack: 0: x itself, 1: "one-step adversary"; x itself
            also if it is T or more, as in their code.
        max_norm: Radius of a ball for the attack, in pixels; None: no ball.
        max_norm_s: Times w, the radius around x in which x_0 must lie, in pixels; None: step · mix_step.
        w_mix: Weight of the second term (the paper's eta).
        warmup: Epochs over which w rises to 1; 1: at once.
        samples: Noise draws per image and step (m).
        family: The noise family.

    Raises:
        InputError: If a setting has an impossible value.
    """

    step: float = 1.0
    steps: int = 8
    mix_step: int = 0
    max_norm: float | None = None
    max_norm_s: float | None = None
    w_mix: float = 1.0
    warmup: int = 10
    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("step", check_positive)
        self.check("steps", check_count)
        self.check("mix_step", check_count, least=0)
        if self.max_norm is not None:
            self.check("max_norm", check_positive)
        if self.max_norm_s is not None:
            self.check("max_norm_s", check_nonnegative)
        self.check("w_mix", check_nonnegative)
        self.check("warmup", check_count)
        self.check("samples", check_count)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``."""
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        w = warm_up(batch.epoch, self.warmup)
        e = draws.noise(self.noise, x, self.samples)
        with attacked(model):
            x_clean, x_adv = self.adversaries(model, x, y, e, w)

        clean = noisy_logits(model, x_clean, e)
        p = clean.softmax(dim=-1).mean(dim=1)
        u = expand_like(draws.uniform(x) / 2, x)
        x_mix = (1 - u) * x_clean + u * x_adv
        u = u.to(p.dtype).reshape(-1, 1)
        y_mix = (1 - u) * p + u / p.shape[1]
        log_mix = noisy_logits(model, x_mix, e).log_softmax(dim=-1)
        tiny = torch.finfo(p.dtype).tiny  # p can be 0, and u too: log 0 · 0 has no gradient
        mixed = kl((y_mix + tiny).log().unsqueeze(1), log_mix)
        right = (p.argmax(dim=1) == y).to(p.dtype).unsqueeze(1)
        return mean_cross_entropy(clean, y) + self.w_mix * w * (right * mixed).mean()

    def adversaries(self, model: nn.Module, x: Tensor, y: Tensor, e: Tensor, w: float) -> tuple[Tensor, Tensor]:
        """Return x_0 and a_T, (n, *input) each, for ``x`` with labels ``y`` (n,) under the draws ``e`` (n, m, *input).

        ``model`` is in eval mode and frozen; ``w`` is the share of ``max_norm_s`` that counts.
        """
        path = [x, *ascend(model, x, y, e, steps=self.steps, step=self.step, max_norm=self.max_norm)]
        x_clean = path[self.mix_step] if self.mix_step < self.steps else x
        reach = self.step * self.mix_step if self.max_norm_s is None else self.max_norm_s
        return ball_then_box(x_clean, x, w * reach), path[-1]
