"""The subcommands of a benchmark, in modules of their own, each imported when it is asked for."""

import sys
from importlib import import_module
from pathlib import Path

import click


class Sections(click.Group):
    """Finds the command ``name`` in the module ``modules[name]`` of this folder."""

    modules: dict[str, str]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        folder = str(Path(__file__).parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        command: click.Command = getattr(import_module(self.modules[cmd_name]), cmd_name)
        return command


def sections(**modules: str) -> Sections:
    """Return the group of the commands that are in these ``modules``."""
    group = Sections()
    group.modules = modules
    return group
