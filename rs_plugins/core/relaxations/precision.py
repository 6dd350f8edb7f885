"""Arithmetic with all the digits of its type: what bounds mean by rounding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rs_plugins.errors import InputError


@contextmanager
def full_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute as the type says: TensorFloat-32 and autocast round a thousand times more than the slack covers.

    Raises:
        InputError: If whether torch does so in ``dtype`` cannot be found out.
    """
    with torch.autocast(device.type, enabled=False):
        if dtype != torch.float32:
            yield
            return
        backends = torch.backends
        try:
            convolutions, products = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:  # set by torch's newer names, on which the older ones will not comment
            raise InputError(
                "dtype: torch.float32 needs products with all digits, which torch's fp32_precision may have switched "
                "off; use torch.float64, or leave that setting"
            ) from None
        try:
            backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            backends.cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)
