"""PGPE: a gradient from loss values alone, for losses that need not be differentiable (Sehnke et al. 2010)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, vmap

from rs_plugins.core.checks import check_count, check_flag, check_nonnegative, check_positive
from rs_plugins.core.training.gradient_estimators import with_gradients
from rs_plugins.core.training.objective import Draws
from rs_plugins.core.training.weight_noise import Tensors, at, moved, noise, trained
from rs_plugins.errors import InputError

MOST_CHANGE = 0.2  # of a standard deviation in one step, as in pgpelib
_ENTRIES = 2**22  # of weights and inputs that a chunk may hold


@dataclass
class _State:
    """What a run of PGPE remembers from step to step.

    Attributes:
        stdev: The standard deviation for each entry of each parameter, once it has been adapted.
        sequential: Whether the loss cannot be computed for several weights at once.
    """

    stdev: Tensors = field(default_factory=dict)
    sequential: bool = False


@dataclass(frozen=True, kw_only=True)
class PGPE:
    """Policy gradients with parameter-based exploration, antithetic (Sehnke et al. 2010), as in Balauca et al. (2024).

    The gradient of E[l(θ + e)], e ~ N(0, sd²), is estimated by the mean over pairs of (l(θ + e) - l(θ - e))/2 · e/sd²,
    without a bias, also where l has jumps. Its cosine with the true gradient is about √(P/(P + D)) for P pairs and D
    parameters, so it is for small networks, and begins best at weights that are trained already. The value is the mean
    loss; buffers of the loss stay as they are. It lives on small differences of losses, which half precision hides.

    With ``adapt`` it has a state, which `state_dict` returns; gradients that several processes take on a batch together
    then differ from those of one, so that is for one process alone, as are ``ranks``.

    Attributes:
        population: Loss values per step, two for each pair.
        sigma_w: Standard deviation of the noise on each trained parameter, at the beginning if it is adapted.
        ranks: Whether losses give way to their centred ranks in [-0.5, 0.5]: another objective.
        adapt: Whether a standard deviation per entry is learned, by at most 20 % in a step.
        lr_sd: Learning rate of the standard deviations.
        chunk: How many losses are computed at once by ``torch.func.vmap``; 1: one after the other, as it is done for
            losses that vmap cannot compute, such as those whose way through the code depends on values. None: one after
            the other on a CPU, where nothing is won, else as many as have room.

    Raises:
        InputError: If a setting has an impossible value.
    """

    population: int = 256
    sigma_w: float = 1e-2
    ranks: bool = False
    adapt: bool = False
    lr_sd: float = 0.1
    chunk: int | None = None
    _state: _State = field(init=False, repr=False, compare=False, default_factory=_State)

    def __post_init__(self) -> None:
        object.__setattr__(self, "population", check_count(self.population, "population", least=2))
        if self.population % 2:
            raise InputError(f"population: expected an even number, two for each pair, got {self.population}")
        object.__setattr__(self, "sigma_w", check_positive(self.sigma_w, "sigma_w"))
        object.__setattr__(self, "lr_sd", check_nonnegative(self.lr_sd, "lr_sd"))
        for name in ("ranks", "adapt"):
            object.__setattr__(self, name, check_flag(getattr(self, name), name))
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_count(self.chunk, "chunk"))

    @torch.no_grad()
    def __call__(self, loss: nn.Module, inputs: tuple[Any, ...], draws: Draws, scale: float = 1.0) -> Tensor:
        """Return the mean loss, whose backward pass adds the estimate to the gradients of the parameters of ``loss``.

        Raises:
            InputError: If several processes train with ``ranks`` or ``adapt``, or the state is of other parameters.
        """
        self._check_alone()
        weights = trained(loss)
        deviation = self._deviations(weights, check_positive(scale, "scale"))
        values = self._losses(loss, inputs, weights, deviation, draws)
        heights = centred_ranks(values.flatten()).view_as(values) if self.ranks else values
        estimate = {name: torch.zeros_like(value) for name, value in weights.items()}
        for key, (plus, minus) in enumerate(heights.unbind(dim=1)):
            for name, e in noise(deviation, weights, draws, key).items():
                estimate[name] += (plus - minus) / self.population * e / deviation[name] ** 2
        if self.adapt:
            self._adapt(heights, weights, deviation, draws)
        with torch.enable_grad():
            return with_gradients(values.mean(), estimate, weights)

    def state_dict(self) -> Tensors:
        """Return copies of the adapted standard deviations by parameter; empty if there are none."""
        return {name: value.clone() for name, value in self._state.stdev.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` returned.

        Raises:
            InputError: If there are standard deviations, though none are adapted, or one is not above 0.
        """
        if state and not self.adapt:
            raise InputError("state: expected none, as adapt is False, got standard deviations")
        for name, value in state.items():
            if not bool((value > 0).all()):
                raise InputError(f"state: expected standard deviations above 0, got others for {name}")
        self._state.stdev = {name: value.clone() for name, value in state.items()}

    def _check_alone(self) -> None:
        together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        for name in ("ranks", "adapt"):
            if getattr(self, name) and together:
                raise InputError(f"{name}: expected a process alone, got {distributed.get_world_size()} together")

    def _deviations(self, weights: Mapping[str, Tensor], scale: float) -> Tensors:
        """Return the standard deviation of each parameter, a number or one per entry."""
        stdev = self._state.stdev
        if not self.adapt:
            return {name: value.new_tensor(scale * self.sigma_w) for name, value in weights.items()}
        if not stdev:
            return {name: torch.full_like(value, scale * self.sigma_w) for name, value in weights.items()}
        shapes, expected = ({name: tuple(each.shape) for name, each in of.items()} for of in (stdev, weights))
        if shapes != expected:
            name = next(iter(dict(shapes.items() ^ expected.items())))
            raise InputError(f"state: its standard deviations are of another network, see {name}")
        return {name: scale * stdev[name].to(value) for name, value in weights.items()}

    def _losses(
        self, loss: nn.Module, inputs: tuple[Any, ...], weights: Tensors, deviation: Tensors, draws: Draws
    ) -> Tensor:
        """Return the losses at θ + e and at θ - e for each pair, (2, pairs)."""
        pairs, chunk = self.population // 2, self._chunk(weights, inputs)
        found = []
        for first in range(0, pairs, max(1, chunk // 2)):
            keys = range(first, min(pairs, first + max(1, chunk // 2)))
            there = [moved(weights, noise(deviation, weights, draws, key), sign) for sign in (1, -1) for key in keys]
            if chunk == 1 or self._state.sequential:
                values = one_by_one(loss, there, inputs)
            else:
                values = self._at_once(loss, there, inputs)
            found.append(values.view(2, len(keys)))
        return torch.cat(found, dim=1)

    def _at_once(self, loss: nn.Module, there: list[Tensors], inputs: tuple[Any, ...]) -> Tensor:
        try:
            return at_once(loss, there, inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # what vmap raises at operations that it cannot do; a true error comes again
            values = one_by_one(loss, there, inputs)
            self._state.sequential = True
            return values

    def _chunk(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> int:
        if self.chunk is not None:
            return self.chunk
        if all(value.device.type == "cpu" for value in weights.values()):
            return 1
        tensors = [*weights.values(), *(each for each in inputs if isinstance(each, Tensor))]
        return max(2, min(self.population, _ENTRIES // sum(each.numel() for each in tensors)))

    def _adapt(self, heights: Tensor, weights: Tensors, deviation: Tensors, draws: Draws) -> None:
        """Take a step on the standard deviations."""
        gains = heights.mean() - heights.mean(dim=0)  # fitness, which is minus the loss, above its mean
        change = {name: torch.zeros_like(value) for name, value in deviation.items()}
        for key, gain in enumerate(gains):
            for name, e in noise(deviation, weights, draws, key).items():
                sd = deviation[name]
                change[name] += gain / len(gains) * (e**2 - sd**2) / sd
        self._state.stdev = {
            name: torch.minimum(
                torch.maximum(sd + self.lr_sd * change[name], (1 - MOST_CHANGE) * sd), (1 + MOST_CHANGE) * sd
            )
            for name, sd in deviation.items()
        }


def centred_ranks(values: Tensor) -> Tensor:
    """Return the ranks of ``values`` (n,), from -0.5 for the least to 0.5 for the greatest; equal ones share theirs."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(dim=1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(dim=1) - 1
    return (below + equal / 2).to(values.dtype) / (len(values) - 1) - 0.5


def one_by_one(loss: nn.Module, there: list[Tensors], inputs: tuple[Any, ...]) -> Tensor:
    """Return the losses at several weights, (n,), computed one after the other."""
    return torch.stack([at(loss, weights, inputs) for weights in there])


def at_once(loss: nn.Module, there: list[Tensors], inputs: tuple[Any, ...]) -> Tensor:
    """Return the losses at several weights, (n,), computed together.

    Raises:
        RuntimeError: If ``torch.func.vmap`` cannot do that.
    """
    weights = {name: torch.stack([each[name] for each in there]) for name in there[0]}
    changing = dict(_running_statistics(loss))
    own = {name: value.expand(len(there), *value.shape).clone() for name, value in changing.items()}
    shared = {name: value.clone() for name, value in loss.named_buffers() if name not in changing}

    def value(each: Tensors) -> Tensor:
        return functional_call(loss, {**shared, **each}, inputs)  # type: ignore[no-any-return]

    result: Tensor = vmap(value)({**own, **weights})
    return result


def _running_statistics(loss: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that batch normalisation changes in a pass in train mode, with their names."""
    for path, part in loss.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            yield from part.named_buffers(path, recurse=False)
