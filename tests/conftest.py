"""Every test runs under RS_PLUGINS_STRICT; `site` is a folder of throw-away packages and plugins on the path."""

import importlib
import importlib.metadata
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("unhurried", deadline=None)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("unhurried")
os.environ["RS_PLUGINS_STRICT"] = "1"
# On tensors this small, threads that wait for each other on a busy machine take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _width in ("COLUMNS", "LINES"):  # readline sets them for the processes of pytest-xdist, and tqdm cuts its bars
    os.environ.pop(_width, None)


class Site:
    """Stands in for site-packages."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, source: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def plugin(self, name: str, source: str, *, distribution: str | None = None, version: str = "1.0") -> None:
        """Install a plugin: a module ``<name>_plugin``, and a distribution whose entry point names it."""
        distribution = distribution or f"dist-{name}"
        imports = "from rs_plugins.hookspecs import Component, Export, hookimpl\n"
        self.write(f"{name}_plugin.py", imports + textwrap.dedent(source))
        folder = f"{distribution.replace('-', '_')}-{version}.dist-info"
        self.write(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        self.write(f"{folder}/entry_points.txt", f"[rs_plugins]\n{name} = {name}_plugin\n")

    def exporting(self, name: str, *exports: tuple[str, str, str]) -> None:
        """Install a plugin that exports ``(host, name, target)``."""
        items = ", ".join(f"Export({host!r}, {attribute!r}, {target!r})" for host, attribute, target in exports)
        self.plugin(name, f"@hookimpl\ndef rs_plugins_exports():\n    return [{items}]\n")

    def entry_points(self) -> list[importlib.metadata.EntryPoint]:
        found = importlib.metadata.distributions(path=[str(self.folder)])
        return [point for distribution in found for point in distribution.entry_points]


@pytest.fixture
def run_python(tmp_path, monkeypatch):
    """A function that runs blocks of Python one after the other, in a folder of their own, and returns the names."""
    from rs_plugins.core.global_randomness import global_randomness

    def run(blocks: Iterable[str], where: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)  # some write a folder
        names: dict[str, Any] = {}
        with global_randomness(0):  # they seed nothing, and their networks are small
            for block in blocks:
                exec(compile(block, where, "exec"), names)
        return names

    return run


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None)
        if isinstance(place, str) and Path(place).is_relative_to(folder):
            del sys.modules[name]
