"""The global random generators, lent to code that knows no others."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """Let others' code draw from the global generators in a known state, and put the caller's states back.

    They are Python's, NumPy's and torch's; those of GPUs only where CUDA is in use already: to begin with it here would
    keep the caller from forking.

    Args:
        seed: As torch takes it, in [-2**63, 2**64).
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
