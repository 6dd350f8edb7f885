"""Each way to convert, on each network, against the same network written with the other activation."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.activations import SmoothReLU, smooth_relu
from rs_plugins.core.architectures.cifar_resnet import CifarResNet
from rs_plugins.core.identity import identity
from rs_plugins.errors import ModelError, ModelWarning

CURVED = {"initial": 1.5}  # of SmoothReLU: far enough from ReLU to tell


def curved(z):
    return smooth_relu(z, 1.5**2)


def gradients(output, *inputs):
    return torch.autograd.grad(output.square().sum(), inputs)


def guests_parameters(model):
    return [value for name, value in model.named_parameters() if not name.endswith("b_raw")]


@pytest.mark.parametrize(
    ("network", "mechanism", "used", "counts"),
    [
        ("Functions", "auto", "fx", (1, 8, 10, 9)),
        ("Functions", "fx", "fx", (0, 10, 10, 10)),
        ("Functions", "mode", "mode", (1, 0, 10, 2)),
        ("Branching", "auto", "mode", (1, 0, 3, 2)),
        ("Branching", "mode", "mode", (1, 0, 3, 2)),
        ("Statements", "auto", "fx", (1, 3, 4, 4)),
        ("Statements", "fx", "fx", (0, 4, 4, 4)),
        ("Statements", "mode", "mode", (1, 0, 4, 2)),
    ],
)
def test_functions(networks, vectors, network, mechanism, used, counts):
    guest = networks[network]()
    model, report = smooth_activations(guest, "smooth-relu", vectors, mechanism=mechanism, **CURVED)
    assert (report.mechanism, not report.remaining) == (used, True)
    assert (report.modules, report.sites, report.calls, len(report.learnable)) == counts
    x, same = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    expected = guest.written_out(same, curved)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(guest(vectors), expected, atol=1e-2)
    for got, wanted in zip(
        gradients(model(x), x, *guests_parameters(model)), gradients(expected, same, *guest.parameters()), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_statements_are_written_back_and_others_not(networks, vectors, pictures):
    statements = smooth_activations(networks["Statements"](), "silu", vectors).report
    functions = smooth_activations(networks["Functions"](), "silu", vectors).report
    modules = smooth_activations(networks["ResidualNetwork"](), "silu", pictures).report
    assert [statements.written_back, functions.written_back, modules.written_back] == [True, False, False]
    assert "in-place results are written back" in str(statements)


def test_modules_alone_can_be_statements():
    class Statement(nn.Sequential):
        def forward(self, x):
            z = self[0](x)
            self[1](z)
            return self[2](z)

    class Careful(Statement):
        def forward(self, x):
            z = super().forward(x)
            if not z.isfinite().all():
                raise ValueError("expected numbers")
            return z

    x = torch.randn(3, 4)
    for kind in (Statement, Careful):
        guest = kind(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
        model, report = smooth_activations(guest, "silu", (4,))
        assert (report.mechanism, report.written_back, report.modules) == ("modules", True, 1)
        torch.testing.assert_close(model(x), guest[2](F.silu(guest[0](x))))


@pytest.mark.parametrize(
    ("mechanism", "learned", "sites"), [("auto", 9, 0), ("modules", 9, 0), ("fx", 17, 17), ("mode", 10, 0)]
)
def test_a_residual_network_with_shared_modules(networks, pictures, mechanism, learned, sites):
    guest = networks["ResidualNetwork"]()
    written = networks["ResidualNetwork"](lambda: SmoothReLU(1.5))
    model, report = smooth_activations(guest, "smooth-relu", (3, 16, 16), mechanism=mechanism, **CURVED)
    assert (len(report.learnable), report.sites, report.calls) == (learned, sites, 17)
    assert report.modules == (0 if mechanism == "fx" else 9)
    for training in (False, True):
        output, expected = (part.train(training)(pictures) for part in (model, written))
        torch.testing.assert_close(output, expected)
    for name, buffer in written.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())["model." * (mechanism == "mode") + name], buffer)
    output.square().sum().backward(), expected.square().sum().backward()
    pairs = zip(guests_parameters(model), guests_parameters(written), strict=True)
    assert all(torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5) for one, other in pairs)
    learned_here = dict(model.named_parameters())
    silent = [name for name in report.learnable if learned_here[name].grad is None]
    assert silent == (["activation.b_raw"] if mechanism == "mode" else [])  # of functions, which this network has not


@pytest.mark.parametrize("mechanism", ["auto", "fx", "mode"])
def test_our_residual_network(mechanism):
    guest = CifarResNet(8, classes=4)
    model, report = smooth_activations(guest, "silu", (3, 16, 16), mechanism=mechanism)
    assert (report.calls, report.mechanism) == (7, "mode" if mechanism == "mode" else "fx")
    other = smooth_activations(guest, "silu", (3, 16, 16), mechanism="mode").model
    x = torch.rand(2, 3, 16, 16)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), other.train(training)(x))


@pytest.mark.parametrize("mechanism", ["auto", "modules", "fx", "mode"])
def test_the_real_resnet18(mechanism):
    reason = "torchvision is not here, or does not import"
    models = pytest.importorskip("torchvision.models", exc_type=Exception, reason=reason)
    guest = models.resnet18(num_classes=10)
    model, report = smooth_activations(guest, "silu", (3, 32, 32), mechanism=mechanism)
    assert (report.calls, report.modules) == (17, 0 if mechanism == "fx" else 9)
    surgery = smooth_activations(guest, "silu", (3, 32, 32), mechanism="modules").model
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), surgery(x))
    if mechanism != "mode":
        assert list(model.state_dict()) == list(guest.state_dict())


@pytest.mark.parametrize("mechanism", ["auto", "modules", "fx", "mode"])
@pytest.mark.parametrize("training", [False, True])
def test_transformer_layers_leave_the_fast_path(encoder, mechanism, training):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    model, report = smooth_activations(encoder, "silu", (5, 8), mechanism=mechanism)
    assert (report.modules, report.calls, bool(report.remaining)) == (1, 1, False)
    written = copy.deepcopy(encoder)
    written[0].activation, written[0].activation_relu_or_gelu = F.silu, 0
    with torch.no_grad():
        model.train(training), written.train(training)
        torch.testing.assert_close(model(x), written(x))
        assert not torch.allclose(model(x), encoder(x), atol=1e-4)


def test_transformer_layers_with_a_module_and_a_stack_of_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
    stack = nn.TransformerEncoder(layer, 2).eval()
    model, report = smooth_activations(stack, "silu", (5, 8))
    assert (report.modules, report.calls) == (2, 2)
    assert not model.use_nested_tensor
    padded = torch.tensor([[False] * 3 + [True] * 2] * 3)
    assert model(torch.randn(3, 5, 8), src_key_padding_mask=padded).shape == (3, 5, 8)


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_copies_pickles_and_state_dicts(networks, pictures, mechanism):
    guest = networks["ResidualNetwork"]()
    model, report = smooth_activations(guest.eval(), "smooth-relu", pictures, mechanism=mechanism)
    other = smooth_activations(guest, "smooth-relu", pictures, mechanism=mechanism, initial=2.0).model
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    for twin in (*twins, other):
        assert list(twin.state_dict()) == list(model.state_dict())
        assert torch.equal(twin(pictures), model(pictures))
    assert identity(twins[0]) == identity(twins[1]) == identity(model)
    with torch.no_grad():
        next(twins[0].parameters()).add_(1)
    assert not torch.equal(twins[0](pictures), model(pictures))
    keys = [key for key in model.state_dict() if key not in report.learnable]
    assert keys == ["model." * (mechanism == "mode") + key for key in guest.state_dict()]


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_silu_adds_no_keys_and_another_activation_is_another_model(networks, pictures, mechanism):
    guest = networks["ResidualNetwork"]()
    prefix = "model." if mechanism == "mode" else ""
    known = set()
    for activation, options in [("silu", {}), ("celu", {"alpha": 0.5}), ("celu", {"alpha": 0.7})]:
        model, report = smooth_activations(guest, activation, pictures, mechanism=mechanism, **options)
        assert list(model.state_dict()) == [prefix + key for key in guest.state_dict()]
        assert report.learnable == ()
        known.add(identity(model))
    assert len(known | {identity(guest)}) == 4


def test_what_torch_fx_would_get_wrong_is_left_to_the_mode():
    class Dropping(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.layer, self.way = nn.Linear(4, 3), way
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x):
            return self.way(self, F.relu(self.layer(x)))

    def kept(self, z):
        self.kept = z
        return z

    def counted(self, z):
        self.steps += self.training
        return z

    ways = [
        ("another way in train mode", lambda self, z: F.dropout(z, 0.5, self.training)),
        ("in eval mode it computes something else", lambda self, z: z + isinstance(z, torch.Tensor)),
        ("in train mode it computes something else", lambda self, z: z + torch.tensor(1.0 + self.training)),
        ("draws random numbers", lambda self, z: z + torch.randn(3)),
        ("draws random numbers", lambda self, z: -z if self.training and random.random() < 1e-9 else z),
        ("draws random numbers", lambda self, z: z + np.random.random()),  # noqa: NPY002
        ("changes its attributes or buffers", kept),
        ("changes its attributes or buffers", counted),
        ("torch.fx cannot", lambda self, z: z if z.sum() > 0 else -z),
    ]
    for reason, way in ways:
        guest = Dropping(way).eval()
        with pytest.raises(ModelError, match=f"^model: it cannot be converted by 'fx': .*{reason}"):
            smooth_activations(guest, "silu", (4,), mechanism="fx")
        assert smooth_activations(guest, "silu", (4,)).report.mechanism == "mode"
    hooked = Dropping(lambda self, z: z)
    assert smooth_activations(hooked, "silu", (4,)).report.mechanism == "fx"
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ModelError, match=r"'fx': Dropping has hooks, which would be lost; mechanism='mode' takes any"):
        smooth_activations(hooked, "silu", (4,), mechanism="fx")
    model, report = smooth_activations(hooked, "silu", (4,))
    x = torch.randn(2, 4)
    assert report.mechanism == "mode"
    torch.testing.assert_close(model(x), 2 * F.silu(hooked.layer(x)))


def test_a_layer_that_is_shared_has_an_activation_at_each_call(networks, vectors):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Calls()
            self.same, self.last = self.part, nn.Linear(4, 4)
            self.last.weight = self.part.layer.weight

        def forward(self, x):
            return self.last(self.same(self.part(x)))

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return F.relu(self.layer(self.relu(self.layer(x))))

    guest = Tied()
    for mechanism, learned in [("auto", 3), ("fx", 4), ("mode", 2)]:
        model, report = smooth_activations(guest, "smooth-relu", vectors, mechanism=mechanism, **CURVED)
        inner = model.model if mechanism == "mode" else model
        assert inner.part is inner.same
        assert inner.last.weight is inner.part.layer.weight
        assert (len(report.learnable), report.calls) == (learned, 4)
        layer = guest.part.layer
        once = curved(layer(curved(layer(vectors))))
        torch.testing.assert_close(model(vectors), guest.last(curved(layer(curved(layer(once))))))
        before = {name: value.clone() for name, value in model.named_parameters()}
        model(vectors).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("mechanism", ["fx", "mode"])
def test_functions_of_the_parameters(networks, vectors, mechanism):
    guest = networks["Functions"]()
    model = smooth_activations(guest, "smooth-relu", vectors, mechanism=mechanism).model
    other = smooth_activations(guest, "smooth-relu", vectors, mechanism=mechanism, initial=2.0).model
    values, _ = torch.func.stack_module_state([model, other])

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(other.named_parameters()), vectors)
    expected = torch.autograd.grad(other(vectors).square().sum(), list(other.parameters()))
    for got, wanted in zip(single.values(), expected, strict=True):
        torch.testing.assert_close(got.sum(0), wanted)
    both = torch.func.vmap(lambda value: torch.func.functional_call(model, value, (vectors,)))(values)
    torch.testing.assert_close(both, torch.stack([model(vectors), other(vectors)]))


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_compiled_in_place_and_copied(networks, pictures, mechanism):
    model = smooth_activations(networks["ResidualNetwork"]().eval(), "silu", pictures, mechanism=mechanism).model
    expected = model(pictures)
    model.compile(backend="eager")  # nothing is compiled before the first call
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(pictures), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mechanism", ["fx", "mode"])
def test_half_precision(networks, vectors, mechanism, dtype):
    model = smooth_activations(networks["Functions"]().to(dtype), "smooth-relu", vectors.to(dtype), mechanism=mechanism)
    assert {value.dtype for value in model.model.parameters()} == {dtype}
    single = smooth_activations(networks["Functions"](), "smooth-relu", vectors, mechanism=mechanism).model
    torch.testing.assert_close(model.model(vectors.to(dtype)).float(), single(vectors), rtol=0.1, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        output = single(vectors)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in single.parameters())


def test_constants_and_unused_parts_survive_torch_fx():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.layer = nn.Linear(4, 3)
            self.mean = torch.full((3,), 0.5)
            self.free = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return F.relu(self.layer(x) - self.mean) * torch.tensor([1.0, 2.0, 3.0])

    guest, x = Odd(), torch.randn(2, 4)
    model, report = smooth_activations(guest, "silu", (4,))
    assert report.mechanism == "fx"
    assert list(model.state_dict()) == list(guest.state_dict())
    expected = F.silu(guest.layer(x) - 0.5) * torch.tensor([1.0, 2.0, 3.0])
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    assert model.unused.weight.requires_grad


def test_names_that_are_taken(vectors):
    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.smooth_activations, self.relu = nn.Linear(4, 4), nn.ReLU()
            self.other = self.relu

        def forward(self, x):
            return self.other(self.relu(F.relu(self.smooth_activations(x)) - 0.1) - 0.1)

    for mechanism, modules in [("auto", 1), ("mode", 1)]:
        plain, report = smooth_activations(Taken(), "silu", vectors, mechanism=mechanism)
        assert (report.modules, report.calls) == (modules, 3)
        inner = plain.model if mechanism == "mode" else plain
        once = F.silu(F.silu(F.silu(inner.smooth_activations(vectors)) - 0.1) - 0.1)
        torch.testing.assert_close(plain(vectors), once)
        assert inner.other is inner.relu


def test_converted_twice(networks, vectors):
    guest = networks["Functions"]()
    for mechanism in ("fx", "mode"):
        once = smooth_activations(guest, "smooth-relu", vectors, mechanism=mechanism, **CURVED).model
        for again in ("modules", "fx", "mode") if mechanism == "fx" else ("modules", "mode"):
            with pytest.raises(ModelError, match="nothing to replace"):
                smooth_activations(once, "silu", vectors, mechanism=again)
            with pytest.warns(ModelWarning):
                twice, report = smooth_activations(once, "silu", vectors, mechanism=again, strict=False)
            assert (report.modules, report.sites, report.calls) == (0, 0, 0)
            torch.testing.assert_close(twice(vectors), once(vectors))
