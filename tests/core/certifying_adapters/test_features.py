import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.certifying_adapters.features import split_features
from rs_plugins.core.identity import identity
from rs_plugins.core.models import NoisyModule
from rs_plugins.errors import InputError, ModelError

EXAMPLE = torch.full((1, 3, 8, 8), 0.5)
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BODY = 3 * 8 * 8


@pytest.fixture(autouse=True)
def known_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network(width=6, classes=4):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(width, classes),
    )


def state(model):
    """What a guest must leave as it was."""
    return [
        (name, part.training, list(part._forward_hooks), list(part._forward_pre_hooks), dict(part._modules))
        for name, part in model.named_modules(remove_duplicate=False)
    ] + [
        (name, id(value), value.requires_grad, value.data_ptr(), id(value.grad), value.detach().tolist())
        for name, value in chain(model.named_parameters(), model.named_buffers())
    ]


def logits_of(model, images):
    """Those of a frozen copy in eval mode, made without the code that is tested."""
    with torch.no_grad():
        return copy.deepcopy(model).requires_grad_(False).eval()(images)


def check_split(split, model, images=IMAGES):
    assert not any(part.training for part in split.extractor.modules())
    assert not any(value.requires_grad for value in split.extractor.parameters())
    features = split.extractor(images)
    assert features.shape == (len(images), split.feature_dim)
    assert torch.equal(split.head(features).detach(), logits_of(model, images))


class Custom(nn.Module):
    """Layers a, b, c on flat pixels, put together by a function of the module and the flat pixels."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x.flatten(1))


class Pieces(nn.Module):
    """A small vision transformer: pieces of 4x4 pixels and a class token, one block, its last layer in ``heads``."""

    def __init__(self, width=8, pool="token"):
        super().__init__()
        self.pool = pool
        self.cut = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.heads = nn.Sequential()
        self.heads.add_module("drop", nn.Dropout(0.5))
        self.heads.add_module("head", nn.Linear(width, 3))

    def tokens(self, x):
        tokens = self.cut(x).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1))

    def forward(self, x):
        tokens = self.tokens(x)
        return self.heads(tokens[:, 0]) if self.pool == "token" else self.heads(tokens).mean(1)


class Squeeze(nn.Module):
    """No linear layer: the logits are means of the channels of a convolution."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)

    def forward(self, x):
        return self.last(self.body(x).relu()).mean((2, 3))


def pooled(model, x):
    return model.body(x).relu().mean((2, 3))


@pytest.mark.parametrize("mean", [None, 0.4])
@pytest.mark.parametrize(
    ("name", "head_name", "features", "shape"),
    [
        ("lenet", "9", 500, (1, 28, 28)),
        ("resnet20", "linear", 64, (3, 8, 8)),
        ("resnet56", "linear", 64, (3, 8, 8)),
        ("resnet110", "fc", 64, (3, 8, 8)),
    ],
)
def test_our_networks(name, head_name, features, shape, mean):
    means = None if mean is None else [mean] * shape[0]
    model = make_network(name, classes=7, mean=means, std=means, seed=3)
    split = split_features(model, torch.full((1, *shape), 0.5))
    assert split.head_name == (head_name if mean is None else f"1.{head_name}")
    assert split.feature_dim == features
    check_split(split, model, torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)))


def test_weights_and_buffers_are_shared_unless_a_copy_is_wanted():
    model = network()
    theirs = {name: value.data_ptr() for name, value in chain(model.named_parameters(), model.named_buffers())}
    for own in (False, True):
        split = split_features(model, EXAMPLE, copy=own)
        ours = {
            name: v.data_ptr() for name, v in chain(split.extractor.named_parameters(), split.extractor.named_buffers())
        }
        assert ours.keys() == theirs.keys() - {"5.weight", "5.bias"}
        assert {theirs[name] == place for name, place in ours.items()} == {not own}
        assert split.head.weight.data_ptr() != theirs["5.weight"]
        check_split(split, model)
    shared, own = split_features(model, EXAMPLE), split_features(model, EXAMPLE, copy=True)
    before = own.extractor(IMAGES)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)
    check_split(shared, model)
    assert torch.equal(own.extractor(IMAGES), before)


def test_the_head_is_a_copy_that_learns():
    model = network().requires_grad_(False)
    split = split_features(model, EXAMPLE)
    assert type(split.head) is nn.Linear
    assert all(value.requires_grad and value.is_leaf for value in split.head.parameters())
    before, logits = state(model), logits_of(model, IMAGES)
    optimiser = torch.optim.SGD(split.head.parameters(), lr=1.0)
    split.head(split.extractor(IMAGES)).square().sum().backward()
    optimiser.step()
    assert state(model) == before
    assert not torch.equal(split.head(split.extractor(IMAGES)), logits)


def test_no_random_number_is_drawn():
    model, before = network(), torch.get_rng_state()
    split_features(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


def doubled(layer, inputs, output):
    return output * 2


def lived_in():
    """A model in mixed modes, with a gradient, frozen parts and hooks that change what it says."""
    model = network().train()
    model(IMAGES).sum().backward()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2].register_forward_hook(doubled)
    model[3].register_forward_pre_hook(lambda layer, inputs: inputs[0] + 1)
    return model


@pytest.mark.parametrize("own", [False, True])
def test_the_model_stays_as_it_was_and_its_hooks_count_once(own):
    model = lived_in()
    before = state(model)
    split = split_features(model, EXAMPLE, copy=own)
    assert state(model) == before
    check_split(split, model)
    assert [len(part._forward_hooks) for part in split.extractor] == [0, 0, 1, 0, 0, 0]
    assert [len(part._forward_pre_hooks) for part in split.extractor] == [0, 0, 0, 1, 0, 0]
    split.extractor(IMAGES.clone().requires_grad_()).sum().backward()
    assert state(model) == before


@pytest.mark.parametrize(
    ("last", "example", "options"),
    [
        (nn.LogSoftmax(1), EXAMPLE, {}),
        (nn.Identity(), EXAMPLE, {"head_name": "9"}),
        (nn.Identity(), EXAMPLE[:, :2], {}),
        (nn.Identity(), EXAMPLE, {"feature_fn": lambda model, x: model[9]}),
    ],
)
def test_the_model_stays_as_it_was_also_after_an_error(last, example, options):
    model = lived_in().append(last)
    before = state(model)
    with pytest.raises((InputError, ModelError)):
        split_features(model, example, **options)
    assert state(model) == before


def test_gradients_reach_the_images():
    extractor = split_features(network(), EXAMPLE).extractor
    images = IMAGES.clone().requires_grad_()
    extractor(images).square().sum().backward()
    assert bool((images.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(value.grad is None for value in extractor.parameters())
    with torch.no_grad():
        assert not extractor(images).requires_grad


def test_a_split_made_in_inference_mode_is_good_outside():
    model = network()
    with torch.inference_mode():
        split = split_features(model, torch.full((1, 3, 8, 8), 0.5))
    images = IMAGES.clone().requires_grad_()
    split.head(split.extractor(images)).sum().backward()
    assert split.head.weight.grad is not None
    assert bool(images.grad.any())


@pytest.mark.parametrize("options", [{}, {"feature_fn": lambda model, x: model[:5](x)}])
def test_the_extractor_can_be_copied_saved_and_named(options):
    model = network()
    model[1].running_mean.normal_()
    extractor = split_features(model, EXAMPLE, **options).extractor
    twin = copy.deepcopy(extractor)
    assert identity(twin) == identity(extractor)
    assert {v.data_ptr() for v in twin.parameters()}.isdisjoint(v.data_ptr() for v in extractor.parameters())
    other = split_features(network(), EXAMPLE, copy=True, **options).extractor
    assert identity(other) != identity(extractor)
    other.load_state_dict(extractor.state_dict())
    assert torch.equal(other(IMAGES), extractor(IMAGES))
    assert identity(other) == identity(extractor)


def early_auxiliary(model, x):
    model.a(x)
    return model.b(x)


def late_auxiliary(model, x):
    logits = model.b(x)
    model.c(x)
    return logits


@pytest.mark.parametrize("forward", [early_auxiliary, late_auxiliary])
def test_other_linear_layers_do_not_mislead(forward):
    """They run before or after the last one, or are defined after it and do not run."""
    model = Custom(forward, a=nn.Linear(BODY, 4), b=nn.Linear(BODY, 4, bias=False), c=nn.Linear(BODY, 4))
    split = split_features(model, EXAMPLE)
    assert (split.head_name, split.head.bias) == ("b", None)
    check_split(split, model)
    assert split_features(model, EXAMPLE, head_name="b").head_name == "b"


@pytest.mark.parametrize("change", [lambda z: z, lambda z: z.view(len(z), -1), lambda z: z[:]])
def test_the_same_numbers_in_another_wrapping_are_the_output(change):
    model = Custom(lambda model, x: change(model.a(x)), a=nn.Linear(BODY, 4))
    check_split(split_features(model, EXAMPLE), model)


def test_nested_names_dropout_and_a_transformer():
    model = Pieces()
    split = split_features(model, EXAMPLE)
    assert (split.head_name, split.feature_dim) == ("heads.head", 8)
    assert isinstance(split.extractor.heads.head, nn.Identity)
    check_split(split, model)


def test_a_layer_with_two_places():
    shared = nn.Linear(BODY, 4)
    model = Custom(lambda model, x: model.b(x), a=shared, b=shared)
    split = split_features(model, EXAMPLE, head_name="b")
    assert isinstance(split.extractor.a, nn.Identity)
    assert isinstance(split.extractor.b, nn.Identity)
    check_split(split, model)
    assert split_features(model, EXAMPLE).head_name == "a"


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(BODY, BODY), nn.Linear(BODY, BODY), nn.Linear(BODY, 4))
    model[2].weight = model[1].weight
    for own in (False, True):
        split = split_features(model, EXAMPLE, copy=own)
        assert split.extractor[1].weight is split.extractor[2].weight
        check_split(split, model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "prune"],
)
def test_weights_that_are_computed_from_others(change, own):
    model = nn.Sequential(nn.Flatten(), nn.Linear(BODY, 6), nn.ReLU(), nn.Linear(6, 4))
    change(model[1])
    change(model[3])
    model.train()(IMAGES)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)  # the weights that old norms keep are now out of date
    before = state(model)
    split = split_features(model, EXAMPLE, copy=own)
    assert state(model) == before
    assert type(split.head) is nn.Linear
    features = split.extractor(IMAGES)
    with torch.no_grad():
        assert torch.equal(split.head(features), model.eval()(IMAGES))
    ours = {value.data_ptr() for value in split.extractor.parameters()}
    assert ours.isdisjoint(value.data_ptr() for value in model.parameters()) == own


class Compiled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, lambda model: nn.DataParallel(Compiled(model))])
def test_wrappers_are_taken_off(wrap):
    model = network()
    split = split_features(wrap(model), EXAMPLE, head_name="5")
    assert type(split.extractor) is nn.Sequential
    check_split(split, model)


def test_a_linear_layer_alone():
    model = nn.Linear(7, 3)
    split = split_features(model, torch.full((1, 7), 0.5))
    assert (split.head_name, split.feature_dim) == ("", 7)
    check_split(split, model, torch.rand(5, 7, generator=torch.Generator().manual_seed(1)))


def test_type_of_the_model():
    split = split_features(network().double(), EXAMPLE)
    assert split.head.weight.dtype == torch.float64
    assert split.extractor(IMAGES.double()).dtype == torch.float64


def test_a_function_gives_features_where_there_is_no_linear_layer():
    model = Squeeze()
    message = (
        r"^model: expected a torch.nn.Linear whose output is the logits, got none that runs; "
        r"pass feature_fn\(model, x\), which returns features \(n, p\)$"
    )
    with pytest.raises(InputError, match=message):
        split_features(model, EXAMPLE)
    split = split_features(model, EXAMPLE, feature_fn=pooled)
    assert (split.head, split.head_name, split.feature_dim) == (None, None, 5)
    assert torch.equal(split.extractor(IMAGES), pooled(model, IMAGES))
    assert split.extractor.model.body.weight.data_ptr() == model.body.weight.data_ptr()
    assert not any(value.requires_grad or value.grad_fn for value in split.extractor.parameters())
    own = split_features(model, EXAMPLE, feature_fn=pooled, copy=True)
    assert own.extractor.model.body.weight.data_ptr() != model.body.weight.data_ptr()


def test_a_function_with_the_name_of_the_head():
    model = Pieces()
    split = split_features(model, EXAMPLE, feature_fn=lambda m, x: m.tokens(x)[:, 0], head_name="heads.head")
    assert (split.head_name, split.feature_dim) == ("heads.head", 8)
    check_split(split, model)
    with pytest.raises(
        ModelError, match=r"^model: .*'heads.head' after them.*feature_fn may return something else than"
    ):
        split_features(model, EXAMPLE, feature_fn=lambda m, x: m.tokens(x)[:, 1], head_name="heads.head")
    with pytest.raises(InputError, match=r"^feature_fn: expected as many features as 'heads.head' takes, 8, got 40$"):
        split_features(model, EXAMPLE, feature_fn=lambda m, x: m.tokens(x).flatten(1), head_name="heads.head")


@pytest.mark.parametrize(
    ("feature_fn", "error", "message"),
    [
        (
            lambda m, x: m.tokens(x),
            InputError,
            r"^feature_fn: expected .*\(n, p\), got shape \(2, 5, 8\) for 2 images; let",
        ),
        (
            lambda m, x: m.cut(x),
            InputError,
            r"got shape \(2, 8, 2, 2\) for 2 images; let feature_fn\(model, x\) pool them",
        ),
        (lambda m, x: m.tokens(x)[:1, 0], InputError, r"got shape \(1, 8\) for 2 images"),
        (lambda m, x: m.tokens(x)[:, 0].argmax(1), InputError, r"floating-point .*, got a tensor of torch.int64$"),
        (lambda m, x: [x], InputError, r"^feature_fn: expected floating-point features of shape \(n, p\), got list$"),
        (lambda m, x: m.tokens(x)[:, 0] * torch.nan, ModelError, r"^feature_fn: it returns NaN features"),
        (
            lambda m, x: m.nothing(x),
            ModelError,
            r"^feature_fn: it fails on images of shape \(2, 3, 8, 8\) \(AttributeE",
        ),
        (lambda m, x: m.tokens(x.mul_(2))[:, 0], ModelError, r"changes its input in place"),
        (nn.Identity(), InputError, r"^feature_fn: expected a function feature_fn\(model, x\), got Identity$"),
        (3, InputError, r"^feature_fn: expected a function feature_fn\(model, x\), got int$"),
    ],
)
def test_what_a_function_must_not_return(feature_fn, error, message):
    with pytest.raises(error, match=message):
        split_features(Pieces(), EXAMPLE, feature_fn=feature_fn)


def test_a_function_must_use_the_model_that_it_is_given():
    model = Pieces()
    with pytest.raises(
        InputError, match=r"^feature_fn: expected a function of the model that it is given, got features of"
    ):
        split_features(model, EXAMPLE, feature_fn=lambda m, x: model.tokens(x)[:, 0])


def after(change):
    return Custom(lambda model, x: change(model.b(model.a(x))), a=nn.Linear(BODY, 6), b=nn.Linear(6, 4))


AFTER = [lambda z: log_softmax(z, 1), lambda z: z.relu_(), lambda z: z + 0, lambda z: z[:, :3]]


@pytest.mark.parametrize("change", AFTER, ids=["log_softmax", "in place", "another tensor", "a part"])
def test_what_comes_after_the_last_layer_is_not_lost(change):
    message = (
        r"^model: expected a torch.nn.Linear whose output is the logits, got others \(a, b, in the order in which they "
        r"run\); take off what comes after it, such as a softmax.*feature_fn\(model, x\)"
    )
    with pytest.raises(InputError, match=message):
        split_features(after(change), EXAMPLE)
    message = (
        r"^head_name: expected the layer whose output is the logits, but something comes after 'b', which returns "
        r"shape \(2, 4\); take off"
    )
    with pytest.raises(InputError, match=message):
        split_features(after(change), EXAMPLE, head_name="b")


def test_a_last_layer_on_tokens_is_refused_with_its_shape():
    with pytest.raises(InputError, match=r"after 'heads.head', which returns shape \(2, 5, 3\); .* feature_fn"):
        split_features(Pieces(pool="mean"), EXAMPLE, head_name="heads.head")


def test_only_a_few_of_many_names_are_told():
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(BODY, BODY) for _ in range(9)), nn.Softmax(1))
    with pytest.raises(InputError, match=r"\(…, 4, 5, 6, 7, 8, 9, in the order"):
        split_features(model, EXAMPLE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", r"^head_name: expected a torch.nn.Linear of the model \(a, b, c\), got 'x'$"),
        ("r", r"^head_name: expected a torch.nn.Linear of the model \(a, b, c\), got 'r', a ReLU$"),
        ("c", r"^head_name: expected the layer that makes the logits, but 'c' does not run in eval mode$"),
        ("a", r"^head_name: expected the layer whose output is the logits, but something comes after 'a'"),
        (5, r"^head_name: expected the name of a layer, or None, got int$"),
    ],
)
def test_what_is_not_the_head(name, message):
    parts = {"a": nn.Linear(BODY, 6), "r": nn.ReLU(), "b": nn.Linear(6, 4), "c": nn.Linear(6, 4)}
    model = Custom(lambda model, x: model.b(model.r(model.a(x))), **parts)
    with pytest.raises(InputError, match=message):
        split_features(model, EXAMPLE, head_name=name)


def test_no_linear_layer_to_name():
    with pytest.raises(InputError, match=r"^head_name: expected .* \(there is none\), got 'last', a Conv2d$"):
        split_features(Squeeze(), EXAMPLE, head_name="last")


def test_a_last_layer_that_runs_twice():
    model = Custom(lambda model, x: model.a(model.a(x)), a=nn.Linear(BODY, BODY))
    with pytest.raises(
        InputError, match=r"^model: expected its last layer 'a' to run once, got 2 runs; pass feature_fn$"
    ):
        split_features(model, EXAMPLE)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked():
    model = network()
    model[5].register_forward_hook(doubled)
    return model


def weight_read(model, x):
    return model.b(x + model.b.weight.sum())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hooked, r"the layer '5' after them.* is not a plain one \(hooks, a forward of its own\)"),
        (
            lambda: nn.Sequential(nn.Flatten(), Scaled(BODY, 4)),
            r"the layer '1' after them to give its logits to the last",
        ),
        (
            lambda: Custom(lambda m, x: m.b(m.a(x + torch.rand(())).sin()), a=nn.Linear(BODY, 6), b=nn.Linear(6, 4)),
            r"the layer 'b' after them.*random in eval mode",
        ),
        (
            lambda: Custom(weight_read, b=nn.Linear(BODY, 4)),
            r"^model: without its last layer 'b' it fails on images of shape \(2, 3, 8, 8\) \(AttributeError",
        ),
        (
            lambda: Custom(lambda m, x: (m.b(x),), b=nn.Linear(BODY, 4)),
            r"expected it to return .*logits .*, got tuple$",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 4)),
            r"^model: expected logits of shape \(2, classes\), got shape \(2, 3, 8, 4",
        ),
    ],
)
def test_models_whose_parts_do_not_make_the_whole(model, message):
    with pytest.raises(ModelError, match=message):
        split_features(model(), EXAMPLE)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.data += 1
        return x


@pytest.mark.parametrize("options", [{}, {"feature_fn": lambda model, x: model[1](model[0](x)).flatten(1)}])
def test_buffers_that_change_in_eval_mode_are_put_back(options):
    model = nn.Sequential(nn.Flatten(), Counting(), nn.Linear(BODY, 4))
    with pytest.raises(
        ModelError, match=r"^model: it changes its buffer '1.calls' in eval mode; nothing frozen may do so$"
    ):
        split_features(model, EXAMPLE, **options)
    assert model[1].calls == 0


class Particular(nn.Flatten):
    """Makes trouble when it is copied."""

    def __init__(self, trouble):
        super().__init__()
        self.weight, self.trouble = nn.Parameter(torch.ones(1)), trouble

    def __deepcopy__(self, memo):
        if self.trouble == "itself":
            return self
        if self.trouble == "never" or id(self.weight) in memo:
            raise ZeroDivisionError("no")
        return Particular(self.trouble)


def particular(trouble):
    return nn.Sequential(Particular(trouble), nn.Linear(BODY, 6), nn.Linear(6, 4))


def test_modules_that_cannot_share_their_weights_get_their_own():
    model = particular("sharing")
    split = split_features(model, EXAMPLE)
    check_split(split, model)
    assert split.extractor[1].weight.data_ptr() != model[1].weight.data_ptr()
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("never", r"^model: a frozen copy of it is needed, which failed \(ZeroDivisionError: no\)$"),
        ("itself", r"^model: its copy has the same Particular in it, which would be changed$"),
    ],
)
def test_modules_that_cannot_be_copied(trouble, message):
    model = particular(trouble)
    before = state(model)
    with pytest.raises(ModelError, match=message):
        split_features(model, EXAMPLE)
    assert state(model) == before


def test_what_the_model_remembers_of_its_last_run_does_not_matter():
    def forward(model, x):
        model.seen = model.a(x)
        return model.b(model.seen)

    model = Custom(forward, a=nn.Linear(BODY, 6), b=nn.Linear(6, 4))
    logits = model(IMAGES)
    split = split_features(model, EXAMPLE)
    assert torch.equal(split.head(split.extractor(IMAGES)), logits)


class Noise(NoisyModule):
    pass


@pytest.mark.parametrize(
    ("model", "example", "options", "message"),
    [
        ("resnet20", EXAMPLE, {}, r"^model: expected a torch.nn.Module, got str$"),
        (nn.Sequential(Noise()), EXAMPLE, {}, r"^model: expected a base classifier, got a Sequential with a Noise"),
        (nn.LazyLinear(3), EXAMPLE, {}, r"^model: expected weights, got a lazy layer that has none yet; run the"),
        (network(), EXAMPLE.byte(), {}, r"^example: expected floating-point pixels"),
        (network(), EXAMPLE[:0], {}, r"^example: expected at least one image, got shape \(0, 3, 8, 8\)$"),
        (network(), EXAMPLE, {"copy": 1}, r"^copy: expected True or False, got 1$"),
    ],
)
def test_arguments_that_make_no_sense(model, example, options, message):
    with pytest.raises(InputError, match=message):
        split_features(model, example, **options)


def importable(name):
    return pytest.importorskip(name, exc_type=Exception, reason=f"{name} is not here, or does not import")


def check_library(library, name, head_name, pixels=224):
    importable(library)
    model = make_network(f"{library}.{name}", classes=5)
    images = torch.rand(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    split = split_features(model, images[:1])
    assert split.head_name == head_name
    check_split(split, model, images)


@pytest.mark.parametrize(
    ("name", "head_name"), [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("shufflenet_v2_x0_5", "fc")]
)
def test_torchvision(name, head_name):
    check_library("torchvision", name, head_name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")
@pytest.mark.parametrize(
    ("name", "head_name"),
    [
        *(("vgg11", "classifier.6"), ("alexnet", "classifier.6"), ("densenet121", "classifier")),
        *(("mobilenet_v2", "classifier.1"), ("efficientnet_b0", "classifier.1"), ("convnext_tiny", "classifier.2")),
        *(("regnet_y_400mf", "fc"), ("mnasnet0_5", "classifier.1"), ("vit_b_16", "heads.head"), ("swin_t", "head")),
        *(("googlenet", "fc"), ("inception_v3", "fc"), ("maxvit_t", "classifier.5")),
    ],
)
def test_more_of_torchvision(name, head_name):
    check_library("torchvision", name, head_name, 299 if name == "inception_v3" else 224)


@pytest.mark.slow
def test_torchvisions_squeezenet():
    importable("torchvision")
    model, example = make_network("torchvision.squeezenet1_1", classes=5), torch.full((1, 3, 64, 64), 0.5)
    with pytest.raises(InputError, match=r"got none that runs; pass feature_fn"):
        split_features(model, example)
    assert split_features(model, example, feature_fn=lambda m, x: m.features(x).mean((2, 3))).feature_dim == 512


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head_name"),
    [
        *(
            ("resnet18", "fc"),
            ("vit_tiny_patch16_224", "head"),
            ("convnext_atto", "head.fc"),
            ("mixer_s32_224", "head"),
        ),
        *(("efficientnet_b0", "classifier"), ("swin_tiny_patch4_window7_224", "head.fc")),
        ("xcit_nano_12_p16_224", "head"),
    ],
)
def test_timm(name, head_name):
    check_library("timm", name, head_name)
