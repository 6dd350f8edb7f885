import random

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.heads import replace_head
from rs_plugins.core.architectures.named import make_network
from rs_plugins.errors import InputError


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 1000), nn.Identity()))


def test_the_last_layer_is_replaced_and_nothing_else():
    model = network()
    old, first = model[3][0].weight, model[1].weight
    assert replace_head(model, 3) is model
    assert (model[3][0].in_features, model[3][0].out_features) == (6, 3)
    assert model[1].weight is first
    assert model[3][0].weight is not old
    assert model(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "resnet110"])
def test_our_networks(name):
    model = make_network(name, classes=100)
    shape = (1, 1, 28, 28) if name == "lenet" else (1, 3, 8, 8)
    assert replace_head(model, 10).eval()(torch.zeros(shape)).shape == (1, 10)


def test_the_pretrained_resnet110_of_1000_classes():
    model = replace_head(make_network("resnet110", classes=1000), 10)
    assert (model.fc.in_features, model.fc.out_features) == (64, 10)
    assert sum(value.numel() for value in model.parameters()) == 1_730_714


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def head(seed, dtype=torch.float32):
    return replace_head(network().to(dtype), 5, seed=seed)[3][0].weight


def test_its_weights_come_from_the_seed_alone():
    first = head(7)
    torch.rand(3)
    assert torch.equal(first, head(7))
    assert not torch.equal(first, head(8))
    assert torch.equal(first.double(), head(7, torch.float64))


def test_the_global_generators_are_left_alone():
    model, before = network(), states()
    replace_head(model, 5)
    assert states() == before


def test_type_device_mode_and_bias_are_the_old_ones():
    model = nn.Sequential(nn.Linear(4, 9, bias=False)).to("meta", torch.bfloat16).eval()
    new = replace_head(model, 3)[0]
    assert (new.weight.device.type, new.weight.dtype, new.bias, new.training) == ("meta", torch.bfloat16, None, False)
    assert replace_head(network(), 3)[3][0].training


def test_a_frozen_network_gets_a_head_that_learns():
    model = network().requires_grad_(False)
    replace_head(model, 3)
    assert [value.requires_grad for value in model.parameters()] == [False, False, True, True]


def test_a_layer_that_has_two_places_is_replaced_in_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), shared, nn.Sequential(shared))
    replace_head(model, 2)
    assert model[1] is model[2][0]
    assert model[1].out_features == 2


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        (nn.Conv2d(1, 1, 1), 3, r"^model: expected a network with a torch.nn.Linear to replace, got none in it$"),
        (nn.Linear(3, 4), 3, r"^model: expected a network with a torch.nn.Linear to replace, got that layer alone$"),
        (network(), 1, r"^classes: expected an integer >= 2, got 1$"),
    ],
)
def test_what_has_no_such_layer(model, classes, message):
    with pytest.raises(InputError, match=message):
        replace_head(model, classes)


def test_a_seed_must_be_a_number():
    with pytest.raises(InputError, match=r"^seed: expected an integer or None, got 'x'$"):
        replace_head(network(), 3, seed="x")
