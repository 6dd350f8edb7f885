import math

import pytest
import torch

from rs_plugins.core.chunks import SHARE, calibrated_chunk, default_chunk

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Device:
    """A pass of k images takes ``overhead`` + k seconds; k more above ``cache``; above ``memory`` it fails."""

    def __init__(self, overhead=0.0, cache=math.inf, memory=math.inf):
        self.overhead, self.cache, self.memory, self.tried = overhead, cache, memory, []

    def __call__(self, size):
        self.tried.append(size)
        if size > self.memory:
            return math.inf
        return self.overhead + size * (1 + (size > self.cache))


@pytest.mark.parametrize(
    ("device", "best"),
    [
        (Device(overhead=100), 256),
        (Device(overhead=10, cache=100), 64),
        (Device(overhead=100, memory=130), 128),
        (Device(), 16),
        (Device(overhead=0.5), 64),  # 256 would gain less than two percent
    ],
    ids=["overhead", "cache", "memory", "no difference", "little difference"],
)
def test_the_fastest_size_is_kept(device, best):
    assert calibrated_chunk(device, 64, 10**9) == best
    assert set(device.tried) == {16, 32, 64, 128, 256}


def test_a_disturbed_pass_decides_nothing():
    device = Device(overhead=100)

    def disturbed(size):
        return device(size) * (50 if len(device.tried) % 5 == 0 else 1)

    assert calibrated_chunk(disturbed, 64, 10**9) == 256


@pytest.mark.parametrize("start", [1, 2, 64, 512])
def test_the_trial_is_a_small_part_of_the_work(start):
    device = Device(overhead=10)
    calibrated_chunk(device, start, 10**7)
    images = sum(device.tried)
    assert 0 < images <= SHARE * 10**7
    device.tried.clear()
    assert calibrated_chunk(device, start, int(images / SHARE) - 1) == start
    assert not device.tried
    calibrated_chunk(device, start, math.ceil(images / SHARE))
    assert sum(device.tried) == images


def test_sizes_of_less_than_one_image_are_not_tried():
    device = Device()
    assert calibrated_chunk(device, 1, 10**9) == 1
    assert set(device.tried) == {1, 2, 4}


def test_chunks_are_modest_on_a_cpu_and_large_on_a_gpu():
    sizes = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224)]
    assert [default_chunk(torch.empty(size), CPU) for size in sizes] == [512, 256, 64, 16]
    assert [default_chunk(torch.empty(size), GPU) for size in sizes] == [8192, 8192, 8192, 128]
    assert default_chunk(torch.empty(0), CPU) == 512
    assert default_chunk(torch.empty(3, 2000, 2000), GPU) == 64
