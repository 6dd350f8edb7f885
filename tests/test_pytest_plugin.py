"""`pytest -p rs_plugins.pytest_plugin`: a test suite finds our names, its conftest.py included."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

TEST = "import fakehost\ndef test_it():\n    assert fakehost.dumps and 'dumps' in fakehost.__all__\n"
ASKED = ["-p", "rs_plugins.pytest_plugin"]


@pytest.fixture
def suite(site, tmp_path):
    """A third party's tests, whose conftest.py looks a name up while it is imported."""
    site.write("fakehost.py", "__all__ = []")
    site.exporting("fake", ("fakehost", "dumps", "json:dumps"))
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "conftest.py").write_text("from fakehost import dumps\n")
    (folder / "test_theirs.py").write_text(TEST)
    return folder


def run_pytest(suite, *words, **extra):
    environ = os.environ | {"PYTHONPATH": str(suite.parent / "site"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | extra
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(words, cwd=suite, env=environ, capture_output=True, text=True, timeout=600)


def test_without_the_plugin_the_suite_fails_where_it_looks(suite):
    done = run_pytest(suite)
    assert done.returncode == 4
    assert "cannot import name 'dumps' from 'fakehost'" in done.stdout + done.stderr


def test_p_on_the_command_line(suite):
    done = run_pytest(suite, *ASKED, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 passed" in done.stdout


def test_pytest_plugins_in_the_environment(suite):
    done = run_pytest(suite, PYTEST_PLUGINS="rs_plugins.pytest_plugin")
    assert done.returncode == 0, done.stdout


def test_addopts(suite):
    (suite / "pytest.ini").write_text("[pytest]\naddopts = -p rs_plugins.pytest_plugin\n")
    assert run_pytest(suite).returncode == 0


def test_pytest_plugins_in_a_conftest_is_in_time_for_the_tests(suite):
    (suite / "conftest.py").write_text("pytest_plugins = ['rs_plugins.pytest_plugin']\n")
    assert run_pytest(suite).returncode == 0


def test_a_broken_plugin_is_one_warning_and_under_strict_the_end(suite, site):
    site.plugin("bad", "import no_such_module_x")
    loose = run_pytest(suite, *ASKED, RS_PLUGINS_STRICT="0")
    assert loose.returncode == 0
    assert "plugin 'bad' (dist-bad 1.0) is left out: ModuleNotFoundError" in loose.stdout + loose.stderr
    strict = run_pytest(suite, *ASKED, RS_PLUGINS_STRICT="1")
    assert strict.returncode != 0
    assert "PluginError: plugin 'bad' (dist-bad 1.0) is left out" in strict.stderr


def test_the_names_go_when_the_run_is_over(suite):
    code = f"""
import pytest, sys
assert pytest.main({["-q", "-p", "no:cacheprovider", *ASKED]}) == 0
import fakehost
assert not hasattr(fakehost, "dumps") and fakehost.__all__ == []
assert "ImportWatcher" not in [type(finder).__name__ for finder in sys.meta_path]
"""
    environ = os.environ | {"PYTHONPATH": str(suite.parent / "site"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=suite, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_not_loaded_into_every_test_run_of_the_environment():
    values = [point.value for point in importlib.metadata.entry_points(group="pytest11")]
    assert [value for value in values if value.startswith("rs_plugins")] == []
