"""How fast certification is, and how few votes it needs.

python benchmarks/bench_certify.py speed      noisy images per second, against the best loop written by hand and peers
python benchmarks/bench_certify.py samples    votes per image of each plan, and the certified accuracy it reports
"""

import sys
from importlib import import_module
from pathlib import Path

import click

SECTIONS = {"speed": "certify_speed", "samples": "certify_samples"}


class Sections(click.Group):
    """Subcommands in modules of their own, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SECTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SECTIONS:
            return None
        folder = str(Path(__file__).parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        command: click.Command = getattr(import_module(SECTIONS[cmd_name]), cmd_name)
        return command


@click.command(cls=Sections)
def main() -> None:
    """Benchmarks of certification."""


if __name__ == "__main__":
    main()
