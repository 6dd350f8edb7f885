import copy
import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import nn

from rs_plugins.core.certifying_adapters.routing import NoiseLevelRouter, choices
from rs_plugins.errors import InputError, ModelError

SIGMAS = (0.25, 0.5, 1.0)
MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])


def noisy_images(n=24, size=32, channels=3, sigmas=SIGMAS, dtype=torch.float32):
    """Return smooth images, each with noise of one of the levels, and these levels."""
    source = torch.Generator().manual_seed(0)
    slopes = torch.rand(n, channels, 2, 1, 1, generator=source, dtype=dtype)
    across = torch.linspace(0, 0.5, size, dtype=dtype)
    smooth = slopes[:, :, 0] * across + slopes[:, :, 1] * across[:, None] ** 2
    levels = torch.tensor(sigmas, dtype=dtype).repeat(n)[:n]
    noise = torch.randn(smooth.shape, generator=source, dtype=dtype)
    return smooth + levels.view(-1, 1, 1, 1) * noise, levels


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (3, 3, 9, 5), (1, 2, 40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula_of_immerkaer(shape, dtype):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    sizes = [[np.abs(convolve2d(channel, MASK, mode="valid")).mean() for channel in image] for image in x.numpy()]
    expected = np.mean(sizes, axis=1) * math.sqrt(math.pi / 2) / 6
    found = NoiseLevelRouter(SIGMAS).estimate(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.12, 0.25, 0.5, 1.0])
def test_the_noise_on_smooth_images(sigma):
    x, _ = noisy_images(sigmas=(sigma,))
    found = NoiseLevelRouter(SIGMAS).estimate(x) / sigma
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert float(found.std()) < 0.05


def test_a_smooth_image_has_no_noise():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 9), indexing="ij")
    x = torch.stack([torch.full((8, 9), 0.3), rows, rows + columns**2])[None]  # what the mask takes away
    assert float(NoiseLevelRouter(SIGMAS).estimate(x)) < 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_member_of_the_level_in_any_order_of_members(order):
    sigmas = [SIGMAS[place] for place in order]
    x, levels = noisy_images()
    found = NoiseLevelRouter(sigmas)(x)
    assert found.dtype == torch.int64
    assert [sigmas[member] for member in found.tolist()] == levels.tolist()


@pytest.mark.parametrize(("sigma", "nearest"), [(0.1, 0), (0.35, 0), (0.36, 1), (0.7, 1), (0.72, 2), (5.0, 2)])
def test_nearest_on_a_logarithmic_scale(sigma, nearest, monkeypatch):
    """0.36 and 0.72 are nearer to the lower level on a linear scale."""
    router = NoiseLevelRouter(SIGMAS)
    monkeypatch.setattr(router, "estimate", lambda x: torch.full((len(x),), sigma))
    assert router(torch.zeros(2, 1, 3, 3)).tolist() == [nearest, nearest]


def test_one_member():
    assert NoiseLevelRouter([0.5])(noisy_images()[0]).unique().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 7, 32])
def test_the_company_changes_no_bit(size, dtype):
    router, x = NoiseLevelRouter(SIGMAS), noisy_images(n=45, size=size)[0].to(dtype)
    together = router.estimate(x)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    assert torch.equal(router.estimate(x[order]), together[order])
    for parts in (1, 2, 7, 44):
        assert torch.equal(torch.cat([router.estimate(part) for part in x.split(parts)]), together)
    assert torch.equal(router.estimate(torch.cat([x[5:], x * 3]))[:40], together[5:])
    assert torch.equal(router.estimate(x.to(memory_format=torch.channels_last)), together)


def test_what_is_no_number_stays_with_its_image():
    x, _ = noisy_images(n=4)
    expected = NoiseLevelRouter(SIGMAS)(x)
    x[1, 0, 0, 0], x[2, 0, 3, 3], x[3, 0, 9, 9] = math.nan, math.inf, -1e30
    found = NoiseLevelRouter(SIGMAS)(x)
    assert found[0] == expected[0]
    assert found.tolist()[2:] == [2, 2]


def test_state_printed_form_and_copies():
    router = NoiseLevelRouter((0.5, 0.25)).half()
    assert repr(router) == "NoiseLevelRouter(sigmas=(0.5, 0.25))"
    assert not router.state_dict()
    x, _ = noisy_images(sigmas=(0.25, 0.5))
    assert copy.deepcopy(router)(x).tolist() == [1, 0] * 12


@pytest.mark.parametrize("shape", [(2, 3, 2, 8), (2, 3, 8, 2), (2, 8, 8), (4, 9), (2, 1, 8, 8, 8)])
def test_other_shapes(shape):
    with pytest.raises(InputError, match=r"^x: expected images \(n, channels, height, width\) of at least 3x3 pixels "):
        NoiseLevelRouter(SIGMAS)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ((), r"^sigmas: expected one or more different noise levels, got \(\)$"),
        ((0.5, 0.25, 0.5), r"^sigmas: expected one or more different noise levels, got \(0.5, 0.25, 0.5\)$"),
        ((0.5, 0), r"^sigmas: expected a finite number > 0, got 0$"),
    ],
)
def test_impossible_levels(sigmas, message):
    with pytest.raises(InputError, match=message):
        NoiseLevelRouter(sigmas)


class ByMean(nn.Module):
    """Member 1 for images brighter than the mean of the batch: what a router must not do."""

    def forward(self, x):
        means = x.flatten(1).mean(1)
        return (means > means.mean()).long()


X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_router_sees_one_image_at_a_time():
    seen = []

    def router(x):
        seen.append((len(x), x.requires_grad, torch.is_grad_enabled()))
        return (x.mean() > 0.5).long().reshape(1)

    expected = [int(image.mean() > 0.5) for image in X]
    assert set(expected) == {0, 1}
    assert choices(router, X.clone().requires_grad_(), 2).tolist() == expected
    assert seen == [(1, False, False)] * 6
    assert choices(ByMean(), X, 2).tolist() == [0] * 6


def test_a_router_that_promises_is_asked_once_and_for_one_image_more():
    router = NoiseLevelRouter(SIGMAS)
    x, seen = noisy_images(n=9)[0], []
    router.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    assert choices(router, x, 3).tolist() == [0, 1, 2] * 3
    assert seen == [9, 1]
    assert choices(router, x[:1], 3).tolist() == [0]
    assert seen == [9, 1, 1]


def test_a_broken_promise():
    router = ByMean()
    router.row_wise = True
    brightest = X[X.flatten(1).mean(1).argsort(descending=True)]
    with pytest.raises(
        ModelError, match=r"^router: its choice for an image depends on the batch that the image is in;"
    ):
        choices(router, brightest, 2)


@pytest.mark.parametrize("router", [lambda _x: 1 / 0, NoiseLevelRouter(SIGMAS)], ids=["one by one", "at once"])
def test_no_images(router):
    chosen = choices(router, torch.zeros(0, 1, 4, 4), 3)
    assert (chosen.shape, chosen.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: [0] * len(x), "one number of a member for each image, got list"),
        (lambda x: torch.zeros(len(x)), "got torch.float32"),
        (lambda x: torch.zeros(len(x), dtype=torch.int32), "got torch.int32"),
        (lambda x: torch.zeros(len(x), 1, dtype=torch.int64), r"got shape \(., 1\)"),
        (lambda _x: torch.tensor(0), r"got shape \(\)"),
        (lambda x: torch.full((len(x),), -1), "router: expected members from 0 to 1, got values from -1 to -1"),
        (lambda x: torch.full((len(x),), 2), "router: expected members from 0 to 1, got values from 2 to 2"),
    ],
)
def test_what_is_no_choice(answer, message, row_wise):
    answer.row_wise = row_wise
    with pytest.raises(ModelError, match=f"^router: .*{message.removeprefix('router: ')}$"):
        choices(answer, X, 2)


@pytest.mark.parametrize("row_wise", [True, False])
def test_a_router_that_changes_the_images(row_wise):
    def router(x):
        x.add_(1)
        return torch.zeros(len(x), dtype=torch.int64)

    router.row_wise = row_wise
    with pytest.raises(ModelError, match="changes its input in place"):
        choices(router, X.clone(), 2)
