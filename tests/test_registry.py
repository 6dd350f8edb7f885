"""Loading plugins: each failure harms its own plugin only, is said once, and raises under strict."""

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest

from rs_plugins import AtRadius, FixedBudget, certify, registry
from rs_plugins.errors import PluginError, PluginWarning, UnknownNameError
from rs_plugins.hookspecs import Component, Export
from rs_plugins.registry import Registry

GOOD = """
@hookimpl
def rs_plugins_components():
    yield Component("attack", "good", "json:dumps")

@hookimpl
def rs_plugins_exports():
    return [Export("somehost", "Good", "json:JSONDecoder")]
"""

COMPONENTS = "@hookimpl\ndef rs_plugins_components(): return "
EXPORTS = "@hookimpl\ndef rs_plugins_exports(): return "

# What a plugin does wrong → what the warning must say, besides its name, distribution and version.
BROKEN = {
    "import error": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "wrong signature": (
        "@hookimpl\ndef rs_plugins_components(config): return []",
        "PluginValidationError: Plugin 'bad' for hook 'rs_plugins_components' hookimpl definition",
    ),
    "misspelt hook": ("@hookimpl\ndef rs_plugins_component(): return []", "unknown hook 'rs_plugins_component'"),
    "misspelt hook, what there is": (
        "@hookimpl\ndef rs_plugins_component(): return []",
        "; the hooks are rs_plugins_components, rs_plugins_exports",
    ),
    "no hook": ("def rs_plugins_components(): return []", "implements no rs_plugins hook; is @hookimpl missing?"),
    "raises": ("@hookimpl\ndef rs_plugins_exports(): raise KeyError('oops')", "KeyError: 'oops'"),
    "raises half-way": (
        COMPONENTS + "gen()\ndef gen():\n    yield Component('attack', 'bad', 'a:b')\n    raise OSError('disk')",
        "OSError: disk",
    ),
    "returns None": ("@hookimpl\ndef rs_plugins_exports(): pass", "rs_plugins_exports returned None; expected an"),
    "returns a string": (
        COMPONENTS + "'attack'",
        "rs_plugins_components returned 'a'; expected a Component",
    ),
    "returns tuples": (
        COMPONENTS + "[('attack', 'x', 'a:b')]",
        "returned ('attack', 'x', 'a:b'); expected a Component",
    ),
    "an export among components": (
        COMPONENTS + "[Export('host', 'X', 'a:b')]",
        "expected a Component",
    ),
    "not iterable": (COMPONENTS + "3", "rs_plugins_components returned 3; expected an iterable of Component"),
    "one component alone": (
        COMPONENTS + "Component('attack', 'x', 'a:b')",
        "returned Component(kind='attack', name='x', target='a:b'); expected an iterable of Component",
    ),
    "unknown kind": (
        COMPONENTS + "[Component('atack', 'x', 'a:b')]",
        "unknown kind 'atack'; the kinds are attack, certifier, estimator, noise, trainer",
    ),
    "empty name": (COMPONENTS + "[Component('attack', '', 'a:b')]", "non-empty"),
    "a name with a colon": (
        COMPONENTS + "[Component('noise', 'x:y', 'a:b')]",
        "without colons, commas and spaces, got",
    ),
    "a name with a comma": (
        COMPONENTS + "[Component('noise', 'x,y', 'a:b')]",
        "without colons, commas and spaces, got",
    ),
    "a name with a space": (
        COMPONENTS + "[Component('noise', 'x y', 'a:b')]",
        "without colons, commas and spaces, got",
    ),
    "target without colon": (
        COMPONENTS + "[Component('attack', 'x', 'a.b')]",
        "target must look like 'package.module:attribute', got 'a.b'",
    ),
    "target is a class": (
        EXPORTS + "[Export('host', 'X', dict)]",
        "target must look like 'package.module:attribute', got <class 'dict'>",
    ),
    "host is no module name": (
        EXPORTS + "[Export('my host', 'X', 'a:b')]",
        "host must be a module's dotted name, got 'my host'",
    ),
    "export name is no identifier": (
        EXPORTS + "[Export('host', 'X-1', 'a:b')]",
        "name must be an identifier, got 'X-1'",
    ),
    "the same name twice": (
        COMPONENTS + "[Component('attack', 'x', 'a:b'), Component('attack', 'x', 'c:d')]",
        "attack 'x' is already offered by plugin 'bad'",
    ),
    "asks for plugins while loaded": (
        "from rs_plugins import registry\nimport my_registry\nmy_registry.it.plugins()",
        "asked for by a plugin that is itself still being loaded",
    ),
}


@pytest.fixture
def good(site):
    site.plugin("good", GOOD)
    return site


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_with_one_warning(good, case):
    source, cause = BROKEN[case]
    good.plugin("bad", source, version="0.3")
    good.write("my_registry.py", "")
    it = Registry(good.entry_points(), strict=False, disabled=())
    import my_registry

    my_registry.it = it
    with pytest.warns(PluginWarning) as warned:
        plugins = {plugin.name: plugin for plugin in it.plugins()}
    assert len(warned) == 1
    assert str(warned[0].message).startswith("plugin 'bad' (dist-bad 0.3) is left out: ")
    assert cause in str(warned[0].message)
    assert cause in plugins["bad"].cause
    assert plugins["bad"].status == "quarantined"
    assert plugins["bad"].components == plugins["bad"].exports == ()
    assert it.components() == (Component("attack", "good", "json:dumps"),)
    assert it.exports() == (Export("somehost", "Good", "json:JSONDecoder"),)


@pytest.mark.parametrize("case", ["import error", "exits at import", "wrong signature", "raises", "unknown kind"])
def test_strict_raises_instead(good, case):
    source, cause = BROKEN[case]
    good.plugin("bad", source)
    with pytest.raises(PluginError, match=r"plugin 'bad' \(dist-bad 1\.0\) is left out") as caught:
        Registry(good.entry_points(), strict=True, disabled=()).plugins()
    assert cause in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_strict_is_read_from_the_environment(monkeypatch, value, strict):
    monkeypatch.setenv("RS_PLUGINS_STRICT", value)
    assert Registry([]).strict is strict


def test_several_broken_plugins_are_each_named(good):
    good.plugin("one", "import nothing_one")
    good.plugin("two", "import nothing_two")
    it = Registry(good.entry_points(), strict=False)
    with pytest.warns(PluginWarning) as warned:
        it.plugins()
    assert [str(warning.message).split(" ")[1] for warning in warned] == ["'one'", "'two'"]
    assert it.component("attack", "good").__name__ == "dumps"


def test_a_warning_filter_cannot_turn_one_broken_plugin_into_the_loss_of_all(good, capsys):
    good.plugin("bad", "import nothing_one")
    it = Registry(good.entry_points(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(it.components("attack")) == 1
    assert "rs-plugins: plugin 'bad' (dist-bad 1.0) is left out" in capsys.readouterr().err


def test_plugins_are_loaded_once_and_not_before_they_are_asked_for(site):
    site.plugin("counting", "import counter\ncounter.loads += 1\n" + GOOD)
    site.write("counter.py", "loads = 0")
    import counter

    it = Registry(site.entry_points())
    assert counter.loads == 0
    it.plugins()
    it.plugins()
    assert counter.loads == 1


def test_of_two_plugins_that_claim_a_name_the_third_party_one_is_left_out(site):
    site.plugin("aaa", GOOD, distribution="aaa-first-in-the-alphabet")
    site.plugin("ours", GOOD, distribution="rs-plugins")
    it = Registry(site.entry_points(), strict=False)
    with pytest.warns(PluginWarning, match=r"attack 'good' is already offered by plugin 'ours' \(rs-plugins 1\.0\)"):
        status = {plugin.name: plugin.status for plugin in it.plugins()}
    assert status == {"ours": "loaded", "aaa": "quarantined"}


def test_two_distributions_with_the_same_plugin_name(site):
    site.plugin("same", EXPORTS + "[]", distribution="first")
    site.plugin("same", EXPORTS + "[]", distribution="second")
    it = Registry(site.entry_points(), strict=False)
    with pytest.warns(PluginWarning, match=r"the plugin name 'same' is already taken by plugin 'same' \(first 1\.0\)"):
        assert [plugin.status for plugin in it.plugins()] == ["loaded", "quarantined"]


def test_disabled_plugins_are_not_even_imported(good, monkeypatch):
    good.plugin("bad", "raise RuntimeError('imported')")
    monkeypatch.setenv("RS_PLUGINS_DISABLE", " bad ,")
    it = Registry(good.entry_points())
    assert {plugin.name: plugin.status for plugin in it.plugins()} == {"bad": "disabled", "good": "loaded"}


def test_disabling_an_unknown_plugin_is_said(good, monkeypatch):
    monkeypatch.setenv("RS_PLUGINS_DISABLE", "god")
    it = Registry(good.entry_points(), strict=False)
    with pytest.warns(PluginWarning, match="RS_PLUGINS_DISABLE names god, not installed here; known are: good"):
        it.plugins()
    assert it.unknown() == ("god",)
    with pytest.raises(PluginError, match="RS_PLUGINS_DISABLE names god"):
        Registry(good.entry_points(), strict=True).plugins()


def test_components_by_kind_and_name(good):
    it = Registry(good.entry_points())
    assert it.components("attack") == it.components() == (Component("attack", "good", "json:dumps"),)
    assert it.components("trainer") == ()
    import json

    assert it.component("attack", "good") is json.dumps


def test_an_unknown_name_lists_the_known_ones(good):
    it = Registry(good.entry_points())
    with pytest.raises(UnknownNameError, match=r"no attack is called 'goood'; known are: good$"):
        it.component("attack", "goood")
    with pytest.raises(UnknownNameError, match=r"no trainer is called 'good'; known are: none$"):
        it.component("trainer", "good")
    with pytest.raises(UnknownNameError, match="unknown kind 'attacks'; the kinds are attack, certifier"):
        it.component("attacks", "good")
    with pytest.raises(LookupError):
        it.component("attack", "goood")


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("no_such_package.x:Y", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("json:nothing", "AttributeError: module 'json' has no attribute 'nothing'"),
    ],
)
def test_a_component_that_cannot_be_imported_names_plugin_and_target(site, target, cause):
    site.plugin("far", COMPONENTS + f"[Component('noise', 'n', {target!r})]")
    with pytest.raises(PluginError) as caught:
        Registry(site.entry_points()).component("noise", "n")
    assert str(caught.value) == f"plugin 'far' (dist-far 1.0): cannot load noise 'n' from {target}: {cause}"


def test_a_target_may_be_an_attribute_of_an_attribute():
    import json

    assert registry.load_target("json:JSONDecoder.decode") is json.JSONDecoder.decode


def test_the_installed_plugins_are_ours():
    ours = {plugin.name: plugin for plugin in registry.plugins() if plugin.distribution == "rs-plugins"}
    assert {name: plugin.status for name, plugin in ours.items()} == dict.fromkeys(
        ["art", "core", "torchattacks"], "loaded"
    )
    assert Export("torchattacks", "SmoothAdvPGD", "rs_plugins_torchattacks.attacks:SmoothAdvPGD") in registry.exports()
    assert "fixed-budget" in [component.name for component in registry.components("certifier")]
    assert registry.component("noise", "gaussian").__name__ == "GaussianNoise"


def test_the_plugins_in_the_documentation_work(site):
    """Install both as the page writes them down, then use them as it says."""
    page = (Path(__file__).parent.parent / "docs/plugins.md").read_text()
    files = re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(files) == 6
    for name, text in files:
        if name == "pyproject.toml":
            (distribution,) = re.findall(r'^name = "(.*)"', text, flags=re.MULTILINE)
            (point,) = re.findall(r"^(\w+) = \"(\w+\.plugin)\"", text, flags=re.MULTILINE)
            folder = distribution.replace("-", "_")
            site.write(
                f"{folder}-0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n"
            )
            site.write(f"{folder}-0.1.dist-info/entry_points.txt", f"[rs_plugins]\n{point[0]} = {point[1]}\n")
            site.write(f"{folder}/__init__.py", "")
        else:
            site.write(name, text)
    it = Registry(site.entry_points())
    noise = it.component("noise", "logistic")(0.25)
    generator = torch.Generator().manual_seed(0)
    drawn = noise.draw_(torch.empty(20_000), generator)
    scale = 0.25 * 3**0.5 / math.pi
    assert kstest(drawn.numpy(), "logistic", args=(0, scale)).pvalue > 1e-3
    assert noise.draw_(torch.empty(10**7, dtype=torch.float32), generator).isfinite().all()
    for t in (1e-9, 0.1, 0.5):  # the worst case, a threshold that lies t away
        radius = noise.radius(1 / (1 + math.exp(-t / scale)))
        assert radius == pytest.approx(t, rel=1e-6)
        assert t <= noise.radius(noise.probability(t)) + 1e-11
        assert 1 / (1 + math.exp(-t / scale)) <= noise.probability(t)
    assert noise.radius(0.5) == 0
    assert noise.radius(1.0) == math.inf
    images = torch.rand(2, 1, 2, 2, generator=generator)
    for plan in (FixedBudget(n=300), AtRadius(0.01, n=300)):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        found = list(certify(model, images, 0.25, plan=plan, family=type(noise)))
        assert {(each.made_with.family, each.made_with.norm) for each in found} == {("logistic", "l1")}
    code = """
import torch, torchattacks
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
shifted = torchattacks.Shift(model)(torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 0, 1]))
print("Shift" in torchattacks.__all__, shifted.shape)
"""
    command = [str(Path(sys.executable).parent / "rs-plugins"), "run", "-c", code]
    environ = os.environ | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert (done.stdout.strip(), done.stderr) == ("True torch.Size([4, 1, 3, 3])", "")
