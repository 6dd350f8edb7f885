"""The wheel holds what it must and no more, and `adapters` stays AdapterHub's."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import rs_plugins

ROOT = Path(__file__).parent.parent
PACKAGES = {"rs_plugins": ROOT, "rs_plugins_art": ROOT / "adapters", "rs_plugins_torchattacks": ROOT / "adapters"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy to build from, so that nothing is left in the working tree; it has what could get in by mistake."""
    tree = tmp_path_factory.mktemp("tree")
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", "cache")
    for name in ("rs_plugins", "adapters", "tests", "benchmarks", "docs", ".ci", ".github"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=left)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for stray in (
        "tests/__pycache__/stray.cpython-310.pyc",
        "benchmarks/cache/weights.bin",
        "dist/old.whl",
        "run/model.json",
    ):
        (tree / stray).parent.mkdir(exist_ok=True)
        (tree / stray).write_text("")
    return tree


def build(tree, kind, ending):
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(tree / kind)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / kind).glob(f"*{ending}")
    return built


@pytest.fixture(scope="module")
def wheel(tree):
    return build(tree, "wheel", ".whl")


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


def test_the_sdist_is_the_repository(tree):
    """With all that its tests read, and nothing that a run leaves behind."""
    with tarfile.open(build(tree, "sdist", ".tar.gz")) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in packed if ".egg-info/" in name or name in ("PKG-INFO", "setup.cfg")}
    folders = ("rs_plugins", "adapters", "tests", "benchmarks", "docs", ".ci", ".github")
    kept = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT) for path in kept if not {"__pycache__", "cache"} & set(path.parts)}
    files = {path.as_posix() for path in wanted if ".egg-info" not in path.as_posix()}
    assert packed - made - files <= {
        *("ARCHITECTURE.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"),
        *("Makefile", "README.md", "mkdocs.yml", "pyproject.toml"),
    }
    assert files <= packed
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "README.md", "mkdocs.yml"} <= packed


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
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=600)
    assert (done.stdout.strip(), done.stderr) == ("True True 1", "")


@pytest.mark.parametrize("cwd", ["/", str(ROOT)])
@pytest.mark.parametrize("form", ["plain", "run"])
def test_adapters_is_the_installed_package_of_that_name(site, cwd, form):
    """With AdapterHub's package installed, here a stand-in, `import adapters` is theirs, in our repository too."""
    site.write("adapters/__init__.py", "whose = 'AdapterHub'")
    start = [str(Path(sys.executable).parent / "rs-plugins"), "run", "python"] if form == "run" else [sys.executable]
    code = "import adapters, rs_plugins, rs_plugins_art; print(adapters.whose)"
    environ = os.environ | {"PYTHONPATH": str(site.folder)}
    done = subprocess.run([*start, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "AdapterHub", done.stderr


def test_the_version_is_the_same_everywhere():
    """And the changelog has a chapter of it, with a date."""
    version = rs_plugins.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    chapters = re.findall(r"^## \[([^]]+)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert chapters[0] == ("Unreleased", "")
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", dict(chapters)[version])
