import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.identity import identity
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward, gradient_for
from rs_plugins.errors import InputError

GRID = torch.tensor([-3.0, -0.4, -0.01, 0.0, 0.02, 0.5, 4.0], dtype=torch.float64)


def slope(module, create_graph=False):
    z = GRID.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(z).sum(), z, create_graph=create_graph)
    return (first, z) if create_graph else first


@pytest.mark.parametrize("sharpness", [10.0, 2.5])
@pytest.mark.parametrize(
    ("where", "purposes"),
    [("attack_grad", {"attack"}), ("update_grad", {"update"}), ("both_grads", {"attack", "update"})],
)
def test_whose_gradient_is_smooth(where, purposes, sharpness):
    module = ReLUWithSmoothBackward(where, sharpness=sharpness)
    hard = (GRID > 0).double()
    smooth = 1 / (1 + torch.exp(-sharpness * GRID))
    for purpose in ("attack", "update"):
        with gradient_for(module, purpose):
            torch.testing.assert_close(slope(module), smooth if purpose in purposes else hard)
            assert torch.equal(module(GRID), GRID.relu())
    assert torch.equal(slope(module), hard)
    assert torch.equal(module(GRID), GRID.relu())


def test_the_backward_pass_need_not_be_inside():
    module, z = ReLUWithSmoothBackward(sharpness=3.0), GRID.clone().requires_grad_()
    with gradient_for(module, "update"):
        total = module(z).sum()
    total.backward()
    torch.testing.assert_close(z.grad, torch.sigmoid(3 * GRID))


def test_second_derivatives_and_vmap():
    module = ReLUWithSmoothBackward(sharpness=3.0)
    with gradient_for(module, "attack"):
        first, z = slope(module, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
        logistic = torch.sigmoid(3 * GRID)
        torch.testing.assert_close(second, 3 * logistic * (1 - logistic))
        single = torch.func.vmap(torch.func.grad(lambda value: module(value) * 2))(GRID)
        torch.testing.assert_close(single, 2 * logistic)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with gradient_for(module, "attack"):
        torch.testing.assert_close(module(values), values.relu(), equal_nan=True)


def test_checkpointing_needs_the_backward_pass_inside():
    module, z = ReLUWithSmoothBackward(sharpness=3.0), GRID.clone().requires_grad_()
    with gradient_for(module, "update"):
        checkpoint(module, z, use_reentrant=False).sum().backward()
    torch.testing.assert_close(z.grad, torch.sigmoid(3 * GRID))
    with gradient_for(module, "update"):
        total = checkpoint(module, z, use_reentrant=False).sum()
    with pytest.raises(CheckpointError, match="different number of tensors"):
        total.backward()


def test_the_switch_is_put_back():
    outer = nn.Sequential(ReLUWithSmoothBackward("attack_grad"), ReLUWithSmoothBackward())
    with gradient_for(outer, "attack"):
        with gradient_for(outer[0], "update"):
            assert torch.equal(slope(outer[0]), (GRID > 0).double())
        assert not torch.equal(slope(outer[0]), (GRID > 0).double())
    assert torch.equal(slope(outer), (GRID > 0).double())
    try:
        with gradient_for(outer, "update"):
            assert not torch.equal(slope(outer), (GRID > 0).double())
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert torch.equal(slope(outer), (GRID > 0).double())
    plain = nn.Sequential(nn.ReLU())
    with gradient_for(plain, "update") as same:
        assert same is plain


def test_in_a_network():
    guest = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model, report = smooth_activations(guest, lambda: ReLUWithSmoothBackward(sharpness=2.0), (4,))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), guest(x))
    assert (report.modules, report.calls, report.remaining) == (1, 1, {})
    RelaxedNetwork(model, (4,))
    with gradient_for(model, "update"):
        model(x).sum().backward()
    expected = (torch.sigmoid(2 * guest[0](x)) * guest[2].weight.sum(0)).T @ x
    torch.testing.assert_close(model[0].weight.grad, expected)
    sharper = smooth_activations(guest, lambda: ReLUWithSmoothBackward(sharpness=3.0), (4,)).model
    attacked = smooth_activations(guest, lambda: ReLUWithSmoothBackward("attack_grad", sharpness=2.0), (4,)).model
    assert len({identity(part) for part in (guest, model, sharper, attacked)}) == 4
    assert identity(pickle.loads(pickle.dumps(model))) == identity(copy.deepcopy(model)) == identity(model)
    assert list(model.state_dict()) == list(guest.state_dict())


def test_mistakes():
    with pytest.raises(InputError, match=r"^where: expected one of 'attack_grad', .*'both_grads', got 'full'$"):
        ReLUWithSmoothBackward("full")
    with pytest.raises(InputError, match=r"^sharpness: expected a finite number > 0, got 0$"):
        ReLUWithSmoothBackward(sharpness=0)
    with pytest.raises(InputError, match=r"^purpose: expected one of 'attack', 'update', got 'test'$"):
        gradient_for(nn.ReLU(), "test").__enter__()
    assert repr(ReLUWithSmoothBackward()) == "ReLUWithSmoothBackward(where='both_grads', sharpness=10)"
