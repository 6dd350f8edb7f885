import pytest
import torch
from torch import nn

from rs_plugins.core import models
from rs_plugins.errors import InputError, ModelError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Dropout(), nn.Linear(8, 3)))


class Scale(nn.Module):
    """A model without parameters or buffers."""

    def forward(self, x):
        return torch.cat([x, -x], dim=1)


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_every_submodule_gets_its_own_mode_back_also_after_an_exception():
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with models.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), models.evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_frozen_parameters_ask_for_gradients_again_as_they_did_also_after_an_exception():
    model = network()
    model[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert sorted(set(before)) == [False, True]
    with models.frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    with pytest.raises(KeyError), models.frozen(model):
        raise KeyError
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_device_and_dtype_come_from_the_model():
    assert models.device_and_dtype(network()) == (torch.device("cpu"), torch.float32)
    assert models.device_and_dtype(network().double()) == (torch.device("cpu"), torch.float64)
    assert models.device_and_dtype(Scale(), "cpu") == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("model", "device", "message"),
    [
        (Scale(), None, "model: it has no parameters or buffers, so its device is unknown; pass device='cpu'"),
        (network(), "meta", "device: expected the model's own device cpu, got meta"),
        (network(), "cuda:99", "device: expected a device of this machine, got 'cuda:99'"),
        (Scale(), "nonsense", "device: expected a device of this machine, got 'nonsense'"),
        (Scale(), b"\x80", "device: expected a device of this machine, got"),
    ],
    ids=["no parameters", "elsewhere", "no such GPU", "no such device", "bytes"],
)
def test_devices_are_refused(model, device, message):
    with pytest.raises(InputError, match=message):
        models.device_and_dtype(model, device)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: [x], r"expected it to return floating-point logits of shape \(1, classes\), got list"),
        (lambda x: x.argmax(1), "got a tensor of torch.int64"),
        (lambda x: x.unsqueeze(1), r"expected logits of shape \(1, classes\), got shape \(1, 1, 4\)"),
        (lambda x: x[:, :1], "expected at least 2 columns of logits, got 1; turn a one-output model into two"),
        (lambda x: x[:, :2], "expected 4 columns of logits, got 2"),
        (lambda x: x * float("nan"), "it returns NaN logits on a clean image"),
        (lambda x: x.add_(1), "it changes its input in place"),
        (lambda x: x @ torch.zeros(7, 2), r"it fails on an input of shape \(1, 4\): RuntimeError:"),
        (lambda x: x[9], r"it fails on an input of shape \(1, 4\): IndexError:"),
    ],
    ids=["list", "labels", "rank", "one column", "columns", "nan", "in place", "shape", "index"],
)
def test_a_model_that_cannot_be_certified_is_refused(make, message):
    with pytest.raises(ModelError, match=message):
        models.probe(Returning(make), torch.rand(1, 4), classes=4)


def test_probe_finds_the_number_of_classes_and_leaves_the_model_alone():
    model = network().train()
    before = models.digest(model)
    assert models.probe(model, torch.rand(1, 4)) == 3
    assert model[1].training
    assert models.digest(model) == before


def test_the_digest_sees_buffers_that_are_not_saved_and_not_their_order_of_creation():
    def normalising(mean):
        model = nn.Linear(2, 2)
        model.register_buffer("mean", torch.tensor(mean), persistent=False)
        return model

    torch.manual_seed(0)
    first = models.digest(normalising(0.0))
    torch.manual_seed(0)
    assert models.digest(normalising(0.5)) != first


def test_the_digest_sees_shape_and_type_of_equal_bytes():
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    digests = set()
    for value in zeros:
        module = nn.Module()
        module.register_buffer("x", value)
        digests.add(models.digest(module))
    assert len(digests) == 3


def test_device_and_type_are_those_of_the_first_floating_tensor():
    module = nn.Module()
    module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    module.register_buffer("scale", torch.zeros(1, dtype=torch.float64))
    assert models.device_and_dtype(module, "cpu") == (torch.device("cpu"), torch.float64)


def test_the_digest_sees_weights_buffers_types_and_architecture():
    torch.manual_seed(0)
    model = network()
    digests = {models.digest(model)}
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    digests.add(models.digest(model))
    model[1].running_mean += 1
    digests.add(models.digest(model))
    digests.add(models.digest(model.bfloat16()))
    digests.add(models.digest(nn.Sequential(model, nn.ReLU())))
    assert len(digests) == 5
    assert models.digest(network()) == models.digest(network())
