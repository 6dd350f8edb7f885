import json
import shlex
import sys

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.training.trained import load_trained, save_trained
from rs_plugins.errors import InputError

OWN = """
from torch import nn
called = []
def linear():
    called.append(1)
    return nn.Linear(2, 3)
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


@pytest.mark.parametrize("sigma", [0, "0.5", None, 10**400])
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
