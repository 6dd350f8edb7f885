"""Which class a targeted attack aims at: vectorised, and without the global generator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError

TargetMap = Callable[[Tensor, Tensor | None], Tensor]


def labels_are_targets(images: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return ``labels``: what the caller gives are the targets. A function, and not a lambda, so that it pickles."""
    del images
    return labels


def least_likely_targets(scores: Tensor, labels: Tensor, kth: int) -> Tensor:
    """Return the class of ``kth``-lowest score among those that are not the label, (n,).

    Args:
        scores: (n, classes).
        labels: (n,), in [0, classes).
        kth: 1 for the lowest.

    Raises:
        InputError: If there are fewer than ``kth`` other classes.
    """
    others = scores.shape[1] - 1
    if kth > others:
        raise InputError(f"kth_min: expected at most {others}, the number of other classes, got {kth}")
    return scores.scatter(1, labels.unsqueeze(1), math.inf).kthvalue(kth, dim=1).indices


def random_targets(images: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """Return a class other than the label, (n,), uniform over seeds and a function of (seed, image, label) alone.

    Args:
        images: (n, *input).
        labels: (n,), in [0, classes).
        classes: The number of classes, >= 2.
        seed: Seed of the choice.
    """
    return (labels + 1 + _content_keys(images, seed) % (classes - 1)) % classes


def _content_keys(images: Tensor, seed: int) -> Tensor:
    """Return a 31-bit hash of each image, (n,): the bits of its pixels in 16-bit words times random 64-bit weights.

    Integer sums wrap around and are exact, so a key does not depend on the batch. Two contents differ in some word, by
    less than 2**16, so the upper bits of the sum, which are kept, differ at random.
    """
    words = images.contiguous().view(torch.int16).flatten(1).long()
    limits = torch.iinfo(torch.int64)
    source = stream(seed, "targets", device=images.device)
    weights = torch.randint(limits.min, limits.max, words.shape[1:], generator=source, device=images.device)
    return ((words * weights).sum(dim=1) >> 32) & 0x7FFFFFFF
