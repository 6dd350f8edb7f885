"""``rs-plugins doctor``: what is installed, what does not go together, which known traps are here, and what to do."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

import click

from rs_plugins.cli.run import site_path
from rs_plugins.registry import DISABLE, OWN, STRICT, Plugin, Registry

_ART = "adversarial-robustness-toolbox"
# distribution → (import name, our extra, the version that our tests run with)
_HOSTS = {_ART: ("art", "art", "1.20.1"), "torchattacks": ("torchattacks", "torchattacks", "3.5.1")}
_BASE = ("torch", "numpy", "scipy", "pluggy", "click", "tqdm")
_SIGNS = {"ok": "ok      ", "note": "note    ", "warning": "warning ", "problem": "PROBLEM "}

# Run in a process of its own: a host that crashes or hangs at import is then a finding, and not our end.
_PROBE = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
out, sys.stdout = sys.stdout, sys.stderr
from rs_plugins.activation import Activation
from rs_plugins.registry import Registry
activation = Activation(Registry(strict=False))
with activation.activated():
    module = importlib.import_module(sys.argv[1])
    landings = [(l.export.host, l.export.name, l.state, l.detail) for l in activation.landings()]
cuda = module.cuda.is_available() if sys.argv[1] == "torch" else None
json.dump({"landings": landings, "cuda": cuda}, out)
"""


# The same with what third-party plugins offer by name, which is imported at use only.
_LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
out, sys.stdout = sys.stdout, sys.stderr
from rs_plugins.registry import FAILURES, describe, load_target
failed = {}
for target in sys.argv[1:]:
    try:
        load_target(target)
    except FAILURES as error:
        failed[target] = describe(error)
json.dump(failed, out)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Only a *problem* means that something will not work."""

    level: Literal["ok", "note", "warning", "problem"]
    what: str
    advice: str = ""


class Environment:
    """What the checks look at; tests put something else in its place."""

    environ: dict[str, str]
    path: list[str]

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self.path = list(sys.path)

    def version(self, distribution: str) -> str | None:
        """Return the installed version, or None."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def files(self, distribution: str) -> set[str]:
        """Return the top-level names that a distribution installed."""
        return {file.parts[0] for file in importlib.metadata.files(distribution) or ()}

    def locations(self, module: str) -> list[Path]:
        """Return what ``import module`` would find: one file of a package, or the folders of a namespace."""
        spec = PathFinder.find_spec(module, self.path)
        if spec is None:
            return []
        return (
            [Path(spec.origin)] if spec.origin else [Path(folder) for folder in spec.submodule_search_locations or ()]
        )

    def registry(self) -> Registry:
        """Return the plugins, the broken ones included."""
        return Registry(strict=False)

    def probe(self, module: str, timeout: float = 180) -> dict[str, Any] | str:
        """Import a module in a process of its own, with the plugins activated; say what it saw or what went wrong."""
        return self._in_a_process(_PROBE, module, timeout=timeout)

    def load(self, targets: Sequence[str], timeout: float = 180) -> dict[str, Any] | str:
        """Load targets in a process of its own; say which fail, and why, or what ended the process."""
        return self._in_a_process(_LOAD, *targets, timeout=timeout)

    def _in_a_process(self, code: str, *words: str, timeout: float) -> dict[str, Any] | str:
        environ = {name: value for name, value in self.environ.items() if name != STRICT}
        command = [sys.executable, "-c", code, *words]
        try:
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return f"it did not finish within {timeout:g} s"
        if done.returncode < 0:
            return f"the process was killed by {signal.Signals(-done.returncode).name}"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]  # of a traceback, this is the exception
            return ": ".join(last if done.returncode == 1 and last else [f"exit code {done.returncode}", *last])
        seen: dict[str, Any] = json.loads(done.stdout)
        return seen


_Findings = Iterator[Finding]


def check_python(env: Environment) -> _Findings:
    """The interpreter and the platform."""
    yield Finding("ok", f"python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")
    if os.name != "posix":
        yield Finding("warning", "rs-plugins run has never been tried on this platform", "use rs_plugins.activate()")


def check_base(env: Environment) -> _Findings:
    """What every installation needs."""
    for name in _BASE:
        version = env.version(name)
        if version is None:
            yield Finding("problem", f"{name} is not installed", "pip install --force-reinstall rs-plugins")
        else:
            yield Finding("ok", f"{name} {version}")


def check_torch(env: Environment) -> _Findings:
    """That torch can be imported, and whether it sees a GPU."""
    seen = env.probe("torch")
    if isinstance(seen, str):
        yield Finding("problem", f"torch cannot be imported: {seen}", "reinstall torch: https://pytorch.org")
    elif seen["cuda"]:
        yield Finding("ok", "torch sees a CUDA device")
    else:
        yield Finding("note", "torch sees no CUDA device", "everything runs on the CPU; keep n and samples small")


def check_plugins(env: Environment) -> _Findings:
    """That every plugin could be loaded."""
    for plugin in env.registry().plugins():
        if plugin.status == "quarantined":
            yield Finding(
                "problem",
                f"{plugin} is left out: {plugin.cause}",
                f"update or uninstall {plugin.distribution}, or set {DISABLE}={plugin.name}",
            )
        elif plugin.status == "disabled":
            yield Finding("note", f"{plugin} is disabled", f"unset {DISABLE} to have it back")
        else:
            yield Finding("ok", str(plugin))
            yield from _load_components(env, plugin)


def _load_components(env: Environment, plugin: Plugin) -> _Findings:
    """What a third-party plugin offers by name and cannot be imported; ours are tested."""
    if plugin.distribution == OWN or not plugin.components:
        return
    advice = f"update or uninstall {plugin.distribution}"
    failed = env.load(sorted({component.target for component in plugin.components}))
    if isinstance(failed, str):
        yield Finding("problem", f"{plugin}: loading what it offers fails: {failed}", advice)
        return
    for component in plugin.components:
        if component.target in failed:
            what = f"{component.kind} {component.name!r} from {component.target}: {failed[component.target]}"
            yield Finding("problem", f"{plugin}: cannot load {what}", advice)


def check_hosts(env: Environment) -> _Findings:
    """Each host's version, and that it can be imported with our names on it."""
    for distribution, (module, extra, tested) in _HOSTS.items():
        version = env.version(distribution)
        if version is None:
            yield Finding(
                "note", f"{distribution} is not installed", f"if you need it: pip install 'rs-plugins[{extra}]'"
            )
            continue
        if version == tested:
            yield Finding("ok", f"{distribution} {version}")
        else:
            advice = f"if something fails: pip install {distribution}=={tested}"
            yield Finding("warning", f"{distribution} {version}: tested is {tested} only", advice)
        yield from _judge_probe(distribution, module, env.probe(module))


def _judge_probe(distribution: str, module: str, seen: dict[str, Any] | str) -> _Findings:
    if isinstance(seen, str):
        yield Finding("problem", f"import {module} fails: {seen}", f"repair {distribution}; see the notes below")
        return
    for host, name, state, detail in seen["landings"]:
        if host.partition(".")[0] != module:
            continue
        if state == "failed":
            yield Finding(
                "problem",
                f"{host}.{name} is missing: {detail}",
                "`rs-plugins list` names the plugin: update it, or its host",
            )
        elif state == "kept":
            yield Finding("warning", f"{host}.{name} is not ours: {detail}", "import ours by its own module")
        elif state == "nowhere":
            yield Finding("problem", f"{host}.{name} is missing: {detail}", "`rs-plugins list` names the plugin")
        else:
            yield Finding("ok", f"{host}.{name}")


def check_clamp(env: Environment) -> _Findings:
    """Torch from 2.15 gives clamp gradient 0 at the bounds themselves."""
    torch = env.version("torch")
    if torch and env.version("torchattacks") and _at_least(torch, 2, 15):
        yield Finding(
            "warning",
            f"torch {torch}: torchattacks' PGDRS and PGDRSL2 never move a pixel that is exactly 0 or 1",
            "use SmoothAdvPGD, or torch < 2.15, when comparing",
        )


def check_undeclared(env: Environment) -> _Findings:
    """What ART imports without declaring it."""
    if env.version(_ART) is None:
        return
    needs: list[tuple[str, Literal["note", "problem"], str]] = [
        ("packaging", "problem", "import art fails without it"),
        (
            "statsmodels",
            "note",
            "ART's own PyTorchRandomizedSmoothing needs it to certify; our SmoothedClassifier does not",
        ),
        ("multiprocess", "note", "ART's AutoAttack needs it"),
        ("tensorboardX", "note", "ART's summary_writer needs it"),
    ]
    for name, level, why in needs:
        if env.version(name) is None:
            yield Finding(level, f"{name} is not installed: {why}", f"pip install {name}")


def check_numpy(env: Environment) -> _Findings:
    """NumPy 2 keeps float64 where NumPy 1 did not."""
    numpy = env.version("numpy")
    if numpy and env.version(_ART) and _at_least(numpy, 2, 0):
        yield Finding(
            "note",
            f"numpy {numpy}: ART's HopSkipJump and BoundaryAttack hand float64 images to its classifiers, which fail",
            "our SmoothedClassifier casts them",
        )


def check_robustbench(env: Environment) -> _Findings:
    """The torchattacks wheel brings a top-level ``robustbench`` of its own."""
    if env.version("torchattacks") is None or "robustbench" not in env.files("torchattacks"):
        return
    real = env.version("robustbench")
    if real is None:
        yield Finding(
            "note",
            "import robustbench gives an old copy that the torchattacks wheel brings along",
            "install RobustBench itself into another environment",
        )
    else:
        yield Finding(
            "warning",
            f"robustbench {real} and the torchattacks wheel have overwritten each other's files",
            "pip install --force-reinstall --no-deps robustbench, or one environment for each",
        )


def check_requests(env: Environment) -> _Findings:
    """Torchattacks pins an old requests, which it never imports."""
    requests = env.version("requests")
    if requests and env.version("torchattacks") and not _at_least(requests, 2, 32):
        yield Finding(
            "note",
            f"requests {requests} is old, because torchattacks pins it without ever importing it",
            "if another package needs a newer one: pip install --no-deps torchattacks; pip install -U requests",
        )


def check_adapters(env: Environment) -> _Findings:
    """``adapters`` is AdapterHub's name; ours is a folder of source code that must not hide it."""
    found = env.locations("adapters")
    ours = [path for path in found if (path.parent if path.suffix else path).joinpath("rs_plugins_art").is_dir()]
    if not ours:
        return
    if ours[0].suffix:
        yield Finding("problem", f"{ours[0]} hides the package adapters of AdapterHub", "delete that file")
    elif env.version("adapters"):
        yield Finding("problem", f"import adapters finds {ours[0]}, not AdapterHub's package", "reinstall adapters")
    else:
        yield Finding(
            "note", f"import adapters finds the source folder {ours[0]}", "harmless; AdapterHub is not installed"
        )


def check_sitecustomize(env: Environment) -> _Findings:
    """Whether this process tree is activated, and by which installation; other ``sitecustomize`` modules."""
    ours = Path(site_path())
    entries = [Path(entry) for entry in env.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if any(_same(entry, ours) for entry in entries):
        yield Finding("note", "PYTHONPATH holds our site folder", "every Python process started from here is activated")
    for entry in dict.fromkeys(Path(entry) for entry in env.path):
        if _same(entry, ours) or not (entry / "sitecustomize.py").is_file():
            continue
        if entry.parts[-2:] == ours.parts[-2:]:
            advice = f"put {ours} on PYTHONPATH instead (rs-plugins site-dir)"
            yield Finding("warning", f"{entry} on the path belongs to another installation of rs-plugins", advice)
        else:
            yield Finding("note", f"there is a {entry / 'sitecustomize.py'}", "rs-plugins run runs it first, then ours")


CHECKS: tuple[Callable[[Environment], _Findings], ...] = (
    check_python,
    check_base,
    check_torch,
    check_plugins,
    check_hosts,
    check_clamp,
    check_undeclared,
    check_numpy,
    check_robustbench,
    check_requests,
    check_adapters,
    check_sitecustomize,
)


def examine(env: Environment) -> list[Finding]:
    """Make every check."""
    return [finding for check in CHECKS for finding in check(env)]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check versions, plugins and hosts, and look for the traps that are known, each with what to do about it.

    Exits 1 if something will not work; notes and warnings do not count.
    """
    click.echo("importing torch and the hosts, each in a process of its own", err=True)
    findings = examine(Environment())
    problems = [finding for finding in findings if finding.level == "problem"]
    if as_json:
        click.echo(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(
                _SIGNS[finding.level] + finding.what + (f"\n        → {finding.advice}" if finding.advice else "")
            )
        click.echo(f"\n{len(problems)} will not work" if problems else "\neverything that is installed works")
    sys.exit(1 if problems else 0)


def _at_least(version: str, *wanted: int) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", version)[: len(wanted)]) >= wanted


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
