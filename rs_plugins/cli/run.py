"""``rs-plugins run``: replaces itself by the real interpreter or program, in which the plugins are activated."""

import os
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click


class _NoSuchScript(click.ClickException):
    exit_code = 2  # as python says it


class _NotExecutable(click.ClickException):
    exit_code = 126  # as the shell and env(1) say it


class _NotFound(click.ClickException):
    exit_code = 127


def site_path() -> str:
    """Return the folder with our ``sitecustomize``."""
    return str(Path(__file__).resolve().parent.parent / "_site")


class _RunCommand(click.Command):
    """Everything after the first word belongs to what is run, ``--help`` and ``--version`` included."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in ctx.help_option_names:
            return super().parse_args(ctx, args[:1])
        return super().parse_args(ctx, ["--", *(args[1:] if args[:1] == ["--"] else args)])


@click.command(
    cls=_RunCommand,
    options_metavar="",
    epilog="Everything after SCRIPT, MODULE, CODE or PROGRAM belongs to it. A bare PROGRAM is looked for beside this "
    "Python first, then on PATH. Options of Python itself: rs-plugins run python -X dev SCRIPT.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT...|-m MODULE...|-c CODE...|PROGRAM...")
def run(command: tuple[str, ...]) -> None:
    """Run a Python script, module or code, or any program, with the names of all plugins in place.

    The code is not edited: getattr(torchattacks, "SmoothAdvPGD") just works, in subprocesses, spawned workers and
    torchrun ranks too. Arguments, exit code, stdin and sys.path[0] are what plain python would give.
    """
    argv = command_line(command)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(argv[0], argv, activated_environment(os.environ))
    except OSError as error:
        raise _NotExecutable(f"cannot execute {argv[0]}: {error.strerror}") from error


@click.command()
def site_dir() -> None:
    """Print the folder that activates the plugins: PYTHONPATH=$(rs-plugins site-dir) python SCRIPT.

    The same as `rs-plugins run`, for cluster jobs, containers and notebooks whose command line is not yours.
    """
    click.echo(site_path())


def activated_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of the environment in which every Python process starts with our ``sitecustomize``."""
    ours = site_path()
    before = environ.get("PYTHONPATH")  # an empty entry in it means the current directory, an empty value nothing
    others = [entry for entry in before.split(os.pathsep) if entry != ours] if before else []
    return {**environ, "PYTHONPATH": os.pathsep.join([ours, *others])}


def command_line(command: Sequence[str]) -> list[str]:
    """Say what to execute, the path of the executable first."""
    if not command:
        raise click.UsageError("nothing to run; name a script, -m MODULE, -c CODE or a program")
    first, rest = command[0], command[1:]
    if first in ("-m", "-c"):
        if not rest:
            raise click.UsageError(f"{first} needs {'a module' if first == '-m' else 'code'} after it")
        return [_python(), *command]
    if first == "-":
        return [_python(), *command]
    if first.startswith("-"):
        raise click.UsageError(
            f"no such option: {first}; options of Python itself go here: rs-plugins run python {first} ..."
        )
    if _is_python_source(first):
        return [_python(), *command]
    return [_program(first), *rest]


def _python() -> str:
    if not sys.executable:
        raise click.ClickException("this Python does not know its own path (sys.executable is empty)")
    return sys.executable


def _is_python_source(name: str) -> bool:
    """Whether plain python runs it: a script, or a folder or zip file with a ``__main__.py``."""
    path = Path(name)
    if path.suffix in (".py", ".pyc", ".pyw", ".pyz"):
        if not path.is_file() and not path.is_dir():
            raise _NoSuchScript(f"no such file: {name}")
        return True
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise _NoSuchScript(f"{name} is a folder without a __main__.py")
        return True
    if path.is_file() and not os.access(path, os.X_OK):
        return os.sep in name or zipfile.is_zipfile(path) or _find(name) is None
    return False


def _program(name: str) -> str:
    found = _find(name)
    if found is None:
        hint = "" if os.sep in name else f"; a module is run with: rs-plugins run -m {name}"
        raise _NotFound(f"no such script or program: {name}{hint}")
    return found


def _find(name: str) -> str | None:
    """Look beside this interpreter first: its torchrun, pytest and python are the ones that have the plugins."""
    if os.sep in name:
        return name if Path(name).is_file() else None
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
