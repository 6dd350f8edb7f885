"""What an attack climbs: three ways to make one loss of the logits f(x + e_i) of an image under m noise draws.

All of them go through the draws in passes of at most ``chunk`` noisy images, and keep only sums from one pass to the
next: memory does not grow with m.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rs_plugins.core.chunks import default_chunk
from rs_plugins.core.geometry import at_least_single, expand_like
from rs_plugins.core.models import check_logits
from rs_plugins.errors import InputError, ModelError

Logits = Callable[[Tensor], Tensor]
ObjectiveName = Literal["log-mean-softmax", "mean-cross-entropy", "mean-logits"]


class Look(NamedTuple):
    """What one look at the noisy copies of n images shows.

    Attributes:
        loss: The objective, (n,), at least in single precision.
        gradient: Its gradient in the images, (n, *input).
        votes: How many noisy copies the base classifier puts into each class, (n, classes); NaN logits count nowhere.
    """

    loss: Tensor
    gradient: Tensor
    votes: Tensor


class Objective(Protocol):
    """A loss of noisy images, high where the smoothed classifier does not say y.

    Attributes:
        name: The objective's name among the settings of an attack.
    """

    name: ClassVar[str]

    def loss(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
        """Return the loss at ``x`` (n, *input) with labels ``y`` (n,) under ``draws`` (m, *input), as (n,)."""

    def look(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Look:
        """Return the loss, its gradient and the votes; works in any gradient mode, leaves parameters alone.

        Raises:
            ModelError: If no gradient flows from the logits to the input.
        """


class _LogMeanSoftmax:
    """-log((1/m) Σ_i softmax(f(x + e_i))_y), the loss of the soft vote (Salman et al. 2019)."""

    name: ClassVar[str] = "log-mean-softmax"

    def loss(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Tensor:
            return -reduce(torch.logaddexp, (chosen(noisy_logits(logits, xs, e), ys).logsumexp(1) for e in parts))

        with torch.no_grad():
            return math.log(len(draws)) + over_images(one, x, y, draws, chunk)

    def look(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Look:
        """With L_c the log of the sum over pass c and L that of all, ∇L = Σ_c exp(L_c - L) ∇L_c, kept as it grows."""

        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Look:
            total, votes = zeros(xs) - math.inf, ys.new_zeros(1)
            gradient = torch.zeros_like(xs, dtype=at_least_single(xs))
            for part in parts:
                leaf = xs.clone().requires_grad_()
                output = noisy_logits(logits, leaf, part)
                share = chosen(output, ys).logsumexp(dim=1)
                slope = input_gradient(share, leaf)
                share = share.detach()
                new = torch.logaddexp(total, share)
                gradient = weighted(gradient, total - new) + weighted(slope.to(gradient.dtype), share - new)
                total, votes = new, votes + count_votes(output)
            return Look(math.log(len(draws)) - total, -gradient.to(xs.dtype), votes)

        return look_over_images(one, x, y, draws, chunk)


class _MeanCrossEntropy:
    """-(1/m) Σ_i log softmax(f(x + e_i))_y: attacks the noisy base classifier, as EOT does (Athalye et al. 2018)."""

    name: ClassVar[str] = "mean-cross-entropy"

    def loss(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Tensor:
            return -sum((chosen(noisy_logits(logits, xs, e), ys).sum(1) for e in parts), zeros(xs))

        with torch.no_grad():
            return over_images(one, x, y, draws, chunk) / len(draws)

    def look(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Look:
        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Look:
            total, votes = zeros(xs), ys.new_zeros(1)
            gradient = torch.zeros_like(xs, dtype=at_least_single(xs))
            for part in parts:
                leaf = xs.clone().requires_grad_()
                output = noisy_logits(logits, leaf, part)
                share = -chosen(output, ys).sum(dim=1) / len(draws)
                gradient = gradient + input_gradient(share, leaf)
                total, votes = total + share.detach(), votes + count_votes(output)
            return Look(total, gradient.to(xs.dtype), votes)

        return look_over_images(one, x, y, draws, chunk)


class _MeanLogits:
    """-log softmax((1/m) Σ_i f(x + e_i))_y: one loud copy can outweigh many.

    Its gradient is that of Σ_i ⟨w, f(x + e_i)⟩ with w = (softmax(mean) - onehot(y))/m held fixed. So the mean comes
    first: where the draws do not fit into one pass, they all go through the model once more, without a gradient.
    """

    name: ClassVar[str] = "mean-logits"

    def loss(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Tensor:
            return cross_entropy(_mean_logits(logits, xs, parts), ys, reduction="none")

        with torch.no_grad():
            return over_images(one, x, y, draws, chunk)

    def look(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Look:
        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Look:
            mean = _mean_logits(logits, xs, parts) if len(parts) > 1 else None
            gradient, votes = torch.zeros_like(xs, dtype=at_least_single(xs)), ys.new_zeros(1)
            for part in parts:
                leaf = xs.clone().requires_grad_()
                output = noisy_logits(logits, leaf, part)
                mean = output.detach().mean(dim=1) if mean is None else mean
                weight = (mean.softmax(dim=1) - one_hot(ys, mean.shape[1])) / len(draws)
                gradient = gradient + input_gradient((output * weight.unsqueeze(1)).sum(dim=(1, 2)), leaf)
                votes = votes + count_votes(output)
            assert mean is not None
            return Look(cross_entropy(mean, ys, reduction="none"), gradient.to(xs.dtype), votes)

        return look_over_images(one, x, y, draws, chunk)


LOG_MEAN_SOFTMAX: Objective = _LogMeanSoftmax()
MEAN_CROSS_ENTROPY: Objective = _MeanCrossEntropy()
MEAN_LOGITS: Objective = _MeanLogits()


def objective_named(name: str) -> Objective:
    """Return the objective of that name.

    Raises:
        InputError: If there is none.
    """
    for objective in (LOG_MEAN_SOFTMAX, MEAN_CROSS_ENTROPY, MEAN_LOGITS):
        if objective.name == name:
            return objective
    raise InputError(f"objective: expected one of {', '.join(map(repr, get_args(ObjectiveName)))}, got {name!r}")


def noisy_logits(logits: Logits, x: Tensor, draws: Tensor) -> Tensor:
    """Return f(x + e_i) for n images, (n, k, classes), at least in single precision.

    Args:
        logits: The base classifier, (batch, *input) in pixels to (batch, classes).
        x: (n, *input), pixels.
        draws: k draws that all images share, (k, *input), or each image's own, (n, k, *input).

    Raises:
        ModelError: If they are no logits.
    """
    noisy = x.unsqueeze(1) + draws
    n, k = noisy.shape[:2]
    output = check_logits(logits(noisy.flatten(0, 1)), n * k)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    return output.reshape(n, k, output.shape[1])


def log_probabilities(output: Tensor) -> Tensor:
    """Return the log softmax of logits (…, classes).

    Probability 0 gives the lowest finite number: the gradient of a logsumexp over -inf alone would be NaN.
    """
    output = output.log_softmax(dim=-1)
    return output.masked_fill(output == -math.inf, torch.finfo(output.dtype).min)


def count_votes(output: Tensor) -> Tensor:
    """Return how many of the noisy copies (n, k, classes) fall into each class, (n, classes).

    A copy with NaN logits falls into none.
    """
    output = output.detach()
    votes = one_hot(output.argmax(dim=2), output.shape[2]) * ~output.isnan().any(dim=2, keepdim=True)
    return votes.sum(dim=1)


def passes(x: Tensor, draws: Tensor, chunk: int | None) -> tuple[int, Sequence[Tensor]]:
    """Return how many images go into one pass, and the draws split so that it holds at most ``chunk`` noisy images."""
    chunk = chunk or default_chunk(draws[0], x.device)
    images = max(1, min(len(x), chunk))
    return images, draws.split(max(1, chunk // images))


def over_images(
    one: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor], x: Tensor, y: Tensor, draws: Tensor, chunk: int | None
) -> Tensor:
    """Return what ``one`` says of as many images and labels as fit into a pass, and the draws in parts, for all."""
    if not len(x):
        return zeros(x)
    images, parts = passes(x, draws, chunk)
    return torch.cat([one(xs, ys, parts) for xs, ys in zip(x.split(images), y.long().split(images), strict=True)])


def look_over_images(
    one: Callable[[Tensor, Tensor, Sequence[Tensor]], Look],
    x: Tensor,
    y: Tensor,
    draws: Tensor,
    chunk: int | None,
    *,
    gradients: bool = True,
) -> Look:
    """As `over_images`, with or without gradients, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        x, y, draws = x.detach().clone(), y.long().clone(), draws.clone()
        if not len(x):
            return Look(zeros(x), x, y.new_zeros(0, 0))
        images, parts = passes(x, draws, chunk)
        looks = [one(xs, ys, parts) for xs, ys in zip(x.split(images), y.split(images), strict=True)]
        return Look(*(torch.cat(part) for part in zip(*looks, strict=True)))


def _mean_logits(logits: Logits, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return (1/m) Σ_i f(x + e_i), (n, classes), without a gradient."""
    with torch.no_grad():
        return reduce(torch.add, (noisy_logits(logits, x, e).sum(dim=1) for e in parts)) / sum(map(len, parts))


def chosen(output: Tensor, y: Tensor) -> Tensor:
    """Return log softmax(f(x + e_i))_y, (n, k), of logits (n, k, classes)."""
    return log_probabilities(output)[torch.arange(len(y)), :, y]


def input_gradient(share: Tensor, leaf: Tensor) -> Tensor:
    """Return the gradient in ``leaf`` (n, *input) of the sum of ``share`` (n,).

    Raises:
        ModelError: If there is none.
    """
    # Logits can have a gradient that goes to the parameters alone.
    (slope,) = torch.autograd.grad(share.sum(), leaf, allow_unused=True) if share.requires_grad else (None,)
    if slope is None:
        raise ModelError("model: no gradient flows from its logits to its input, so gradients cannot attack it")
    return slope


def zeros(x: Tensor) -> Tensor:
    """Return (n,) zeros for sums over the draws of ``x`` (n, *input)."""
    return x.new_zeros(len(x), dtype=at_least_single(x))


def weighted(gradient: Tensor, log_weight: Tensor) -> Tensor:
    """Return ``gradient`` (n, *input) times the exponential of ``log_weight`` (n,)."""
    return gradient * expand_like(log_weight.exp(), gradient).to(gradient.dtype)
