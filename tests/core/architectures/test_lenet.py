import pytest
import torch
from torch.nn.functional import conv2d, linear, max_pool2d, relu

from rs_plugins.core.architectures.lenet import lenet
from rs_plugins.errors import InputError


def by_hand(weights, x):
    """The network by the paper's list of layers, on a state_dict."""
    w = list(weights.values())
    x = max_pool2d(relu(conv2d(x, w[0], w[1])), 2)
    x = max_pool2d(relu(conv2d(x, w[2], w[3])), 2)
    return linear(relu(linear(x.flatten(1), w[4], w[5])), w[6], w[7])


def test_it_is_the_papers_network():
    model = lenet().double()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("classes", "parameters"), [(10, 431_080), (4, 431_080 - 6 * 501)])
def test_parameters(classes, parameters):
    model = lenet(classes=classes)
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, classes)


def test_names_of_its_weights():
    """Weights were saved under these."""
    names = [f"{layer}.{kind}" for layer in (0, 3, 7, 9) for kind in ("weight", "bias")]
    assert list(lenet().state_dict()) == names


def test_the_layouts_agree():
    model, x = lenet().eval(), torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    other = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


def test_impossible_classes():
    with pytest.raises(InputError, match=r"^classes: expected an integer >= 2, got 1$"):
        lenet(classes=1)
