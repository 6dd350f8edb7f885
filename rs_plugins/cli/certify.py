"""``rs-plugins certify``: a data set certified into a log."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.certify_bounds import bound_options, by_bounds, certify_by_bounds
from rs_plugins.cli.engines import check_engine, device_of, engine_of, engine_options, log_of_this_process
from rs_plugins.cli.model_errors import plain_model_errors
from rs_plugins.cli.noise import chosen_family, noise_option
from rs_plugins.cli.options import (
    INTERRUPTED,
    device_option,
    find_modules_here,
    load_network,
    model_options,
    open_data,
    quiet_option,
    range_options,
)
from rs_plugins.cli.plain_warnings import plain_warnings

if TYPE_CHECKING:
    from rs_plugins.core.plans.protocol import Plan
    from rs_plugins.core.results.table import Results


def _parse_shard(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise click.BadParameter(f"expected I/N such as 0/4, got {text!r}")
    return int(part), int(parts)


def _check_log(_context: click.Context, _option: click.Parameter, path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise click.BadParameter(f"expected a file, got {path}, which is something else")
    return path


@click.command(
    epilog="Example: rs-plugins certify --model mynets:resnet20 --weights resnet20.safetensors --data cifar10:data "
    "--sigma 0.25 --plan fixed:n=10000 --skip 20 --out resnet20.tsv"
)
@model_options
@noise_option(trained=True)
@click.option(
    "--plan",
    default="fixed-budget",
    show_default=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="How many votes: fixed-budget (100,000 an image), at-radius, on-grid, anytime, a plugin's, or how "
    "one of them begins; with options, such as fixed:n0=100,n=10000,alpha=0.001 or on-grid:radii=0/0.25/0.5.",
)
@click.option(
    *("--out", "out"),
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    callback=_check_log,
    help="The log to write.",
)
@click.option("--resume", is_flag=True, help="Go on with the log if it exists.")
@range_options
@click.option(
    "--shard",
    default="0/1",
    show_default=True,
    callback=_parse_shard,
    metavar="I/N",
    help="Of the images chosen take the I-th, (I+N)-th, ..., I from 0. rs-plugins merge puts the logs together.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise, or of the attack.")
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    help="Certify a copy of the model in this type.  [the model's own; float64 with --bounds]",
)
@click.option("--channels-last", is_flag=True, help="Lay images out with the channels last; often faster.")
@click.option("--compile", is_flag=True, help="Compile the model first.")
@click.option("--chunk", type=int, help="Most noisy images in a forward pass; changes the speed only.")
@engine_options
@bound_options
@quiet_option
@click.pass_context
def certify(context: click.Context, /, out: Path, quiet: bool, **options: Any) -> None:
    """Certify a smoothed classifier on a data set into a log; with --bounds, a classifier without noise.

    Each finished image is on disk before the next result is taken. Killed at any moment and started again with
    --resume, the job goes on, and the log becomes what it would have been. It refuses a log of another model, data set,
    noise, plan, seed, hardware or version, and of other images, but that a later --stop extends it.

    --engine ray has several processes do it, on this machine or a cluster; under torchrun each process certifies a
    shard into OUT.shard-I-of-N, and the first one merges them. The log is the same.

    The current folder is on the path, so a model defined in mynets.py there is mynets:FUNCTION. The same job in Python
    is rs_plugins.core.job.certify_data_set.

    With --bounds NAME --eps R: is the whole ball of radius R around an image of its class? After an attack that drops
    images, bounds are computed from cheap to tight, up to the first that proves it. Other images stay unknown.
    """
    bounds, progress = by_bounds(context), not quiet and sys.stderr.isatty()
    check_engine(context)
    try:
        with plain_warnings(), plain_model_errors():
            if bounds:
                done: str | None = certify_by_bounds(out, progress, options)
            else:
                results = _run(out, progress, options)
                done = None if results is None else _summary(out, results)
    except KeyboardInterrupt:
        click.echo(
            f"\nstopped; {_written(log_of_this_process(out))}; go on with the same command and --resume", err=True
        )
        sys.exit(INTERRUPTED)
    if done is not None:
        click.echo(done)


def _run(out: Path, progress: bool, options: Mapping[str, Any]) -> "Results | None":
    """Certify into the log ``out`` and return its rows, but not in those processes of torchrun that only help."""
    import torch

    from rs_plugins.core.engines.torchrun import certify_in_shards, processes
    from rs_plugins.core.job import certify_data_set
    from rs_plugins.core.results.files import RESULTS
    from rs_plugins.core.selection import Selection

    group = processes()
    chosen, device, engine = _plan(options["plan"]), device_of(options, group), engine_of(options)
    selection = Selection(*(options[name] for name in ("start", "stop", "skip", "shard")))
    find_modules_here()
    network, sigma = load_network(options)
    family, data = chosen_family(options), open_data(options)

    def certify_into(log: Path, selection: Selection, resume: bool) -> "Results":
        return certify_data_set(
            *(network.to(device), data, sigma, log),
            plan=chosen,
            family=family,
            seed=options["seed"],
            selection=selection,
            resume=resume,
            progress=progress and (group is None or group.rank == 0),
            engine=engine,
            chunk=options["chunk"],
            device=device if engine is None else None,
            dtype=None if options["dtype"] is None else getattr(torch, options["dtype"]),
            channels_last=options["channels_last"],
            compile=options["compile"],
        )

    if group is None:
        return certify_into(out, selection, options["resume"])
    torch.set_num_threads(group.threads)
    how = {"images": len(data), "selection": selection, "resume": options["resume"]}
    return certify_in_shards(out, certify_into, group, RESULTS, **how)


def _plan(text: str) -> "Plan":
    from rs_plugins import registry
    from rs_plugins.cli.plans import parse_plan

    names = [component.name for component in registry.components("certifier")]
    plan: Plan = parse_plan(text, names, lambda name: registry.component("certifier", name))
    return plan


def _written(out: Path) -> str:
    if not out.is_file():
        return "no image is done yet"
    from rs_plugins.core.relaxations.bound_files import is_bound_log, read_bounds
    from rs_plugins.core.results.files import read_results

    held = len(read_bounds(out) if is_bound_log(out) else read_results(out))
    return f"{held} {'image is' if held == 1 else 'images are'} in {out}"


def _summary(out: Path, results: "Results") -> str:
    """Return the figures in a line, of a plan with radii of its own at these."""
    from rs_plugins.core.results.logged_noise import read_noise
    from rs_plugins.core.results.logged_plan import read_plan
    from rs_plugins.core.results.table import radius_text

    noise = read_noise(out)
    norm = "" if noise is None or noise.norm == "l2" else f" in {noise.norm}"
    plan, images = read_plan(out), f"{len(results)} {'image' if len(results) == 1 else 'images'}"
    own = [] if plan is None else plan.radii
    if not own:
        figures = (
            f"certified {results.certified_accuracy([0])[0]:.2%}, ACR {results.average_certified_radius:.4f}{norm}, "
            f"abstained {results.abstention:.2%}"
        )
    else:
        shares = zip(own, results.certified_accuracy(own), strict=True)
        figures = f"certified {', '.join(f'{share:.2%} at {radius_text(radius)}' for radius, share in shares)}{norm}"
    return f"{out}: {images}, {figures}; more with: rs-plugins report {out}"
