"""Which images a step takes: all of them once an epoch, in an order that the seed and the epoch decide."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from rs_plugins.core.data_sets.data_set import in_memory, spaced_images
from rs_plugins.core.training.batches import Batches, Reader, Source, data_set, share_of, tensors
from rs_plugins.errors import InputError


def rows(steps, source=0):
    return torch.cat([step.rows for step in steps if step.source == source]).tolist()


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
    batches = Batches([103], 10, seed=3)
    first, second = batches.steps(0), batches.steps(1)
    assert sorted(rows(first)) == sorted(rows(second)) == list(range(103))
    assert rows(first) != rows(second)
    assert rows(first) == rows(Batches([103], 10, seed=3).steps(0)) != rows(Batches([103], 10, seed=4).steps(0))
    assert [len(step.rows) for step in first] == [10] * 10 + [3]
    assert [step.index for step in first] == list(range(11))
    assert [step.last for step in first] == [False] * 10 + [True]
    assert {step.epoch for step in second} == {1}
    assert [step.elapsed for step in second] == [1 + index / 11 for index in range(11)]
    assert [step.passed for step in second] == [1 + index / 11 for index in range(1, 12)]
    assert batches.steps_an_epoch() == 11


def test_parts_and_a_dropped_remainder():
    steps = Batches([103], 10, parts=4, drop_last=True).steps(0)
    assert [len(step.rows) for step in steps] == [3, 3, 2, 2] * 10
    assert sum(step.last for step in steps) == 1
    assert len({step.name for epoch in range(2) for step in Batches([103], 10, parts=4).steps(epoch)}) == 2 * 41


@pytest.mark.parametrize(
    ("images", "options", "sizes"),
    [
        (41, {"batch_size": 20}, [20, 21]),
        (41, {"batch_size": 20, "drop_last": True}, [20, 20]),
        (42, {"batch_size": 20}, [20, 20, 2]),
        (22, {"batch_size": 20, "parts": 4}, [5, 5, 5, 5, 2]),
        (23, {"batch_size": 20, "parts": 4}, [5, 5, 5, 5, 3]),
        (21, {"batch_size": 20, "parts": 4}, [6, 5, 5, 5]),
        (3, {"batch_size": 1}, [1, 1, 1]),
        (1, {"batch_size": 20, "parts": 4}, [1]),
    ],
    ids=repr,
)
def test_no_step_is_of_one_image_if_that_can_be_helped(images, options, sizes):
    for epoch in range(3):
        steps = Batches([images], **options).steps(epoch)
        assert [len(step.rows) for step in steps] == sizes
        if not options.get("drop_last"):
            assert sorted(rows(steps)) == list(range(images))


@pytest.mark.parametrize("images", [2, 3, 4, 5, 9])
def test_no_share_is_of_one_image(images):
    (step,) = Batches([images], 20).steps(0)
    assert min(len(share_of(step, rank, 4).rows) for rank in range(4)) >= 2


@pytest.mark.parametrize("extra", [7, 30, 55, 400])
def test_another_source_has_as_many_batches_and_goes_through_its_images_in_turn(extra):
    batches = Batches([40, extra], 10, seed=1)
    epochs = [batches.steps(epoch) for epoch in range(30)]
    for steps in epochs:
        assert sorted(rows(steps)) == list(range(40))
        assert [step.source for step in steps].count(1) == len({s.index for s in steps if s.source == 0}) == 4
    orders = {tuple(step.source for step in steps) for steps in epochs}
    assert len(orders) > 5  # shuffled, and not alike in each epoch
    # within an epoch the batches of a pass are shuffled among the others: passes are recovered from counts
    seen = [row for steps in epochs for row in rows(steps, 1)]
    counts = np.bincount(seen, minlength=extra)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 7, 12])
def test_shares_are_the_step_and_their_means_its_mean(world):
    (step,) = Batches([10], 10).steps(0)
    values = torch.rand(10, dtype=torch.float64)
    shares = [share_of(step, rank, world) for rank in range(world)]
    real = [share for share in shares if share.weight]
    assert torch.equal(torch.cat([share.rows for share in real]), step.rows)
    assert all(torch.equal(step.rows[share.first :][: len(share.rows)], share.rows) for share in shares)
    assert all(len(share.rows) for share in shares)
    mean = sum(share.weight * values[share.rows].mean() for share in shares) / world
    torch.testing.assert_close(mean, values.mean())


def test_reading():
    images = np.random.default_rng(0).random((6, 1, 2, 2)).astype("float32")
    data = in_memory("made up", images, np.arange(6))
    for source in (data_set(data, weight=0.5), tensors(torch.from_numpy(images), torch.arange(6), weight=0.5)):
        step = next(step for step in Batches([1, source.size], 4).steps(0) if step.source == 1)
        share, x, y = Reader([source, source])[share_of(step, 0, 1)]
        assert share.step is step
        assert torch.equal(y, step.rows)
        assert torch.equal(x, torch.from_numpy(images)[step.rows])
        assert source.weight == 0.5


def test_a_source_can_be_sent_to_another_process():
    data = in_memory("made up", np.random.default_rng(0).random((6, 1, 2, 2)).astype("float32"), np.arange(6))
    for source in (tensors(torch.rand(6, 2), torch.arange(6)), data_set(data), data_set(spaced_images(data, 3))):
        again = pickle.loads(pickle.dumps(Reader([source])))
        share = share_of(Batches([source.size], 2).steps(0)[0], 0, 1)
        for one, other in zip(Reader([source])[share][1:], again[share][1:], strict=True):
            assert torch.equal(one, other)


def test_soft_labels_are_read_too():
    x, y = torch.rand(4, 2), torch.rand(4, 3)
    assert torch.equal(tensors(x, y).read(torch.tensor([2, 0]))[1], y[[2, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches([5], 0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: Batches([5], 1, 0), "parts: expected an integer >= 1, got 0"),
        (lambda: Batches([50, 5], 10, drop_last=True), "drop_last: nothing is left of 5 images in batches of 10"),
        (lambda: Source(lambda rows: None, 0), "size: expected an integer >= 1, got 0"),
        (lambda: tensors(torch.rand(2, 2), torch.zeros(2), weight=0), "weight: expected a finite number > 0, got 0"),
        (lambda: tensors(torch.rand(2, 2) + 1, torch.zeros(2)), r"x: expected pixels in \[0, 1\]"),
        (lambda: tensors(torch.rand(2, 2), torch.tensor([0, -100])), "y: expected labels >= 0, got -100"),
        (lambda: tensors(torch.rand(2, 2), torch.zeros(3)), "y: expected one label for each of at least one image"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_epochs_follow_each_other_in_the_other_source():
    """A pass over the other source goes on in the next epoch."""
    batches = Batches([20, 50], 10)
    of_two_and_a_half = [batches.steps(epoch) for epoch in range(5)]
    seen = list(itertools.chain.from_iterable(rows(steps, 1) for steps in of_two_and_a_half))
    assert len(seen) == 100
    assert sorted(seen) == sorted([*range(50)] * 2)
