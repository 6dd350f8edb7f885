import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.procedures import BLOCK, Job
from rs_plugins.core.streams import stream


def job(wishes):
    def procedure(_turn):
        answers = []
        for wish in wishes:
            counts = yield wish
            answers.append(counts.tolist())
        return answers

    source = stream(1, "votes", 9)
    return Job(3, 9, torch.full((2, 3), 0.5), procedure, GaussianNoise(0.25), source, classes=2)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_noise_is_the_stream_in_blocks_however_it_is_asked_for(sizes):
    image = job([sum(sizes)])
    parts = [torch.empty(size, 2, 3) for size in sizes]
    for part in parts:
        image.fill(part)
    source = stream(1, "votes", 9)
    blocks = [0.25 * torch.empty(BLOCK, 2, 3).normal_(generator=source) for _ in range(sum(sizes) // BLOCK + 1)]
    assert torch.equal(torch.cat(parts), 0.5 + torch.cat(blocks)[: sum(sizes)])
    assert image.unfilled == 0


def test_a_request_is_complete_when_its_votes_are_counted():
    image = job([10, 5])
    image.fill(torch.empty(10, 2, 3))
    image.count(np.array([4, 2, 1]), seconds=0.5)
    assert not image.complete
    image.count(np.array([1, 1, 1]), seconds=0.25)
    assert image.complete
    image.settle()
    assert (image.unfilled, image.complete, image.ballot) == (5, False, None)
    image.count(np.array([5, 0, 0]), seconds=0.25)
    image.settle()
    assert image.ballot.result == [[5, 3], [5, 0]]
    assert (image.ballot.invalid, image.ballot.seconds) == (2, 1.0)
    assert not image.complete


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_finished_image_holds_next_to_nothing(size):
    image = job([size])
    image.fill(torch.empty(size, 2, 3))
    image.count(np.array([size, 0, 0]), seconds=0.0)
    image.settle()
    assert not any(isinstance(value, torch.Tensor | torch.Generator | np.ndarray) for value in vars(image).values())
    assert len(pickle.dumps(image)) < 500


def test_so_does_an_image_that_asked_for_nothing():
    assert len(pickle.dumps(job([]))) < 500
