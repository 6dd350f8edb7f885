import re

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.lenet import lenet
from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certification import certify
from rs_plugins.core.certifying_adapters.backbones import ImageBackbone
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.certifying_adapters.modules import (
    FeatureCertifyingAdapter,
    ImageCertifyingAdapter,
    TokenCertifyingAdapter,
)
from rs_plugins.core.models import evaluating
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.loop import train
from rs_plugins.errors import InputError, ModelError

SHAPE = (3, 16, 16)


class Attention(nn.Module):
    """A small vision transformer: patches of 4x4 pixels, a class token, blocks, a head."""

    def __init__(self, *, width=12, depth=3, classes=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        block = nn.TransformerEncoderLayer(width, 2, 24, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


@pytest.fixture
def resnet():
    return make_network("resnet20", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], seed=3).eval()


def images(n=4, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "design",
    [
        AdapterDesign(size="tiny"),
        AdapterDesign(size="copy"),
        AdapterDesign(kind="feature"),
        AdapterDesign(size="tiny", head="frozen"),
        AdapterDesign(kind="feature", combine="gated"),
    ],
    ids=repr,
)
def test_the_adapted_classifier_begins_as_the_model(resnet, design):
    adapted = adapt(resnet, SHAPE, design).eval()
    assert torch.equal(adapted(images()), resnet(images()))


def test_the_model_stays_as_it_is(resnet):
    resnet[1].bn1.train()
    resnet[1].conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in resnet.state_dict().items()}
    adapted = adapt(resnet, SHAPE, AdapterDesign(size="copy"))
    adapted.train()
    adapted(images()).sum().backward()
    assert [part.training for part in resnet.modules()].count(True) == 1
    assert [parameter.requires_grad for parameter in resnet.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in resnet.parameters())
    assert all(torch.equal(before[key], value) for key, value in resnet.state_dict().items())


@pytest.mark.parametrize("copied", [False, True])
def test_the_extractor_shares_the_weights_of_the_model_unless_copied(resnet, copied):
    adapted = adapt(resnet, SHAPE, AdapterDesign(kind="feature"), copied=copied)
    shared = adapted.extractor.conv1.weight.data_ptr() == resnet[1].conv1.weight.data_ptr()
    assert shared is not copied
    assert adapted.head.weight.data_ptr() != resnet[1].linear.weight.data_ptr()


def test_a_normalisation_that_comes_first_is_in_front_of_the_certifying_adapter_too(resnet):
    adapted = adapt(resnet, SHAPE, AdapterDesign(size="tiny"))
    assert isinstance(adapted.normalise, Normalise)
    assert adapted.normalise is not resnet[0]
    seen = []
    adapted.adapter.register_forward_hook(lambda _m, given, _out: seen.append(given[0]))
    adapted(images())
    torch.testing.assert_close(seen[0], resnet[0](images()))
    layers = nn.Sequential(resnet[0], nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    several = adapt(layers, SHAPE, AdapterDesign(kind="feature"))
    assert isinstance(several.normalise, Normalise)
    assert torch.equal(several.eval()(images()), layers(images()))


def test_normalisation_elsewhere_stays_in_the_extractor(resnet):
    inside = nn.Sequential(nn.Sequential(*resnet))
    adapted = adapt(inside, SHAPE, AdapterDesign(size="tiny")).eval()
    assert isinstance(adapted.normalise, nn.Identity)
    assert torch.equal(adapted(images()), resnet(images()))


class Halved(nn.Sequential):
    """Makes images smaller before its parts see them."""

    def forward(self, x):
        return super().forward(nn.functional.avg_pool2d(x, 2))


def test_a_sequential_that_does_more_than_its_parts_is_left_whole(resnet):
    halved = Halved(*resnet).eval()
    hooked = nn.Sequential(*resnet).eval()
    hooked.register_forward_pre_hook(lambda _module, given: (given[0] ** 2,))
    replaced = nn.Sequential(*resnet).eval()
    replaced.forward = lambda x: resnet(1 - x)
    for model in (halved, hooked):
        adapted = adapt(model, SHAPE, AdapterDesign(size="tiny")).eval()
        assert isinstance(adapted.normalise, nn.Identity)
        assert torch.equal(adapted(images()), model(images()))
        assert not torch.equal(adapted(images()), resnet(images()))
    with pytest.raises((InputError, ModelError), match="model: "):
        adapt(replaced, SHAPE, AdapterDesign(size="tiny"))


def test_what_begins_otherwise_than_the_model_is_refused(resnet, monkeypatch):
    monkeypatch.setattr("rs_plugins.core.certifying_adapters.design._without_normalisation", lambda m: (None, m[1]))
    with pytest.raises(ModelError, match="model: with a certifying adapter that does nothing yet its logits differ by"):
        adapt(resnet, SHAPE, AdapterDesign(size="tiny"))


def test_a_copy_has_weights_to_train_and_leaves_counters_alone():
    with pytest.raises(InputError, match="size: the extractor has no weights, so a copy of it has nothing to train"):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).eval(), SHAPE)
    counted = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.Linear(5, 3)).eval()
    counted[1].number = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert not adapt(counted, SHAPE).adapter.backbone[1].number.requires_grad


def test_a_copy_begins_with_the_weights_of_the_extractor_and_is_trained(resnet):
    adapted = adapt(resnet, SHAPE, AdapterDesign(size="copy"))
    backbone = adapted.adapter.backbone
    theirs = adapted.extractor.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.conv1.weight.data_ptr() != adapted.extractor.conv1.weight.data_ptr()
    assert adapted.train().adapter.backbone.bn1.training


def test_each_setting_is_heeded(resnet):
    assert isinstance(adapt(resnet, SHAPE, AdapterDesign(kind="image")).adapter, ImageCertifyingAdapter)
    tiny = adapt(resnet, SHAPE, AdapterDesign(size="tiny")).adapter.backbone
    assert isinstance(tiny, ImageBackbone)
    assert tiny.features == 64
    feature = adapt(resnet, SHAPE, AdapterDesign(kind="feature", hidden=7)).adapter
    assert isinstance(feature, FeatureCertifyingAdapter)
    assert feature.first.out_features == 7
    assert adapt(resnet, SHAPE, AdapterDesign(kind="feature", combine="gated")).gate is not None
    frozen = adapt(resnet, SHAPE, AdapterDesign(kind="feature", head="frozen"))
    assert not frozen.head.weight.requires_grad
    fresh = adapt(resnet, SHAPE, AdapterDesign(kind="feature", head="fresh"))
    assert fresh.head.weight.requires_grad
    assert fresh.head.weight.shape == resnet[1].linear.weight.shape
    assert not torch.equal(fresh.head.weight, resnet[1].linear.weight)
    named = adapt(resnet, SHAPE, AdapterDesign(kind="feature", head_name="1.linear"))
    assert torch.equal(named.head.weight, resnet[1].linear.weight)
    with pytest.raises(InputError, match="head_name"):
        adapt(resnet, SHAPE, AdapterDesign(kind="feature", head_name="1.layer1"))


def test_the_initial_weights_come_from_the_seed_alone(resnet):
    def weights(seed):
        return adapt(resnet, SHAPE, AdapterDesign(size="tiny"), seed=seed).adapter.backbone.conv1.weight

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(state, torch.get_rng_state())


def test_a_transformer_gets_bottlenecks_in_all_its_blocks_or_some():
    torch.manual_seed(0)
    model = Attention().eval()
    whole = adapt(model, SHAPE, AdapterDesign(kind="token")).eval()
    assert isinstance(whole.adapter, TokenCertifyingAdapter)
    assert whole.adapter.sites == tuple(f"encoder.layers.{number}" for number in range(3))
    assert whole.adapter.bottlenecks[0].first.weight.shape == (64, 12)
    # the fast path of torch's transformer, taken where nothing asks for a gradient, rounds otherwise
    torch.testing.assert_close(whole(images()), model(images()), rtol=1e-4, atol=1e-5)
    some = adapt(model, SHAPE, AdapterDesign(kind="token", sites=("encoder.layers.1",), hidden=5))
    assert len(some.adapter.bottlenecks) == 1
    assert some.adapter.bottlenecks[0].first.out_features == 5


def test_a_transformer_is_trained_inside_and_its_own_weights_are_not():
    torch.manual_seed(0)
    adapted = adapt(Attention().eval(), SHAPE, AdapterDesign(kind="token")).train()
    before = adapted.extractor_fingerprint()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(adapted(images()), torch.arange(4)).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in adapted.adapter.bottlenecks[0].parameters())
    assert adapted.extractor_fingerprint() == before


@pytest.mark.parametrize("kind", ["image", "feature", "token"])
def test_a_vision_transformer_of_timm_goes_the_same_way(kind):
    try:
        from timm.models.vision_transformer import VisionTransformer
    except Exception as error:  # compiled parts of torchvision, which it needs, may not fit
        pytest.skip(f"timm is not here, or does not import ({type(error).__name__})")
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=4).eval()
    adapted = adapt(model, SHAPE, AdapterDesign(kind=kind))
    torch.testing.assert_close(adapted.eval()(images()), model(images()))
    if kind == "token":
        assert adapted.adapter.sites == ("blocks.0", "blocks.1")
    before = adapted.extractor_fingerprint()
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.01)
    losses = train(
        adapted, images(16), torch.arange(16) % 4, gaussian(0.25), optimizer=optimizer, epochs=5, batch_size=8
    )
    assert losses[-1] < losses[0]
    assert adapted.extractor_fingerprint() == before
    (certificate,) = certify(adapted.eval(), images(1), 0.25, plan=FixedBudget(n0=10, n=100))
    assert certificate.n == 100


def test_features_by_a_function_get_a_fresh_head(resnet):
    def last_map(model, x):
        net = model[1]
        inner = net.layer1(torch.relu(net.bn1(net.conv1(model[0](x)))))
        return inner.mean(dim=(2, 3))

    adapted = adapt(resnet, SHAPE, AdapterDesign(size="tiny"), feature_fn=last_map).eval()
    assert (adapted.head.in_features, adapted.head.out_features) == (16, 10)
    assert isinstance(adapted.normalise, nn.Identity)
    with evaluating(resnet):
        expected = last_map(resnet, images())
    torch.testing.assert_close(adapted.features(images()), expected)


def test_other_images_and_other_types():
    small = lenet().eval().double()
    adapted = adapt(small, (1, 28, 28), AdapterDesign(size="tiny")).eval()
    x = images(2, (1, 28, 28)).double()
    assert adapted(x).dtype == torch.float64
    assert torch.equal(adapted(x), small(x))
    vectors = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    assert torch.equal(adapt(vectors, (6,), AdapterDesign(kind="feature")).eval()(x := torch.rand(2, 6)), vectors(x))
    with pytest.raises(InputError, match="shape: expected images"):
        adapt(vectors, (6,), AdapterDesign(size="tiny"))


def test_by_default_the_features_are_gated_but_in_a_transformer():
    assert [AdapterDesign(kind=kind).combine for kind in ("image", "feature", "token")] == ["gated", "gated", "add"]
    assert AdapterDesign(combine="add").combine == "add"
    assert [AdapterDesign(kind=kind).size for kind in ("image", "feature", "token")] == ["copy", None, None]


def test_a_design_is_plain_data():
    design = AdapterDesign(kind="token", sites=["a", "b"], hidden=3, head="fresh", head_name="fc")
    assert design.sites == ("a", "b")
    assert AdapterDesign(**design.plain()) == design
    assert design.plain()["sites"] == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, "kind: expected one of 'image', 'feature', 'token', got 'lora'"),
        ({"size": "huge"}, "size: expected one of 'tiny', 'small', 'medium', 'paper', 'copy', got 'huge'"),
        ({"combine": "mean"}, "combine: expected one of 'add', 'gated', got 'mean'"),
        ({"head": "new"}, "head: expected one of 'tuned', 'frozen', 'fresh', got 'new'"),
        ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        ({"kind": "token", "sites": "blocks"}, "sites: expected names of blocks, got the text 'blocks'"),
        ({"sites": ("a",)}, "sites: only for the kind 'token', got ('a',) for 'image'"),
        ({"kind": "feature", "size": "tiny"}, "size: only for the kind 'image', got 'tiny' for 'feature'"),
        ({"hidden": 3}, "hidden: only for the kind 'feature' or 'token', got 3 for 'image'"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        AdapterDesign(**settings)


def test_models_that_do_not_fit_are_refused(resnet):
    with pytest.raises(InputError, match=r"sites: expected layer1 to return tokens .*, got \(1, 16, 16, 16\)"):
        adapt(resnet, SHAPE, AdapterDesign(kind="token", sites=("layer1",)))
    with pytest.raises(InputError, match="sites: the extractor has no module 'nothing'"):
        adapt(resnet, SHAPE, AdapterDesign(kind="token", sites=("nothing",)))
    attention = Attention().eval()
    attention.encoder.idle = nn.Linear(12, 12)
    with pytest.raises(InputError, match=r"expected encoder.idle to return tokens .*, got none, as it does not run"):
        adapt(attention, SHAPE, AdapterDesign(kind="token", sites=("encoder.layers.0", "encoder.idle")))
    uneven = nn.Sequential(nn.Flatten(2), nn.Linear(256, 6), nn.Linear(6, 5), nn.Flatten(), nn.Linear(15, 3)).eval()
    with pytest.raises(InputError, match=r"sites: expected tokens of one width, got \{'1': 6, '2': 5\}"):
        adapt(uneven, SHAPE, AdapterDesign(kind="token", sites=("1", "2")))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).eval()
    with pytest.raises(InputError, match=r"sites: expected names of blocks .* no list of blocks"):
        adapt(flat[1], (768,), AdapterDesign(kind="token"))
    with pytest.raises(ModelError, match="model: it fails on an input of shape"):
        adapt(resnet, (1, 16, 16))
