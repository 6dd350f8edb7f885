"""The global random generators, lent to code that knows no others."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """Let others' code draw from the global generators in a known state, and put the caller's states back.

    They are Python's, NumPy's and torch's.

    Args:
        seed: As torch takes it, in [-2**63, 2**64).
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch_randomness(seed):
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def torch_randomness(seed: int) -> Iterator[None]:
    """Do the same with torch's generators alone, which layers such as dropout draw from; that takes microseconds.

    Those of GPUs count only where CUDA is in use already: to begin with it here would keep the caller from forking.

    Args:
        seed: As torch takes it, in [-2**63, 2**64).
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
