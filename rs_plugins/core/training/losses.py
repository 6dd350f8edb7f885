"""Losses of logits (n, m, classes) of n images under m noise draws each; in log space, so that nothing underflows."""

import math

from torch import Tensor
from torch.nn.functional import cross_entropy


def mean_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean of CE(f(x + e_i), y) over images and draws; ``y`` is (n,), or probabilities (n, classes)."""
    return cross_entropy(output.flatten(0, 1), y.repeat_interleave(output.shape[1], dim=0))


def log_mean_probability(log_f: Tensor) -> Tensor:
    """Return log((1/m) Σ_i F(x + e_i)), (n, classes), of log probabilities (n, m, classes)."""
    return log_f.logsumexp(dim=1) - math.log(log_f.shape[1])


def cross_entropy_between(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return -Σ_c p_c log q_c, (…,), of log probabilities (…, classes); gradients flow into both."""
    return -(log_p.exp() * log_q).sum(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c - log q_c), (…,), of log probabilities; gradients flow into both."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
