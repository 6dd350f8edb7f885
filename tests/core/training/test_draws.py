"""Draws of a step do not depend on how its images are spread over processes."""

import itertools

import pytest
import torch

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training.draws import BLOCK, BlockDraws
from rs_plugins.core.training.objective import StreamDraws

X = torch.zeros(50, 2, 3)
NOISE = GaussianNoise(0.5)


def draw(first, stop, *, seed=0, purpose="step", x=X):
    draws = BlockDraws(seed, purpose, first=first)
    part = x[first:stop]
    return draws.noise(NOISE, part, 4), draws.uniform(part), draws.noise(NOISE, part, 1)


@pytest.mark.parametrize("cuts", [(0, 50), (0, 16, 50), (0, 7, 50), (0, 1, 2, 33, 49, 50), (0, 15, 17, 50)], ids=repr)
def test_the_same_draws_in_parts(cuts):
    whole = draw(0, 50)
    parts = [draw(first, stop) for first, stop in itertools.pairwise(cuts)]
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(expected, torch.cat(found))


def test_shapes_and_distribution():
    x = torch.zeros(4000, 3)
    draws = BlockDraws(0, "step")
    e, u = draws.noise(NOISE, x, 2), draws.uniform(x)
    assert (e.shape, u.shape) == ((4000, 2, 3), (4000,))
    assert float(e.mean()) == pytest.approx(0, abs=0.02)
    assert float(e.std()) == pytest.approx(0.5, rel=0.02)
    assert 0 <= float(u.min()) < 0.01 < 0.99 < float(u.max()) < 1
    flat = e.flatten(1)
    assert float(torch.corrcoef(flat.T).fill_diagonal_(0).abs().max()) < 0.06  # copies and pixels
    assert float(torch.corrcoef(flat[: 2 * BLOCK]).fill_diagonal_(0).abs().max()) < 0.9999  # no image has another's


def test_no_two_images_blocks_steps_or_seeds_share_draws():
    numbers = [*draw(0, 50)[1].tolist(), *draw(0, 50, seed=1)[1].tolist(), *draw(0, 50, purpose="other")[1].tolist()]
    assert len(set(numbers)) == 150


def test_draws_go_on_within_a_step():
    draws = BlockDraws(0, "step")
    assert not torch.equal(draws.noise(NOISE, X, 1), draws.noise(NOISE, X, 1))


def test_the_type_is_that_of_the_images():
    found = draw(0, 3, x=X.double())
    assert [part.dtype for part in found] == [torch.float64] * 3


def test_what_belongs_to_no_image_is_the_same_at_each_call_and_in_each_process():
    def numbers(draws, purpose="weights", key=0):
        return torch.randn(5, generator=draws.fresh(purpose, key)).tolist()

    draws = BlockDraws(0, "step")
    assert numbers(draws) == numbers(draws) == numbers(BlockDraws(0, "step", first=20))
    others = [
        *(numbers(draws, key=1), numbers(draws, purpose="other")),
        *(numbers(BlockDraws(1, "step")), numbers(BlockDraws(0, "other"))),
    ]
    assert len({tuple(found) for found in [numbers(draws), *others]}) == 5


def test_draws_of_one_generator_have_others_for_what_belongs_to_no_image():
    draws = StreamDraws(torch.Generator().manual_seed(0), seed=3)
    first = torch.randn(5, generator=draws.fresh("weights", 2))
    assert torch.equal(first, torch.randn(5, generator=draws.fresh("weights", 2)))
    assert not torch.equal(first, torch.randn(5, generator=StreamDraws(draws.generator, seed=4).fresh("weights", 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_draws_in_half_precision_are_those_in_single(dtype):
    """Rounded, and below 1 all the same, so that mixed precision trains with the same draws for every torch."""
    single, half = (
        StreamDraws(torch.Generator().manual_seed(0)).uniform(X.new_empty(20_000, 1).to(t))
        for t in (torch.float32, dtype)
    )
    assert half.dtype == dtype
    assert single.to(dtype).max() == 1
    assert half.max() == 1 - torch.finfo(dtype).eps / 2
    assert torch.equal(half, single.to(dtype).clamp(max=half.max()))
