"""``rs-plugins merge``: the logs of shards put together."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rs_plugins.cli.plain_warnings import plain_warnings

if TYPE_CHECKING:
    from rs_plugins.core.results.kinds import LogKind, Table


@click.command(epilog="Example: rs-plugins merge part-0.tsv part-1.tsv part-2.tsv --out whole.tsv")
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The log to write.")
@click.option("--partial", is_flag=True, help="Merge what there is, where a shard is missing or not finished.")
def merge(logs: tuple[Path, ...], out: Path, partial: bool) -> None:
    """Put the logs of a run's shards together: the log that one run over all images would have made.

    Refuses logs of different runs, images that are in two of them, logs that are not finished or being written, and to
    leave a shard out.
    """
    from rs_plugins.core.relaxations.bound_files import BOUND_LOG, is_bound_log
    from rs_plugins.core.results.files import RESULTS
    from rs_plugins.core.results.merging import merge_logs

    with plain_warnings():
        kind: LogKind[Table] = BOUND_LOG if is_bound_log(logs[0]) else RESULTS
        results = merge_logs(logs, out, kind, partial=partial)
    click.echo(f"{out}: {len(results)} images of {len(logs)} log{'s' * (len(logs) > 1)}")
