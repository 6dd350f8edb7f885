import random

import numpy as np
import pytest
import torch

from rs_plugins.core.global_randomness import global_randomness


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def drawn(seed):
    with global_randomness(seed):
        return draws()


def states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state().tolist()


def test_what_is_drawn_inside_depends_on_the_seed_alone():
    first = drawn(3)
    draws()
    assert drawn(3) == first
    assert all(a != b for a, b in zip(first, drawn(4), strict=True))


def test_it_is_what_the_generators_give_by_themselves():
    expected = random.Random(3).random(), np.random.RandomState(3).rand()
    assert drawn(3)[:2] == expected
    assert drawn(3)[2] == float(torch.rand((), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    assert drawn(seed) == drawn(seed)


def test_the_callers_states_are_put_back_also_after_an_error():
    before = states()
    drawn(0)
    assert states() == before
    with pytest.raises(ZeroDivisionError), global_randomness(1):
        draws() and 1 / 0
    assert states() == before


def test_gpus_that_nobody_uses_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("device_count", "get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA is begun"))
    drawn(0)


def test_all_gpus_are_seeded_and_put_back(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: seen.append((state, device)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    drawn(7)
    assert seen == [7, ("state 0", 0), ("state 1", 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_real_gpu():
    torch.cuda.init()
    before = torch.cuda.get_rng_state().tolist()
    found = []
    for seed in (0, 0, 1):
        with global_randomness(seed):
            found.append(float(torch.rand((), device="cuda")))
    assert found[0] == found[1] != found[2]
    assert torch.cuda.get_rng_state().tolist() == before
