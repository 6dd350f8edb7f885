"""Random changes of training images that leave their class as it is."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rs_plugins.core.training.objective import Draws
from rs_plugins.errors import InputError

PADDING = 4  # pixels; what all the papers use for CIFAR-10


def crop_and_flip(x: Tensor, draws: Draws, *, padding: int = PADDING) -> Tensor:
    """Return ``x`` moved by up to ``padding`` pixels each way, with zeros coming in, and half of it mirrored.

    Args:
        x: (n, channels, height, width), pixels in [0, 1].
        draws: Of these three numbers are taken for each image.
        padding: How far an image may move, in pixels.

    Raises:
        InputError: If ``x`` has another rank.
    """
    if x.ndim != 4:
        raise InputError(f"augment: expected images (n, channels, height, width), got shape {tuple(x.shape)}")
    height, width = x.shape[2:]
    down, right = ((draws.uniform(x) * (2 * padding + 1)).long().clamp(max=2 * padding) for _ in range(2))
    mirrored = draws.uniform(x) < 0.5
    rows = down.unsqueeze(1) + torch.arange(height, device=x.device)
    columns = right.unsqueeze(1) + torch.arange(width, device=x.device)
    columns = torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
    image = torch.arange(len(x), device=x.device).reshape(-1, 1, 1)
    moved = pad(x, (padding,) * 4).permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2)
