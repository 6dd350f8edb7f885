"""`rs-plugins list`: plugins, components, where each export landed, what was left out and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rs_plugins.cli import listing, main
from rs_plugins.cli.run import site_path
from rs_plugins.registry import Registry


@pytest.fixture
def look(site, monkeypatch):
    """Run `rs-plugins list` with the plugins of `site` instead of the installed ones."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*words):
        monkeypatch.setattr(listing, "Registry", lambda **options: Registry(site.entry_points(), **options))
        return CliRunner().invoke(main, ["list", *words])

    return run


def test_everything_in_place(site, look):
    site.write("fakehost.py", "print('noise from the host')")
    site.plugin(
        "fake",
        """
        @hookimpl
        def rs_plugins_components(): return [Component("attack", "dump", "json:dumps")]
        @hookimpl
        def rs_plugins_exports():
            return [Export("fakehost", "dumps", "json:dumps"), Export("nowhere", "X", "json:dumps")]
        """,
        version="2.5",
    )
    result = look()
    assert result.exit_code == 0
    assert result.stdout == (
        "fake  (dist-fake 2.5, fake_plugin)\n"
        "  attack     dump  →  json:dumps\n"
        "  export     fakehost.dumps  placed\n"
        "  export     nowhere.X  the host is not installed\n"
        "\n"
        "Python processes started from here are not activated: use `rs-plugins run` or `rs-plugins site-dir`.\n"
    )
    assert "importing fakehost to see where the names land (--no-import skips this)" in result.stderr
    assert not hasattr(sys.modules["fakehost"], "dumps")  # deactivated again


TROUBLES = {
    "a clash": ("dumps = 'theirs'", "json:dumps", "kept", "fakehost has a dumps of its own, which stays", 1),
    "a class that is not there": ("", "json:nothing", "failed", "AttributeError: module 'json' has no", 1),
    "a host that cannot be imported": ("1 / 0", "json:dumps", "broken", "ZeroDivisionError: division by zero", 1),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_exports_that_did_not_land(site, look, trouble):
    source, target, state, detail, code = TROUBLES[trouble]
    site.write("fakehost.py", source)
    site.exporting("fake", ("fakehost", "dumps", target))
    result = look()
    assert result.exit_code == code
    assert detail in result.stdout
    result = look("--json")
    data = json.loads(result.stdout)
    assert data["ok"] is (code == 0)
    assert data["exports"][0]["state"] == state
    assert detail in data["exports"][0]["detail"]


def test_a_part_of_the_host_that_nobody_imports(site, look):
    site.write("fakehost/__init__.py", "")
    site.write("fakehost/late.py", "")
    site.exporting("fake", ("fakehost.late", "dumps", "json:dumps"))
    result = look()
    assert result.exit_code == 0
    assert "fakehost.late.dumps  not placed: this part of the host is not imported by the host itself" in result.stdout


def test_a_part_that_the_host_has_not(site, look):
    site.write("fakehost/__init__.py", "import fakehost.one")
    site.write("fakehost/one.py", "")
    site.exporting("fake", ("fakehost.two", "X", "json:dumps"), ("fakehost.one.deep", "X", "json:dumps"))
    result = look()
    assert result.exit_code == 1
    assert "  export     fakehost.two.X  not placed: fakehost has no module two\n" in result.stdout
    assert "  export     fakehost.one.deep.X  not placed: fakehost.one has no module deep\n" in result.stdout


def test_a_misspelt_name_to_disable(site, look, monkeypatch):
    site.plugin("good", "@hookimpl\ndef rs_plugins_components(): return []")
    monkeypatch.setenv("RS_PLUGINS_DISABLE", "god,good")
    result = look()
    assert result.exit_code == 0
    assert "warning: RS_PLUGINS_DISABLE names god, not installed here\n" in result.stdout
    assert json.loads(look("--json").stdout)["unknown"] == ["god"]


def test_all_that_is_broken_is_shown_also_under_strict(site, look):
    assert os.environ["RS_PLUGINS_STRICT"] == "1"
    site.plugin("one", "import no_such_module_1")
    site.plugin("two", "import no_such_module_2")
    result = look("--no-import")
    assert result.exit_code == 1
    assert (
        "one  (dist-one 1.0, one_plugin)\n  QUARANTINED: ModuleNotFoundError: No module named 'no_such" in result.stdout
    )
    assert "two  (dist-two 1.0, two_plugin)\n  QUARANTINED: ModuleNotFoundError" in result.stdout
    assert json.loads(look("--json", "--no-import").stdout)["ok"] is False


def test_a_disabled_plugin(site, look, monkeypatch):
    site.plugin("bad", "import no_such_module_1")
    monkeypatch.setenv("RS_PLUGINS_DISABLE", "bad")
    result = look()
    assert result.exit_code == 0
    assert "  disabled by RS_PLUGINS_DISABLE\n" in result.stdout


def test_no_import_imports_no_host(site, look):
    site.write("fakehost.py", "raise AssertionError('imported')")
    site.exporting("fake", ("fakehost", "dumps", "json:dumps"))
    result = look("--no-import")
    assert result.exit_code == 0
    assert "fakehost.dumps  not looked at" in result.stdout
    assert "fakehost" not in sys.modules


def test_it_says_whether_the_environment_is_activated(look, monkeypatch):
    assert json.loads(look("--json").stdout)["on_pythonpath"] is False
    monkeypatch.setenv("PYTHONPATH", site_path())
    assert json.loads(look("--json").stdout)["on_pythonpath"] is True
    assert "Every Python process started from here is activated" in look().stdout


def test_the_real_thing():
    command = [str(Path(sys.executable).parent / "rs-plugins"), "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    data = json.loads(done.stdout)
    ours = {f"{export['host']}.{export['name']}": export["state"] for export in data["exports"]}
    assert ours == dict.fromkeys(
        [
            *(
                f"art.estimators.{host}.{name}"
                for host in ("classification", "certification", "certification.randomized_smoothing")
                for name in ("SmoothedClassifier", "SmoothedBlackBox", "CertifyingAdapterClassifier")
            ),
            *(
                f"art.estimators.{host}.BoundsClassifier"
                for host in ("classification", "certification", "certification.interval")
            ),
            *(f"art.attacks.evasion.SmoothAdv{kind}" for kind in ("PGD", "LinfPGD", "DDN")),
            *(
                f"art.defences.trainer.{method}Trainer"
                for method in ("Consistency", "Gaussian", "Macer", "SAT", "SmoothAdv", "SmoothMix", "Stability", "Gls")
            ),
            *(f"torchattacks.SmoothAdv{kind}" for kind in ("PGD", "LinfPGD", "DDN")),
        ],
        "placed",
    )
    assert done.returncode == 0
