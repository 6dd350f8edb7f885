"""Numbers and tensors of a model that are added to its values or multiplied with them."""

from dataclasses import dataclass

from torch import Tensor

from rs_plugins.core.relaxations.layers import Call


@dataclass(frozen=True)
class Operand:
    """A number, or a tensor of the model that fits a node of ``ndim`` dimensions."""

    source: float | str
    ndim: int

    def __call__(self, call: Call) -> Tensor:
        """Return it as a tensor of the call's type that broadcasts against the node."""
        if not isinstance(self.source, str):
            return call.like.new_tensor(self.source)
        value = call.constants[self.source].to(call.like)
        return value.squeeze(0) if value.ndim > self.ndim else value


@dataclass(frozen=True)
class Shift:
    """z + sign·operand, or operand - z where ``turned``."""

    operand: Operand
    sign: float
    turned: bool

    def __call__(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and shift."""
        return (call.like.new_tensor(-1.0) if self.turned else None), self.sign * self.operand(call)


@dataclass(frozen=True)
class Scale:
    """z·operand, or z / operand."""

    operand: Operand
    divide: bool

    def __call__(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and shift."""
        value = self.operand(call)
        return (1 / value if self.divide else value), None
