import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.errors import InputError, MissingDependencyError, ModelError


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options, self.layer = options, nn.Linear(3, options["num_classes"])


def get_model(name, **options):
    if name == "broken":
        raise ZeroDivisionError("no")
    return Network(name=name, **options)


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture
def torchvision(monkeypatch):
    def list_models(module=None):
        return ["both", "vision_only", "broken", *(["fcn_resnet50"] if module is not models else [])]

    models = module("torchvision.models", get_model=get_model, list_models=list_models)
    monkeypatch.setitem(sys.modules, "torchvision", module("torchvision", models=models))


@pytest.fixture
def timm(monkeypatch):
    def is_model(name):
        return name.partition(".")[0] in ("both", "timm_only")

    monkeypatch.setitem(sys.modules, "timm", module("timm", is_model=is_model, create_model=get_model))


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.fixture
def no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)


TORCHVISION = {"weights": None, "num_classes": 10}
TIMM = {"pretrained": False, "num_classes": 10, "in_chans": 3}


@pytest.mark.usefixtures("torchvision", "timm")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision.both", {"name": "both", **TORCHVISION}),
        ("timm.both", {"name": "both", **TIMM}),
        ("both", {"name": "both", **TORCHVISION}),
        ("vision_only", {"name": "vision_only", **TORCHVISION}),
        ("timm_only", {"name": "timm_only", **TIMM}),
    ],
)
def test_which_library_makes_it_without_weights(name, options):
    assert make_network(name).options == options


@pytest.mark.usefixtures("torchvision", "timm")
def test_options_are_passed_on():
    assert make_network("torchvision.both", classes=4).options["num_classes"] == 4
    assert make_network("timm.both", classes=4, channels=1).options == {
        **TIMM,
        "name": "both",
        "num_classes": 4,
        "in_chans": 1,
    }
    wrapped = make_network("timm.both", channels=2, mean=(0, 0), std=(1, 1))
    assert type(wrapped[0]).__name__ == "Normalise"
    first, same, other = (make_network("both", seed=seed).layer.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("torchvision", "timm")
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("both", {"channels": 1}, InputError, r"^channels: expected 3 for torchvision.both, got 1$"),
        ("both", {"mean": (0,)}, InputError, r"^mean: expected one number per channel, 3 for both, got 1$"),
        ("broken", {}, ModelError, r"^model: torchvision.broken cannot be made: ZeroDivisionError: no$"),
    ],
)
def test_what_does_not_fit(name, options, error, message):
    with pytest.raises(error, match=message):
        make_network(name, **options)


@pytest.mark.usefixtures("torchvision", "timm")
@pytest.mark.parametrize(
    "name", ["resnet21", "torchvision.resnet21", "timm.x", "fcn_resnet50", "timm.both.a1_in1k", "nets.small", ""]
)
def test_unknown_names(name):
    message = (
        "^model: expected one of lenet, resnet20, resnet56, resnet110, cnn3, cnn5, cnn7, torchvision.NAME, "
        f"timm.NAME or PACKAGE.MODULE:FUNCTION, got '{name}'$"
    )
    with pytest.raises(InputError, match=message):
        make_network(name)


@pytest.mark.usefixtures("torchvision", "no_timm")
def test_timm_is_not_needed_for_torchvisions():
    assert make_network("both").options["name"] == "both"
    with pytest.raises(InputError, match=r"^model: expected one of .*, got 'timm_only'$"):
        make_network("timm_only")


@pytest.mark.usefixtures("no_torchvision", "timm")
def test_torchvision_is_not_needed_for_timms():
    assert make_network("both").options == {"name": "both", **TIMM}


@pytest.mark.usefixtures("no_torchvision", "no_timm")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"networks of torchvision and timm need them: pip install torchvision timm$"),
        ("torchvision.resnet50", r"networks of torchvision need it: pip install torchvision$"),
        ("timm.resnet50", r"networks of timm need it: pip install timm$"),
    ],
)
def test_what_is_not_installed_is_named(name, message):
    ours = "lenet, resnet20, resnet56, resnet110, cnn3, cnn5, cnn7"
    with pytest.raises(MissingDependencyError, match=rf"^model: {name} is not one of {ours}, and {message}"):
        make_network(name)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import no_such_part", "ModuleNotFoundError: No module named 'no_such_part'"),
    ],
)
@pytest.mark.parametrize("name", ["torchvision.resnet50", "resnet50"])
def test_what_does_not_import_is_said(site, monkeypatch, name, source, reason):
    site.write("torchvision.py", source)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    message = rf"torchvision is installed but does not import beside torch \d.*\({reason}.*pip install --upgrade torch"
    with pytest.raises(MissingDependencyError, match=message):
        make_network(name)


def importable(name):
    return pytest.importorskip(name, exc_type=Exception, reason=f"{name} is not here, or does not import")


def test_the_real_torchvision():
    importable("torchvision")
    first, same, other = (make_network("torchvision.resnet18", classes=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conv1.weight, same.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert first.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(InputError, match=r"got 'torchvision\.fcn_resnet50'"):
        make_network("torchvision.fcn_resnet50")


def test_the_real_timm():
    importable("timm")
    model = make_network("timm.resnet18", classes=5, channels=1)
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
