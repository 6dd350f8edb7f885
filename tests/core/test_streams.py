import itertools

import pytest
import torch

from rs_plugins.core.streams import _mix32, _mix64, fresh_seed, stream
from rs_plugins.errors import InputError


def draw(*args, n=8, **kwargs):
    return torch.randn(n, generator=stream(*args, **kwargs))


def test_a_stream_is_determined_by_seed_purpose_and_key():
    assert torch.equal(draw(1, "a", 2), draw(1, "a", 2))
    for other in [(2, "a", 2), (1, "b", 2), (1, "a", 3)]:
        assert not torch.equal(draw(1, "a", 2), draw(*other))


def test_torch_looks_at_32_bits_of_a_cpu_seed():
    """The reason for the bijection; if this fails, the streams could be made 64 bits wide."""
    low, high = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=low), torch.randn(4, generator=high))


def test_no_two_images_of_a_run_share_a_seed():
    seeds = {stream(0, "votes", index).initial_seed() for index in range(200_000)}
    assert len(seeds) == 200_000
    assert max(seeds) < 2**32


@pytest.mark.parametrize(("mix", "bits"), [(_mix32, 32), (_mix64, 63)])
def test_mixing_stays_in_range_and_scatters_neighbours(mix, bits):
    values = [mix(key) for key in range(1000)]
    assert len(set(values)) == 1000
    assert all(0 <= value < 2**bits for value in values)
    assert min(abs(a - b) for a, b in itertools.pairwise(values)) > 1000


def test_neighbouring_streams_are_uncorrelated():
    draws = torch.stack([draw(0, "votes", index, n=10_000) for index in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert correlation.abs().max() < 5 / 100  # five standard deviations


@pytest.mark.parametrize("key", [-1, 2**32])
def test_keys_out_of_range_are_refused(key):
    with pytest.raises(InputError, match=r"key: expected an integer in \[0, 2\*\*32\), got"):
        stream(0, "votes", key)


def test_fresh_seeds_differ_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    assert fresh_seed() != fresh_seed()
    draw(0, "a")
    assert torch.equal(before, torch.get_rng_state())
