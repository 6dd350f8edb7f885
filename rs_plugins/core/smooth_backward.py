"""ReLU whose gradient is that of a smooth function (Xie et al. 2020): what smoothness alone does to training.

The paper asks first where smooth gradients help: where an attack looks for its direction, where the weights are
updated, or at both. The network's outputs stay those of ReLU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rs_plugins.core.checks import check_positive
from rs_plugins.errors import InputError

SmoothWhere = Literal["attack_grad", "update_grad", "both_grads"]
Purpose = Literal["attack", "update"]


class ReLUWithSmoothBackward(nn.Module):
    """ReLU with the gradient of `ParametricSoftplus`, logistic(a z), where `gradient_for` says so (Xie et al. 2020).

    Anywhere else it is ReLU with ReLU's gradient: an attack that puts the network to the test sees the true one. The
    fourth mode of the paper, smooth forward and backward, is a smooth activation such as `ParametricSoftplus`.

    Args:
        where: Whose gradient is smooth: "attack_grad", that of the attack in training; "update_grad", that of the
            weights; "both_grads".
        sharpness: a > 0. The paper's value is not known to us; 10 is ours.
    """

    def __init__(self, where: SmoothWhere = "both_grads", *, sharpness: float = 10.0) -> None:
        super().__init__()
        if where not in get_args(SmoothWhere):
            raise InputError(f"where: expected one of {', '.join(map(repr, get_args(SmoothWhere)))}, got {where!r}")
        self.where = where
        self.sharpness = check_positive(sharpness, "sharpness")
        self._purpose: Purpose | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that it has in torch's activations
        """ReLU of every entry of ``input``, of any shape."""
        smooth = self._purpose is not None and self.where in (f"{self._purpose}_grad", "both_grads")
        if not smooth:
            return functional.relu(input)
        result: Tensor = _SmoothBackward.apply(input, self.sharpness)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """What the module is made with."""
        return f"where={self.where!r}, sharpness={self.sharpness:g}"


@contextmanager
def gradient_for(model: nn.Module, purpose: Purpose) -> Iterator[nn.Module]:
    """Let each `ReLUWithSmoothBackward` in ``model`` know whose gradient is taken; afterwards as before.

    The forward pass has to be inside the block; the backward pass need not, except with torch.utils.checkpoint, which
    runs the forward pass again: outside the block its ``use_reentrant=False`` fails, and True takes ReLU's gradient.
    In a model without such modules nothing happens, so that a training step can always say what it does. The purpose
    is kept in the modules: two threads must not use one model for different purposes at the same time.

    Args:
        model: The model.
        purpose: "attack" or "update".

    Raises:
        InputError: If there is no such purpose.
    """
    if purpose not in get_args(Purpose):
        raise InputError(f"purpose: expected one of {', '.join(map(repr, get_args(Purpose)))}, got {purpose!r}")
    parts = [part for part in model.modules() if isinstance(part, ReLUWithSmoothBackward)]
    before = [part._purpose for part in parts]
    try:
        for part in parts:
            part._purpose = purpose
        yield model
    finally:
        for part, old in zip(parts, before, strict=True):
            part._purpose = old


class _SmoothBackward(torch.autograd.Function):
    """ReLU forward; backward, the gradient times logistic(a z)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, sharpness: float) -> Tensor:
        return functional.threshold(z, 0.0, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        z, ctx.sharpness = inputs
        ctx.save_for_backward(z, output)  # one more than ReLU keeps, so that checkpointing sees the difference

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        z, _ = ctx.saved_tensors
        return gradients[0] * torch.sigmoid(ctx.sharpness * z), None
