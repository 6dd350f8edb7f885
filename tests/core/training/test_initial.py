import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS, statistics
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.training.ibp_initial import ibp_initial
from rs_plugins.core.training.initial import NORMALISATIONS, describe_network, initial_network
from rs_plugins.core.training.residual_initial import zero_residual
from rs_plugins.errors import InputError


def images(channels=3, classes=None):
    pixels = np.random.default_rng(0).integers(0, 256, (6, channels, 8, 8), dtype=np.uint8)
    return in_memory("noise", pixels, np.array([0, 1, 2, 3, 0, 1]), classes=classes)


def equal(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module whose functions make networks, for 4 and for 7 classes."""
    source = "from torch import nn\nfrom functools import partial\n"
    source += "def four(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n"
    source += "def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))\n"
    source += "def none(): return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())\n"
    (tmp_path / "initial_nets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("initial_nets", None)


def test_channels_and_classes_are_those_of_the_data():
    assert describe_network(images(), "resnet20") == {"name": "resnet20", "classes": 4, "channels": 3, "seed": 0}
    found = describe_network(images(1, classes=9), "lenet", seed=3)
    assert found == {"name": "lenet", "classes": 9, "channels": 1, "seed": 3}


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_first_layer_normalises(normalise):
    found = describe_network(images(), "resnet20", normalise=normalise)
    expected = statistics(images()) if normalise == "data" else STATISTICS[normalise]
    assert json.loads(json.dumps(found)) == found
    torch.testing.assert_close(make_network(**found)[0].std, torch.tensor(expected.std))
    assert found["mean"] == list(expected.mean)


def test_a_normalisation_that_is_none():
    with pytest.raises(InputError, match=r"^normalise: expected one of 'data', 'cifar10', 'imagenet' or None, got 'x'"):
        describe_network(images(), "lenet", normalise="x")


def test_fresh_weights_and_those_of_a_file(tmp_path):
    network = describe_network(images(), "resnet20", seed=1)
    assert equal(initial_network(network), make_network(**network))
    other = make_network("resnet20", classes=4, seed=2)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    assert equal(initial_network(network, tmp_path / "w.pt"), other)


def test_the_head_gives_way_to_a_fresh_one(tmp_path):
    trained = make_network("resnet20", classes=6, seed=2)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    network = describe_network(images(), "resnet20", normalise="cifar10", seed=1)
    with pytest.raises(InputError, match=r"expected shape \(4, 64\), got \(6, 64\)"):
        initial_network(network, tmp_path / "w.pt")
    found = initial_network(network, tmp_path / "w.pt", classes=6)
    make_network(**network).load_state_dict(found.state_dict())  # so it can be loaded once it is trained
    own, theirs = found[1].state_dict(), trained.state_dict()
    head = {"linear.weight", "linear.bias"}
    assert all(torch.equal(own[key], theirs[key]) for key in own.keys() - head)
    assert not any(torch.equal(own[key], theirs[key][:4]) for key in head)
    again = initial_network(network, tmp_path / "w.pt", classes=6)
    other = initial_network({**network, "seed": 5}, tmp_path / "w.pt", classes=6)
    assert equal(again, found)
    assert not equal(other, found)


def test_a_function_of_ones_own(nets):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).state_dict(), nets / "w.pt")
    network = describe_network(images(), "initial_nets:four")
    assert initial_network(network, nets / "w.pt", classes=6)[1].out_features == 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "seven",
            "replace_head: initial_nets:seven makes 1.weight of shape (7, 192), and a last linear layer for 4 classes "
            "has (4, 192)",
        ),
        ("none", "model: expected a network with a torch.nn.Linear to replace, got none in it"),
    ],
)
def test_a_head_that_could_not_be_made_again(nets, function, message):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).state_dict(), nets / "w.pt")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        initial_network(describe_network(images(), f"initial_nets:{function}"), nets / "w.pt", classes=6)


# ---- for certified training ------------------------------------------------------------------------------------------


def test_a_network_for_images_of_one_size():
    found = describe_network(images(), "cnn3", seed=3)
    assert found == {"name": "cnn3", "classes": 4, "channels": 3, "seed": 3, "size": 8}
    assert initial_network(found)(images().read([0, 1])).shape == (2, 4)
    wide = in_memory("noise", np.zeros((2, 1, 8, 9), dtype=np.uint8), np.array([0, 1]))
    with pytest.raises(InputError, match=r"^size: cnn5 takes square images, got shape \(1, 8, 9\)$"):
        describe_network(wide, "cnn5")


def test_initial_weights_for_interval_bounds(tmp_path):
    network = describe_network(images(), "cnn5", normalise="cifar10", seed=1)
    usual, found = make_network(**network), initial_network(network, initial="ibp")
    assert equal(found, ibp_initial(make_network(**network), seed=1))
    assert not equal(found, usual)
    assert float(found[1][7].weight.detach().std()) == pytest.approx((2 * np.pi) ** 0.5 / 128, rel=0.1)
    assert torch.equal(found[1][-1].weight, usual[1][-1].weight)
    torch.save(usual.state_dict(), tmp_path / "w.pt")
    assert equal(initial_network(network, tmp_path / "w.pt", initial="ibp"), usual)


# ---- other activations than ReLU, and blocks that begin as their shortcut -------------------------------------------


def test_another_activation_is_part_of_the_description():
    found = describe_network(images(), "resnet20", activation="celu", activation_options={"alpha": 0.5})
    assert (found["activation"], found["activation_options"], found["shape"]) == ("celu", {"alpha": 0.5}, [3, 8, 8])
    assert json.loads(json.dumps(found)) == found
    network = make_network(**found)
    assert {part.alpha for part in network.modules() if isinstance(part, nn.CELU)} == {0.5}
    assert "activation" not in describe_network(images(), "resnet20")


def test_the_initial_weights_are_the_same_whatever_the_activation():
    smooth = make_network("resnet20", activation="silu", shape=(3, 8, 8), seed=5)
    assert equal(smooth, make_network("resnet20", seed=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "silu"}, "shape: expected that of an image beside activation='silu', got None"),
        ({"activation_options": {"alpha": 1.0}}, "activation_options: expected another activation than relu beside"),
        ({"activation": "swish", "shape": (3, 8, 8)}, "activation: expected one of relu, "),
    ],
)
def test_an_activation_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        make_network("resnet20", **settings)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_residual_blocks_begin_as_their_shortcut(activation):
    described = {"name": "resnet20", "activation": activation, "shape": [3, 8, 8], "seed": 1}
    model = initial_network(described, initial="zero-residual").eval()
    changed = {
        key for key, value in make_network(**described).state_dict().items() if not value.equal(model.state_dict()[key])
    }
    assert changed == {f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3) for block in (0, 1, 2)}
    x = torch.rand(2, 3, 8, 8)
    act = torch.relu if activation == "relu" else nn.functional.silu
    features = act(model.bn1(model.conv1(x)))
    for stage in range(3):
        if stage:
            half = features.shape[1] // 2  # new channels on either side
            features = nn.functional.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        for _ in range(3):
            features = act(features)
    torch.testing.assert_close(model(x), model.linear(features.mean(dim=(2, 3))))


def test_only_residual_networks_begin_as_shortcuts():
    with pytest.raises(InputError, match=r"^initial: zero-residual is for ResNets, whose blocks have a downsample and"):
        initial_network({"name": "lenet"}, initial="zero-residual")
    plain = nn.Module()
    plain.bn1, plain.bn2 = nn.BatchNorm2d(2), nn.BatchNorm2d(2)  # no shortcut goes past it
    with pytest.raises(InputError, match=r"found none$"):
        zero_residual(plain)


def test_blocks_with_nothing_in_the_shortcut_and_with_three_convolutions():
    block, bottleneck = nn.Module(), nn.Module()
    block.bn1, block.bn2, block.downsample = nn.BatchNorm2d(2), nn.BatchNorm2d(2), None
    bottleneck.bn2, bottleneck.bn3, bottleneck.downsample = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
    model = nn.Sequential(block, bottleneck)
    assert zero_residual(model) is model
    zero = {name for name, value in model.named_parameters() if name.endswith("weight") and not value.any()}
    assert zero == {"0.bn2.weight", "1.bn3.weight"}
