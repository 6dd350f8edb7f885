"""``rs-plugins certify --bounds``: balls around images certified by deterministic bounds, into a log."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from rs_plugins.cli.options import default_device, find_modules_here, load_any_network, open_data

if TYPE_CHECKING:
    from rs_plugins.core.relaxations.bound_results import BoundResults

_Command = TypeVar("_Command", bound=Callable[..., Any])
_BOUNDS = ("ibp", "crown-ibp", "crown", "alpha-crown")
_OF_SMOOTHING = (
    *("sigma", "noise", "plan", "channels_last", "compile", "chunk", "engine", "workers", "address"),
    *("member", "ensemble"),
)


def _parse_pixels(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    above, line, below = text.partition("/")
    try:
        return float(Fraction(above) / Fraction(below) if line else Fraction(above))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise click.BadParameter(f"expected a number such as 0.1 or 8/255, got {text!r}") from None


_OPTIONS = (
    click.option(
        "--bounds",
        type=click.Choice(_BOUNDS),
        help="Certify without noise: by these bounds and all that are cheaper, the cheapest first.",
    ),
    click.option(
        "--cascade", metavar="BOUND,...", help="With --bounds: which of them to compute, as ibp,crown.  [all up to it]"
    ),
    click.option(
        "--eps", callback=_parse_pixels, metavar="NUMBER", help="With --bounds: radius in pixels, as 0.1 or 8/255."
    ),
    click.option(
        "--norm",
        type=click.Choice(["linf", "l2"]),
        default="linf",
        show_default=True,
        help="With --bounds: that of eps.",
    ),
    click.option(
        "--attack-steps",
        type=int,
        default=40,
        show_default=True,
        help="With --bounds: steps of the attack that drops images before; 0 for none.",
    ),
    click.option(
        "--attack-restarts", type=int, default=1, show_default=True, help="With --bounds: runs of the attack."
    ),
    click.option(
        "--alpha-steps", type=int, default=20, show_default=True, help="With --bounds alpha-crown: steps of its slopes."
    ),
    click.option("--batch-size", type=int, default=32, show_default=True, help="With --bounds: images at once."),
    click.option(
        "--export-unknown",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="With --bounds: write what stays unknown for a complete verifier, as ONNX and VNN-LIB.",
    ),
    click.option(
        "--timeout",
        type=float,
        default=300,
        show_default=True,
        help="With --export-unknown: seconds that the verifier may spend on an image.",
    ),
)
_OF_BOUNDS = ("cascade", "eps", "norm", "attack_steps", "attack_restarts", "alpha_steps", "batch_size")
_OF_EXPORT = ("export_unknown", "timeout")


def bound_options(command: _Command) -> _Command:
    """Give ``command`` the options that certify by bounds."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def by_bounds(context: click.Context) -> bool:
    """Return whether bounds are asked for.

    Raises:
        UsageError: If options do not go together.
    """
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    bounds = context.params["bounds"] is not None
    wrong = [name for name in given if name in (_OF_SMOOTHING if bounds else (*_OF_BOUNDS, *_OF_EXPORT))]
    if wrong:
        why = (
            "is for randomized smoothing, which --bounds is not" if bounds else "is for --bounds NAME, which is missing"
        )
        raise click.UsageError(f"--{wrong[0].replace('_', '-')} {why}")
    if bounds and context.params["eps"] is None:
        raise click.UsageError("--bounds needs a radius: --eps 8/255, or another")
    if "timeout" in given and context.params["export_unknown"] is None:
        raise click.UsageError("--timeout is for --export-unknown FOLDER, which is missing")
    return bounds


def certify_by_bounds(out: Path, progress: bool, options: Mapping[str, Any]) -> str:
    """Certify the images that ``options`` name into the log ``out``, and return what came out of it."""
    import torch

    from rs_plugins.core.models import check_device
    from rs_plugins.core.relaxations.certifying import cascade_up_to
    from rs_plugins.core.relaxations.export import check_exportable, export_unknown_of_log
    from rs_plugins.core.relaxations.job import certify_bounds_data_set
    from rs_plugins.core.selection import Selection

    folder = options["export_unknown"]
    if folder is not None:
        check_exportable(options["norm"])
    named = options["cascade"]
    cascade = cascade_up_to(options["bounds"]) if named is None else _cascade(named, options["bounds"])
    device = check_device(options["device"] or default_device())
    find_modules_here()
    network = load_any_network(options)
    data = open_data(options)
    results = certify_bounds_data_set(
        *(network.to(device), data, options["eps"], out),
        selection=Selection(*(options[name] for name in ("start", "stop", "skip", "shard"))),
        resume=options["resume"],
        progress=progress,
        cascade=cascade,
        dtype=getattr(torch, options["dtype"] or "float64"),
        device=device,
        **{
            name: options[name]
            for name in ("norm", "attack_steps", "attack_restarts", "alpha_steps", "batch_size", "seed")
        },
    )
    lines = [_summary(out, results)]
    if folder is not None:
        written = export_unknown_of_log(network, data, results, folder, timeout=options["timeout"])
        lines.append(f"{folder}: {_images(len(written))} for a complete verifier")
    return "\n".join(lines)


def _cascade(text: str, last: str) -> list[str]:
    names = text.split(",")
    if names[-1] != last:
        raise click.UsageError(f"--cascade: expected {last} at its end, as --bounds says, got {text!r}")
    return names


def _summary(out: Path, results: "BoundResults") -> str:
    figures = (
        f"natural {results.natural_accuracy().share:.2%}, certified {results.certified_accuracy().share:.2%}, "
        f"at most {results.robust_accuracy_at_most().share:.2%}"
    )
    counts = ", ".join(f"{count} {status}" for status, count in results.counts.items())
    return f"{out}: {_images(len(results))}, {figures} ({counts}); more with: rs-plugins report {out}"


def _images(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'}"
