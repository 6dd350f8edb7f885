"""GLS: certified training on a loss that is smoothed by Gaussian noise on the weights (Balauca et al. 2024)."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_count, check_labels, check_nonnegative, check_positive
from rs_plugins.core.relaxations.network import LowerSlope, Method, RelaxedNetwork
from rs_plugins.core.relaxations.normalising import BatchNorm
from rs_plugins.core.relaxations.precision import full_precision
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.relaxations.slack import slack
from rs_plugins.core.training.certified_loss import CertifiedLoss
from rs_plugins.core.training.eps_schedule import RampShape, SmoothEps
from rs_plugins.core.training.gradient_estimators import RGS, GradientEstimator, PlainGradient
from rs_plugins.core.training.objective import Batch, Draws
from rs_plugins.core.training.pgpe import PGPE
from rs_plugins.core.training.weight_noise import Tensors, WeightNoiseMode
from rs_plugins.errors import InputError

Gradient = Literal["plain", "rgs", "pgpe"]
SIGMA_W = {"rgs": 0.1, "pgpe": 1e-2}
_CHOICES = {
    "bound": Method,
    "gradient": Gradient,
    "noise_mode": WeightNoiseMode,
    "ramp_shape": RampShape,
    "lower_slope": LowerSlope,
}
_NOISE = ("sigma_w", "sigma_w_end", "decay")
_RGS, _PGPE = ("draws", "noise_mode", "antithetic"), ("population", "ranks", "adapt", "lr_sd", "chunk")
_IDLE = {"plain": (*_RGS, *_PGPE, *_NOISE), "rgs": _PGPE, "pgpe": _RGS}  # what each gradient has no use for


class _Read:
    """The network that was read last, as reading one takes longer than many a step; it is never copied."""

    def __init__(self) -> None:
        self._network: RelaxedNetwork | None = None
        self._of: tuple[Any, ...] = ()

    def __call__(self, model: nn.Module, x: Tensor) -> RelaxedNetwork:
        """Return ``model``, read for images like ``x``; anew if it has other modules than the last time.

        Raises:
            ModelError: If bounds do not go through it in the mode that it is in.
        """
        shape = tuple(x.shape[1:])
        of = (shape, *model.modules())
        if self._network is None or of != self._of:  # modules are equal only to themselves
            network = RelaxedNetwork(model, shape)
            _bound_once(network, x[:1])
            self._network, self._of = network, of
        return self._network

    def __reduce__(self) -> tuple[Any, ...]:
        return _Read, ()


@torch.no_grad()
def _bound_once(network: RelaxedNetwork, x: Tensor) -> None:
    """Refuse before any work, and not when the ramp begins, what bounds do not go through, such as active dropout."""
    own = {
        name: (part.running_mean, part.running_var)
        for name, part in network.model.named_modules()
        if isinstance(part, BatchNorm) and part.running_mean is not None and part.running_var is not None
    }
    network.margins(Region(x, 0.0), x.new_zeros(len(x), dtype=torch.long), method="ibp", statistics=own)


@dataclass(frozen=True)
class Gls:
    """kappa·CE(f(x), y) + (1 - kappa)·L_cert + l1·Σ|W| + warm-up regulariser, smoothed over weights (`CertifiedLoss`).

    The radius grows to ``eps`` on a ramp (`SmoothEps`), and kappa falls from 1 to 1 - ``w_rob`` in proportion. The
    gradient is that at the weights (``"plain"``), a mean of those at weights with noise (`RGS`), or one of loss values
    alone (`PGPE`). PGPE is for small networks and begins best at weights that are trained already, such as those of
    certified training with intervals (`rs-plugins train --weights`).

    Under autocast the bounds of training are as rough as its type; those of `validate` have all digits. With several
    processes batch statistics and the regulariser, which looks at all images of a batch, are those of each
    process's images.

    Args:
        eps: Radius in l-infinity that is trained for, in pixels.
        bound: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``.
        gradient: ``"plain"``, ``"rgs"`` or ``"pgpe"``.
        draws: RGS: gradients per step.
        noise_mode: RGS: ``"relative"`` to the deviation of each weight tensor, or ``"fixed"``.
        antithetic: RGS: whether draws come in pairs of opposite noise.
        population: PGPE: losses per step.
        ranks: PGPE: whether ranks take the place of losses.
        adapt: PGPE: whether a standard deviation for each weight is learned; see `state_dict`.
        lr_sd: PGPE: its learning rate.
        chunk: PGPE: how many losses are computed at once; None: as `PGPE` chooses.
        sigma_w: Standard deviation of the noise up to the end of the ramp, as `RGS` and `PGPE` have it; None: 0.1 for
            RGS, 0.01 for PGPE.
        sigma_w_end: What it falls to, geometrically, after the ramp; None: it stays.
        decay: In how many epochs it does, 0 at once; together with ``sigma_w_end``.
        w_rob: Weight of the certified loss at the end of the ramp, in [0, 1].
        l1: Weight of the sum of absolute weights of linear and convolutional layers (the papers' lambda_1).
        regulariser: Weight of the warm-up regulariser of Shi et al. (2021) at the beginning of the ramp; it falls to 0
            along it, and before there is none.
        ramp_start: After how many epochs, of clean images alone, the ramp begins.
        ramp: How many it takes; 0: the radius is ``eps`` at once.
        ramp_shape: ``"smooth"`` or ``"linear"``.
        lower_slope: Of the lower line of ReLU in CROWN: ``"adaptive"``, 0 or 1, or ``"parallel"`` to the upper one,
            which makes no jumps.

    Raises:
        InputError: If a setting has an impossible value, or one that gradient or bound have no use for is not at its
            default.
    """

    eps: float
    _: KW_ONLY
    bound: Method = "crown-ibp"
    gradient: Gradient = "rgs"
    draws: int = 2
    noise_mode: WeightNoiseMode = "relative"
    antithetic: bool = True
    population: int = 256
    ranks: bool = False
    adapt: bool = False
    lr_sd: float = 0.1
    chunk: int | None = None
    sigma_w: float | None = None
    sigma_w_end: float | None = None
    decay: float | None = None
    w_rob: float = 1.0
    l1: float = 0.0
    regulariser: float = 0.5
    ramp_start: float = 0.0
    ramp: float = 20.0
    ramp_shape: RampShape = "smooth"
    lower_slope: LowerSlope = "adaptive"

    def __post_init__(self) -> None:
        self._check_choices()
        self._check("eps", check_positive)
        if self.eps > 1:
            raise InputError(f"eps: expected a radius in pixels of [0, 1], got {self.eps}; divide by 255")
        for name in ("w_rob", "l1", "regulariser", "ramp_start", "ramp", *_NOISE):
            if getattr(self, name) is not None:
                self._check(name, check_positive if name == "sigma_w_end" else check_nonnegative)
        for name in ("draws", "population"):
            self._check(name, check_count)
        if self.w_rob > 1:
            raise InputError(f"w_rob: expected a number in [0, 1], got {self.w_rob}")
        self._check_used()
        _ = self._estimator  # which checks what is its own

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of ``batch``.

        Raises:
            InputError: If labels are none of the network's.
            ModelError: If ``model`` has a part that bounds cannot go through.
        """
        x, y = batch.x, check_labels(batch.y, n=len(batch.x)).long()
        settings = {name: getattr(self, name) for name in ("bound", "w_rob", "l1", "regulariser", "lower_slope")}
        loss = CertifiedLoss(self._read(model, x), **settings)
        share = self.schedule.share(batch.elapsed)
        value = self._estimator(loss, (x, y, share * self.eps, share), draws, self.noise_scale(batch.elapsed))
        if self.gradient != "plain":
            loss.observe(x)
        return value

    def check_model(self, model: nn.Module, x: Tensor) -> None:
        """Refuse ``model``, in the mode that it is in, if bounds do not go through it on images like ``x``.

        Raises:
            ModelError: If so; the message names what it is.
        """
        self._read(model, x)

    @property
    def schedule(self) -> SmoothEps:
        """The ramp of the radius."""
        return SmoothEps(self.eps, self.ramp_start, self.ramp, self.ramp_shape)

    def noise_scale(self, elapsed: float) -> float:
        """Return by what ``sigma_w`` is multiplied after ``elapsed`` epochs."""
        if self.sigma_w_end is None or self.decay is None:
            return 1.0
        fallen = SmoothEps(1.0, self.schedule.end, self.decay, "linear").share(elapsed)
        return float((self.sigma_w_end / self._sigma_w) ** fallen)

    @property
    def figure(self) -> str:
        """What `validate` counts."""
        return "certified accuracy"

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> int:
        """Return how many of the images ``x`` with labels ``y`` the bound proves to be right within ``eps``.

        ``model`` is in eval mode. Margins are in the type of ``x``, with all its digits, and count if they are above
        its `slack`: in half precision none does.

        Raises:
            InputError: As `full_precision`.
        """
        network = self._read(model, x)
        with full_precision(x.device, x.dtype):
            margins = network.margins(Region(x, self.eps), y, method=self.bound, lower_slope=self.lower_slope)
            return int((margins > slack(margins, network.terms(x, y))).all(dim=1).sum())

    def state_dict(self) -> Tensors:
        """Return what must be kept between steps to go on: the adapted standard deviations, else nothing."""
        return self._estimator.state_dict() if isinstance(self._estimator, PGPE) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` returned.

        Raises:
            InputError: If there is something, and nothing is adapted.
        """
        if isinstance(self._estimator, PGPE):
            self._estimator.load_state_dict(state)
        elif state:
            raise InputError("state: expected none, as adapt is False, got standard deviations")

    @cached_property
    def _read(self) -> _Read:
        return _Read()

    @cached_property
    def _estimator(self) -> GradientEstimator:
        if self.gradient == "rgs":
            return RGS(draws=self.draws, sigma_w=self._sigma_w, mode=self.noise_mode, antithetic=self.antithetic)
        if self.gradient == "pgpe":
            return PGPE(sigma_w=self._sigma_w, **{name: getattr(self, name) for name in _PGPE})
        return PlainGradient()

    @property
    def _sigma_w(self) -> float:
        return SIGMA_W[self.gradient] if self.sigma_w is None else self.sigma_w

    def _check(self, name: str, check: Callable[..., Any]) -> None:
        """Replace the setting ``name`` by what ``check`` makes of it."""
        object.__setattr__(self, name, check(getattr(self, name), name))

    def _check_choices(self) -> None:
        for name, choice in _CHOICES.items():
            if getattr(self, name) not in get_args(choice):
                expected = ", ".join(map(repr, get_args(choice)))
                raise InputError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")

    def _check_used(self) -> None:
        """Refuse settings without an effect."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in _IDLE[self.gradient]:
            if getattr(self, name) != defaults[name]:
                users = " or ".join(repr(each) for each in ("rgs", "pgpe") if name not in _IDLE[each])
                raise InputError(
                    f"{name}: only for the gradient {users}, got {getattr(self, name)!r} with {self.gradient!r}"
                )
        if self.lower_slope != "adaptive" and self.bound == "ibp":
            raise InputError(f"lower_slope: not for the bound 'ibp', which has no lines, got {self.lower_slope!r}")
        if self.lr_sd != defaults["lr_sd"] and not self.adapt:
            raise InputError(f"lr_sd: only with adapt, got {self.lr_sd!r} without")
        if (self.sigma_w_end is None) != (self.decay is None):
            raise InputError(f"sigma_w_end, decay: expected both or neither, got {self.sigma_w_end} and {self.decay}")
        if self.sigma_w_end is not None and (self.adapt or self._sigma_w < self.sigma_w_end):
            reason = "adapt, which learns it" if self.adapt else f"sigma_w={self._sigma_w}, which is less"
            raise InputError(f"sigma_w_end: expected none with {reason}, got {self.sigma_w_end}")
