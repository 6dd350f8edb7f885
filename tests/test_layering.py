"""Who may import whom: what each import loads, and that the contracts catch what they forbid."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("rs_plugins", "adapters")
HEAVY = ("torch", "numpy", "scipy", "art", "torchattacks")

# What is imported → what must not be loaded by it.
LIGHT = {
    "rs_plugins": (*HEAVY, "pluggy", "click"),
    "rs_plugins.errors": (*HEAVY, "pluggy"),
    "rs_plugins.hookspecs": HEAVY,
    "rs_plugins.registry": HEAVY,
    "rs_plugins.activation": HEAVY,
    "rs_plugins.import_hook": (*HEAVY, "pluggy"),
    "rs_plugins.pytest_plugin": (*HEAVY, "pytest"),
    "rs_plugins.core_plugin": (*HEAVY, "rs_plugins.core"),
    "rs_plugins.cli": (*HEAVY, "pluggy"),
    "rs_plugins.cli.run": (*HEAVY, "pluggy"),
    "rs_plugins_art.plugin": (*HEAVY, "rs_plugins.core"),
    "rs_plugins_torchattacks.plugin": (*HEAVY, "rs_plugins.core"),
    "rs_plugins.core": ("art", "torchattacks", "pluggy", "click", "rs_plugins.registry"),
    "rs_plugins.core.certification": ("art", "torchattacks", "pluggy", "click", "rs_plugins.registry"),
    "rs_plugins_torchattacks.attacks": ("art", "rs_plugins.registry", "rs_plugins.activation"),
    "rs_plugins_art.classifier": ("torchattacks", "rs_plugins.registry", "rs_plugins.activation"),
}


@pytest.mark.parametrize("module", LIGHT)
def test_what_an_import_loads(module):
    code = f"import sys, {module}; print(*sorted(set({LIGHT[module]!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_activating_loads_nothing_heavy_and_names_come_lazily():
    code = f"""
import sys, rs_plugins
rs_plugins.activate()
from rs_plugins import registry
registry.components(), registry.exports()
assert not set({HEAVY!r}) & set(sys.modules)
assert "SmoothAdvPGD" in dir(rs_plugins)
rs_plugins.GaussianNoise
assert len(dir(rs_plugins)) == len(set(dir(rs_plugins)))
assert "torch" in sys.modules and not {{"art", "torchattacks"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["adapters", "tests", "benchmarks"])
def test_bare_folders_stay_bare(folder):
    """`adapters` is AdapterHub's import name; an `__init__.py` in one of these would shadow somebody's package."""
    assert not (ROOT / folder / "__init__.py").exists()


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
sys.path[:0] = [{str(tree)!r}, {str(tree / "adapters")!r}]
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", no_cache=True))
"""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=600)


def copy_tree(to: Path) -> Path:
    for name in TREES:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


# The file that gets a forbidden line → (the line, the contract that must say so).
VIOLATIONS = {
    "rs_plugins/core/noise.py": ("import art", "core is plain PyTorch and SciPy"),
    "rs_plugins/core/geometry.py": ("from rs_plugins import registry", "core is plain PyTorch and SciPy"),
    "rs_plugins/core/attacks/__init__.py": ("import rs_plugins_art", "core is plain PyTorch and SciPy"),
    "rs_plugins/registry.py": ("import torch", "the plugin host is light"),
    "rs_plugins/import_hook.py": ("import numpy", "the plugin host is light"),
    "rs_plugins/core_plugin.py": ("from rs_plugins.core import noise", "the plugin host is light"),
    "rs_plugins/cli/run.py": ("import torch", "the command line is light"),
    "adapters/rs_plugins_art/plugin.py": ("import art", "the plugin host is light"),
    "adapters/rs_plugins_torchattacks/plugin.py": (
        "from rs_plugins_torchattacks import attacks",
        "the plugin host is light",
    ),
    "adapters/rs_plugins_art/__init__.py": ("import rs_plugins_torchattacks", "do not know each other"),
    "adapters/rs_plugins_torchattacks/__init__.py": (
        "import rs_plugins.registry",
        "know core, the hook specifications",
    ),
    "adapters/rs_plugins_torchattacks/attacks.py": ("import art", "its own host only (torchattacks)"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("tree"))


def test_the_contracts_hold(tree):
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("file", VIOLATIONS)
def test_a_planted_violation_is_caught(tree, file):
    line, contract = VIOLATIONS[file]
    path = tree / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try:
        done = lint_imports(tree)
    finally:
        path.write_text(before)
    assert done.returncode == 1, done.stdout
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(contract in text for text in broken), done.stdout
