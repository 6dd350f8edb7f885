import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch
import torchattacks
from torch import nn

from rs_plugins import registry
from rs_plugins.cli.attacks import parse_attack
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.laplace import LaplaceNoise
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError
from rs_plugins.registry import Registry
from rs_plugins_torchattacks.attacks import SmoothAdvPGD


@pytest.fixture
def smoothed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0.3, samples=5).eval()


THIRD_PARTY = """
@hookimpl
def rs_plugins_components():
    return [Component("attack", "theirs.Shift", "shift:Shift"), Component("attack", "Bare", "shift:bare"),
            Component("attack", "theirs.SmoothAdvPGD", "shift:Shift"), Component("attack", "Aims", "shift:Aims"),
            Component("attack", "Secret", "shift:Secret"), Component("attack", "Five", "shift:FIVE"),
            Component("attack", "Alone", "shift:alone"), Component("attack", "Fivefold", "shift:fivefold")]
"""
SHIFT = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Length
class Shift:
    def __init__(self, model, by, *, often: "Length" = 1, clip=True, how="up", seed=None):
        self.model, self.given = model, (by, often, clip, how, seed)
    def __call__(self, images, labels):
        return images
class Aims:
    def __init__(self, model, goal: str = "none"):
        self.targeted = goal == "label"
    def __call__(self, images, labels):
        return images
class Secret(Aims):
    def __init__(self, model, targeted=False):
        pass
    targeted = "no"
FIVE = 5
def alone():
    return None
def fivefold(model):
    return 5
def bare(model, eps: float = 1.0, start: int | None = None, **more):
    return lambda images, labels: (model, eps, start, more)
"""


@pytest.fixture
def plugins(site, monkeypatch):
    """The installed plugins and a third party's."""
    site.plugin("theirs", THIRD_PARTY)
    site.write("shift.py", SHIFT)
    ours = importlib.metadata.entry_points(group="rs_plugins")
    everybodys = {point.name: point for point in [*ours, *site.entry_points()]}  # `site` may be among the installed
    monkeypatch.setattr(registry, "_DEFAULT", Registry(everybodys.values()))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmoothAdvPGD", "torchattacks.SmoothAdvPGD"),
        ("torchattacks.SmoothAdvPGD", "torchattacks.SmoothAdvPGD"),
        ("art.SmoothAdvPGD", "art.SmoothAdvPGD"),
        ("theirs.SmoothAdvPGD", "theirs.SmoothAdvPGD"),
        ("Shift:by=1", "theirs.Shift"),
        ("Bare", "Bare"),
        ("torchattacks.PGDL2", "torchattacks.PGDL2"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_names(text, name):
    text += ":by=1" if text == "theirs.SmoothAdvPGD" else ""
    assert parse_attack(text).name == name


@pytest.mark.usefixtures("plugins")
def test_a_short_name_is_arts_where_torchattacks_is_not_installed(monkeypatch):
    from rs_plugins.cli import attacks

    find_spec = attacks.find_spec
    monkeypatch.setattr(attacks, "find_spec", lambda name: None if name == "torchattacks" else find_spec(name))
    assert parse_attack("SmoothAdvPGD").name == "art.SmoothAdvPGD"
    with pytest.raises(InputError, match=r"attack: expected one of .*got 'torchattacks.PGDL2'"):
        parse_attack("torchattacks.PGDL2")


def given(text):
    return parse_attack(text).options


def test_values_by_annotation():
    text = "SmoothAdvPGD:eps=1/4, steps=2e1,sigma=none,samples=8,noise=fresh,seed=7,alpha=1"
    assert given(text) == {
        **{"eps": 0.25, "steps": 20, "sigma": None, "samples": 8, "noise": "fresh", "seed": 7, "alpha": 1.0}
    }
    assert isinstance(given(text)["alpha"], float)
    assert given("art.SmoothAdvPGD:eps=8/255,norm=2,targeted=no,max_iter=3") == {
        **{"eps": 8 / 255, "norm": 2.0, "targeted": False, "max_iter": 3}
    }


@pytest.mark.usefixtures("plugins")
def test_values_by_default_or_by_their_look():
    """Nothing is annotated in torchattacks, and nothing that a running program knows in the third party's."""
    assert given("torchattacks.PGDL2:eps=8/255,steps=3,random_start=false") == {
        **{"eps": 8 / 255, "steps": 3, "random_start": False}
    }
    assert given("torchattacks.Square:norm=L2,n_restarts=2") == {"norm": "L2", "n_restarts": 2}
    assert given("Shift:by=0.5,often=none,clip=no,how=12,seed=1.5") == {
        **{"by": 0.5, "often": None, "clip": False, "how": "12", "seed": 1.5}
    }
    assert given("Shift:by=true,seed=1/0") == {"by": True, "seed": "1/0"}
    assert given("Shift:by=far")["by"] == "far"


@pytest.mark.usefixtures("plugins")
def test_any_option_where_the_attack_takes_any(smoothed):
    named = parse_attack("Bare:eps=2,start=none,colour=red")
    assert named.aimed(smoothed)(None, None) == (smoothed, 2.0, None, {"colour": "red"})


KNOWN = "Aims, Bare, Secret, art.SmoothAdvPGD, theirs.Shift, theirs.SmoothAdvPGD, torchattacks.SmoothAdvPGD"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Shft", "torchattacks.NAME, with options as in SmoothAdvPGD:eps=0.5, got 'Shft'"),
        ("torchattacks.PGDL3", "PGDL2, PGDRS, PGDRSL2, "),
        ("torchattacks.MultiAttack", ", got 'torchattacks.MultiAttack'"),
        ("art.Shift:by=1", ", got 'art.Shift'"),
        ("SmoothAdvPGD:", "attack: expected OPTION=VALUE after SmoothAdvPGD:, got nothing"),
        (
            "SmoothAdvPGD:epz=1",
            "attack: torchattacks.SmoothAdvPGD has no option 'epz'; it has eps, alpha, steps, ",
        ),
        ("torchattacks.PGDL2:step=1", "attack: torchattacks.PGDL2 has no option 'step'; it has eps, alpha, steps, ran"),
        ("art.SmoothAdvPGD:classifier=1", "attack: art.SmoothAdvPGD has no option 'classifier'; it has norm, eps, "),
        ("torchattacks.VANILA:eps=1", "attack: torchattacks.VANILA has no option 'eps'; it has none"),
        ("Shift", "attack: theirs.Shift needs by, as in Shift:by=…"),
        ("SmoothAdvPGD:steps=many", "attack: steps: expected an integer, got 'many'"),
        ("SmoothAdvPGD:eps=1/0", "attack: eps: expected a number, got '1/0'"),
        ("torchattacks.PGDL2:random_start=perhaps", "attack: random_start: expected true or false, got 'perhaps'"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_attacks_that_are_not_there(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_attack(text)


@pytest.mark.usefixtures("plugins")
def test_all_that_is_known_is_listed():
    with pytest.raises(InputError) as caught:
        parse_attack("Shft")
    listed = str(caught.value).partition("expected one of ")[2].partition(", the last part")[0].split(", ")
    assert set(KNOWN.split(", ")) <= set(listed)


def test_the_smoothed_classifier_is_what_is_attacked(smoothed):
    ours = parse_attack("SmoothAdvPGD:eps=0.5").aimed(smoothed)
    assert isinstance(ours, SmoothAdvPGD)
    assert ours.model is smoothed
    assert parse_attack("torchattacks.PGDL2").aimed(smoothed).model is smoothed


def test_the_base_classifier_on_request_with_the_sigma(smoothed):
    ours = parse_attack("SmoothAdvPGD:eps=0.5").aimed(smoothed, base=True)
    assert ours.model is smoothed.base
    assert ours.sigma == 0.3
    assert parse_attack("SmoothAdvPGD:sigma=0.1").aimed(smoothed, base=True).sigma == 0.1
    theirs = parse_attack("torchattacks.PGDRSL2:noise_sd=0.3").aimed(smoothed, base=True)
    assert isinstance(theirs, torchattacks.PGDRSL2)
    assert theirs.model is smoothed.base
    with pytest.raises(InputError, match=r"on: art\.SmoothAdvPGD attacks the smoothed classifier only"):
        parse_attack("art.SmoothAdvPGD").aimed(smoothed, base=True)


def test_arts_attack_is_a_function_of_tensors(smoothed):
    x, y = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    attack = parse_attack("art.SmoothAdvPGD:eps=0.5,eps_step=0.2,max_iter=4,samples=6").aimed(smoothed)
    expected = parse_attack("torchattacks.SmoothAdvPGD:eps=0.5,alpha=0.2,steps=4,samples=6").aimed(smoothed)(x, y)
    torch.testing.assert_close(attack(x, y), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", ["art.SmoothAdvPGD:max_iter=1", "torchattacks.SmoothAdvPGD:steps=1"])
def test_an_attack_sees_the_noise_of_the_classifier_that_is_judged(smoothed, attack, monkeypatch):
    """All of its draws are those of the family, none Gaussian."""
    drawn = []
    monkeypatch.setattr(GaussianNoise, "draw_", lambda *_: pytest.fail("Gaussian noise was drawn"))
    draw = LaplaceNoise.draw_
    monkeypatch.setattr(LaplaceNoise, "draw_", lambda self, *how: drawn.append(self.sigma) or draw(self, *how))
    under_laplace = SmoothedModel(smoothed.base, 0.3, family=LaplaceNoise, samples=6)
    parse_attack(attack).aimed(under_laplace)(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    assert set(drawn) == {0.3}


def test_what_the_art_attack_says_of_its_success_is_passed_on(smoothed):
    attack = parse_attack("art.SmoothAdvPGD").aimed(smoothed)
    attack._attack.success = [True]
    assert attack.success == [True]


@pytest.mark.usefixtures("plugins")
def test_a_constructor_that_refuses(smoothed):
    with pytest.raises(InputError, match=re.escape("sigma: expected 0.3, which the SmoothedModel brings, or None")):
        parse_attack("SmoothAdvPGD:sigma=0.5").aimed(smoothed)
    message = re.escape("attack: Bare cannot be set up: TypeError: bare() got multiple values for argument 'model'")
    with pytest.raises(InputError, match=message):
        parse_attack("Bare:model=1").aimed(smoothed)


def test_the_record_tells_attacks_apart():
    record = parse_attack("torchattacks.PGDL2:eps=0.5").record
    assert record == {
        "attack": "torchattacks.PGDL2",
        "options": {"eps": 0.5},
        "host": f"torchattacks {torchattacks.__version__}",
    }
    assert parse_attack("SmoothAdvPGD").record["host"] == f"torchattacks {torchattacks.__version__}"
    assert parse_attack("art.SmoothAdvPGD").record["host"].startswith("art 1.")


@pytest.mark.parametrize("text", ["art.SmoothAdvPGD:targeted=true", "Aims:goal=label", "Secret:targeted=true"])
@pytest.mark.usefixtures("plugins")
def test_targeted_attacks_are_refused(smoothed, text):
    name = text.partition(":")[0]
    message = f"attack: {name} is set up as targeted: it would take the true labels for its targets; expected one that"
    with pytest.raises(InputError, match=re.escape(message)):
        parse_attack(text).aimed(smoothed)


@pytest.mark.parametrize("text", ["art.SmoothAdvPGD:targeted=false", "Aims", "Secret", "torchattacks.PGD"])
@pytest.mark.usefixtures("plugins")
def test_others_are_not(smoothed, text):
    assert callable(parse_attack(text).aimed(smoothed))


@pytest.mark.usefixtures("plugins")
def test_infinite_numbers_are_text_in_the_record():
    named = parse_attack("Bare:eps=inf,low=-inf,none=nan,start=3")
    assert named.options["eps"] == float("inf")
    assert named.record["options"] == {"eps": "inf", "low": "-inf", "none": "nan", "start": 3}


@pytest.mark.parametrize(
    ("text", "ours"),
    [("SmoothAdvPGD", True), ("art.SmoothAdvPGD", True), ("torchattacks.PGD", False), ("Aims", False), ("Bare", False)],
)
@pytest.mark.usefixtures("plugins")
def test_whether_an_attack_is_one_of_ours(text, ours):
    assert parse_attack(text).ours == ours


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(("name", "got"), [("Five", "5"), ("Alone", "<function alone at ")])
def test_components_that_are_no_attacks(name, got):
    with pytest.raises(InputError) as caught:
        parse_attack(name)
    expected = f"attack: expected {name} to be a class or function that takes a model, got {got}"
    assert str(caught.value).startswith(expected)


@pytest.mark.usefixtures("plugins")
def test_what_an_attack_returns_is_called(smoothed):
    with pytest.raises(InputError, match=r"^attack: expected Fivefold to return a function of .* labels, got 5$"):
        parse_attack("Fivefold").aimed(smoothed)


def test_a_name_that_a_plugin_exports_into_torchattacks_is_found(site):
    site.exporting("theirs", ("torchattacks", "Shifted", "shifted:Shifted"))
    site.write("shifted.py", "class Shifted:\n    def __init__(self, model, by=1):\n        pass")
    code = """
from rs_plugins.cli.attacks import parse_attack
found = parse_attack("torchattacks.Shifted:by=2")
import torchattacks
print(found.name, found.make.__module__, dict(found.options), hasattr(torchattacks, "Shifted"))
"""
    environ = os.environ | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("torchattacks.Shifted shifted {'by': 2} False\n", "")
