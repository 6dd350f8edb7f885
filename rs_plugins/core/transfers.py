"""Tensors between host and device, without the host waiting for a GPU."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; the host does not wait until it is there."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()  # of host memory only; else an error
    return tensor.to(device, non_blocking=device.type == "cuda")


def fetch(tally: Tensor, close: Tensor | None) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
    """Return both in host memory, and the event after which they are there; the host does not wait for it."""
    if tally.device.type != "cuda":
        return tally.cpu(), None if close is None else close.cpu(), None
    counts, mask = _pinned(tally), None if close is None else _pinned(close)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tally.device))
    return counts, mask, event


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
