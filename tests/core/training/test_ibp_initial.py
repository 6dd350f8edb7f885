"""Initial weights for interval bounds."""

import math

import pytest
import torch
from torch import nn

from rs_plugins.core.training.ibp_initial import ibp_initial
from rs_plugins.errors import InputError


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 5, groups=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten()),
        *(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def test_weights_of_all_but_the_last_layer_have_the_deviation_that_keeps_widths():
    model, before = network(), network().state_dict()
    assert ibp_initial(model) is model
    for name, fan_in in (("0", 2 * 25), ("3", 32 * 9), ("5", 64)):
        weight = model.get_submodule(name).weight
        expected = math.sqrt(2 * math.pi) / fan_in
        assert float(weight.detach().std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))
        assert abs(float(weight.detach().mean())) < 4 * expected / math.sqrt(weight.numel())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "3.weight", "5.weight"}


def test_a_layer_with_relu_leaves_the_width_of_an_interval_as_it_is():
    """Half of the neurons are on: E|w| · fan_in · 1/2 = 1 for widths, as of E|w| = √(2/π) · sd."""
    torch.manual_seed(0)
    model = ibp_initial(nn.Sequential(nn.Linear(400, 400, bias=False), nn.ReLU(), nn.Linear(400, 2)))
    weight, c, r = model[0].weight.detach(), torch.randn(200, 400), 1e-3
    centre, radius = c @ weight.T, torch.full((200, 400), r) @ weight.abs().T
    after = ((centre + radius).relu() - (centre - radius).relu()) / 2
    assert float(after.mean()) == pytest.approx(r, rel=0.1)


def test_the_seed_decides_and_nothing_else():
    numbers = torch.get_rng_state()
    one, two, other = (ibp_initial(network(), seed=seed) for seed in (3, 3, 4))
    torch.set_rng_state(numbers)
    ibp_initial(one, seed=3)
    assert torch.equal(numbers, torch.get_rng_state())
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


def test_precision_and_what_asks_for_a_gradient_stay():
    model = network().double()
    model[3].weight.requires_grad_(False)
    parameters = [id(parameter) for parameter in model.parameters()]
    ibp_initial(model)
    assert model[0].weight.dtype == torch.float64
    assert [parameter.requires_grad for parameter in (model[0].weight, model[3].weight)] == [True, False]
    assert [id(parameter) for parameter in model.parameters()] == parameters
    torch.testing.assert_close(model[0].weight, ibp_initial(network())[0].weight.double())


def test_what_cannot_be_done_is_refused():
    with pytest.raises(InputError, match="model: expected at least two linear or convolutional layers, got 1"):
        ibp_initial(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    computed = network()
    nn.utils.parametrizations.weight_norm(computed[5])
    with pytest.raises(InputError, match="model: expected weights to draw, got 5, whose weight is computed of others"):
        ibp_initial(computed)
    with pytest.raises(InputError, match=r"seed: expected an integer or None, got 0\.5"):
        ibp_initial(network(), seed=0.5)
