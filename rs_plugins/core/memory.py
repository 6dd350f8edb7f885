"""Too little memory: how it is told from other errors, and passes that get smaller until they fit."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# in what torch's errors say, on a GPU, on a CPU, and of sizes that no memory has
_SAID = ("out of memory", "not enough memory", "allocate memory", "alloc_failed", "storage size calculation overflowed")


def is_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that there was too little memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _SAID)


class Room:
    """How many images go into a pass at once, as far as passes have failed; without a limit at first.

    Attributes:
        most: At most so many; None where nothing has failed yet.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def parts(self, compute: Callable[[Tensor], T], batch: Tensor) -> list[T]:
        """Return what ``compute`` returns for ``batch`` (n, *input), in parts where memory is too small for all.

        After an error of memory it is tried with half as many images at once, here and from then on, down to one.

        Raises:
            Exception: Whatever ``compute`` raises else, or of a single image.
        """
        while True:
            size = len(batch) if self.most is None else min(self.most, len(batch))
            try:
                return [compute(batch)] if size == len(batch) else [compute(part) for part in batch.split(size)]
            except Exception as error:  # torch.OutOfMemoryError, MemoryError, or a RuntimeError of a CPU
                if not is_of_memory(error) or size == 1:
                    raise
            # here and not above: the error's traceback holds the tensors of the pass
            self.most = size // 2
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Make glibc keep the memory of activations between passes, once it has seen a large block freed.

    Until then it returns each to the kernel and asks for it again, page by page, which can take as long as the network.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8)  # below the 32 MiB up to which it learns; no page of it is touched
