"""Cropping and flipping, against an independent loop over images."""

import pytest
import torch

from rs_plugins.core.training.augmentation import crop_and_flip
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.errors import InputError


class Known:
    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, x):
        return self.numbers.pop(0)[: len(x)]


@pytest.mark.parametrize("padding", [4, 2])
def test_against_a_loop(padding):
    source = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 8, 6, generator=source)
    down, right, mirrored = (torch.rand(40, generator=source) for _ in range(3))
    found = crop_and_flip(x, Known(down, right, mirrored), padding=padding)
    for image, row, column, mirror, result in zip(x, down, right, mirrored, found, strict=True):
        large = torch.zeros(3, 8 + 2 * padding, 6 + 2 * padding)
        large[:, padding:-padding, padding:-padding] = image
        top, left = int(row * (2 * padding + 1)), int(column * (2 * padding + 1))
        expected = large[:, top : top + 8, left : left + 6]
        assert torch.equal(result, expected.flip(2) if mirror < 0.5 else expected)


def test_all_places_and_both_sides_occur():
    x = torch.zeros(4000, 1, 9, 9)
    x[:, 0, 4, 3] = 1
    moved = crop_and_flip(x, BlockDraws(0, "step"))
    assert int((moved.mean(dim=0)[0] > 0).sum()) == 9 * 9
    assert moved.shape == x.shape
    numbers = torch.tensor([1 - 2**-24]), torch.tensor([0.0]), torch.tensor([0.9])
    assert float(crop_and_flip(x[:1], Known(*numbers))[0, 0, 0, 7]) == 1


def test_vectors_have_no_sides():
    with pytest.raises(
        InputError, match=r"augment: expected images \(n, channels, height, width\), got shape \(2, 5\)"
    ):
        crop_and_flip(torch.zeros(2, 5), BlockDraws(0, "step"))
