"""``rs-plugins merge``: the logs of shards put together."""

from pathlib import Path

import click

from rs_plugins.cli.plain_warnings import plain_warnings


@click.command(epilog="Example: rs-plugins merge part-0.tsv part-1.tsv part-2.tsv --out whole.tsv")
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The log to write.")
@click.option("--partial", is_flag=True, help="Merge what there is, where a shard is missing or not finished.")
def merge(logs: tuple[Path, ...], out: Path, partial: bool) -> None:
    """Put the logs of a run's shards together: the log that one run over all images would have made.

    Refuses logs of different runs, images that are in two of them, logs that are not finished or being written, and to
    leave a shard out.
    """
    from rs_plugins.core.merging import merge_results

    with plain_warnings():
        results = merge_results(logs, out, partial=partial)
    click.echo(f"{out}: {len(results)} images of {len(logs)} log{'s' * (len(logs) > 1)}")
