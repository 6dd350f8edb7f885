"""`rs-plugins doctor`: every trap it knows is found where it is, and only there."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from rs_plugins.cli import doctor, main
from rs_plugins.cli.run import site_path
from rs_plugins.registry import Registry

HEALTHY = {
    "torch": "2.13.0+cpu",
    "numpy": "1.26.4",
    "scipy": "1.17.1",
    "pluggy": "1.7.0",
    "click": "8.5.1",
    "tqdm": "4.70",
    "adversarial-robustness-toolbox": "1.20.1",
    "torchattacks": "3.5.1",
    "packaging": "26",
    "statsmodels": "0.15",
    "multiprocess": "0.70",
    "tensorboardX": "2.6",
    "requests": "2.32.3",
}


class FakeEnvironment(doctor.Environment):
    """A machine where everything is as it should be, but for what a test changes."""

    def __init__(self, versions=None, environ=None, path=(), plugins=(), probes=None, files=("torchattacks",)):
        self.versions = HEALTHY | (versions or {})
        self.environ = environ or {}
        self.path = [str(entry) for entry in path]
        self.entry_points = plugins
        self.probes = {"torch": {"landings": [], "cuda": True}} | (probes or {})
        self.brought = set(files)

    def version(self, distribution):
        return self.versions.get(distribution)

    def files(self, distribution):
        return self.brought

    def registry(self):
        return Registry(self.entry_points, strict=False)

    def probe(self, module, timeout=180):
        return self.probes.get(module, {"landings": [[module, "Ours", "placed", ""]], "cuda": None})


def findings(**changes):
    return doctor.examine(FakeEnvironment(**changes))


def unusual(**changes):
    return [(finding.level, finding.what, finding.advice) for finding in findings(**changes) if finding.level != "ok"]


def test_a_healthy_machine():
    assert unusual() == []
    whats = [finding.what for finding in findings()]
    assert {"torch 2.13.0+cpu", "torchattacks 3.5.1", "art.Ours", "torchattacks.Ours"} <= set(whats)


# What is different → the level of the one finding, a part of what it says, and a part of its advice.
TRAPS = {
    "no scipy": ({"versions": {"scipy": None}}, "problem", "scipy is not installed", "pip install"),
    "torch broken": (
        {"probes": {"torch": "ImportError: libgomp"}},
        "problem",
        "torch cannot be imported: ImportError",
        "reinst",
    ),
    "no gpu": (
        {"probes": {"torch": {"landings": [], "cuda": False}}},
        "note",
        "torch sees no CUDA device",
        "on the CPU",
    ),
    "no art": (
        {"versions": {"adversarial-robustness-toolbox": None}},
        "note",
        "toolbox is not installed",
        "rs-plugins[art]",
    ),
    "no torchattacks": (
        {"versions": {"torchattacks": None}},
        "note",
        "torchattacks is not",
        "rs-plugins[torchattacks]",
    ),
    "another art": (
        {"versions": {"adversarial-robustness-toolbox": "1.19.2"}},
        "warning",
        "1.19.2: tested is 1.20.1",
        "==1.20.1",
    ),
    "another torchattacks": ({"versions": {"torchattacks": "3.6"}}, "warning", "3.6: tested is 3.5.1", "==3.5.1"),
    "host broken": (
        {"probes": {"art": "ModuleNotFoundError: x"}},
        "problem",
        "import art fails: ModuleNotFoundError: x",
        "repair",
    ),
    "export into nowhere": (
        {"probes": {"art": {"landings": [["art.attacks.no", "A", "nowhere", "art.attacks has no module no"]]}}},
        "problem",
        "art.attacks.no.A is missing: art.attacks has no module no",
        "rs-plugins list",
    ),
    "export failed": (
        {"probes": {"art": {"landings": [["art.attacks", "A", "failed", "TypeError: y"]]}}},
        "problem",
        "art.attacks.A is missing: TypeError: y",
        "update",
    ),
    "name clash": (
        {"probes": {"art": {"landings": [["art.attacks", "A", "kept", "art has its own"]]}}},
        "warning",
        "art.attacks.A is not ours: art has its own",
        "import ours by its own module",
    ),
    "clamp": (
        {"versions": {"torch": "2.15.0"}},
        "warning",
        "never move a pixel that is exactly 0 or 1",
        "SmoothAdvPGD",
    ),
    "clamp, later": (
        {"versions": {"torch": "3.0.1+cu130"}},
        "warning",
        "never move a pixel that is exactly 0 or 1",
        "SmoothAdvPGD",
    ),
    "no packaging": (
        {"versions": {"packaging": None}},
        "problem",
        "packaging is not installed: import art fails",
        "pip install",
    ),
    "no statsmodels": (
        {"versions": {"statsmodels": None}},
        "note",
        "PyTorchRandomizedSmoothing needs it",
        "pip install stats",
    ),
    "no multiprocess": (
        {"versions": {"multiprocess": None}},
        "note",
        "ART's AutoAttack needs it",
        "pip install multiprocess",
    ),
    "no tensorboardX": (
        {"versions": {"tensorboardX": None}},
        "note",
        "summary_writer needs it",
        "pip install tensorboardX",
    ),
    "numpy 2": ({"versions": {"numpy": "2.4.6"}}, "note", "hand float64 images to its classifiers", "casts them"),
    "bundled robustbench": (
        {"files": ["robustbench"]},
        "note",
        "import robustbench gives an old copy",
        "another environment",
    ),
    "two robustbenches": (
        {"files": ["robustbench"], "versions": {"robustbench": "1.1"}},
        "warning",
        "robustbench 1.1 and the torchattacks wheel have overwritten each other's files",
        "--force-reinstall --no-deps robustbench",
    ),
    "old requests": ({"versions": {"requests": "2.25.1"}}, "note", "requests 2.25.1 is old", "--no-deps torchattacks"),
    "activated": (
        {"environ": {"PYTHONPATH": "/a:" + site_path()}},
        "note",
        "PYTHONPATH holds our site folder",
        "is activated",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    changes, level, what, advice = TRAPS[trap]
    found = unusual(**changes)
    assert [finding[0] for finding in found] == [level], found
    assert what in found[0][1]
    assert advice in found[0][2]


def test_the_clamp_trap_needs_torchattacks():
    assert not [what for _, what, _ in unusual(versions={"torch": "2.15.0", "torchattacks": None}) if "0 or 1" in what]


def test_plugins(site, monkeypatch):
    site.plugin("bad", "import no_such_module_1")
    site.plugin("off", "import no_such_module_2")
    monkeypatch.setenv("RS_PLUGINS_DISABLE", "off")
    with pytest.warns(match="plugin 'bad'"):
        found = unusual(plugins=site.entry_points())
    assert [level for level, _, _ in found] == ["problem", "note"]
    assert "plugin 'bad' (dist-bad 1.0) is left out: ModuleNotFoundError" in found[0][1]
    assert "RS_PLUGINS_DISABLE=bad" in found[0][2]
    assert "plugin 'off' (dist-off 1.0) is disabled" in found[1][1]


OFFERS = """
@hookimpl
def rs_plugins_components():
    return [Component("noise", "there", "json:dumps"), Component("noise", "gone", "no_such_module_3:X"),
            Component("attack", "lost", "json:nothing"), Component("trainer", "ends", "ends:X")]
"""


def test_what_plugins_offer_is_loaded(site):
    site.plugin("far", OFFERS)
    site.write("ends.py", "print('loud')\nraise SystemExit(2)")
    found = unusual(plugins=site.entry_points(), environ=os.environ | {"PYTHONPATH": str(site.folder)})
    who = "plugin 'far' (dist-far 1.0): cannot load "
    assert found == [
        ("problem", f"{who}{what}", "update or uninstall dist-far")
        for what in (
            "noise 'gone' from no_such_module_3:X: ModuleNotFoundError: No module named 'no_such_module_3'",
            "attack 'lost' from json:nothing: AttributeError: module 'json' has no attribute 'nothing'",
            "trainer 'ends' from ends:X: SystemExit: 2",
        )
    ]


def test_what_ends_the_process_is_said(site):
    site.plugin("far", OFFERS)
    site.write("ends.py", "import os\nos._exit(7)")
    found = unusual(plugins=site.entry_points(), environ=os.environ | {"PYTHONPATH": str(site.folder)})
    ((level, what, _),) = found
    assert (level, what) == ("problem", "plugin 'far' (dist-far 1.0): loading what it offers fails: exit code 7")


def test_what_we_offer_ourselves_is_not_loaded(site):
    site.plugin("far", OFFERS, distribution="rs-plugins")
    assert unusual(plugins=site.entry_points()) == []


def test_adapters_is_adapterhubs_name(tmp_path):
    (tmp_path / "root/adapters/rs_plugins_art").mkdir(parents=True)
    (tmp_path / "hub/adapters").mkdir(parents=True)
    (tmp_path / "hub/adapters/__init__.py").touch()
    root, hub = tmp_path / "root", tmp_path / "hub"
    installed = {"adapters": "1.3"}
    assert unusual(path=[root, hub], versions=installed) == []  # a bare folder does not shadow a package
    assert [level for level, _, _ in unusual(path=[root])] == ["note"]
    (level, what, _), *_ = unusual(path=[root], versions=installed)
    assert (level, "not AdapterHub's package" in what) == ("problem", True)
    (root / "adapters/__init__.py").touch()
    ((level, what, advice),) = unusual(path=[root, hub], versions=installed)
    assert (level, advice) == ("problem", "delete that file")
    assert "hides the package adapters of AdapterHub" in what


def test_other_sitecustomizes(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/sitecustomize.py").touch()
    (tmp_path / "old/rs_plugins/_site").mkdir(parents=True)
    (tmp_path / "old/rs_plugins/_site/sitecustomize.py").touch()
    found = unusual(path=[tmp_path / "theirs", tmp_path / "old/rs_plugins/_site", site_path()])
    assert [(level, advice) for level, _, advice in found] == [
        ("note", "rs-plugins run runs it first, then ours"),
        ("warning", f"put {site_path()} on PYTHONPATH instead (rs-plugins site-dir)"),
    ]


PROBES = {
    "works": ("__all__ = []", None),
    "raises": ("raise ValueError('too old')", "ValueError: too old"),
    "crashes": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "the process was killed by SIGSEGV"),
    "exits": ("import os\nos._exit(3)", "exit code 3: noise"),
    "hangs": ("import time\ntime.sleep(60)", "it did not finish within 1.5 s"),
}


@pytest.mark.parametrize("host", PROBES)
def test_a_probe_survives_whatever_the_host_does(site, monkeypatch, host):
    source, expected = PROBES[host]
    site.write("fakehost.py", "print('noise')\n" + source)
    site.exporting("fake", ("fakehost", "dumps", "json:dumps"))
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    seen = doctor.Environment().probe("fakehost", timeout=1.5 if host == "hangs" else 60)
    if expected is None:
        assert ["fakehost", "dumps", "placed", ""] in seen["landings"]
    else:
        assert seen == expected


@pytest.mark.parametrize(("versions", "code"), [({}, 0), ({"statsmodels": None}, 0), ({"packaging": None}, 1)])
def test_exit_code_and_output(monkeypatch, versions, code):
    monkeypatch.setattr(doctor, "Environment", lambda: FakeEnvironment(versions))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == code
    assert ("PROBLEM " in result.stdout) is bool(code)
    assert ("1 will not work" if code else "everything that is installed works") in result.stdout
    data = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert data["ok"] is (code == 0)
    assert {"level", "what", "advice"} == set(data["findings"][0])


def test_the_real_environment_is_looked_at():
    env = doctor.Environment()
    assert env.version("torch").partition("+")[0] == __import__("torch").__version__.partition("+")[0]
    assert env.version("no-such-distribution") is None
    assert "pluggy" in env.files("pluggy")
    assert env.locations("json") == [Path(json.__file__)]
    assert env.locations("no_such_module") == []
    assert {plugin.name for plugin in env.registry().plugins()} >= {"core", "art", "torchattacks"}
