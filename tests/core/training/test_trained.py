import copy
import functools
import json
import shlex
import sys

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.training import trained as trained_module
from rs_plugins.core.training.trained import load_trained, save_trained
from rs_plugins.errors import InputError

OWN = """
from torch import nn
called = []
def linear():
    called.append(1)
    return nn.Linear(2, 3)
class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 8, 0.1, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(6, 3)
    def forward(self, x):
        return self.head(self.blocks(self.embed(x.flatten(1, 2))).mean(1))
def transformer():
    return Transformer()
"""


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Write a folder with this record, and a module of the user's that is not imported yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    (tmp_path / "own_networks.py").write_text(OWN)
    folder = tmp_path / "a run"
    folder.mkdir()

    def save(network, model=None, **record):
        save_trained(folder, nn.Linear(2, 3) if model is None else model, {"sigma": 0.5, "network": network, **record})
        return folder

    return save


def test_a_function_is_called_only_with_trust(saved):
    folder = saved({"name": "own_networks:linear", "classes": 3})
    with pytest.raises(InputError) as caught:
        load_trained(folder)
    weights = shlex.quote(str(folder / "model.safetensors"))
    assert str(caught.value) == (
        f"model: {folder / 'model.json'} names a function, own_networks:linear, which would be imported and called; if "
        "you trust it, say trust=True (--trust-model), or pass the network yourself, model=… "
        f"(--model own_networks:linear --weights {weights} --sigma 0.5)"
    )
    with pytest.raises(InputError, match="trust: expected True or False, got 'no'"):
        load_trained(folder, trust="no")
    assert "own_networks" not in sys.modules
    given = load_trained(folder, model=nn.Linear(2, 3)).model
    assert "own_networks" not in sys.modules
    trusted = load_trained(folder, trust=True).model
    assert sys.modules["own_networks"].called == [1]
    assert torch.equal(given.weight, trusted.weight)


def test_anything_that_can_be_called_is_refused_unseen(saved, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: pytest.fail("called"))
    with pytest.raises(InputError, match="names a function, os:getpid, which would be imported"):
        load_trained(saved({"name": "os:getpid"}))


@pytest.mark.parametrize("name", ["torchvision.three", "timm.three", "three"])
def test_networks_of_libraries_need_no_trust(saved, monkeypatch, name):
    monkeypatch.setattr(
        "rs_plugins.core.architectures.named.find_network",
        lambda found, *, classes, channels: lambda: nn.Linear(2, classes) if found == name else None,
    )
    model = nn.Linear(2, 3)
    found = load_trained(saved({"name": name, "classes": 3}, model)).model
    assert torch.equal(found.weight, model.weight)


def test_our_networks_need_no_trust(saved):
    network = {"name": "lenet", "classes": 4, "seed": 3}
    model = make_network(**network)
    found = load_trained(saved(network, model)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            {"classes": 3},
            r"model: .*model\.json: network: expected name, a text, and others of classes, ch",
        ),
        ({"name": "lenet", "pretrained": True}, "network: expected name, .* got .*'pretrained': True"),
        ({"name": 3}, "network: expected name, a text, "),
        (["lenet"], r"network: expected name, a text, .*, got \['lenet'\]"),
        ({"name": "lenet", "classes": "3"}, r"model\.json: network: classes: expected an integer >= 2, got '3'"),
        ({"name": "lenet", "seed": 0.5}, r"model\.json: network: seed: expected an integer"),
        ({"name": "lenet", "classes": 10**400}, r"model\.json: network: classes: expected an integer >= 2"),
        ({"name": "resnet20", "mean": 0.5}, r"model\.json: network: mean: expected one number per channel"),
    ],
    ids=repr,
)
def test_a_network_that_makes_no_sense_is_named(saved, network, message):
    with pytest.raises(InputError, match=message):
        load_trained(saved(network))


@pytest.mark.parametrize("sigma", [0, "0.5", 10**400])
def test_a_sigma_that_makes_no_sense_is_named(saved, sigma):
    with pytest.raises(InputError, match=r"model\.json: sigma: expected a finite number > 0"):
        load_trained(saved({"name": "lenet"}, sigma=sigma))


def test_records_that_are_none(saved):
    folder = saved(None)
    with pytest.raises(InputError, match=r"model\.json does not name the network; pass one of the same architecture"):
        load_trained(folder)
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(record | {"format": "another"}))
    with pytest.raises(InputError, match="was not written by rs-plugins"):
        load_trained(folder)
    (folder / "model.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        load_trained(folder)


# ---- networks with a certifying adapter ------------------------------------------------------------------------------

LENET = {"name": "lenet", "classes": 4, "seed": 3, "mean": [0.2], "std": [0.3]}


def different(model):
    """Change every weight and buffer, also those that begin as 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    ("network", "shape", "design"),
    [
        (LENET, (1, 28, 28), {"size": "tiny"}),
        (LENET, (1, 28, 28), {"size": "small", "combine": "gated"}),
        (LENET, (1, 28, 28), {"size": "medium", "head": "frozen"}),
        (LENET, (1, 28, 28), {"size": "copy", "head": "fresh"}),
        (LENET, (1, 28, 28), {"kind": "feature", "hidden": 7, "head_name": "1.9"}),
        ({"name": "resnet20"}, (3, 12, 12), {"kind": "feature", "combine": "gated"}),
        ({"name": "own_networks:transformer"}, (2, 3, 4), {"kind": "token", "hidden": 5}),
        ({"name": "own_networks:transformer"}, (2, 3, 4), {"kind": "token", "sites": ["blocks.1"]}),
    ],
    ids=str,
)
def test_a_network_with_a_certifying_adapter_comes_back(saved, network, shape, design):
    check_round_trip(saved, network, shape, design)


@pytest.mark.slow
def test_the_adapter_of_the_paper_comes_back(saved):
    check_round_trip(saved, {"name": "resnet20"}, (3, 12, 12), {"size": "paper", "head": "fresh"})


def check_round_trip(saved, network, shape, design):
    design = AdapterDesign(**design)
    folder = saved(network)  # our function can be imported from now on
    model = different(adapt(make_network(**network), shape, design, seed=2, copied=True))
    saved(network, model, adapter={**design.plain(), "shape": list(shape), "seed": 1})
    found = load_trained(folder, trust=":" in network["name"]).model
    assert isinstance(found, AdaptedClassifier)
    assert not any(part.training for part in found.modules())
    state, expected = found.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
        assert not torch.equal(found.head(found.extractor(found.normalise(x))), model(x))
    assert [name for name, value in found.named_parameters() if not value.requires_grad] == [
        name for name, value in model.named_parameters() if not value.requires_grad
    ]
    bare = adapt(make_network(**network), shape, design, copied=True)
    for part in model.still:
        getattr(bare, part).load_state_dict(getattr(model, part).state_dict())
    given = load_trained(folder, model=bare).model
    assert all(torch.equal(given.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize("part", ["extractor", "normalise", "head"])
def test_what_is_frozen_is_compared_and_not_written(saved, part):
    base = make_network(**LENET).eval()
    design = AdapterDesign(kind="feature", hidden=5, head="frozen")
    trained = different(adapt(base, (1, 28, 28), design, copied=True))
    for name in trained.still:
        getattr(trained, name).load_state_dict(getattr(adapt(base, (1, 28, 28), design), name).state_dict())
    expected = copy.deepcopy(trained.state_dict())
    folder = saved(LENET, trained, adapter={**design.plain(), "shape": [1, 28, 28]})
    mine = adapt(base, (1, 28, 28), design)
    found = load_trained(folder, model=mine).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with torch.no_grad():
        key, value = next((key, value) for key, value in trained.state_dict().items() if key.startswith(f"{part}."))
        value.add_(0.5)
    saved(LENET, trained, adapter={**design.plain(), "shape": [1, 28, 28]})
    before = {name: copy.deepcopy(one.state_dict()) for name, one in (("base", base), ("mine", mine))}
    message = rf"model\.safetensors: {key}: expected the same as in the model, where {part} is frozen, got others; pass"
    with pytest.raises(InputError, match=message):
        load_trained(folder, model=mine)
    for name, one in (("base", base), ("mine", mine)):
        assert all(torch.equal(one.state_dict()[key], value) for key, value in before[name].items())


def test_a_frozen_part_of_another_type_is_the_same_as_far_as_it_can_be(saved):
    base, design = make_network(**LENET), AdapterDesign(kind="feature", hidden=5)
    folder = saved(LENET, adapt(base, (1, 28, 28), design), adapter={**design.plain(), "shape": [1, 28, 28]})
    half = adapt(copy.deepcopy(base).bfloat16(), (1, 28, 28), design, seed=1)
    assert load_trained(folder, model=half).model.head.weight.dtype == torch.bfloat16


def test_an_extractor_that_the_record_does_not_tell_of(saved):
    base, design = make_network(**LENET), AdapterDesign(kind="feature", hidden=5)
    model = adapt(base, (1, 28, 28), design, copied=True)
    plain = {**design.plain(), "shape": [1, 28, 28]}
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        record = {"adapter": plain, "extractor": model.to(dtype).extractor_fingerprint()}
        assert load_trained(saved(LENET, model, **record)).model.head.weight.dtype == dtype
    folder = saved(LENET, different(model), **record, versions="torch 1")
    message = r"model: .*a run: model\.safetensors has another extractor .*model\.json tells of.*written with torch 1"
    with pytest.raises(InputError, match=message):
        load_trained(folder)


def test_the_network_below_a_certifying_adapter_needs_trust_or_is_passed(saved):
    plain = {**AdapterDesign(kind="token").plain(), "shape": [2, 3, 4], "seed": 0}
    folder = saved({"name": "own_networks:transformer"}, adapter=plain)
    with pytest.raises(InputError, match="names a function, own_networks:transformer, which would be imported"):
        load_trained(folder)
    assert "own_networks" not in sys.modules
    folder = saved(None, adapter=plain)
    with pytest.raises(InputError, match="does not name the network; pass one of the same architecture"):
        load_trained(folder)
    with pytest.raises(InputError, match=r"model\.json: adapter: model: it fails on an input of shape \(1, 2, 3, 4\)"):
        load_trained(folder, model=nn.Linear(2, 3))


def test_the_classifier_itself_is_enough_for_a_folder_with_its_certifying_adapter(saved):
    base = make_network(**LENET).eval()
    design = AdapterDesign(kind="feature", hidden=5)
    model = different(adapt(base, (1, 28, 28), design, copied=True))
    plain = {**design.plain(), "shape": [1, 28, 28]}
    folder = saved(None, model, adapter=plain, extractor=model.extractor_fingerprint())
    fresh = make_network(**{**LENET, "seed": 7})  # its weights do not matter, and stay
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    found = load_trained(folder, model=fresh).model
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(found(x), model.eval()(x))
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (["tiny"], r"model\.json: adapter: expected shape and others of kind, .*, seed, got \['tiny'\]"),
        ({"size": "tiny"}, "adapter: expected shape and others of kind, "),
        ({"shape": [1, 28, 28], "backbone": "resnet18"}, "adapter: expected shape and others of .*'backbone'"),
        ({"shape": "28"}, "adapter: shape: expected that of an image, such as .*, got '28'"),
        ({"shape": []}, "adapter: shape: expected that of an image"),
        ({"shape": [1, 28, 0.5]}, "adapter: shape: expected an integer >= 1, got 0.5"),
        ({"shape": [1, "28", 28]}, "adapter: shape: expected an integer >= 1, got '28'"),
        ({"shape": [10**5, 10**5, 10**5]}, "adapter: shape: expected that of an image"),
        ({"shape": [3, 28, 28]}, "adapter: model: it fails on an input of shape"),
        ({"shape": [1, 28, 28], "seed": "0"}, "adapter: seed: expected an integer"),
        ({"shape": [1, 28, 28], "size": "huge"}, "adapter: size: expected one of 'tiny', "),
        ({"shape": [1, 28, 28], "size": ["tiny"]}, r"adapter: size: expected one of .*, got \['tiny'\]"),
        (
            {"shape": [1, 28, 28], "kind": "feature", "hidden": "7"},
            "adapter: hidden: expected an integer >= 1, got '7'",
        ),
        ({"shape": [1, 28, 28], "kind": "token", "sites": [0]}, r"adapter: sites: expected a list of names, got \[0\]"),
        ({"shape": [1, 28, 28], "kind": "token", "sites": "1"}, "adapter: sites: expected a list of names, got '1'"),
        ({"shape": [1, 28, 28], "kind": "token", "sites": ["no"]}, "adapter: sites: the extractor has no module 'no'"),
        ({"shape": [1, 28, 28], "head_name": 12}, "adapter: head_name: expected the name of a layer, or None, got int"),
        ({"shape": [1, 28, 28], "head_name": "0"}, "adapter: head_name: expected a torch.nn.Linear of the model"),
    ],
    ids=str,
)
def test_an_adapter_that_makes_no_sense_is_named(saved, adapter, message):
    with pytest.raises(InputError, match=message):
        load_trained(saved({"name": "lenet"}, adapter=adapter))


@pytest.mark.parametrize(
    ("network", "adapter", "message"),
    [
        (
            {"classes": 10**12},
            {},
            "network: classes: expected at most [0-9]+, the longest side of a .*, got 10{12}",
        ),
        (
            {"name": "resnet20", "mean": None, "std": None, "channels": 10**11},
            {},
            "network: channels: expected at most",
        ),
        ({}, {"hidden": 10**11}, "adapter: hidden: expected (at most|an integer)"),
        ({}, {"hidden": 10**30}, "adapter: hidden: expected (at most|an integer)"),
        ({}, {"shape": [1, 20_000, 20_000]}, "adapter: shape: expected that of an image"),
        ({}, {"shape": [2**30]}, "adapter: shape: expected that of an image"),
        (
            {},
            {"kind": "token", "hidden": None, "sites": [str(site) for site in range(99)]},
            "adapter: sites: expected at most [0-9]+, the number of tensors",
        ),
    ],
    ids=["classes", "channels", "hidden", "huge hidden", "sides", "pixels", "sites"],
)
def test_a_record_that_asks_for_all_memory_is_refused(saved, monkeypatch, network, adapter, message):
    plain = {"kind": "feature", "hidden": 5, "shape": [1, 28, 28]}
    model = adapt(make_network(**LENET), (1, 28, 28), AdapterDesign(kind="feature", hidden=5))
    folder = saved(LENET, model, adapter=plain)
    load_trained(folder)
    monkeypatch.setattr("rs_plugins.core.training.trained.adapt", lambda *_, **__: pytest.fail("it is made"))
    folder = saved({**LENET, **network}, model, adapter={**plain, **adapter})
    with pytest.raises(InputError, match=rf"model\.json: {message}"):
        load_trained(folder)


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), TypeError(), OverflowError(), MemoryError()], ids=repr)
@pytest.mark.parametrize("maker", ["make_network", "adapt"])
def test_what_cannot_be_made_is_named(saved, monkeypatch, maker, failure):
    folder = saved({"name": "lenet"}, adapter={"shape": [1, 28, 28]})

    def fail(*_, **__):
        raise failure

    original = getattr(trained_module, maker)
    monkeypatch.setattr(trained_module, maker, functools.wraps(original)(fail))
    what = "adapter" if maker == "adapt" else "network"
    message = rf"model\.json: {what}: nothing can be made of it \({type(failure).__name__}: {failure}\)"
    with pytest.raises(InputError, match=message):
        load_trained(folder)


def test_weights_for_another_adapter_are_refused(saved):
    model = adapt(make_network(**LENET), (1, 28, 28), AdapterDesign(size="tiny"))
    folder = saved(LENET, model, adapter={"shape": [1, 28, 28], "size": "small"})
    with pytest.raises(InputError, match=r"model\.safetensors: adapter\.\S+: expected shape|does not fit the model"):
        load_trained(folder)


def test_a_network_for_images_of_one_size_is_made_again_and_no_larger(saved):
    network = {"name": "cnn5", "classes": 3, "channels": 1, "size": 8, "width": 0.25, "mean": [0.5]}
    model = make_network(**network)
    found = load_trained(saved(network, model)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    stored = sum(value.numel() for value in model.state_dict().values())
    before = torch.get_rng_state()
    for more in ({"size": 10**5}, {"width": 1e4}, {"width": None}):
        with pytest.raises(
            InputError, match=rf"json: network: expected at most {stored} values, as many as model\.saf"
        ):
            load_trained(saved({**network, **more}, model))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match=r"model\.json: network: width: expected a finite number > 0, got '1'"):
        load_trained(saved({**network, "width": "1"}, model))
    with pytest.raises(InputError, match=r"model\.json: network: (size|nothing)"):
        load_trained(saved({**network, "size": 10**300}, model))
