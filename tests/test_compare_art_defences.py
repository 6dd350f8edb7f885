"""The comparison with ART's defences: its tables, what is kept, and a defence that does not run."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ROWS = {
    "one": {"clean": 90.0, "ACR": 0.5, "certified at 0.25": 80.0, "training seconds": 2.0, "SmoothAdv": "Error: no"},
    "two": {"clean": 91.0, "ACR": 0.4, "certified at 0.25": 80.0, "training seconds": 1.0, "SmoothAdv": 60.0},
    "three": {"error": "KeyError: 'x'"},
}
MADE = {"test_images": 297, "attacked": 100, "auto_attacked": 30}


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare_art_defences")


def test_the_best_are_bold_and_what_did_not_run_is_named(compare):
    found = compare.table(ROWS, ("clean", "SmoothAdv", "certified at 0.25", "ACR", "training seconds")).splitlines()
    assert found[0] == "| defence | clean | SmoothAdv | certified at 0.25 | ACR | training seconds |"
    assert found[2:] == [
        "| one | 90.0 | – | **80.0** | **0.500** | 2.0 |",
        "| two | **91.0** | **60.0** | **80.0** | 0.400 | **1.0** |",
    ]
    text = compare.markdown(MADE, ROWS)
    assert "* three: KeyError: 'x'" in text
    assert "–: Error: no" in text
    assert "2.3 points of clean" in text
    assert compare.error_of(100) == "4.0 points"


def test_what_is_kept_is_not_done_again_and_what_failed_is(compare, monkeypatch, tmp_path):
    answers = iter([{"error": "RuntimeError: no"}, {"clean": 90.0}, {"clean": 10.0}])
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, f"words\n{json.dumps(next(answers))}\n", "")

    monkeypatch.setattr(compare.subprocess, "run", run)
    how = {"data": "digits", "seconds": None, "n": 10}
    found = [compare.run("it/s", how, tmp_path) for _ in range(3)]
    assert found == [{"error": "RuntimeError: no"}, {"clean": 90.0}, {"clean": 90.0}]
    assert calls[0][2:] == ["--data=digits", "--n=10", "--one", "it/s"]
    monkeypatch.setattr(
        compare.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, "", "one\nKilled\n")
    )
    assert compare.run("other", how, tmp_path) == {"error": "Killed"}


def test_a_plugin_that_cannot_be_loaded_is_one_row(compare, site, monkeypatch):
    """Its trainer is a name among the others; what is wrong with it shows when it is its turn."""
    from rs_plugins import registry

    monkeypatch.setattr(registry, "_DEFAULT", registry.Registry())
    site.write(
        "theirs.py",
        "from rs_plugins.hookspecs import Component, hookimpl\n"
        "@hookimpl\n"
        "def rs_plugins_components():\n"
        '    return [Component("trainer", name, f"objectives:{name}") for name in ("lost", "eta")]\n',
    )
    site.write("objectives.py", "def eta(eta):\n    pass\n")
    site.write("theirs-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    site.write("theirs-1.0.dist-info/entry_points.txt", "[rs_plugins]\ntheirs = theirs\n")
    defences = importlib.import_module("defences")
    known = defences.defences()
    assert {"plugin lost", "plugin eta", "smoothadv", "ART none"} <= set(known)
    with pytest.raises(Exception, match="'lost'"):
        known["plugin lost"](None)
    with pytest.raises(TypeError, match="eta: expected an objective that takes sigma, or eps; it takes eta"):
        known["plugin eta"](None)


@pytest.mark.slow
@pytest.mark.skipif(np.__version__.startswith("1."), reason="ART's feature squeezing fails with NumPy 2 alone")
def test_some_defences_are_trained_and_examined(tmp_path):
    names = ["gaussian", "ART FeatureSqueezing", "smoothadv, ensemble of 3"]
    how = ["--epochs", "1", "--train-images", "64", "--test-images", "8", "--attacked", "2", "--auto-attacked", "1"]
    command = [
        sys.executable,
        BENCHMARKS / "compare_art_defences.py",
        "--defences",
        ";".join(names),
        *how,
        "--n",
        "200",
    ]
    done = subprocess.run(
        [*command, "--folder", tmp_path / "kept", "--out", tmp_path / "table", "--jobs", "2"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    written = json.loads((tmp_path / "table.json").read_text())
    assert list(written["rows"]) == names
    assert (written["made"]["epochs"], written["made"]["n"]) == (1, 200)
    for name in (names[0], names[2]):
        row = written["rows"][name]
        assert all(
            isinstance(row[column], float) for column in ("clean", "AutoAttack l2", "SmoothAdv", "ACR", "memory")
        )
    assert done.stdout == (tmp_path / "table.md").read_text() + "\n"
    assert "* ART FeatureSqueezing: " in done.stdout
    kept = {path.stem for path in (tmp_path / "kept").rglob("*.json")}
    assert kept == {names[0], names[2]}


def test_the_table_of_the_readme_is_that_of_the_results(compare):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = json.loads((BENCHMARKS / "results" / "compare_art_defences_digits.json").read_text())
    shown = re.search(r"^\| defence \|.*?\n\n", text, flags=re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert shown[0].strip() == compare.table(written["rows"], compare.SHORT)
    assert written["made"]["date"] in text
