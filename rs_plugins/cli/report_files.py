"""``rs-plugins report --out``: the report as a page and as files, with a gallery of images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.noise import family_called
from rs_plugins.cli.options import open_data
from rs_plugins.errors import UnknownNameError

if TYPE_CHECKING:
    from rs_plugins.core.data_sets.data_set import DataSet
    from rs_plugins.core.noise import Noise
    from rs_plugins.core.results.logged_noise import LoggedNoise
    from rs_plugins.core.results.table import Results
    from rs_plugins.report_page.content import Content
    from rs_plugins.report_page.gallery import Gallery

_OF_GALLERY = ("split", "image_size", "attacked", "gallery")  # options that mean nothing without --data


def check_options(context: click.Context, options: Mapping[str, Any]) -> None:
    """Refuse options that have no meaning without others.

    Raises:
        UsageError: If there are some.
    """
    given = [
        name for name in _OF_GALLERY if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given and options["data"] is None:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --data, whose images the gallery shows")
    out = options["out"]
    if options["data"] is not None and out is None:
        raise click.UsageError("--data needs --out, the folder of the report in which the gallery is")
    if out is not None and not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out: there is no folder {out.absolute().parent}")


def write_files(
    content: "Content", table: str, paths: Mapping[str, Path], options: Mapping[str, Any]
) -> Sequence[Path]:
    """Write the report ``content`` and its gallery into the folder ``out``, ``table`` as CSV; return the files."""
    from rs_plugins.report_page.writing import write_report

    if options["data"] is not None:
        content = replace(content, gallery=_gallery(content, paths, options))
    return write_report(options["out"], content, table)


def _gallery(content: "Content", paths: Mapping[str, Path], options: Mapping[str, Any]) -> "Gallery":
    from rs_plugins.core.results.writer import record_beside
    from rs_plugins.report_page.content import certified
    from rs_plugins.report_page.gallery import make_gallery, read_attacked

    data = open_data(options)
    logs = {name: log for name, log in content.logs.items() if certified(log)}
    first = next(iter(logs), None)
    return make_gallery(
        data,
        logs,
        count=options["gallery"],
        noise=None if first is None else _noise(logs[first], content.noises.get(first), data),
        attacked=None if options["attacked"] is None else read_attacked(options["attacked"]),
        records={name: record_beside(paths[name]) or {} for name in logs},
    )


def _noise(log: "Results", noise: "LoggedNoise | None", data: "DataSet") -> "Noise | None":
    """Return the noise of ``log``, Gaussian if it does not say; None if it is unknown, or of what sigma."""
    from rs_plugins.core.noise import make_noise

    if log.sigma is None:
        return None
    try:
        return make_noise(family_called(noise.family if noise else "gaussian"), log.sigma, data.shape)
    except UnknownNameError:
        return None
