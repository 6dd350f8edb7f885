"""The loss of certified training, against formulas in NumPy and against what is sampled in the region."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.training.certified_loss import CertifiedLoss, absolute_weights, certified_cross_entropy
from rs_plugins.errors import InputError, ModelError

BOUNDS = ("ibp", "crown-ibp", "crown")


def images(n=6, shape=(1, 4, 4), classes=3, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=source, dtype=torch.float64)
    x[0].flatten()[:2] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=source)


def dense():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Flatten(), Normalise([0.3] * 16, [0.5] * 16), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()),
        nn.Linear(5, 3),
    ).double()
    with torch.no_grad():
        model[6].weight.mul_(10)
    return model


def normalised():
    torch.manual_seed(1)
    return nn.Sequential(
        *(Normalise([0.4], [0.25]), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(27, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    ).double()


def loss(model, shape=(1, 4, 4), **settings):
    return CertifiedLoss(RelaxedNetwork(model, shape), **settings)


# ---- cross-entropy of margins ----------------------------------------------------------------------------------------


def test_certified_cross_entropy_is_that_of_the_worst_logits():
    margins = np.array([[0.5, -1.0], [2.0, 3.0], [-40.0, 800.0]])
    expected = [math.log(1 + sum(math.exp(-m) for m in row)) for row in margins]
    found = certified_cross_entropy(torch.tensor(margins))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-12)
    y = torch.tensor([2, 0, 1])
    v = torch.tensor([[-0.5, 1.0, 0.0], [0.0, -2.0, -3.0], [40.0, 0.0, -800.0]], dtype=torch.float64)
    assert found.item() == pytest.approx(cross_entropy(v, y).item(), rel=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_image_in_the_region_has_a_greater_cross_entropy(bound):
    x, y = images()
    model = dense()
    bounded = loss(model, bound=bound, regulariser=0)(x, y, 0.1)
    corners = (x + 0.1 * torch.randint(-1, 2, (400, *x.shape), generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    worst = torch.stack([cross_entropy(model(each), y, reduction="none") for each in corners]).amax(dim=0).mean()
    clean = cross_entropy(model(x), y)
    assert bounded.item() >= worst.item() > clean.item() + 0.01
    assert loss(model, bound=bound)(x, y, 0.0).item() == pytest.approx(clean.item(), rel=1e-9)


# ---- the whole loss --------------------------------------------------------------------------------------------------


def intervals_by_hand(model, x, eps):
    """Return bounds before each activation and centre and radius after the last one, in NumPy."""
    x = x.numpy().reshape(len(x), -1)
    lower, upper = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
    lower, upper = (lower - 0.3) / 0.5, (upper - 0.3) / 0.5
    found, width = [], np.mean(upper - lower) / 2
    for layer in (model[2], model[4]):
        W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        c, r = (lower + upper) / 2 @ W.T + b, (upper - lower) / 2 @ np.abs(W).T
        lower, upper = c - r, c + r
        found.append((lower, upper))
        lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
    return found, width, (lower + upper) / 2, (upper - lower) / 2


def loss_by_hand(model, x, y, eps, share, w_rob, l1, regulariser):
    found, width, c, r = intervals_by_hand(model, x, eps)
    W, b = model[6].weight.detach().numpy(), model[6].bias.detach().numpy()
    certified = []
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(3) if k != label]
        margins = [(W[label] - W[k]) @ c[i] + b[label] - b[k] - np.abs(W[label] - W[k]) @ r[i] for k in others]
        certified.append(math.log(1 + sum(math.exp(-m) for m in margins)))
    kappa = 1 - w_rob * share
    terms = []
    for lower, upper in found:
        tight = max(0, 0.5 - width / np.mean((upper - lower) / 2)) / 0.5
        centre, on, off = (lower + upper) / 2, lower > 0, upper < 0
        spread = (centre - centre.mean()) ** 2
        ratios = [np.mean(centre * on) / -np.mean(centre * off), np.sum(spread * on) / np.sum(spread * off)]
        terms.append(tight + sum(max(0, 0.5 - min(ratio, 1 / ratio)) for ratio in ratios) / 0.5)
    weights = sum(model[place].weight.abs().sum().item() for place in (2, 4, 6))
    clean = cross_entropy(model(x), y).item()
    return kappa * clean + (1 - kappa) * np.mean(certified) + l1 * weights + regulariser * (1 - share) * np.mean(terms)


@pytest.mark.parametrize(
    ("share", "w_rob", "l1", "regulariser"),
    [(0.5, 0.7, 0.01, 0.5), (1.0, 0.7, 0.0, 0.5), (0.25, 1.0, 0.0, 2.0), (1.0, 1.0, 0.1, 0.0), (0.5, 0.0, 0.0, 0.0)],
)
def test_the_whole_loss_with_intervals(share, w_rob, l1, regulariser):
    (x, y), model, eps = images(), dense(), 0.02
    found = loss(model, bound="ibp", w_rob=w_rob, l1=l1, regulariser=regulariser)(x, y, eps, share)
    assert found.item() == pytest.approx(loss_by_hand(model, x, y, eps, share, w_rob, l1, regulariser), rel=1e-9)


def test_the_regulariser_is_gone_at_the_end_of_the_ramp():
    (x, y), model = images(), dense()

    def value_and_gradient(regulariser, share):
        value = loss(model, bound="ibp", regulariser=regulariser)(x, y, 0.02, share)
        return value, *torch.autograd.grad(value, list(model.parameters()))

    for with_it, without in zip(value_and_gradient(5.0, 1.0), value_and_gradient(0.0, 1.0), strict=True):
        assert torch.equal(with_it, without)
    assert value_and_gradient(5.0, 0.99)[0] > value_and_gradient(0.0, 0.99)[0]
    assert value_and_gradient(5.0, 0.0)[0].isfinite()


@pytest.mark.parametrize("bound", BOUNDS)
def test_before_the_ramp_it_is_the_clean_loss_without_a_regulariser(bound):
    (x, y), model = images(), normalised()
    found = loss(model, bound=bound, regulariser=5.0)(x, y, 0.0, 0.0)
    assert found.item() == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-12)
    assert loss(model, bound=bound, regulariser=5.0)(x, y, 1e-9, 0.0) > found + 0.1


def test_absolute_weights_are_those_of_linear_layers_and_convolutions():
    model = normalised()
    for parameter in (model[1].bias, model[2].weight, model[2].bias, model[8].bias):
        nn.init.constant_(parameter, 100.0)
    expected = sum(model[place].weight.abs().sum().item() for place in (1, 5, 8))
    assert absolute_weights(model).item() == pytest.approx(expected)
    x, y = images()
    found = [loss(model, l1=weight)(x, y, 0.01).item() for weight in (0.0, 0.5)]
    assert found[1] - found[0] == pytest.approx(0.5 * expected)


def test_absolute_weights_are_those_that_are_used_and_shared_ones_count_once():
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(3)), nn.ReLU(), nn.Linear(4, 3)).double()
    model[2].weight = model[1].weight
    nn.utils.parametrizations.weight_norm(model[3])
    expected = sum(model[place].weight.abs().sum().item() for place in (1, 3, 5))
    found = absolute_weights(model)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert model[3].parametrizations.weight.original1.grad.abs().sum() > 0
    nn.utils.parametrizations.weight_norm(model[1]), nn.utils.parametrizations.weight_norm(model[5])
    assert loss(model, (1, 2, 2), l1=0.5)(*images(shape=(1, 2, 2)), 0.01).isfinite()
    assert absolute_weights(nn.Flatten()) == 0


def test_better_bounds_have_a_smaller_loss_and_the_lower_slope_counts():
    (x, y), model = images(), dense()
    values = {bound: loss(model, bound=bound)(x, y, 0.15).item() for bound in BOUNDS}
    assert values["ibp"] > values["crown-ibp"] > values["crown"]
    assert loss(model, lower_slope="parallel")(x, y, 0.15).item() != values["crown-ibp"]


# ---- batch normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("w_rob", [0.7, 1.0])
def test_bounds_take_the_statistics_of_the_clean_batch(bound, w_rob):
    """A twin in eval mode has them as running statistics; gradients go through the statistics, so they differ."""
    (x, y), model = images(), normalised()
    twin = copy.deepcopy(model)
    for layer in (twin[2], twin[6]):
        layer.momentum = 1.0
    twin(x)
    for layer, size in ((twin[2], 6 * 9), (twin[6], 6)):
        layer.running_var *= (size - 1) / size
    twin.eval()
    options = {"bound": bound, "w_rob": w_rob}
    for share in (0.5, 1.0):
        found = loss(model, **options)(x, y, 0.02, share)
        assert found.item() == pytest.approx(loss(twin, **options)(x, y, 0.02, share).item(), rel=1e-9)
    ours = torch.autograd.grad(found, model[1].weight)[0]
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[1].weight[0, 0, 0, 0] += 1e-6
    slope = (loss(shifted, **options)(x, y, 0.02).item() - found.item()) / 1e-6
    assert float(ours[0, 0, 0, 0]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_the_clean_batch_moves_running_statistics_once():
    (x, y), models = images(), [normalised() for _ in range(4)]
    models[0](x)
    loss(models[1])(x, y, 0.02)
    loss(models[2]).observe(x)
    loss(models[3].eval()).observe(x)
    for name, value in models[0].named_buffers():
        assert torch.equal(value, models[1].get_buffer(name))
        assert torch.equal(value, models[2].get_buffer(name))
    assert models[3][2].num_batches_tracked == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_rob", [0.5, 1.0])
@pytest.mark.parametrize("label", [3, -1])
def test_labels_that_the_network_does_not_know_are_refused(w_rob, label):
    x, y = images()
    y[2] = label
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 3\), got values from"):
        loss(dense(), w_rob=w_rob)(x, y, 0.1)


def test_what_cannot_be_bounded_is_refused_by_name():
    with pytest.raises(ModelError, match=r"1 \(Softmax\)|Softmax"):
        loss(nn.Sequential(nn.Flatten(), nn.Softmax(dim=1), nn.Linear(16, 3)))
