import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certification import certify
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.modules import (
    FeatureCertifyingAdapter,
    ImageCertifyingAdapter,
    TokenCertifyingAdapter,
)
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.identity import identity
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.methods import make_objective
from rs_plugins.errors import InputError, ModelError


@pytest.fixture(autouse=True)
def _seeded():
    with global_randomness(0):
        yield


def extractor():
    """Return a network whose batch normalisation and dropout would show if it were ever in train mode."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    )


class Blocks(nn.Module):
    """Tokens of 8 numbers through a block, and their mean."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(8, 5)

    def forward(self, x):
        return self.block(x.reshape(len(x), -1, 8)).mean(dim=1)


KINDS = {
    "image": lambda **how: ImageCertifyingAdapter(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(5,),
        backbone_dim=4,
        **how,
    ),
    "feature": lambda **how: FeatureCertifyingAdapter(5, **how),
    "token": lambda **how: TokenCertifyingAdapter(["block"], 5, 5, **how),
}


def adapted(kind="image", *, normalise=None, combine="add", freeze_head=False, **how):
    inner = Blocks() if kind == "token" else extractor()
    head = nn.Linear(5, 3)
    return AdaptedClassifier(
        inner, KINDS[kind](**how), head, normalise=normalise, combine=combine, freeze_head=freeze_head
    )


def data(n=48):
    y = torch.arange(n) % 3
    x = torch.rand(n, 2, 4, 4) * 0.3 + 0.3 * y.view(-1, 1, 1, 1)
    return x, y


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_the_classifier_that_it_was_made_of(kind):
    nu = Normalise([0.4, 0.5], [0.2, 0.3])
    model = adapted(kind, normalise=nu).eval()
    x, _ = data(7)
    assert torch.equal(model(x), model.head(model.extractor(nu(x))))
    assert not torch.equal(model(x), adapted(kind, normalise=nu, zero_init=False).eval()(x))


@pytest.mark.parametrize("combine", ["add", "gated"])
@pytest.mark.parametrize("kind", ["image", "feature"])
def test_logits_are_the_head_of_corrected_features(kind, combine):
    nu = Normalise([0.4, 0.5], [0.2, 0.3])
    model = adapted(kind, normalise=nu, combine=combine, zero_init=False).eval()
    x, _ = data(5)
    with torch.no_grad():
        if combine == "gated":
            assert torch.equal(model.gate, torch.ones(5))
            model.gate.uniform_(0.5, 2)
        z = model.extractor(nu(x))
        left = model.gate * z if combine == "gated" else z
        expected = (left + model.adapter(nu(x), z)) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("method", ["gaussian", "smoothadv", "smoothmix", "consistency", "macer", "stability"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_extractor_as_it_is_bit_for_bit(kind, method):
    model = adapted(kind, normalise=Normalise([0.4, 0.5], [0.2, 0.3]))
    before, fingerprint = {name: state(part) for name, part in model.named_children()}, model.extractor_fingerprint()
    x, y = data()
    optimizer = torch.optim.Adam(model.trainable_parameters(), lr=0.01)
    options = {"smoothadv": {"attack": PGD(steps=2)}, "smoothmix": {"steps": 2, "samples": 2}}.get(method, {})
    train(model, x, y, make_objective(method, 0.2, **options), optimizer=optimizer, epochs=2, batch_size=16)
    model.train()
    model(x)
    after = {name: state(part) for name, part in model.named_children()}
    for name in ("extractor", "normalise"):
        assert same(before[name], after[name])
    assert model.extractor_fingerprint() == fingerprint
    for name in ("adapter", "head"):
        assert not same(before[name], after[name])


def test_the_fingerprint_tells_parameters_and_buffers():
    model = adapted()
    seen = {model.extractor_fingerprint()}
    model.extractor[1].running_mean += 1
    seen.add(model.extractor_fingerprint())
    with torch.no_grad():
        model.extractor[0].weight[0] += 1
    seen.add(model.extractor_fingerprint())
    with torch.no_grad():
        model.head.weight += 1
    seen.add(model.extractor_fingerprint())
    assert len(seen) == 3


@pytest.mark.parametrize("freeze_head", [False, True])
@pytest.mark.parametrize("combine", ["add", "gated"])
def test_what_is_trained(combine, freeze_head):
    model = adapted(combine=combine, freeze_head=freeze_head)
    wanted = {id(p) for p in model.adapter.parameters()}
    wanted |= set() if freeze_head else {id(p) for p in model.head.parameters()}
    wanted |= {id(model.gate)} if combine == "gated" else set()
    assert {id(parameter) for parameter in model.trainable_parameters()} == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    before = state(model.head)
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, x, y, gaussian(0.2), optimizer=optimizer, epochs=1, batch_size=16)
    assert same(before, state(model.head)) is freeze_head
    if combine == "gated":
        assert not torch.equal(model.gate, torch.ones(5))


@pytest.mark.parametrize("mode", [True, False])
def test_adapter_and_head_follow_the_mode_and_the_extractor_never_does(mode):
    model = adapted(freeze_head=True).train(mode)
    assert model.training is mode
    assert all(part.training is mode for part in model.adapter.modules())
    assert not any(part.training for part in [*model.extractor.modules(), *model.head.modules()])
    assert model.train(mode) is model
    free = adapted().train(mode)
    assert free.head.training is mode


def test_the_first_backward_pass_reaches_head_and_last_layer():
    model = adapted("feature")
    x, y = data()
    cross_entropy(model(x), y).backward()
    assert model.head.weight.grad.any()
    assert model.adapter.last.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.extractor.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_gradient_flows_through_the_extractor(kind):
    model = adapted(kind).eval()
    x = data(3)[0].requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(model.head(model.extractor(x))[:, 0].sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert gradient.any()


def test_no_graph_is_built_through_the_extractor_where_the_image_asks_for_none():
    graphs = []
    model = adapted()
    model.extractor[0].register_forward_hook(lambda _m, _i, out: graphs.append(out.requires_grad))
    loose = copy.deepcopy(model)  # an extractor that somebody has let loose again
    loose.extractor.requires_grad_(True)
    x, _ = data(2)
    for one in (model, loose):
        one(x)
        one(x.clone().requires_grad_())
    assert graphs == [False, True, False, True]


def test_noisy_pixels_are_not_clipped():
    model = adapted("feature").eval()
    x = data(2)[0]
    assert not torch.equal(model(x + 3), model((x + 3).clamp(0, 1)))


def test_sigma_is_in_pixels_wherever_the_normalisation_is():
    """A standard deviation twice as large with first weights twice as large is the same network, exactly."""
    model = adapted(normalise=Normalise([0.25, 0.5], [0.25, 0.5]), zero_init=False).eval()
    twin = copy.deepcopy(model)
    twin.normalise = Normalise([0.25, 0.5], [0.5, 1.0]).eval()
    with torch.no_grad():
        for first in (twin.extractor[0], twin.adapter.backbone[0]):
            first.weight *= 2
    inside = AdaptedClassifier(  # the same, normalising inside extractor and adapter
        nn.Sequential(model.normalise, model.extractor),
        ImageCertifyingAdapter(nn.Sequential(model.normalise, model.adapter.backbone), 5, backbone_dim=4),
        *(model.head,),
        normalise=None,
    ).eval()
    inside.adapter.last = model.adapter.last
    x, _ = data(6)
    certified = [list(certify(one, x, 0.25, plan=FixedBudget(n0=20, n=300))) for one in (model, twin, inside)]
    counts = [[(c.prediction, c.radius, c.count) for c in one] for one in certified]
    assert counts[0] == counts[1] == counts[2]
    assert any(c.radius > 0 for c in certified[0])


def test_a_normalisation_folded_into_the_first_layers_is_the_same_network():
    """Divisors that are powers of 2 go into the weights without rounding."""
    model = adapted(normalise=Normalise([0.0, 0.0], [0.25, 0.5]), zero_init=False).eval()
    folded = copy.deepcopy(model)
    folded.normalise = nn.Identity()
    with torch.no_grad():
        for first in (folded.extractor[0], folded.adapter.backbone[0]):
            first.weight /= torch.tensor([0.25, 0.5]).view(1, 2, 1, 1)
    x, _ = data(6)
    certified = [list(certify(one, x, 0.25, plan=FixedBudget(n0=20, n=300))) for one in (model, folded)]
    first, second = ([(c.prediction, c.radius, c.count) for c in one] for one in certified)
    assert first == second
    assert any(c.radius > 0 for c in certified[0])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copy_and_identity(kind):
    model, other = adapted(kind, zero_init=False).eval(), adapted(kind, zero_init=False).eval()
    x, _ = data(4)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    assert identity(model) == identity(twin)
    with torch.no_grad():
        twin.adapter.feature_dim = 5
        next(twin.adapter.parameters()).add_(1)
    assert identity(model) != identity(twin)


def test_features_of_another_shape_are_named():
    model = AdaptedClassifier(nn.Flatten(), FeatureCertifyingAdapter(5), nn.Linear(5, 2), normalise=None)
    with pytest.raises(ModelError, match=r"extractor: expected features of shape \(2, 5\), got \(2, 32\)"):
        model(data(2)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": len}, "extractor: expected a torch.nn.Module, got builtin"),
        ({"head": None}, "head: expected a torch.nn.Module, got NoneType"),
        ({"adapter": nn.Linear(5, 5)}, "adapter: expected a CertifyingAdapter, got Linear"),
        ({"normalise": (0.5, 0.5)}, "normalise: expected a layer such as"),
        ({"combine": "multiply"}, "combine: expected one of 'add', 'gated', got 'multiply'"),
        ({"freeze_head": 1}, "freeze_head: expected"),
        ({"adapter": KINDS["token"](), "combine": "gated"}, "combine: a 'token' certifying adapter works inside"),
    ],
)
def test_impossible_arguments_are_named(change, message):
    arguments = {"extractor": extractor(), "adapter": FeatureCertifyingAdapter(5), "head": nn.Linear(5, 3)}
    arguments = {**arguments, "normalise": None, **change}
    parts = [arguments.pop(name) for name in ("extractor", "adapter", "head")]
    with pytest.raises(InputError, match=message):
        AdaptedClassifier(*parts, **arguments)


def test_the_normalisation_has_no_default():
    with pytest.raises(TypeError, match="normalise"):
        AdaptedClassifier(extractor(), FeatureCertifyingAdapter(5), nn.Linear(5, 3))
