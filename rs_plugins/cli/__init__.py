"""The command line: thin, each verb calls one function.

A verb's module is imported when the verb is called, so that ``rs-plugins run`` never pays for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

import rs_plugins
from rs_plugins.errors import RSPluginsError

# verb → (module, attribute, one line of help)
_VERBS = {
    "run": ("rs_plugins.cli.run", "run", "Run a script, module, code or program with the plugins activated."),
    "list": ("rs_plugins.cli.listing", "list_plugins", "Show plugins, what they offer and where it landed."),
    "doctor": ("rs_plugins.cli.doctor", "doctor", "Check this environment for versions that clash and known traps."),
    "train": ("rs_plugins.cli.train", "train", "Train a network for certification into a folder; can be gone on with."),
    "adapt": ("rs_plugins.cli.adapt", "adapt", "Make a classifier certifiable by a second network beside it."),
    "certify": ("rs_plugins.cli.certify", "certify", "Certify a model on a data set into a log; can be gone on with."),
    "attack": ("rs_plugins.cli.attack", "attack", "Attack a smoothed classifier, and judge the attack by many votes."),
    "merge": ("rs_plugins.cli.merge", "merge", "Put the logs of a run's shards together."),
    "report": ("rs_plugins.cli.report", "report", "Certified accuracy, ACR and more of logs: tables and a picture."),
    "demo": ("rs_plugins.cli.demo", "demo", "Train, attack and certify on handwritten digits: a table and a plot."),
    "site-dir": ("rs_plugins.cli.run", "site_dir", "Print the folder to put on PYTHONPATH instead of using `run`."),
}


class _LazyGroup(click.Group):
    """Imports a verb's module when the verb is called; help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb, (module, _, _) in _VERBS.items() if find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, attribute, _ = _VERBS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, _VERBS[verb][2]) for verb in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Show our own errors as messages: a traceback tells the user nothing more."""
        try:
            return super().invoke(ctx)
        except RSPluginsError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rs_plugins.__version__, prog_name="rs-plugins")
def main() -> None:
    """Certified robustness by randomized smoothing, for users of ART and torchattacks."""
