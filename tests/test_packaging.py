"""The wheel holds what it must and no more, and `adapters` stays AdapterHub's."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"rs_plugins": ROOT, "rs_plugins_art": ROOT / "adapters", "rs_plugins_torchattacks": ROOT / "adapters"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that nothing is left in the working tree; it has what could get in by mistake."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("rs_plugins", "adapters", "tests", "benchmarks", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


def test_top_level(names):
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == 4


def test_every_source_file_and_nothing_else(names):
    sources = {
        path.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for path in (root / package).rglob("*")
        if path.suffix in (".html", ".json", ".py") or path.name == "py.typed"
    }
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == sources
    assert "rs_plugins/_site/sitecustomize.py" in packed
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_metadata(wheel, names):
    (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    read = zipfile.ZipFile(wheel).read
    points = read(f"{folder}/entry_points.txt").decode()
    assert "rs-plugins = rs_plugins.cli:main" in points
    for line in (
        "art = rs_plugins_art.plugin",
        "core = rs_plugins.core_plugin",
        "torchattacks = rs_plugins_torchattacks",
    ):
        assert line in points
    assert "pytest11" not in points
    needed = [line for line in read(f"{folder}/METADATA").decode().splitlines() if line.startswith("Requires-Dist:")]
    base = [line for line in needed if "extra ==" not in line]
    assert not [line for line in base if "torchattacks" in line or "adversarial" in line]
    assert [line for line in needed if "packaging" in line and "'art'" in line.replace('"', "'")]


def test_the_unpacked_wheel_runs_by_itself(wheel, tmp_path):
    """From a folder of its own, before the editable install on the path: activation works from the wheel's files."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "lib")
    (tmp_path / "lib/fakehost.py").write_text("")
    code = """
import sys, fakehost, rs_plugins
from rs_plugins.cli.run import site_path
watching = [type(finder).__name__ for finder in sys.meta_path].count("ImportWatcher")
print(rs_plugins.__file__.startswith(sys.argv[1]), site_path().startswith(sys.argv[1]), watching)
"""
    start = "from rs_plugins.cli import main; main()"
    command = [sys.executable, "-c", start, "run", "-c", code, str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("True True 1", "")


@pytest.mark.parametrize("cwd", ["/", str(ROOT)])
@pytest.mark.parametrize("form", ["plain", "run"])
def test_adapters_is_the_installed_package_of_that_name(site, cwd, form):
    """With AdapterHub's package installed, here a stand-in, `import adapters` is theirs, in our repository too."""
    site.write("adapters/__init__.py", "whose = 'AdapterHub'")
    start = [str(Path(sys.executable).parent / "rs-plugins"), "run", "python"] if form == "run" else [sys.executable]
    code = "import adapters, rs_plugins, rs_plugins_art; print(adapters.whose)"
    environ = os.environ | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run([*start, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "AdapterHub", done.stderr
