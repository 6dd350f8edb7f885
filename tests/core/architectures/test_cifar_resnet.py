import math

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, linear, relu

from rs_plugins.core.architectures.cifar_resnet import CifarResNet
from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS
from rs_plugins.core.checkpoints import load_weights, read_weights
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.errors import InputError


def by_hand(weights, x, depth, option):
    """He et al. (2016), section 4.2, on a state_dict, in eval mode."""

    def norm(x, name):
        of = {kind: weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")}
        return batch_norm(x, *of.values(), training=False)

    def block(x, name, stride):
        inner = relu(norm(conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        inner = norm(conv2d(inner, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2 and option == "A":
            small = x[:, :, ::2, ::2]
            nothing = torch.zeros_like(small)[:, : small.shape[1] // 2]
            x = torch.cat([nothing, small, nothing], dim=1)
        elif stride == 2:
            x = norm(conv2d(x, weights[f"{name}.downsample.0.weight"], stride=2), f"{name}.downsample.1")
        return relu(inner + x)

    x = relu(norm(conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for number in range((depth - 2) // 6):
            x = block(x, f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1)
    head = "linear" if option == "A" else "fc"
    return linear(x.flatten(2).mean(2), weights[f"{head}.weight"], weights[f"{head}.bias"])


def scattered(model):
    """``model`` in float64 and eval mode, with batch statistics and offsets that are not 0 and 1."""
    source = torch.Generator().manual_seed(1)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                values.data = low + torch.rand(values.shape, generator=source, dtype=torch.float64)
            module.bias.data = torch.randn(module.bias.shape, generator=source, dtype=torch.float64)
    return model.eval()


def images(*shape, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shortcut", "option"), [("pad", "A"), ("conv", "B")])
@pytest.mark.parametrize(("depth", "classes", "channels", "side"), [(8, 10, 3, 8), (20, 7, 1, 12), (14, 3, 2, 32)])
def test_it_is_the_papers_network(shortcut, option, depth, classes, channels, side):
    model = scattered(CifarResNet(depth, classes=classes, channels=channels, shortcut=shortcut))
    x = images(3, channels, side, side)
    expected = by_hand(model.state_dict(), x, depth, option)
    assert expected.shape == (3, classes)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def counted(depth, classes, channels, conv):
    """Weights of convolutions, two numbers per channel of a normalisation, the last layer."""
    n = (depth - 2) // 6
    stem = channels * 16 * 9 + 2 * 16
    stages = sum(
        (inside * width + (2 * n - 1) * width**2) * 9 + 2 * n * 2 * width
        for inside, width in ((16, 16), (16, 32), (32, 64))
    )
    shortcuts = sum(inside * 2 * inside + 2 * 2 * inside for inside in (16, 32)) if conv else 0
    return stem + stages + shortcuts + 64 * classes + classes


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet20", (20, 10, 3, False), 269_722),  # the paper says 0.27 million
        ("resnet56", (56, 10, 3, False), 853_018),
        ("resnet110", (110, 10, 3, True), 1_730_714),
        ("resnet110", (110, 1000, 1, True), 1_730_714 + 990 * 65 - 2 * 144),
    ],
)
def test_parameters(name, options, parameters):
    _, classes, channels, _ = options
    model = make_network(name, classes=classes, channels=channels)
    assert sum(value.numel() for value in model.parameters()) == counted(*options) == parameters


def test_names_of_the_weights_of_published_checkpoints():
    names = set(CifarResNet(20, shortcut="conv").state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    first = {f"layer2.0.conv{k}.weight" for k in (1, 2)} | {f"layer2.0.bn{k}.{part}" for k in (1, 2) for part in norm}
    first |= {"layer2.0.downsample.0.weight"} | {f"layer2.0.downsample.1.{part}" for part in norm}
    assert {name for name in names if name.startswith("layer2.0.")} == first
    stages = {f"layer{stage}" for stage in (1, 2, 3)}
    assert {name.partition(".")[0] for name in names} == {"conv1", "bn1", *stages, "fc"}
    assert {name for name in names if "downsample" in name and not name.startswith("layer2")} == {
        f"layer3.0.downsample.{part}" for part in ("0.weight", *(f"1.{part}" for part in norm))
    }


@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.804), (56, 0.836)])
def test_published_weights(cifar, models, depth, accuracy):
    """Of the first 2,000 images 80.9 and 83.8 % are right; these are 500."""
    path = models / f"cifar10_resnet{depth}.safetensors"
    counters = {name for name in make_network(f"resnet{depth}").state_dict() if name.endswith("num_batches_tracked")}
    assert set(make_network(f"resnet{depth}").state_dict()) - counters == set(read_weights(path)) - counters
    model = make_network(f"resnet{depth}", **STATISTICS["imagenet"]._asdict())
    load_weights(model, path)
    with torch.no_grad():
        right = model.eval()(cifar.read(range(500))).argmax(1) == torch.from_numpy(cifar.labels[:500])
    assert float(right.double().mean()) == pytest.approx(accuracy, abs=0.004)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_the_layouts_agree(shortcut):
    model, x = CifarResNet(14, shortcut=shortcut).eval(), images(4, 3, 16, 16, dtype=torch.float32)
    plain = model(x)
    other = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_initial_weights(shortcut):
    """Normal with variance 2 / (pixels of the kernel · channels that come out), as the papers' code has it."""
    with global_randomness(0):
        model = CifarResNet(20, shortcut=shortcut)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            spread = 5 / math.sqrt(2 * module.weight.numel())  # five standard deviations
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=spread)
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all())


def test_it_learns_through_both_shortcuts():
    for shortcut in ("pad", "conv"):
        model = CifarResNet(8, shortcut=shortcut)
        model(images(4, 3, 8, 8, dtype=torch.float32)).square().sum().backward()
        assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (21, {}, r"^depth: expected 6n \+ 2 layers \(8, 14, 20, …\), got 21$"),
        (2, {}, r"^depth: expected an integer >= 8, got 2$"),
        (8, {"classes": 1}, r"^classes: expected an integer >= 2, got 1$"),
        (8, {"channels": 0}, r"^channels: expected an integer >= 1, got 0$"),
        (8, {"shortcut": "A"}, r"^shortcut: expected one of 'pad', 'conv', got 'A'$"),
    ],
)
def test_impossible_options(depth, options, message):
    with pytest.raises(InputError, match=message):
        CifarResNet(depth, **options)
