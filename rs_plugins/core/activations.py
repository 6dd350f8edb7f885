"""Smooth activations in the place of ReLU (Xie et al. 2020, "Smooth Adversarial Training").

Where the backward pass of an attack or of a bound goes through ReLU, its gradient jumps at 0. The activations here are
near ReLU and differentiable. Those that torch has (`torch.nn.SiLU`, `torch.nn.GELU`, `torch.nn.ELU`, `torch.nn.CELU`,
`torch.nn.Mish`) are not written again; `make_activation` makes any of them by name.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rs_plugins.core.checks import check_flag, check_positive
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward
from rs_plugins.errors import InputError

IDENTITY_ABOVE = 40.0  # log(1 + exp(40)) - 40 is 4e-18: less than the rounding of 40 in float64
_LOG1P_EXPONENT = 31 / 32  # of the largest number: torch 2.3 takes log1p of larger ones for infinite
_LEAST_CURVATURE = 1e-6  # below, the gradient of log(1 + b z) / b with respect to b is lost in rounding


def smooth_relu(z: Tensor, curvature: Tensor | float) -> Tensor:
    """SmoothReLU (Xie et al. 2020): z - log(1 + b z) / b for z >= 0, else 0.

    The derivative is b z / (1 + b z) for z >= 0, else 0: continuous, with slope b at 0+. Near ReLU for a large b.

    Args:
        z: Any shape.
        curvature: b > 0, the second derivative at 0+; a number or a tensor that broadcasts with ``z``.
    """
    b = _finite(torch.as_tensor(curvature, dtype=z.dtype, device=z.device))
    positive = functional.threshold(z, 0.0, 0.0)  # ReLU by a name that nobody puts another activation in place of
    return positive - torch.log1p(_finite(b * positive)) / b


def _finite(values: Tensor) -> Tensor:
    """Put a large number where b z, or b in half precision, is larger: log(1 + b z) / b is lost in rounding there."""
    return values.clamp_max(torch.finfo(values.dtype).max ** _LOG1P_EXPONENT)


def parametric_softplus(z: Tensor, sharpness: float) -> Tensor:
    """Softplus with a sharpness a (Xie et al. 2020): log(1 + exp(a z)) / a; its derivative is logistic(a z).

    Args:
        z: Any shape.
        sharpness: a > 0; 1 is the usual softplus, and the larger, the nearer to ReLU: log(2) / a above it at 0.
    """
    return functional.softplus(z, beta=sharpness, threshold=IDENTITY_ABOVE)


class SmoothReLU(nn.Module):
    """SmoothReLU (Xie et al. 2020): z - log(1 + b z) / b for z >= 0, else 0, where b = b_raw².

    It is once continuously differentiable: f'(z) = b z / (1 + b z) for z >= 0, else 0; f''(0+) = b. One scalar b for
    all units.

    Args:
        initial: b_raw at the start, above 0; 20 as in the authors' code, so b = 400.
        learnable: Whether ``b_raw`` is a parameter, trained with the weights; otherwise it is a buffer.
    """

    b_raw: Tensor

    def __init__(self, initial: float = 20.0, *, learnable: bool = True) -> None:
        super().__init__()
        start = torch.tensor(check_positive(initial, "initial"))
        if check_flag(learnable, "learnable"):
            self.b_raw = nn.Parameter(start)
        else:
            self.register_buffer("b_raw", start)

    @property
    def curvature(self) -> Tensor:
        """The scalar b = b_raw², at least 1e-6, where the function is next to 0 for all inputs of a usual size."""
        b = self.b_raw.square()
        return torch.where(b > _LEAST_CURVATURE, b, torch.full_like(b, _LEAST_CURVATURE))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that it has in torch's activations
        """SmoothReLU of every entry of ``input``, of any shape."""
        return smooth_relu(input, self.curvature)

    def extra_repr(self) -> str:
        """What the module is made with."""
        return f"b_raw={float(self.b_raw.detach()):.6g}, learnable={isinstance(self.b_raw, nn.Parameter)}"


class ParametricSoftplus(nn.Module):
    """Softplus with a sharpness a (Xie et al. 2020): log(1 + exp(a z)) / a, with the derivative logistic(a z).

    Infinitely often differentiable, convex, and at most log(2) / a above ReLU.

    Args:
        sharpness: a > 0. The paper's value is not known to us; 10 is ours.
    """

    def __init__(self, sharpness: float = 10.0) -> None:
        super().__init__()
        self.sharpness = check_positive(sharpness, "sharpness")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that it has in torch's activations
        """Softplus of every entry of ``input``, of any shape."""
        return parametric_softplus(input, self.sharpness)

    def extra_repr(self) -> str:
        """What the module is made with."""
        return f"sharpness={self.sharpness:g}"


def make_activation(name: str, **options: Any) -> nn.Module:
    """A fresh activation module by name.

    Args:
        name: "relu", "silu", "gelu", "elu", "celu", "softplus", "mish", "smooth-relu" or "parametric-softplus"; or
            "relu-attack-grad", "relu-update-grad" or "relu-both-grads", for `ReLUWithSmoothBackward`.
        options: What the module's constructor takes: ``approximate="tanh"`` of GELU, ``alpha`` of ELU and CELU,
            ``initial`` and ``learnable`` of `SmoothReLU`, ``sharpness`` of the latter four, ….

    Raises:
        InputError: If there is no such activation, or it has no such option.
    """
    factory = ACTIVATIONS.get(name)
    if factory is None:
        raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    try:
        return factory(**options)
    except TypeError as error:
        raise InputError(f"activation {name}: {error}") from None


ACTIVATIONS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "elu": nn.ELU,
        "celu": nn.CELU,
        "softplus": nn.Softplus,
        "mish": nn.Mish,
        "smooth-relu": SmoothReLU,
        "parametric-softplus": ParametricSoftplus,
        "relu-attack-grad": partial(ReLUWithSmoothBackward, "attack_grad"),
        "relu-update-grad": partial(ReLUWithSmoothBackward, "update_grad"),
        "relu-both-grads": partial(ReLUWithSmoothBackward, "both_grads"),
    }
)
