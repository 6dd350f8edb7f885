"""The networks of certified training: their layers, and that the sizes go together."""

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.cnn import cnn3, cnn5, cnn7
from rs_plugins.core.architectures.named import make_network

# name: (kernel, stride, padding, channels in, channels out) of convolutions; (in, out) of linear layers; for 28 by 28
LAYERS = {
    cnn3: ([(5, 2, 2, 1, 16), (4, 2, 1, 16, 32)], [(32 * 49, 10)]),
    cnn5: ([(3, 1, 1, 1, 16), (4, 2, 1, 16, 16), (4, 2, 1, 16, 32)], [(32 * 49, 512), (512, 10)]),
    cnn7: (
        [(3, 1, 1, 1, 64), (3, 1, 1, 64, 64), (3, 2, 1, 64, 128), (3, 1, 1, 128, 128), (3, 1, 1, 128, 128)],
        [(128 * 196, 512), (512, 10)],
    ),
}


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
def test_layers(make):
    model = make()
    convolutions = [part for part in model if isinstance(part, nn.Conv2d)]
    linear = [part for part in model if isinstance(part, nn.Linear)]
    found = [(c.kernel_size[0], c.stride[0], c.padding[0], c.in_channels, c.out_channels) for c in convolutions]
    assert (found, [(part.in_features, part.out_features) for part in linear]) == LAYERS[make]
    hidden = len(convolutions) + len(linear) - 1
    kinds = [type(part) for part in model]
    assert kinds.count(nn.ReLU) == hidden
    assert kinds.count(nn.BatchNorm2d) + kinds.count(nn.BatchNorm1d) == (hidden if make is cnn7 else 0)
    assert kinds[-1] is nn.Linear
    for place, part in enumerate(model):
        if isinstance(part, nn.Conv2d | nn.Linear) and part is not model[-1]:
            after = model[place + 1 : place + 3] if make is cnn7 else model[place + 1 : place + 2]
            assert isinstance(after[-1], nn.ReLU)


@pytest.mark.parametrize("name", ["cnn3", "cnn5", "cnn7"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"channels": 1}, (1, 28, 28)),
        ({}, (3, 32, 32)),
        ({"channels": 2, "size": 17, "width": 0.25, "classes": 5}, (2, 17, 17)),
    ],
    ids=["mnist", "cifar10", "other"],
)
def test_sizes(name, options, shape):
    model = make_network(name, **{"width": 0.125} | options).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, options.get("classes", 10))


def test_the_width_scales_all_that_is_hidden():
    model = cnn5(width=0.5)
    assert [part.out_channels for part in model if isinstance(part, nn.Conv2d)] == [8, 8, 16]
    assert [part.out_features for part in model if isinstance(part, nn.Linear)] == [256, 10]
    assert cnn3(width=1e-3)[0].out_channels == 1
