"""How many noisy images go into one forward pass: a rule of thumb, and a short trial of the sizes around it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = (1 / 4, 1 / 2, 1, 2, 4)  # sizes that are tried, beside the rule of thumb
ROUNDS = 5  # the fastest counts: the first warms up, and others may be disturbed
SHARE = 0.01  # at most this much of the work goes into the trial
GAIN = 1.02  # a larger size must be faster than a smaller one by this factor: it needs more memory


def default_chunk(image: Tensor, device: torch.device) -> int:
    """Return how many noisy copies of ``image`` (*input) to put into one forward pass on ``device``.

    On a CPU modest batches are fastest, because the activations then stay in the cache; a GPU wants large ones. Powers
    of two suit the kernels of both.
    """
    pixels = max(1, image.numel())
    if device.type == "cpu":
        return min(_power_of_two(2**18 // pixels, least=16), 512)
    return min(_power_of_two(2**25 // pixels, least=64), 8192)


def calibrated_chunk(seconds: Callable[[int], float], start: int, wanted: int) -> int:
    """Return the size of a forward pass that counts votes fastest, by trying sizes around ``start``.

    Args:
        seconds: Runs one forward pass on that many noisy images and returns the time it took; infinity if the device
            has not enough memory.
        start: The rule of thumb, returned as it is where a trial would cost more than `SHARE` of the work.
        wanted: The work: how many noisy images are to be classified in all, at most.
    """
    sizes = sorted({max(1, int(start * factor)) for factor in FACTORS})
    passes = {size: max(1, start // size) for size in sizes}  # about as many images for small sizes as for others
    if ROUNDS * sum(size * passes[size] for size in sizes) > SHARE * wanted:
        return start
    pace = dict.fromkeys(sizes, math.inf)
    for _ in range(ROUNDS):
        for size in sizes:
            taken = sum(seconds(size) for _ in range(passes[size]))
            pace[size] = min(pace[size], taken / (size * passes[size]))
    best = sizes[0]
    for size in sizes[1:]:
        if pace[size] * GAIN < pace[best]:
            best = size
    return best


def _power_of_two(size: int, *, least: int) -> int:
    """Return the largest power of two up to ``size``, but at least ``least``."""
    return max(1 << max(size, 1).bit_length() - 1, least)
