"""The random numbers of a training step, the same however the images of the step are spread over processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from rs_plugins.core.noise import Noise
from rs_plugins.core.streams import stream
from rs_plugins.core.training.objective import Draws, StreamDraws

BLOCK = 16  # images of a step that share a stream


class BlockDraws:
    """Draws for some of the images of a step: each block of 16 images of the step has a stream of its own.

    So a process draws for its own images alone, and they get what they would get in a single process.

    Args:
        seed: The run's seed.
        purpose: What the draws are for, and in which step.
        first: Place in the step of the first image that is here.
        device: Where the images are.
    """

    def __init__(self, seed: int, purpose: str, *, first: int = 0, device: torch.device | str = "cpu") -> None:
        self._seed, self._purpose, self._first, self._device = seed, purpose, first, device
        self._streams: dict[int, StreamDraws] = {}

    def noise(self, noise: Noise, x: Tensor, samples: int) -> Tensor:
        """Return draws of ``noise`` for ``x`` (n, *input), independent per image and sample, (n, samples, *input)."""
        return self._for(x, lambda draws, block: draws.noise(noise, block, samples))

    def uniform(self, x: Tensor) -> Tensor:
        """Return one number for each of the images ``x`` (n, *input), uniform in [0, 1), as (n,)."""
        return self._for(x, lambda draws, block: draws.uniform(block))

    def fresh(self, purpose: str, key: int = 0) -> torch.Generator:
        """Return a fresh generator for what belongs to no image, the same in all processes."""
        return stream(self._seed, f"{self._purpose} {purpose}", key, device=self._device)

    def _for(self, x: Tensor, draw: Callable[[Draws, Tensor], Tensor]) -> Tensor:
        """Return what ``draw`` gives for the images ``x``: draws for whole blocks, of which those of ``x`` are kept."""
        block = x.new_empty(()).expand(BLOCK, *x.shape[1:])  # only its shape and type count
        numbers = range(self._first // BLOCK, -(-(self._first + len(x)) // BLOCK))
        drawn = torch.cat([draw(self._stream(number), block) for number in numbers])
        return drawn[self._first % BLOCK :][: len(x)]

    def _stream(self, number: int) -> StreamDraws:
        if number not in self._streams:
            generator = stream(self._seed, self._purpose, number, device=self._device)
            self._streams[number] = StreamDraws(generator)
        return self._streams[number]
