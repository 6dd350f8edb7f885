"""``rs-plugins adapt``: certifying adapters for a classifier as it is, trained and certified at several sigmas."""

import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.adapt_inputs import Images, load_inputs, written_test
from rs_plugins.cli.adapt_table import BARE, CERTIFIED, Row, accuracy, kept, next_commands, table, title
from rs_plugins.cli.model_errors import plain_model_errors
from rs_plugins.cli.options import (
    INTERRUPTED,
    data_option,
    default_device,
    device_option,
    find_modules_here,
    image_size_option,
    quiet_option,
)
from rs_plugins.cli.plain_warnings import plain_warnings
from rs_plugins.cli.tables import as_text
from rs_plugins.errors import InputError, ModelError, ResultsError, RSPluginsError, RSPluginsWarning

if TYPE_CHECKING:
    from torch import nn

    from rs_plugins.core.certifying_adapters.design import AdapterDesign
    from rs_plugins.core.plans.fixed_budget import FixedBudget
    from rs_plugins.core.results.table import Results
    from rs_plugins.core.training.folder import Epoch
    from rs_plugins.core.training.recipe import Recipe

_PASSED_ON = ("held_out", "seed", "device", "precision", "channels_last", "workers", "resume")
_DESIGN = ("kind", "size", "hidden", "sites", "combine", "head", "head_name")
# beginning of an error about the classifier → what helps
_ADVICE = {
    "sites:": "the blocks are named with --sites",
    "model: it fails on an input": "--model, or --normalise, may be for other images",
    "weights: .*(does not fit|: expected shape)": "by name: --classes and --normalise are those of its training",
}
_LOW = 0.5  # accuracy without noise below which something is likely to be wrong
_CHANGES = ("epochs", "batch_size", "parts", "lr", "algorithm", "schedule", "weight_decay", "augment")


def _check_sigmas(_context: click.Context, _option: click.Parameter, sigmas: tuple[float, ...]) -> tuple[float, ...]:
    names = [f"{sigma:g}" for sigma in sigmas]
    if twice := [name for name in names if names.count(name) > 1]:
        raise click.BadParameter(f"expected each once, got {twice[0]} twice")
    return sigmas


def _split_sites(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(site.strip() for text in texts for site in text.split(",") if site.strip())


@click.command(
    epilog="Example: rs-plugins adapt --model resnet110 --normalise cifar10 --weights clean.safetensors "
    "--data cifar10:data --sigma 0.25 --sigma 0.5 --out adapted"
)
@click.option(
    "--model",
    required=True,
    metavar="NAME|PACKAGE.MODULE:FUNCTION|DIR",
    help="The classifier: a network as in rs-plugins train --arch; or a folder that rs-plugins train wrote.",
)
@click.option(
    "--trust-model",
    is_flag=True,
    help="Where --model is a folder of a network that a function makes, import that function and call it.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors, or a torch file of tensors only.")
@click.option(
    "--normalise",
    type=click.Choice(["none", "data", "cifar10", "imagenet"]),
    help="Whose mean and standard deviation --model by name gets as its first layer; data: those of the training "
    "images.  [none]",
)
@click.option("--classes", type=int, help="Of --model by name.  [those of --data]")
@data_option
@click.option(
    *("--test", "test"),
    metavar="FORMAT[:PLACE]",
    help="Images to certify.  [the part test of --data, if any; else a tenth of --data, at most 1000 images, that "
    "no certifying adapter is trained on]",
)
@image_size_option
@click.option("--train-images", type=int, help="Train on so many images only, evenly spaced.")
@click.option(
    "--held-out",
    type=int,
    help="So many of them, evenly spaced, are not trained on: the epoch that is best on them under noise is taken; 0: "
    "the last one.  [2 %, from 100 to 2000, at most a tenth]",
)
@click.option(
    *("--sigma", "sigmas"),
    type=float,
    multiple=True,
    required=True,
    callback=_check_sigmas,
    help="Noise, in pixels of [0, 1]; several times for several certifying adapters of one extractor.",
)
@click.option(
    *("--out", "out"),
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder to write, with a folder in it for each sigma: as of train, and certified.tsv, bare.tsv.",
)
@click.option("--resume", is_flag=True, help="Go on with what is there, training and logs.")
@click.option(
    "--kind",
    type=click.Choice(["image", "feature", "token"]),
    help="A network that reads the image, a bottleneck on the features, or bottlenecks inside a transformer.  [image]",
)
@click.option(
    "--size",
    type=click.Choice(["tiny", "small", "medium", "paper", "copy"]),
    help="Of kind image. copy: begins as a copy of the extractor; the others have 8, 16, 32 or 64 channels and initial "
    "weights, paper is a ResNet-18.  [copy]",
)
@click.option("--hidden", type=int, help="Width of the bottlenecks.  [half the features; token: 64]")
@click.option(
    "--sites",
    multiple=True,
    callback=_split_sites,
    metavar="NAME,NAME,...",
    help="Blocks that get a bottleneck, of kind token.  [the longest list of blocks]",
)
@click.option(
    "--combine",
    type=click.Choice(["add", "gated"]),
    help="How features and correction become one: their sum; gated: the features are multiplied by trained numbers "
    "first.  [gated; token: add]",
)
@click.option(
    "--head",
    type=click.Choice(["tuned", "frozen", "fresh"]),
    help="The last layer: the old one trained along, the old one as it is, or a new one.  [tuned]",
)
@click.option("--head-name", help="Name of the last layer in --model.  [the one whose output are the logits]")
@click.option(
    "--method",
    metavar="NAME[:OPTION=VALUE,...]",
    default="gaussian",
    show_default=True,
    help="As in rs-plugins train, such as smoothadv:attack=ddn,eps=0.5,samples=2.",
)
@click.option("--epochs", type=int, help="Passes over the data.  [20]")
@click.option("--batch-size", type=int, help="Images per batch.  [64]")
@click.option("--parts", type=int, help="Cut a batch into so many, a step each.  [1]")
@click.option("--optimizer", "algorithm", type=click.Choice(["sgd", "adam", "adamw"]), help="[sgd; token: adam]")
@click.option("--lr", type=float, help="Learning rate.  [0.02; token: 0.001]")
@click.option("--schedule", type=click.Choice(["step", "cosine"]), help="How the learning rate falls.  [cosine]")
@click.option("--weight-decay", type=float, help="Weight decay.  [0.0005; token: 0]")
@click.option("--augment/--no-augment", default=None, help="Crop and flip images at random.  [no-augment]")
@click.option(
    "--certify-images",
    type=int,
    default=200,
    show_default=True,
    help="Certify at most so many test images, evenly spaced; 0: none.",
)
@click.option("--n", type=int, default=10_000, show_default=True, help="Votes for each of them.")
@click.option("--alpha", type=float, default=0.001, show_default=True, help="Failure probability of each certificate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of initial weights, order and noise.")
@device_option
@click.option(
    "--precision",
    type=click.Choice(["32-true", "bf16-mixed"]),
    default="32-true",
    show_default=True,
    help="Of training: bf16-mixed is faster on hardware that has bfloat16.",
)
@click.option("--channels-last/--no-channels-last", default=False, show_default=True, help="Of training; often faster.")
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that read images ahead.")
@quiet_option
def adapt(out: Path, quiet: bool, **options: Any) -> None:
    """Make a classifier certifiable by a second network beside it, and certify it with that and without.

    The classifier stays as it is: for each --sigma a certifying adapter is trained (Deng et al. 2024), into a folder
    such as DIR/sigma-0.25, which rs-plugins train would write alike and which holds all weights. Then test images are
    certified with it, into certified.tsv there, and without it, into bare.tsv, and a table shows both.

    Stopped at any moment and started again with --resume, the job goes on where it was, in training or certification.

    The folders are models: rs-plugins certify and attack --model DIR/sigma-0.25, and rs_plugins.load_trained in
    Python. The current folder is on the path, so a network defined in mynets.py there is mynets:FUNCTION. The training
    in Python is rs_plugins.core.certifying_adapters.job.adapt_data_set.
    """
    done: list[str] = []
    try:
        with plain_warnings(), plain_model_errors():
            _run(out, quiet, done, **options)
    except KeyboardInterrupt:
        what = f"done: {', '.join(done)}" if done else "nothing is finished yet"
        click.echo(f"\nstopped; {what}; go on with the same command and --resume", err=True)
        sys.exit(INTERRUPTED)


def _run(out: Path, quiet: bool, done: list[str], **options: Any) -> None:
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.models import check_device
    from rs_plugins.core.plans.fixed_budget import FixedBudget

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("adapt: expected one process, got several by torchrun; adapt_data_set trains with them")
    options["device"] = check_device(options["device"] or default_device())
    design = _design(options)
    recipes = [_recipe(sigma, design, options) for sigma in options["sigmas"]]
    count, plan = check_count(options["certify_images"], "certify_images", least=0), FixedBudget(**_votes(options))
    _check_folder(out, options)
    find_modules_here()
    with _about_the_options():
        model, network, images = load_inputs(out, count, design, options)
        right = accuracy(model, images)
        click.echo(title(model, network, images, right))
        if right < _LOW:
            warnings.warn(
                f"model: it is right on {right:.1%} of the test images without noise; is --normalise that of its "
                "training, and are the labels numbered as they were there?",
                RSPluginsWarning,
                stacklevel=1,
            )
        rows = []
        for sigma, recipe in zip(options["sigmas"], recipes, strict=True):
            rows.append(_train(model, network, images, sigma, recipe, design, out, quiet, options))
            done.append(f"{rows[-1].folder} is trained")
    images = written_test(images)
    for row in rows if count else []:
        for name, network_of in ((CERTIFIED, row.adaptation.model), (BARE, model)):
            row.logs[name] = _certify(network_of, images, row, name, plan, quiet, options)
            done.append(f"{row.folder / name} is written")
    click.echo(f"\n{as_text(table(model, rows, images, right))}\n")
    for row in rows:
        for file in ("model.safetensors", "model.json", "history.csv", *row.logs):
            click.echo(f"  {row.folder / file}")
    click.echo("\nnext: " + "\n      ".join(map(shlex.join, next_commands(rows, network, images))))


def _votes(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("n", "alpha")}


def _design(options: Mapping[str, Any]) -> "AdapterDesign":
    from rs_plugins.core.certifying_adapters.design import AdapterDesign

    return AdapterDesign(**{name: options[name] for name in _DESIGN if options[name] is not None})


def _recipe(sigma: float, design: "AdapterDesign", options: Mapping[str, Any]) -> "Recipe":
    from rs_plugins.cli.recipes import parse_method
    from rs_plugins.core.certifying_adapters.job import default_recipe

    method, its = parse_method(options["method"])
    changes = {name: options[name] for name in _CHANGES if options[name] is not None}
    return default_recipe(sigma, kind=design.kind).changed(method=method, options=MappingProxyType(its), **changes)


def _folder(out: Path, sigma: float) -> Path:
    return out / f"sigma-{sigma:g}"


def _check_folder(out: Path, options: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be made or, without ``resume``, holds something of an earlier run, before any work.

    Raises:
        InputError: If it cannot.
        ResultsError: If it does.
    """
    from rs_plugins.core.training.folder import checkpoints_in

    if not out.parent.is_dir():
        raise InputError(f"out: there is no folder {out.parent}")
    for folder in (_folder(out, sigma) for sigma in options["sigmas"]):
        held = [*checkpoints_in(folder), *filter(Path.exists, (folder / name for name in (CERTIFIED, BARE)))]
        if held and not options["resume"]:
            raise ResultsError(f"{held[-1]} is there; to go on use resume (--resume), else choose another folder")


@contextmanager
def _about_the_options() -> Iterator[None]:
    """Add to errors about the classifier which option helps."""
    try:
        yield
    except (InputError, ModelError) as error:
        for beginning, advice in _ADVICE.items():
            if re.match(beginning, str(error)):
                raise type(error)(f"{error}; {advice}") from error.__cause__
        raise


def _train(
    model: "nn.Module",
    network: Mapping[str, Any],
    images: Images,
    sigma: float,
    recipe: "Recipe",
    design: "AdapterDesign",
    out: Path,
    quiet: bool,
    options: Mapping[str, Any],
) -> Row:
    from rs_plugins.core.certifying_adapters.job import adapt_data_set

    folder, bar = _folder(out, sigma), sys.stderr.isatty()
    with _folder_if_used(out):
        adaptation = adapt_data_set(
            *(model, images.train, sigma, folder),
            design=design,
            recipe=recipe,
            network=network,
            after_epoch=None if quiet or bar else partial(_tell, recipe),
            progress=not quiet and bar,
            **{name: options[name] for name in _PASSED_ON},
        )
    if text := kept(sigma, adaptation):
        click.echo(text)
    return Row(sigma=sigma, folder=folder, adaptation=adaptation)


@contextmanager
def _folder_if_used(out: Path) -> Iterator[None]:
    """Make the folder, and take it away again after an error before anything was written into it."""
    out.mkdir(exist_ok=True)
    try:
        yield
    except RSPluginsError:
        with suppress(OSError):
            out.rmdir()
        raise


def _certify(
    model: "nn.Module",
    images: Images,
    row: Row,
    name: str,
    plan: "FixedBudget",
    quiet: bool,
    options: Mapping[str, Any],
) -> "Results":
    from rs_plugins.core.job import certify_data_set

    results = certify_data_set(
        *(model, images.test, row.sigma, row.folder / name),
        plan=plan,
        seed=options["seed"],
        selection=images.chosen,
        resume=options["resume"],
        progress=not quiet and sys.stderr.isatty(),
        device=options["device"],
    )
    if not quiet and not sys.stderr.isatty():
        click.echo(f"{row.folder / name}: {len(results)} images, {results.seconds.sum():.1f} s", err=True)
    return results


def _tell(recipe: "Recipe", epoch: "Epoch") -> None:
    """Say how far it is where no progress bar can."""
    accuracy = "" if epoch.noisy_accuracy is None else f", noisy accuracy {epoch.noisy_accuracy:.1%}"
    where = f"sigma {recipe.sigma:g}, epoch {epoch.epoch}/{recipe.epochs}"
    click.echo(f"{where}: loss {epoch.loss:.4f}{accuracy}, {epoch.seconds:.1f} s", err=True)
