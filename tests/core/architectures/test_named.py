import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.cifar_resnet import CifarResNet
from rs_plugins.core.architectures.named import NETWORKS, make_network
from rs_plugins.core.architectures.normalise import STATISTICS, Normalise
from rs_plugins.core.training.presets import PRESETS
from rs_plugins.errors import InputError, ModelError

OWN = """
import numpy as np, random, torch
from torch import nn
torch.manual_seed(0)
class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("others", torch.tensor([random.random(), np.random.rand()]))
net = Drawn
def broken(): raise ZeroDivisionError("no")
"""


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch):
    """Our own networks need neither."""
    for library in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, library, None)


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_from_the_seed_alone(name):
    before = states()
    first = make_network(name, seed=3)
    assert states() == before
    torch.rand(1)
    assert same(first, make_network(name, seed=3))
    assert not same(first, make_network(name, seed=4))


@pytest.mark.parametrize(("name", "shape"), [("lenet", (1, 28, 28)), ("resnet20", (3, 16, 16))])
def test_classes(name, shape):
    assert make_network(name, classes=7).eval()(torch.zeros(2, *shape)).shape == (2, 7)


def test_channels():
    assert make_network("resnet56", channels=1).conv1.in_channels == 1
    assert make_network("lenet", channels=1)[0].in_channels == 1


def test_which_is_which():
    assert isinstance(make_network("resnet20"), CifarResNet)
    heads = {name: "fc" if hasattr(make_network(name), "fc") else "linear" for name in list(NETWORKS)[1:4]}
    assert heads == {"resnet20": "linear", "resnet56": "linear", "resnet110": "fc"}


def test_the_presets_architectures_are_here():
    assert {preset.architecture for preset in PRESETS.values()} <= set(NETWORKS)


def test_normalisation_comes_first():
    model = make_network("resnet20", **STATISTICS["cifar10"]._asdict(), seed=5)
    assert [type(part) for part in model] == [Normalise, CifarResNet]
    assert model[0].std.tolist() == torch.tensor(STATISTICS["cifar10"].std).tolist()
    assert same(model[1], make_network("resnet20", seed=5))
    assert make_network("lenet", mean=(0.1,))[0].std.tolist() == [1]


def test_on_the_cpu_wherever_tensors_are_made():
    with torch.device("meta"):
        model = make_network("lenet", mean=(0.1,), seed=3)
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert same(model[1], make_network("lenet", seed=3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {"channels": 3}, r"^channels: expected 1 for lenet, got 3$"),
        ("resnet20", {"channels": 0}, r"^channels: expected an integer >= 1, got 0$"),
        ("resnet20", {"classes": 1}, r"^classes: expected an integer >= 2, got 1$"),
        ("lenet", {"seed": 0.5}, r"^seed: expected an integer or None, got 0.5$"),
        ("lenet", {"std": (1,)}, r"^mean: expected one number per channel beside std, got None$"),
        ("lenet", {"mean": (0, 0, 0)}, r"^mean: expected one number per channel, 1 for lenet, got 3$"),
        ("resnet20", {"mean": (0,), "std": (1,)}, r"^mean: expected one number per channel, 3 for resnet20, got 1$"),
        ("lenet", {"mean": (0,), "std": (0,)}, r"^std: expected a finite number > 0, got 0.0$"),
        (None, {}, r"^model: expected a name, got NoneType$"),
        ("resnet20", {"size": 32}, r"^size: only for cnn3, cnn5, cnn7, got 32 with resnet20$"),
        ("own_nets:net", {"width": 0.5}, r"^width: only for cnn3, cnn5, cnn7, got 0.5 with own_nets:net$"),
        ("cnn3", {"width": 0}, r"^width: expected a finite number > 0, got 0$"),
        ("cnn7", {"size": 2.5}, r"^size: expected an integer >= 1, got 2.5$"),
        ("cnn5", {"size": 1}, r"^size: images of 1 by 1 pixels are too small for the network$"),
        ("cnn5", {"mean": (0, 0)}, r"^mean: expected one number per channel, 3 for cnn5, got 2$"),
    ],
)
def test_what_does_not_fit(name, options, message):
    with pytest.raises(InputError, match=message):
        make_network(name, **options)


def test_large_and_negative_seeds():
    assert not same(make_network("lenet", seed=2**80), make_network("lenet", seed=-1))


def test_functions_of_ones_own(site):
    """Their module may seed the generators when it is imported: the first network is as all others."""
    site.write("own_nets.py", OWN)
    before = states()
    first, second = (make_network("own_nets:net", seed=3, classes=9, channels=5) for _ in range(2))
    assert states() == before
    assert isinstance(first, nn.Module)
    assert same(first, second)
    assert not same(first, make_network("own_nets:net", seed=4))
    assert not torch.equal(first.others, make_network("own_nets:net", seed=4).others)
    wrapped = make_network("own_nets:net", mean=(0, 0), std=(1, 2))
    assert [type(part).__name__ for part in wrapped] == ["Normalise", "Drawn"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_nets:nothing", InputError, "model: own_nets has no nothing; it offers"),
        ("own_nets:broken", ModelError, r"model: own_nets:broken\(\) failed: ZeroDivisionError: no"),
        ("no_nets_at_all:net", InputError, "model: cannot import no_nets_at_all: ModuleNotFoundError"),
        ("nets.py:net", InputError, "got a file, 'nets.py:net'; write nets:net"),
        (":net", InputError, "model: expected PACKAGE.MODULE:FUNCTION, got ':net'"),
    ],
)
def test_functions_that_fail(site, name, error, message):
    site.write("own_nets.py", OWN)
    before = states()
    with pytest.raises(error, match=message):
        make_network(name)
    assert states() == before
