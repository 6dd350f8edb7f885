"""Where memory is too small for a pass, it is halved until it fits, and no count changes."""

import math

import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.decisions import PROBES
from rs_plugins.core.memory import Room, is_of_memory
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.votes import Poll

IMAGES = torch.linspace(0, 1, 45).reshape(5, 1, 3, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 6))


def of_a_cpu():
    torch.empty(2**58)  # a real one: no machine has as much


def of_a_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def of_python():
    raise MemoryError


class Small(nn.Module):
    """Has room for so many images at once."""

    def __init__(self, most, fail=of_a_gpu):
        super().__init__()
        self.net, self.most, self.fail = network(), most, fail
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            self.fail()
        return self.net(x)


@pytest.mark.parametrize("fail", [of_a_cpu, of_a_gpu, of_python])
def test_errors_of_memory_are_told_from_others(fail):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    assert is_of_memory(caught.value)
    assert not is_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("most", [1, 2, 7, 16, 63])
@pytest.mark.parametrize("fail", [of_a_cpu, of_a_gpu, of_python])
def test_passes_are_halved_and_the_counts_are_the_same(most, fail):
    expected = Poll(network(), IMAGES, 0.5, chunk=64).votes(200)
    model = Small(most, fail)
    assert Poll(model, IMAGES, 0.5, chunk=64).votes(200).tolist() == expected.tolist()
    tried = [size for size in model.sizes if size > most]
    assert tried == sorted(tried, reverse=True)  # no size fails twice
    assert len(set(tried)) == len(tried)


def test_so_do_certificates_and_the_next_images_know_the_size():
    plan = FixedBudget(n0=10, n=300)
    expected = list(certify(network(), IMAGES, 0.5, plan=plan, chunk=100))
    model = Small(20)
    first = certify(model, IMAGES[:2], 0.5, plan=plan, chunk=100, indices=[0, 1])
    found = list(first)
    begun = len(model.sizes)
    found += first.go_on(IMAGES[2:], [2, 3, 4])
    assert [(c.prediction, c.count, c.radius) for c in found] == [(c.prediction, c.count, c.radius) for c in expected]
    assert max(model.sizes[begun:]) <= 12  # 100, 50, 25, 12 before


def test_of_a_single_image_it_is_an_error_and_the_model_is_as_before():
    model = Small(0).train()
    model.most = 1
    poll = Poll(model, IMAGES, 0.5, chunk=8)
    model.most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        poll.votes(10)
    assert model.training


def test_other_errors_are_raised_at_once():
    model = Small(math.inf)
    poll = Poll(model, IMAGES, 0.5, chunk=8)
    model.most, model.fail = 5, of_another_kind
    model.sizes.clear()
    with pytest.raises(RuntimeError, match="shapes"):
        poll.votes(10)
    assert model.sizes == [8]


def of_another_kind():
    raise RuntimeError("shapes")


def test_rounding_is_measured_on_as_many_copies_as_fit():
    model = Small(5)
    poll = Poll(model, IMAGES, 0.5, chunk=4)
    assert [size for size in model.sizes if size > 5] == [PROBES, PROBES // 2]
    assert poll.votes(50).tolist() == Poll(network(), IMAGES, 0.5, chunk=4).votes(50).tolist()


def test_a_chunk_for_which_there_is_no_room_at_all_is_halved():
    poll = Poll(network(), IMAGES, 0.5, chunk=2**56)
    assert poll.votes(20).tolist() == Poll(network(), IMAGES, 0.5, chunk=20).votes(20).tolist()
    assert poll.chunk < 2**56


def test_the_trial_of_chunks_takes_none_that_does_not_fit():
    model = Small(600)
    poll = Poll(model, IMAGES, 0.5)
    (first, *_) = poll.run(asking(100), most=10**9)
    assert 1 <= poll.chunk <= 600
    expected, *_ = Poll(network(), IMAGES, 0.5, chunk=64).run(asking(100))
    assert first.result == expected.result


def asking(n):
    def procedure(_turn):
        return (yield n).tolist()

    return procedure


def test_a_room_remembers():
    room, sizes = Room(), []

    def compute(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise MemoryError
        return batch.sum()

    assert sum(room.parts(compute, torch.ones(10, 1))) == 10
    assert (sizes, room.most) == ([10, 5, 2, 2, 2, 2, 2], 2)
    sizes.clear()
    assert len(room.parts(compute, torch.ones(2, 1))) == 1
    assert len(room.parts(compute, torch.ones(0, 1))) == 1
    assert sizes == [2, 0]
