"""What ``rs-plugins train`` says of a run: a title, a line an epoch, a table, the files, what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.tables import as_text
from rs_plugins.errors import ResultsError

if TYPE_CHECKING:
    from torch import nn

    from rs_plugins.core.data_sets.data_set import DataSet
    from rs_plugins.core.training.folder import Epoch
    from rs_plugins.core.training.recipe import Recipe

PICTURE = "training.png"
_MOST_ROWS = 12  # of the table at the end


def tell(epochs: int, epoch: "Epoch") -> None:
    """Say how far it is where no progress bar can."""
    accuracy = f", {epoch.figure} {_percent(epoch.accuracy)}" if epoch.accuracy is not None else ""
    click.echo(f"epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.4f}{accuracy}, {epoch.seconds:.1f} s", err=True)


def title(recipe: "Recipe", network: "nn.Module", data: "DataSet") -> str:
    """Return what is trained how on what."""
    count = sum(parameter.numel() for parameter in network.parameters())
    how = "" if recipe.sigma is None else f", sigma {recipe.sigma:g}"
    if recipe.sigma is not None and (family := recipe.options.get("family")) is not None:
        how += f" of {family(recipe.sigma).name} noise"
    if _judged_by_an_attack(recipe) or recipe.activation != "relu":
        how += f", {recipe.activation}"
    return f"{recipe.method}{how}: {recipe.architecture} of {count:,} parameters on {len(data)} images of {data.name}"


def table(history: Sequence["Epoch"]) -> str:
    """Return the first epoch, the last, and some between, with the time up to each."""
    steps = min(len(history), _MOST_ROWS) - 1
    shown = sorted({place * (len(history) - 1) // max(1, steps) for place in range(steps + 1)})
    rows = [
        [
            *(str(history[place].epoch), f"{history[place].loss:.4f}", _percent(history[place].accuracy)),
            *(f"{history[place].lr:g}", f"{sum(epoch.seconds for epoch in history[: place + 1]):.1f}"),
        ]
        for place in shown
    ]
    figure = history[0].figure if history else "accuracy"
    return as_text([["epoch", "loss", figure, "lr", "seconds"], *rows])


def best(history: Sequence["Epoch"]) -> str:
    """Return which epoch was chosen."""
    from rs_plugins.core.training.best import best_of

    chosen = best_of(history)
    if chosen is None:
        return ""
    return f"the network of epoch {chosen.epoch}, {chosen.figure} {_percent(chosen.accuracy)}\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def show_files(out: Path, history: Sequence["Epoch"], *, drawn: bool) -> None:
    """Say what was written, and draw the curves."""
    from rs_plugins.plots import save_training_curves

    for file in ("model.safetensors", "model.json", "history.csv"):
        click.echo(f"  {out / file}")
    if not (drawn and history):
        return
    path = out / PICTURE
    try:
        save_training_curves(path, history)
    except OSError as error:
        reason = error.strerror or error
        raise ResultsError(f"{path}: cannot be written ({reason}); the rest is complete") from error
    click.echo(f"  {path}")


def trained_for(preset: str, recipe: "Recipe") -> str:
    """Return under what noise, or for what radius, a preset trains, and the radius to certify at if that is another."""
    from rs_plugins.core.training.presets import radius_of

    if recipe.sigma is not None:
        return f"sigma {recipe.sigma:g}"
    eps, meant = recipe.options["eps"], radius_of(preset)
    return f"eps {eps:.4g}" if meant in (None, eps) else f"eps {eps:.4g}, to certify {meant:.4g}"


def next_command(out: Path, recipe: "Recipe", options: Mapping[str, Any]) -> str:
    """Return how to certify the network on images that it was not trained on, by votes or bounds, or to attack it."""
    from rs_plugins.core.data_sets.opening import has_parts
    from rs_plugins.core.training.presets import radius_of

    if _judged_by_an_attack(recipe):
        objective: Any = recipe.objective()
        attack = {"linf": "PGD", "l2": "PGDL2"}[objective.norm]
        return f"torchattacks.{attack}(load_trained({str(out)!r}).model, eps={objective.eps:g})(x, y) in Python"
    data = options["validation"] or (options["data"] if has_parts(options["data"]) else "FORMAT:PLACE")
    trust = ["--trust-model"] if ":" in recipe.architecture else []
    meant = None if options["preset"] is None else radius_of(options["preset"])
    eps = getattr(recipe.objective(), "eps", None) if meant is None else meant
    bounds = ["--bounds", "crown", "--eps", "EPS" if eps is None else f"{eps:g}"] if recipe.sigma is None else []
    files = ["--data", data, "--out", str(out / "certified.tsv")]
    return shlex.join(["rs-plugins", "certify", *bounds, "--model", str(out), *trust, *files])


def _judged_by_an_attack(recipe: "Recipe") -> bool:
    """Whether the networks of the method are neither for votes nor for bounds."""
    from rs_plugins.core.training.validation import ADVERSARIAL, figure_of

    return figure_of(recipe.objective()) == ADVERSARIAL
