"""What is refused, counted and reported, and that the guest stays as it was."""

import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rs_plugins.core.activation_replacement.calls import CallCounter, look_alike
from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.activations import ParametricSoftplus, make_activation
from rs_plugins.core.identity import identity
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError, ModelWarning


class Written(nn.Module):
    """A linear layer with any function behind it."""

    def __init__(self, function, training_function=None):
        super().__init__()
        self.layer, self.function, self.other = nn.Linear(4, 3), function, training_function

    def forward(self, x):
        function = self.other if self.training and self.other is not None else self.function
        return function(self.layer(x))


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_the_guest_is_left_as_it_was(networks, pictures, mechanism):
    guest = networks["ResidualNetwork"]().train()
    guest.layer2.eval()
    guest.layer3.requires_grad_(False)
    before, modes, state = identity(guest), [part.training for part in guest.modules()], torch.get_rng_state()
    image = pictures.clone()
    model, _ = smooth_activations(guest, "smooth-relu", pictures, mechanism=mechanism)
    assert identity(guest) == before
    assert modes == [part.training for part in guest.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(image, pictures)
    assert all(parameter.grad is None for parameter in model.parameters())
    inner = model.model if mechanism == "mode" else model
    for name, value in guest.named_parameters():
        own = inner.get_parameter(name)
        assert own.requires_grad == value.requires_grad
        assert own.data_ptr() != value.data_ptr()
        assert torch.equal(own, value)
    assert model.training
    assert not inner.layer2[0].bn1.training
    assert inner.layer1[0].bn1.training
    assert all(torch.equal(inner.get_buffer(name), value) for name, value in guest.named_buffers())


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_new_parameters_are_of_the_models_type(mechanism):
    guest = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double()
    model, report = smooth_activations(guest, "smooth-relu", (4,), mechanism=mechanism)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert len(report.learnable) == (2 if mechanism == "mode" else 1)
    fixed = smooth_activations(guest, "smooth-relu", (4,), mechanism=mechanism, learnable=False)
    assert fixed.report.learnable == ()
    assert fixed.model(torch.rand(2, 4).double()).dtype == torch.float64


def test_options_and_makers_of_ones_own():
    guest, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4)
    z = guest[0](x)
    torch.testing.assert_close(smooth_activations(guest, "celu", (4,), alpha=0.3).model(x), F.celu(z, 0.3))
    torch.testing.assert_close(
        smooth_activations(guest, "gelu", (4,), approximate="tanh").model(x), F.gelu(z, approximate="tanh")
    )
    made = smooth_activations(guest, lambda: ParametricSoftplus(3.0), x)
    torch.testing.assert_close(made.model(x), F.softplus(z, 3.0))
    assert made.report.activation == "ParametricSoftplus(sharpness=3)"
    root = smooth_activations(nn.ReLU(), nn.SiLU, (4,))
    assert (type(root.model), root.report.modules) == (nn.SiLU, 1)


def test_hooks_stay():
    seen = []
    guest = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    guest[1].register_forward_hook(lambda module, args, output: seen.append(output))
    guest[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    for mechanism in ("modules", "fx"):
        model = smooth_activations(guest, "silu", (4,), mechanism=mechanism).model
        seen.clear()
        x = torch.randn(2, 4)
        output = model(x)
        torch.testing.assert_close(output, F.silu(2 * guest[0](x)))
        assert len(seen) == 1
        assert seen[0] is output


def test_which_modules_are_relu():
    class Scaled(nn.ReLU):
        def forward(self, z):
            return 2 * super().forward(z)

    class Named(nn.ReLU):
        pass

    patched = nn.ReLU()
    patched.forward = torch.tanh
    for module, wanted, remark in [
        (patched, torch.tanh, "calls no ReLU on the example, so there is nothing to replace"),
        (nn.ReLU6(), F.silu, "the cap of ReLU6 is lost at 1"),
        (nn.Hardtanh(0, 6), F.silu, "the cap of ReLU6 is lost at 1"),
        (Named(), F.silu, None),
        (Scaled(), lambda z: 2 * F.silu(z), None),
        (nn.LeakyReLU(), F.leaky_relu, "calls no ReLU on the example, so there is nothing to replace"),
    ]:
        guest = nn.Sequential(nn.Linear(4, 3), module)
        if remark is not None and "calls no" in remark:
            with pytest.raises(ModelError, match=f"^model: it {remark}"):
                smooth_activations(guest, "silu", (4,))
        with nullcontext() if remark is None else pytest.warns(ModelWarning, match=remark):
            model, report = smooth_activations(guest, "silu", (4,), strict=False)
        x = torch.randn(5, 4) * 9
        torch.testing.assert_close(model(x), wanted(guest[0](x)))
        assert report.uncapped == (("1",) if isinstance(module, nn.Hardtanh) else ())
        assert report.mechanism == ("fx" if isinstance(module, Scaled) else "modules")
        if remark is not None and "cap" in remark:
            assert remark in str(report)


@pytest.mark.parametrize("mechanism", ["fx", "mode"])
def test_lost_caps_of_functions_are_reported(mechanism):
    capped = Written(lambda z: F.hardtanh(F.relu6(z), 0.0, 6.0))
    with pytest.warns(ModelWarning, match="the cap of ReLU6 is lost at"):
        report = smooth_activations(capped, "silu", (4,), mechanism=mechanism).report
    names = ("torch.nn.functional.relu6", "torch.nn.functional.hardtanh(0, 6)")
    assert report.uncapped == (("Written",) if mechanism == "fx" else names)


def test_a_module_that_torch_does_not_know():
    guest = Written(None)
    guest.hidden = [nn.ReLU()]
    guest.function = lambda z: guest.hidden[0](z)
    model, report = smooth_activations(guest, "silu", (4,))
    x = torch.randn(2, 4)
    assert report.mechanism == "mode"
    torch.testing.assert_close(model(x), F.silu(guest.layer(x)))


class Counting(nn.Module):
    """Changes, as it runs, an attribute and a buffer, which it puts another in place of."""

    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.runs = nn.Linear(4, 3), nn.ReLU(inplace=True), 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        z = self.layer(x)
        self.runs += 1
        self.mean = 0.9 * self.mean + 0.1 * z.mean(0)
        return F.relu(self.relu(z - self.mean))


@pytest.mark.parametrize("mechanism", ["auto", "mode"])
def test_the_runs_leave_nothing_in_guest_and_copy(mechanism):
    guest = Counting()
    model, report = smooth_activations(guest, "silu", (4,), mechanism=mechanism)
    assert report.mechanism == "mode"
    for part in (guest, model.model):
        assert part.runs == 0
        assert not part.mean.any()
    assert model.model.mean is dict(model.named_buffers())["model.mean"]


def test_the_example_is_left_as_it_is(vectors):
    guest, before = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), vectors.clone()
    model = smooth_activations(guest, "silu", vectors).model
    assert torch.equal(vectors, before)
    torch.testing.assert_close(model(vectors), guest[1](F.silu(vectors)))


@pytest.mark.parametrize("mechanism", ["fx", "mode"])
def test_what_is_new_is_in_the_models_mode(networks, vectors, mechanism):
    for training in (False, True):
        guest = networks["Functions"]().train(training)
        model = smooth_activations(guest, "silu", vectors, mechanism=mechanism).model
        assert {part.training for part in model.modules()} == {training}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch before 2.7
def test_layers_without_weights_stay_so():
    guest = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(InputError, match="lazy layer that has none yet"):
        smooth_activations(guest, "silu", (4,))
    assert isinstance(guest[0], nn.LazyLinear)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ["silu", "smooth-relu", "parametric-softplus", "smooth-backward"])
def test_modules_called_with_a_name(activation, inplace):
    class Named(Written):
        def forward(self, x):
            z = self.layer(x)
            return self.function(input=z) + z

    guest = Named(nn.ReLU(inplace=inplace))
    made = ReLUWithSmoothBackward if activation == "smooth-backward" else partial(make_activation, activation)
    model, report = smooth_activations(guest, made, (4,), mechanism="modules")
    x = torch.randn(2, 4)
    z = made()(guest.layer(x))
    torch.testing.assert_close(model(x), 2 * z if inplace else z + guest.layer(x))
    assert report.written_back == inplace


class Squared(nn.Module):
    def forward(self, z):
        return F.relu(z).square()


def test_activations_that_call_relu_themselves():
    class Both(Written):
        def forward(self, x):
            return self.function(F.relu(self.layer(x)) - 0.1)

    guest, x = Both(nn.ReLU()), torch.randn(5, 4)
    written = Squared()(Squared()(guest.layer(x)) - 0.1)
    for mechanism in ("auto", "fx"):
        model, report = smooth_activations(guest, Squared, (4,), mechanism=mechanism)
        assert (report.mechanism, report.calls) == ("fx", 2)
        torch.testing.assert_close(model(x), written)
    with pytest.raises(ModelError, match=r"^activation: it calls ReLU itself, which mechanism='mode' would replace"):
        smooth_activations(guest, Squared, (4,), mechanism="mode")
    model = smooth_activations(Written(F.relu), Squared, (4,), mechanism="mode").model
    torch.testing.assert_close(model(x), Squared()(model.model.layer(x)))
    assert torch.equal(smooth_activations(guest, ReLUWithSmoothBackward, (4,), mechanism="mode").model(x), guest(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of torch, as the runs need none
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    guest = Written(F.relu, lambda z: checkpoint(F.relu, z, use_reentrant=reentrant)).train()
    x, same = (torch.ones(2, 4, requires_grad=True) for _ in range(2))
    F.silu(guest.layer(same)).sum().backward()
    message = r"by 'mode': in a backward pass with checkpointing \(1\)"
    with pytest.raises(ModelError, match=message):
        smooth_activations(guest, "silu", x, mechanism="mode")
    with pytest.warns(ModelWarning, match=message):
        model, _ = smooth_activations(guest, "silu", x, mechanism="mode", strict=False)
    assert all(value.grad is None for value in model.parameters())
    # by modules, what runs again is the activation
    model = smooth_activations(Checkpointed(guest.layer, reentrant).train(), "silu", x).model
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.relu, self.reentrant = layer, nn.ReLU(inplace=True), reentrant

    def forward(self, x):
        return checkpoint(self.relu, self.layer(x), use_reentrant=self.reentrant)


def test_relu_of_integers_is_left():
    guest, x = Written(lambda z: F.relu((2 * z).long()) + F.relu(z)), torch.randn(5, 4)
    model, report = smooth_activations(guest, "silu", (4,))
    assert (report.mechanism, report.calls, report.remaining) == ("mode", 1, {})
    z = guest.layer(x)
    torch.testing.assert_close(model(x), (2 * z).long().relu() + F.silu(z))
    with pytest.raises(ModelError, match=r"'fx': with other activations it fails: (NotImplemented|Runtime)Error"):
        smooth_activations(guest, "silu", (4,), mechanism="fx")


def test_relu_that_is_called_in_train_mode_alone():
    guest = Written(torch.tanh, F.relu)
    model, report = smooth_activations(guest.eval(), "silu", (4,))
    x = torch.randn(2, 4)
    assert report.mechanism == "mode"
    torch.testing.assert_close(model(x), torch.tanh(guest.layer(x)))
    torch.testing.assert_close(model.train()(x), F.silu(guest.layer(x)))
    with pytest.raises(ModelError, match=r"still called after conversion by 'modules': torch.nn.functional.relu \(1\)"):
        smooth_activations(guest, "silu", (4,), mechanism="modules")

    def refuse(z):
        raise ZeroDivisionError("no")

    with pytest.warns(ModelWarning, match="nothing to replace"):
        report = smooth_activations(Written(torch.tanh, refuse), "silu", (4,), strict=False).report
    assert report.unchecked == "ZeroDivisionError: no"
    assert "not seen in train mode" in str(report)
    clamped = Written(torch.tanh, lambda z: z.clamp(min=0))
    with pytest.warns(ModelWarning) as warned:
        similar = smooth_activations(clamped, "silu", (4,), strict=False).report.look_alikes
    assert ["nothing to replace" in str(each.message) for each in warned] == [True, False]
    assert similar == {"clamp(min=0)": 1}


def relu_of_torch(z):
    return torch.relu(z)


def scripted(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to give it up
        return torch.jit.script(thing)


def test_what_cannot_be_replaced_is_said(networks, vectors):
    hidden = scripted(relu_of_torch)
    recurrent = nn.Sequential(nn.RNN(4, 3, nonlinearity="relu", batch_first=True))
    cases = [
        (recurrent, (5, 4), r"by 'mode': torch.rnn_relu \(1\)$"),
        (Written(lambda z: hidden(z)), (4,), r"by 'mode': inside torch or C\+\+ \(1\)"),
        (Written(lambda z: hidden(F.hardtanh(z))), (4,), r"by 'mode': inside torch or C\+\+ \(1\)"),
    ]
    for guest, shape, message in cases:
        with pytest.raises(ModelError, match=f"^model: ReLU is still called after conversion {message}"):
            smooth_activations(guest, "silu", shape)
        with pytest.warns(ModelWarning, match=f"^model: ReLU is still called after conversion {message}"):
            report = smooth_activations(guest, "silu", shape, strict=False).report
        assert sum(report.remaining.values()) == 1
        assert "still called: " in str(report)
    message = (
        r"by 'modules': torch.nn.functional.relu \(3\), torch.relu \(1\).*; mechanism='auto' also replaces functions$"
    )
    with pytest.raises(ModelError, match=message):
        smooth_activations(networks["Functions"](), "silu", vectors, mechanism="modules")


def test_the_fast_path_of_transformers_counts(encoder):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.layer = [encoder], nn.Linear(8, 8)

        def forward(self, x):
            return self.hidden[0](x)

    with pytest.raises(ModelError, match=r"'modules': torch.nn.functional.relu \(1\)"):
        smooth_activations(Kept(), "silu", (5, 8), mechanism="modules")
    x = torch.randn(2, 5, 8)
    model = smooth_activations(Kept(), "silu", (5, 8)).model
    with torch.no_grad():
        torch.testing.assert_close(model(x), smooth_activations(encoder, "silu", (5, 8)).model(x))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda z: z.clamp(min=0), "clamp(min=0)"),
        (lambda z: torch.clamp(z, 0, 1), "clamp(min=0)"),
        (lambda z: z.clip(0), "clip(min=0)"),
        (lambda z: torch.clamp_min(z, 0.0), "clamp_min(0)"),
        (lambda z: z.clamp_min_(0), "clamp_min(0)"),
        (lambda z: torch.maximum(z, torch.zeros(())), "maximum(z, 0)"),
        (lambda z: torch.maximum(torch.zeros_like(z), other=z), "maximum(z, 0)"),
        (lambda z: torch.fmax(z, torch.zeros(3)), "fmax(z, 0)"),
        (lambda z: z.max(torch.zeros(3)), "max(z, 0)"),
        (lambda z: F.threshold(z, 0, 0), "threshold(0)"),
        (nn.Threshold(0, 0), "threshold(0)"),
        (lambda z: F.hardtanh(z, 0, 1), "hardtanh(min_val=0)"),
        (nn.Hardtanh(0, 2), "hardtanh(min_val=0)"),
    ],
)
def test_look_alikes_are_reported(function, name):
    with pytest.warns(ModelWarning) as warned:
        model, report = smooth_activations(Written(function), "silu", (4,), strict=False)
    remarks = [str(each.message) for each in warned]
    assert f"model: max(z, 0) by another name is left as it is: {name} (1)" in remarks
    assert report.look_alikes == {name: 1}
    assert f"left as they are: {name} (1)" in str(report)
    assert bool((model(torch.randn(5, 4)) >= 0).all())


def test_what_does_not_look_like_relu():
    z = torch.randn(3, 3)
    for function, args, kwargs in [
        (torch.clamp, (z, -1, 0), {}),
        (torch.clamp, (z,), {"max": 0}),
        (torch.Tensor.max, (z, 0), {}),
        (torch.maximum, (z, z), {}),
        (F.threshold, (z, 0.1, 0), {}),
        (F.threshold, (z, 0, -1), {}),
        (F.hardtanh, (z,), {}),
        (torch.tanh, (z,), {}),
    ]:
        assert look_alike(function, args, kwargs) is None
    with CallCounter() as calls:
        torch.relu(torch.tensor([1, -1]))  # integers: a mask, maybe, but no activation
    assert not calls.relu


def test_mistakes(networks):
    guest = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    cases = [
        (guest, "swish", (4,), {}, r"^activation: expected one of relu, silu, .*, got 'swish'$"),
        (guest, "relu", (4,), {}, r"^activation: expected another one than ReLU, which is what is replaced$"),
        (guest, nn.ReLU6, (4,), {}, r"^activation: expected another one than ReLU, which is what is replaced$"),
        (guest, "silu", (4,), {"inplace": True}, r"^activation: expected one that leaves its input .*SiLU\(inplace"),
        (guest, "silu", (4,), {"beta": 1}, r"^activation silu: .*beta"),
        (guest, nn.SiLU(), (4,), {}, r"^activation: expected a name or a .*, got a SiLU; pass lambda: SiLU\(\)$"),
        (guest, 3, (4,), {}, r"^activation: expected a name or a function that makes a module, got a int$"),
        (guest, F.silu, (4,), {}, r"^activation: expected a function without arguments that makes a module: silu"),
        (guest, dict, (4,), {}, r"^activation: expected a function that makes a torch.nn.Module, got one of \{\}$"),
        (guest, nn.SiLU, (4,), {"alpha": 1}, r"^activation: expected a name where there are options, got .*alpha"),
        (guest, "silu", (4,), {"mechanism": "hooks"}, r"^mechanism: expected one of 'auto', .*, got 'hooks'$"),
        (guest, "silu", (4,), {"strict": 1}, r"^strict: expected True or False, got 1$"),
        (guest, "silu", None, {}, r"^example: expected images \(n, \*input\) or the shape of one, got None$"),
        (guest, "silu", (0,), {}, r"^example: expected an integer >= 1, got 0$"),
        (guest, "silu", torch.zeros(0, 4), {}, r"^example: expected at least one image, got shape \(0, 4\)$"),
        (guest, "silu", torch.zeros(2, 4, dtype=torch.int64), {}, r"^example: expected floating-point pixels"),
        (
            nn.DataParallel(guest),
            "silu",
            (4,),
            {},
            r"^model: expected the network itself, got a DataParallel around it",
        ),
        (F.relu, "silu", (4,), {}, r"^model: expected a torch.nn.Module, got function$"),
    ]
    for model, activation, example, options, message in cases:
        with pytest.raises(InputError, match=message):
            smooth_activations(model, activation, example, **options)
    inner = nn.Sequential(scripted(guest), nn.Linear(3, 3))
    strange = Written(lambda z: SimpleNamespace(logits=z))
    for model, shape, message in [
        (strange, (4,), r"^model: expected it to return tensors, or a tuple, list or dictionary of them$"),
        (guest, (5,), r"^model: it fails on an input of shape \(2, 5\): RuntimeError"),
        (inner, (4,), r"^model: 0 \(RecursiveScriptModule\): a script module's code cannot be changed; convert it"),
    ]:
        with pytest.raises(ModelError, match=message):
            smooth_activations(model, "silu", shape)
    with pytest.raises(ModelError, match=r"^model: with Linear\(.*\) in the place of ReLU it fails: RuntimeError"):
        smooth_activations(guest, lambda: nn.Linear(9, 9), (4,))


def test_one_image_and_many_will_do(networks, pictures):
    for example in (pictures[:1], pictures.repeat(4, 1, 1, 1), [3, 16, 16]):
        report = smooth_activations(networks["ResidualNetwork"](), "silu", example).report
        assert (report.calls, report.unchecked) == (17, "")


def test_bounds_go_through_surgery_and_torch_fx(networks, vectors):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    convolutions = networks["ResidualNetwork"]().eval()
    for mechanism in ("modules", "fx"):
        model = smooth_activations(convolutions, "silu", x, mechanism=mechanism).model.eval()
        lower, upper = RelaxedNetwork(model, (3, 8, 8)).output_bounds(Region(x, 0.01), method="ibp")
        assert bool(((lower <= model(x)) & (model(x) <= upper)).all())
        assert bool(upper.isfinite().all())
    caught = smooth_activations(networks["Branching"](), "silu", vectors).model
    with pytest.raises(ModelError, match=r"SmoothedCalls.*torch.fx does not see activations .* mechanism='fx'"):
        RelaxedNetwork(caught, (4,))


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_smoothing_goes_through(networks, pictures, mechanism):
    model = smooth_activations(networks["ResidualNetwork"](), "silu", pictures, mechanism=mechanism).model.eval()
    smoothed = SmoothedModel(model, 0.25, samples=4)
    x = pictures.clone().requires_grad_()
    smoothed(x).square().sum().backward()
    assert bool(x.grad.any())
    twin = SmoothedModel(pickle.loads(pickle.dumps(model)), 0.25, samples=4)
    torch.testing.assert_close(smoothed(pictures), twin(pictures), rtol=1e-3, atol=1e-4)
