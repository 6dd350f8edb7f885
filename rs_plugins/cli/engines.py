"""What ``rs-plugins certify`` computes with: this process, workers of Ray, or the processes of torchrun."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rs_plugins.cli.options import default_device
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    import torch

    from rs_plugins.core.engines.ray_engine import RayEngine
    from rs_plugins.core.engines.torchrun import Processes

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _parse_workers(_context: click.Context, _option: click.Parameter, text: str) -> "int | str":
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise click.BadParameter(f"expected a number above 0 or auto, got {text!r}")
    return text if text == "auto" else int(text)


_OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice(["ray"]),
        help="Several processes, maybe on several machines: workers of Ray pull images.  [this process]",
    ),
    click.option(
        "--workers",
        default="auto",
        show_default=True,
        callback=_parse_workers,
        metavar="N|auto",
        help="With --engine ray: how many. auto is one a GPU, or one a core where there is none.",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        help="With --engine ray: of a running cluster.  [one on this machine that ends with the job]",
    ),
)


def engine_options(command: _Command) -> _Command:
    """Give ``command`` the options that say what computes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_engine(context: click.Context) -> None:
    """Look whether the options go together.

    Raises:
        UsageError: If they do not.
    """
    given = context.get_parameter_source
    for name in ("workers", "address"):
        if context.params["engine"] is None and given(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is for --engine ray, which is missing")
    several = "TORCHELASTIC_RUN_ID" in os.environ
    if several and context.params["engine"] is not None:
        raise click.UsageError("--engine: expected none under torchrun, which has processes of its own")
    if several and context.params["bounds"] is not None:
        raise click.UsageError("--bounds: expected one process, got those of torchrun; --shard I/N splits the work")


def engine_of(options: Mapping[str, Any]) -> "RayEngine | None":
    """Return the engine that is asked for, None for this process."""
    if options["engine"] is None:
        return None
    from rs_plugins.core.engines.ray_engine import RayEngine

    return RayEngine(workers=options["workers"], address=options["address"], device=options["device"])


def device_of(options: Mapping[str, Any], group: "Processes | None") -> "torch.device":
    """Return where this process computes.

    Raises:
        InputError: If there is no such device.
    """
    from rs_plugins.core.models import check_device

    if options["engine"] is not None:  # workers have devices of their own
        return check_device("cpu")
    device = check_device(options["device"] or default_device())
    if group is not None and device.index is not None:
        raise InputError(f"device: torchrun gives each process its own; expected {device.type!r}, got {str(device)!r}")
    return check_device(f"cuda:{group.local_rank}") if group is not None and device.type == "cuda" else device


def log_of_this_process(out: Path) -> Path:
    """Return the log that this process writes itself."""
    from rs_plugins.core.engines.torchrun import processes

    group = processes()
    return out if group is None else group.shard_of(out)
