import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rs_plugins.core.architectures import normalise
from rs_plugins.core.architectures.normalise import STATISTICS, Normalise, statistics
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.errors import InputError

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.2, 2.0)


@pytest.mark.parametrize("rest", [(), (5,), (4, 5), (2, 3, 4)])
def test_any_rank(rest):
    x = torch.rand(2, 3, *rest, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, *(1,) * len(rest))
    expected = (x.numpy() - np.reshape(MEAN, shape)) / np.reshape(STD, shape)
    torch.testing.assert_close(Normalise(MEAN, STD).double()(x).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_without_std_it_centres():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Normalise(MEAN)(x), x - torch.tensor(MEAN).view(1, 3, 1, 1))


def test_the_constants_go_with_the_module():
    module = Normalise(MEAN, STD)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {
        "mean": torch.tensor(MEAN).tolist(),
        "std": torch.tensor(STD).tolist(),
    }
    assert not list(module.parameters())
    assert module.half().mean.dtype == torch.float16
    assert repr(Normalise((0.5, 1 / 3), (1, 0.1))) == "Normalise(mean=(0.5, 0.333333), std=(1, 0.1))"


def test_a_layout_stays():
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    y = Normalise(MEAN, STD)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, Normalise(MEAN, STD)(x.contiguous()))


@pytest.mark.parametrize("constants", [True, False], ids=["with constants", "without"])
def test_files_of_weights(tmp_path, constants):
    model = nn.Sequential(Normalise(MEAN, STD), nn.Conv2d(3, 1, 1))
    state = {name: value for name, value in model.state_dict().items() if constants or not name.startswith("0.")}
    save_file(state, tmp_path / "w.safetensors")
    other = nn.Sequential(Normalise((0.1, 0.1, 0.1), (1, 1, 1)), nn.Conv2d(3, 1, 1))
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[1].weight, model[1].weight)
    assert other[0].mean.tolist() == torch.tensor(MEAN if constants else (0.1, 0.1, 0.1)).tolist()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), r"^mean: expected one finite number per channel, got \(\)$"),
        (0.5, (1,), r"^mean: expected one number per channel, got 0.5$"),
        ("123", (1, 1, 1), r"^mean: expected one finite number per channel, got '123'$"),
        ((float("nan"),), (1,), r"^mean: expected one finite number per channel, got \(nan,\)$"),
        ((0.5,), (float("inf"),), r"^std: expected one finite number per channel, got \(inf,\)$"),
        ((0.5,), (None,), r"^std: expected one number per channel, got \(None,\)$"),
        ((0.5,), (0,), r"^std: expected a finite number > 0, got 0.0$"),
        ((0.5,), (-0.1,), r"^std: expected a finite number > 0, got -0.1$"),
        ((0.5, 0.5), (1,), r"^std: expected one number per channel, as many as in mean \(2\), got 1$"),
    ],
)
def test_impossible_constants(mean, std, message):
    with pytest.raises(InputError, match=message):
        Normalise(mean, std)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3,), (2, 4)])
def test_other_channels(shape):
    with pytest.raises(InputError, match=r"^x: expected shape \(n, 3, …\) to normalise, got shape \("):
        Normalise(MEAN, STD)(torch.zeros(shape))


def test_known_statistics(cifar, monkeypatch):
    monkeypatch.setattr(normalise, "_MOST_IMAGES", 1000)
    assert set(STATISTICS) == {"cifar10", "imagenet"}
    for known in STATISTICS.values():
        assert Normalise(*known)(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)
    assert statistics(cifar).mean == pytest.approx(STATISTICS["cifar10"].mean, abs=0.01)


def numpy_statistics(pixels):
    pixels = pixels.astype(np.float64)
    axes = (0, *range(2, pixels.ndim))
    return pixels.mean(axes).tolist(), pixels.std(axes).tolist()


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (130, 3, 5, 4), (64, 2, 7)])
def test_statistics_are_numpys(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = statistics(in_memory("noise", images, np.zeros(len(images), dtype=int)))
    mean, std = numpy_statistics(images.astype(np.float32) / np.float32(255))
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx(std, rel=1e-12)


def test_nearly_equal_pixels_lose_no_digits():
    images = np.full((70, 1, 4, 4), 0.9, dtype=np.float32)
    images[1, 0, 0, 0] += np.float32(1e-6)
    found = statistics(in_memory("flat", images, np.zeros(70, dtype=int)))
    assert found.std == pytest.approx(numpy_statistics(images)[1], rel=1e-9)


def test_statistics_of_evenly_spaced_images(monkeypatch):
    monkeypatch.setattr(normalise, "_MOST_IMAGES", 4)
    images = np.random.default_rng(0).random((10, 2, 3, 3), dtype=np.float32)
    found = statistics(in_memory("noise", images, np.zeros(10, dtype=int)))
    assert found.mean == pytest.approx(numpy_statistics(images[[0, 2, 5, 7]])[0], rel=1e-12)


def test_a_channel_without_content():
    images = np.random.default_rng(0).random((10, 2, 3, 3), dtype=np.float32)
    images[:, 1] = 0.3
    with pytest.raises(InputError, match=r"^data: dark: channel 1 is the same in all pixels, so it has no std > 0$"):
        statistics(in_memory("dark", images, np.zeros(10, dtype=int)))
