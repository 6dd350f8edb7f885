"""Losses of logits (n, m, classes) of n images under m noise draws each; in log space, so that nothing underflows."""

import math

from torch import Tensor
from torch.nn.functional import cross_entropy

from rs_plugins.core.checks import check_labels
from rs_plugins.errors import InputError


def mean_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean of CE(f(x + e_i), y) over images and draws.

    Args:
        output: The logits.
        y: Labels (n,), integers of any type, or class probabilities (n, classes).

    Raises:
        InputError: If ``y`` is neither.
    """
    n, draws, classes = output.shape
    if y.ndim == 2 and y.is_floating_point():
        if y.shape != (n, classes):
            raise InputError(f"y: expected class probabilities of shape ({n}, {classes}), got shape {tuple(y.shape)}")
        y = y.to(output.dtype)
    else:
        y = check_range(check_labels(y, n=n).long(), classes)
    return cross_entropy(output.flatten(0, 1), y.repeat_interleave(draws, dim=0))


def check_range(y: Tensor, classes: int) -> Tensor:
    """Return the labels ``y`` (n,) if they are in [0, classes); on a GPU without a look, which would wait for it.

    There a label out of range ends the program, and -100, the one that a cross-entropy leaves out, is not noticed.

    Raises:
        InputError: Otherwise.
    """
    return y if y.is_cuda else check_labels(y, n=len(y), classes=classes)


def log_mean_probability(log_f: Tensor) -> Tensor:
    """Return log((1/m) Σ_i F(x + e_i)), (n, classes), of log probabilities (n, m, classes)."""
    return log_f.logsumexp(dim=1) - math.log(log_f.shape[1])


def cross_entropy_between(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return -Σ_c p_c log q_c, (…,), of log probabilities (…, classes); gradients flow into both."""
    return -(log_p.exp() * log_q).sum(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c - log q_c), (…,), of log probabilities; gradients flow into both."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
