import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rs_plugins.core.checkpoints import load_weights, make_model, read_weights
from rs_plugins.errors import InputError, ModelError


class Normalise(nn.Module):
    def __init__(self, mean=0.5):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, x):
        return x - self.mean


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), act=nn.ReLU(), last=nn.Linear(4, 2))
    )


def wrapped(seed=0):
    return nn.Sequential(Normalise(), network(seed))


def same_weights(a, b):
    first, second = list(a.parameters()), list(b.parameters())
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.fixture
def module(site):
    site.write(
        "some_models.py",
        """
        from torch import nn
        def linear(): return nn.Linear(3, 2)
        def broken(): raise ZeroDivisionError("no")
        def number(): return 3
        class Nets:
            small = staticmethod(lambda: nn.Linear(1, 2))
        ready = nn.Linear(3, 2)
        size = 3
        """,
    )
    site.write("no_models.py", "raise RuntimeError('not today')")


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(("target", "inputs"), [("some_models:linear", 3), ("some_models:Nets.small", 1)])
def test_models_are_made_by_name(target, inputs):
    assert make_model(target).in_features == inputs


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("some_models", InputError, "model: expected PACKAGE.MODULE:FUNCTION, got 'some_models'"),
        (":linear", InputError, "model: expected PACKAGE.MODULE:FUNCTION, got ':linear'"),
        ("nowhere.models:net", InputError, "model: cannot import nowhere.models: ModuleNotFoundError"),
        ("no_models:net", InputError, "model: cannot import no_models: RuntimeError: not today"),
        ("some_models:square", InputError, "model: some_models has no square; it offers linear, broken, number, Nets"),
        ("some_models:size", InputError, "some_models:size to be a function that returns the model, got int"),
        ("some_models:ready", InputError, "some_models:ready to be a function that returns the model, got Linear"),
        ("some_models:broken", ModelError, r"model: some_models:broken\(\) failed: ZeroDivisionError: no"),
        ("some_models:number", ModelError, r"some_models:number\(\) to return a torch.nn.Module, got int"),
    ],
)
def test_what_is_no_model_is_named(target, error, message):
    with pytest.raises(error, match=message):
        make_model(target)


def keys_renamed(model, change):
    return {change(key): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_come_back(tmp_path, name):
    save = save_file if name.endswith("safetensors") else torch.save
    save(network(1).state_dict(), tmp_path / name)
    model = network(2)
    load_weights(model, tmp_path / name)
    assert same_weights(model, network(1))
    assert not same_weights(model, network(2))


@pytest.mark.parametrize("model", [network, wrapped], ids=["network", "wrapped"])
@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module.", "module.1."])
def test_published_checkpoints_fit_the_network_with_and_without_its_normalisation(tmp_path, model, prefix):
    state = keys_renamed(network(1), lambda key: prefix + key)
    torch.save({"epoch": 90, "arch": "lenet", "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "x.pth.tar")
    target = model(2)
    load_weights(target, tmp_path / "x.pth.tar")
    assert same_weights(target, network(1))


def test_layers_that_are_numbered_are_not_taken_for_a_wrapping(tmp_path):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_weights(target, tmp_path / "w.pt")
    assert same_weights(target, whole)
    with pytest.raises(
        InputError, match=r"does not fit the model: the file lacks bias, weight; the model lacks 0.bias"
    ):
        load_weights(nn.Linear(3, 3), tmp_path / "w.pt")


def test_constants_of_the_normalisation_are_taken_from_the_file_if_it_has_them(tmp_path):
    torch.save(nn.Sequential(Normalise(0.25), network(1)).state_dict(), tmp_path / "w.pt")
    target = wrapped(2)
    load_weights(target, tmp_path / "w.pt")
    assert float(target[0].mean) == 0.25


def test_old_checkpoints_without_counters_fit(tmp_path):
    state = {key: value for key, value in network(1).state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    target = network(2)
    load_weights(target, tmp_path / "w.pt")
    assert same_weights(target, network(1))


def test_a_missing_weight_is_named_and_nothing_is_loaded(tmp_path):
    state = network(1).state_dict()
    del state["last.bias"]
    torch.save(state, tmp_path / "w.pt")
    target = network(2)
    with pytest.raises(InputError, match=r"w.pt does not fit the model: the file lacks last.bias$"):
        load_weights(target, tmp_path / "w.pt")
    assert same_weights(target, network(2))


def test_a_wrong_shape_is_named(tmp_path):
    torch.save(nn.Linear(3, 5).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w.pt: (weight|bias): expected shape \(4,.*got \(5,"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.pt")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_is_not_executed(tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / "torch.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("torch.pt", "plain.pkl"):
        with pytest.raises(InputError, match=f"weights: .*{name}: expected a torch file of tensors only"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"not at all", "expected a safetensors file, got a damaged one"),
        ("w.pt", b"", "expected a torch file"),
        ("w.pt", b"PK\x03\x04 cut off", "expected a torch file, got a damaged one"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"weights: .*{name}: {message}"):
        read_weights(tmp_path / name)


def test_files_of_other_things_are_named(tmp_path):
    with pytest.raises(InputError, match=r"weights: there is no file .*w.pt"):
        read_weights(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"expected a state_dict, got dict of other things"):
        read_weights(tmp_path / "w.pt")


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n")
    with pytest.raises(InputError, match=r"net.py: expected a safetensors or torch file, got neither"):
        read_weights(tmp_path / "net.py")
    with pytest.raises(InputError, match=r"weights: .* is a folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("target", ["mynets.py:net", "./mynets.py:net"])
def test_a_file_in_place_of_a_module(target):
    with pytest.raises(InputError, match=r"got a file, .*; write mynets:net$"):
        make_model(target)
