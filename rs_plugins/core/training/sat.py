"""SAT: adversarial training of a network with a smooth activation (Xie et al. 2020)."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.attacks.norms import L2, LINF, Norm
from rs_plugins.core.checks import check_count, check_labels, check_nonnegative, check_positive
from rs_plugins.core.geometry import expand_like, normalise_l2
from rs_plugins.core.models import check_logits
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import input_gradient
from rs_plugins.core.smooth_backward import gradient_for
from rs_plugins.core.training.inner_attacks import attacked
from rs_plugins.core.training.losses import check_range
from rs_plugins.core.training.objective import Batch, Draws
from rs_plugins.core.training.validation import ADVERSARIAL
from rs_plugins.errors import InputError

NormName = Literal["linf", "l2"]
_NORMS: dict[NormName, Norm] = {"linf": LINF, "l2": L2}
VALIDATION_STEPS = 10


@dataclass(frozen=True)
class Sat:
    """CE(f(x'), y), x' = argmax CE(f(x'), y) in a ball around x, labels smoothed in the loss alone (Xie et al. 2020).

    The attack sees the network in eval mode, the update in train mode: batch statistics are those of x', once a step.
    That makes smooth adversarial training of a network with a smooth activation (`smooth_activations`), and of one with
    ReLU adversarial training by PGD.

    Args:
        eps: Radius of the ball, in pixels.
        norm: ``"linf"`` or ``"l2"``.
        steps: Steps of the attack.
        step: Length of one, in pixels, at least eps/steps, which None stands for.
        clean_start: For which share of the batches the attack begins at x; otherwise at points that are drawn uniformly
            from the ball and brought into the box.
        label_smoothing: Which share of each label is spread evenly over all classes.

    Raises:
        InputError: If a setting has an impossible value.
    """

    eps: float
    _: KW_ONLY
    norm: NormName = "linf"
    steps: int = 1
    step: float | None = None
    clean_start: float = 0.2
    label_smoothing: float = 0.1

    figure: ClassVar[str] = ADVERSARIAL

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise InputError(f"norm: expected one of {', '.join(map(repr, get_args(NormName)))}, got {self.norm!r}")
        self._check("eps", check_positive)
        if self.norm == "linf" and self.eps > 1:
            raise InputError(f"eps: expected a radius in pixels of [0, 1], got {self.eps}; divide by 255")
        self._check("steps", check_count)
        if self.step is not None:
            self._check("step", check_positive)
            if self.norm == "linf" and self.step > 1:
                raise InputError(f"step: expected a length in pixels of [0, 1], got {self.step}; divide by 255")
        for name in ("clean_start", "label_smoothing"):
            self._check(name, check_nonnegative)
            if getattr(self, name) > 1:
                raise InputError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``.

        Raises:
            InputError: If labels are none of the network's.
            ModelError: If no gradient flows from the logits to the images.
        """
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        with attacked(model), gradient_for(model, "attack"):
            adversarial = self._ascend(model, x, y, self._start(x, draws), self.steps, self.step or 0.0)
        with gradient_for(model, "update"):
            logits = model(adversarial)
        return cross_entropy(logits, check_range(y, logits.shape[-1]), label_smoothing=self.label_smoothing)

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> int:
        """Return how many of the images ``x`` with labels ``y`` stay right after 10 steps of eps/4 from x.

        Their gradients are the network's own, also where training takes smooth ones.
        """
        with attacked(model):
            adversarial = self._ascend(model, x, y.long(), x, VALIDATION_STEPS, self.eps / 4)
            return int((check_logits(model(adversarial), len(x)).argmax(dim=1) == y).sum())

    def _start(self, x: Tensor, draws: Draws) -> Tensor:
        coin = draws.fresh("clean start")
        if float(torch.rand((), generator=coin, device=coin.device)) < self.clean_start:
            return x
        return (x + self.eps * self._in_unit_ball(x, draws)).clamp(0, 1)

    def _in_unit_ball(self, x: Tensor, draws: Draws) -> Tensor:
        """Return a point for each image, uniform in the ball of radius 1."""
        normal = draws.noise(GaussianNoise(1.0), x, 1)[:, 0]
        if self.norm == "linf":
            return torch.erf(normal / math.sqrt(2))  # a normal number's cdf is uniform
        share = draws.uniform(x) ** (1 / x[0].numel())  # a ball of radius r has r^d of the volume
        return expand_like(share, x) * normalise_l2(normal, otherwise=torch.zeros_like(x))

    def _ascend(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, steps: int, step: float) -> Tensor:
        """Return x' after ``steps`` of length ``step``, at least eps/steps, each followed by ball and box."""
        norm, eps, length = _NORMS[self.norm], x.new_tensor(self.eps), max(step, self.eps / steps)
        here = start.detach()
        for _ in range(steps):
            direction = norm.direction(_slope(model, here, y), torch.zeros_like(x))
            here = (x + norm.project(here + length * direction - x, eps)).clamp(0, 1)
        return here

    def _check(self, name: str, check: Callable[..., Any]) -> None:
        """Replace the setting ``name`` by what ``check`` makes of it."""
        object.__setattr__(self, name, check(getattr(self, name), name))


def _slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each image's cross-entropy in ``x``, (n, *input)."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = check_logits(model(leaf), len(x))
        return input_gradient(cross_entropy(logits, check_range(y, logits.shape[-1]), reduction="none"), leaf)
