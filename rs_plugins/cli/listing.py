"""``rs-plugins list``: the plugins, what they offer, where each name landed, and what was left out and why."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from rs_plugins.activation import Activation, Landing
from rs_plugins.cli.run import site_path
from rs_plugins.errors import PluginWarning
from rs_plugins.registry import DISABLE, FAILURES, Registry, describe

_STATES = {
    "placed": "placed",
    "waiting": "not placed: this part of the host is not imported by the host itself; placed when it is",
    "kept": "not placed: {detail}",
    "nowhere": "not placed: {detail}",
    "failed": "failed: {detail}",
    "absent": "the host is not installed",
    "broken": "the host cannot be imported: {detail}",
    "unknown": "not looked at",
}


@dataclass
class Listing:
    """What there is, as plain data; ``ok`` is false if anything that should work does not."""

    on_pythonpath: bool
    unknown: list[str] = field(default_factory=list)
    plugins: list[dict[str, Any]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was quarantined, and each export is placed, or waits for a host that may come."""
        return not any(plugin["status"] == "quarantined" for plugin in self.plugins) and not any(
            export["state"] in ("failed", "broken", "kept", "nowhere") for export in self.exports
        )


@click.command("list")
@click.option("--no-import", is_flag=True, help="Do not import the hosts, so do not see where the names land.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(no_import: bool, as_json: bool) -> None:
    """Show every plugin, what it offers, where each name landed in its host, and what was left out and why.

    Exits 1 if a plugin was quarantined, or a name could not be placed: not if its host is not installed.
    """
    listing = gather(import_hosts=not no_import)
    if as_json:
        click.echo(json.dumps({**asdict(listing), "ok": listing.ok}, indent=2))
    else:
        click.echo("\n".join(_lines(listing)))
    sys.exit(0 if listing.ok else 1)


def gather(*, import_hosts: bool, source: Registry | None = None) -> Listing:
    """Load the plugins and, if asked, import every installed host to see what lands."""
    source = source or Registry(strict=False)  # show all that is broken, not the first only
    with _quietly():
        plugins = source.plugins()
        landings = _land(source) if import_hosts else []
    on_pythonpath = site_path() in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    listing = Listing(on_pythonpath, unknown=list(source.unknown()))
    for plugin in plugins:
        listing.plugins.append(asdict(plugin))
        for export in plugin.exports:
            state, detail = next(
                ((state, detail) for landing, state, detail in landings if landing.export == export), ("unknown", "")
            )
            listing.exports.append(
                {
                    "plugin": plugin.name,
                    "distribution": plugin.distribution,
                    **asdict(export),
                    "state": state,
                    "detail": detail,
                }
            )
    return listing


def _land(source: Registry) -> list[tuple[Landing, str, str]]:
    """Activate, import the hosts, look, and deactivate."""
    roots = {export.host.partition(".")[0] for export in source.exports()}
    installed = sorted(root for root in roots if find_spec(root) is not None)
    if installed:
        click.echo(f"importing {', '.join(installed)} to see where the names land (--no-import skips this)", err=True)
    activation = Activation(source)
    with activation.activated():
        broken = {root: cause for root in installed if (cause := _import(root))}
        return [_judge(landing, installed, broken) for landing in activation.landings()]


def _import(root: str) -> str:
    """Import a host; say what went wrong, if anything."""
    try:
        import_module(root)
    except FAILURES as error:
        return describe(error)
    return ""


def _judge(landing: Landing, installed: list[str], broken: dict[str, str]) -> tuple[Landing, str, str]:
    root = landing.export.host.partition(".")[0]
    if root not in installed:
        return landing, "absent", ""
    if root in broken:
        return landing, "broken", broken[root]
    return landing, landing.state, landing.detail


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what hosts print at import out of our output; the warnings say what the listing says anyway."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        yield


def _lines(listing: Listing) -> Iterator[str]:
    for plugin in listing.plugins:
        yield f"{plugin['name']}  ({plugin['distribution']} {plugin['version']}, {plugin['value']})"
        if plugin["status"] == "quarantined":
            yield f"  QUARANTINED: {plugin['cause']}"
        elif plugin["status"] == "disabled":
            yield "  disabled by RS_PLUGINS_DISABLE"
        for component in plugin["components"]:
            yield f"  {component['kind']:<10} {component['name']}  →  {component['target']}"
        for export in listing.exports:
            if export["plugin"] == plugin["name"] and export["distribution"] == plugin["distribution"]:
                state = _STATES[export["state"]].format(detail=export["detail"])
                yield f"  export     {export['host']}.{export['name']}  {state}"
        yield ""
    if not listing.plugins:
        yield "no plugins found; is rs-plugins installed in this environment, and not only on the path?\n"
    if listing.unknown:
        yield f"warning: {DISABLE} names {', '.join(listing.unknown)}, not installed here\n"
    if listing.on_pythonpath:
        yield "Every Python process started from here is activated: PYTHONPATH holds our site folder."
    else:
        yield "Python processes started from here are not activated: use `rs-plugins run` or `rs-plugins site-dir`."
