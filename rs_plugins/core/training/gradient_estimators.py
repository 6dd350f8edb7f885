"""Gradient estimators: a loss, seen as a function of its weights, becomes a scalar whose backward pass is the estimate.

They are for losses smoothed by noise on weights (Balauca et al. 2024): L(θ) = E[l(θ + e)], e ~ N(0, sigma_w² I).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rs_plugins.core.checks import check_count, check_flag, check_nonnegative
from rs_plugins.core.training.objective import Draws
from rs_plugins.core.training.weight_noise import Tensors, WeightNoiseMode, at, deviations, moved, noise, trained
from rs_plugins.errors import InputError


class GradientEstimator(Protocol):
    """A way to come to a gradient."""

    def __call__(self, loss: nn.Module, inputs: tuple[Any, ...], draws: Draws, scale: float = 1.0) -> Tensor:
        """Return the value of ``loss(*inputs)``; its backward pass adds the estimate to the parameters' gradients.

        Args:
            loss: Returns a scalar; the gradient is that with respect to its parameters, as far as they ask for one.
            inputs: What it is called with.
            draws: Where noise comes from.
            scale: What the standard deviation of the noise is multiplied by in this step.
        """


@dataclass(frozen=True)
class PlainGradient:
    """The gradient at the weights themselves."""

    def __call__(self, loss: nn.Module, inputs: tuple[Any, ...], draws: Draws, scale: float = 1.0) -> Tensor:
        """Return ``loss(*inputs)``; neither ``draws`` nor ``scale`` is used."""
        return loss(*inputs)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class RGS:
    """Randomised gradient smoothing: the mean of gradients at weights with noise (Balauca et al. 2024).

    It is the gradient of the smoothed loss where the loss has no jumps, as with interval bounds; where it has some, as
    with the 0/1 slopes of CROWN, it misses their part. The value is the mean loss. Batch statistics are those at the
    weights with noise, while the buffers of the loss, such as running statistics, stay as they are.

    Attributes:
        draws: Gradients per step; even if ``antithetic``.
        sigma_w: How much noise; 0 with two draws gives the plain gradient bit for bit.
        mode: ``"relative"``: the standard deviation on the weight W of a linear or convolutional layer is sigma_w times
            that of the entries of W, and there is no noise on biases and all else (ours). ``"fixed"``: it is sigma_w
            everywhere, as in the theory.
        antithetic: Whether the noise of every other gradient is the negative of the one before.

    Raises:
        InputError: If a setting has an impossible value.
    """

    draws: int = 2
    sigma_w: float = 0.1
    mode: WeightNoiseMode = "relative"
    antithetic: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", check_count(self.draws, "draws"))
        object.__setattr__(self, "sigma_w", check_nonnegative(self.sigma_w, "sigma_w"))
        object.__setattr__(self, "antithetic", check_flag(self.antithetic, "antithetic"))
        if self.antithetic and self.draws % 2:
            raise InputError(f"draws: expected an even number of antithetic draws, got {self.draws}")
        if self.mode not in get_args(WeightNoiseMode):
            expected = ", ".join(map(repr, get_args(WeightNoiseMode)))
            raise InputError(f"mode: expected one of {expected}, got {self.mode!r}")

    def __call__(self, loss: nn.Module, inputs: tuple[Any, ...], draws: Draws, scale: float = 1.0) -> Tensor:
        """Return the mean loss, whose backward pass adds the mean gradient to those of the parameters of ``loss``."""
        weights = trained(loss)
        deviation = deviations(loss, scale * self.sigma_w, self.mode)
        signs = (1, -1) if self.antithetic else (1,)
        values, total = [], dict[str, Tensor]()
        for key in range(self.draws // len(signs)):
            e = noise(deviation, weights, draws, key)
            for sign in signs:
                value, gradients = value_and_gradients(loss, moved(weights, e, sign), inputs)
                values.append(value)
                for name, gradient in gradients.items():
                    total[name] = gradient if name not in total else total[name].add_(gradient)
        estimate = {name: gradient.div_(self.draws) for name, gradient in total.items()}
        return with_gradients(torch.stack(values).mean(), estimate, weights)


@torch.enable_grad()
def value_and_gradients(
    loss: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensors]:
    """Return the loss at ``weights``, which are nobody else's, and its gradients there; none for those without a part.

    Args:
        loss: Its own weights and buffers stay as they are.
        weights: By the names of the parameters of ``loss``.
        inputs: What it is called with.
    """
    asking = {name: value.requires_grad_() for name, value in weights.items()}
    value = at(loss, asking, inputs)
    gradients = torch.autograd.grad(value, list(asking.values()), allow_unused=True)
    found = {name: each for name, each in zip(asking, gradients, strict=True) if each is not None}
    return value.detach(), {name: each.clone() for name, each in found.items()}


def with_gradients(value: Tensor, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Return ``value`` with a backward pass that gives each parameter its gradient, times what comes from above.

    Args:
        value: A scalar.
        gradients: By name; a parameter that is not among them gets none.
        parameters: By name.
    """
    given = [gradients.get(name) for name in parameters]
    return _Given.apply(value, given, *parameters.values())  # type: ignore[no-any-return,no-untyped-call]


class _Given(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if each is None else above * each for each in ctx.gradients))
