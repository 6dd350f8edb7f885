"""``rs-plugins train``: a network trained for certification, into a folder."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.model_errors import plain_model_errors
from rs_plugins.cli.noise import noise_option
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
from rs_plugins.cli.recipes import choose_recipe
from rs_plugins.cli.tables import as_text
from rs_plugins.cli.training_data import open_training_data
from rs_plugins.cli.training_words import PICTURE, best, next_command, show_files, table, tell, title, trained_for
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning

if TYPE_CHECKING:
    from rs_plugins.core.training.recipe import Recipe

_PASSED_ON = ("seed", "precision", "channels_last", "workers", "keep", "keep_best", "resume")


def _list_presets(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from rs_plugins.core.training.presets import PRESETS

    rows = [
        [
            *(name, trained_for(name, recipe), recipe.architecture),
            *map(str, (recipe.epochs, recipe.batch_size, recipe.parts, f"{recipe.lr:g}")),
        ]
        for name, recipe in PRESETS.items()
    ]
    click.echo(as_text([["preset", "trained for", "arch", "epochs", "batch size", "parts", "lr"], *rows]))
    context.exit()


def _list_methods(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from rs_plugins.cli.recipes import describe_methods

    click.echo(describe_methods())
    context.exit()


def _parse_milestones(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected epochs with commas between, such as 50,60, got {text!r}") from None


@click.command(
    epilog="Examples: rs-plugins train --preset smoothmix-mnist-0.5 --data mnist:data --out run; rs-plugins train "
    "--method smoothadv:attack=ddn,eps=0.5,samples=2 --sigma 0.25 --arch resnet20 --data cifar10:data --out run; "
    "rs-plugins train --preset gls-mnist-0.1-crown-ibp --data mnist:data --out run; "
    "torchrun --nproc-per-node 2 -m rs_plugins train ..."
)
@click.option(
    "--method",
    metavar="NAME[:OPTION=VALUE,...]",
    help="gaussian, stability, stability-rs4a, stability-confseq, smoothadv, smoothmix, consistency or macer, such as "
    "smoothmix:steps=4,w_mix=5 or smoothadv:attack=pgd,eps=0.5,steps=10,samples=4; without --sigma: gls, such as "
    "gls:eps=0.1,bound=crown-ibp,gradient=rgs, and sat, such as sat:eps=8/255,steps=2.",
)
@click.option(
    "--methods", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods, help="Explain them and stop."
)
@click.option("--sigma", type=float, help="Noise, in pixels of [0, 1]; beside --method, but for gls and sat.")
@noise_option(trained=False)
@click.option("--preset", metavar="NAME", help="Instead of both: a paper's recipe, such as smoothmix-mnist-0.5.")
@click.option(
    "--presets", is_flag=True, is_eager=True, expose_value=False, callback=_list_presets, help="List them and stop."
)
@data_option
@image_size_option
@click.option("--train-images", type=int, help="Train on so many images only, evenly spaced.")
@click.option(
    *("--out", "out"),
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder to write: model.safetensors, model.json, history.csv, training.png, checkpoints.",
)
@click.option("--resume", is_flag=True, help="Go on with the folder if it has checkpoints.")
@click.option(
    *("--arch", "architecture"),
    metavar="NAME",
    help="lenet, resnet20, resnet56, resnet110, cnn3, cnn5, cnn7, PACKAGE.MODULE:FUNCTION, torchvision.NAME, "
    "timm.NAME, or NAME of either.  [the preset's, else lenet]",
)
@click.option(
    "--activation",
    metavar="NAME[:OPTION=VALUE,...]",
    help="Put it in the place of ReLU: silu, gelu, elu, celu, softplus, mish, smooth-relu or parametric-softplus, such "
    "as celu:alpha=0.5; relu-attack-grad, relu-update-grad or relu-both-grads give ReLU a smooth gradient there.  [the "
    "preset's, else relu]",
)
@click.option(
    "--normalise",
    type=click.Choice(["none", "data", "cifar10", "imagenet"]),
    help="Whose mean and standard deviation the first layer has; data: those of the training images.  [the preset's, "
    "else none]",
)
@click.option(
    "--initial",
    type=click.Choice(["default", "ibp", "zero-residual"]),
    help="Initial weights: those of the layers; Shi et al.'s for training by interval bounds; or scales of 0 at the "
    "ends of residual blocks.  [the preset's, else default]",
)
@click.option("--weights", type=click.Path(path_type=Path), help="Begin with these: safetensors, or tensors of torch.")
@click.option(
    "--replace-head", is_flag=True, help="With --weights: put a fresh layer in the place of the last linear one."
)
@click.option("--weights-classes", type=int, help="With --replace-head: classes in --weights.  [those of --data]")
@click.option(
    "--epochs",
    type=int,
    help="Passes over the data; beside a preset, its --lr-step and warm-up change in proportion.  [the preset's, else "
    "90]",
)
@click.option("--batch-size", type=int, help="Images per batch.  [the preset's, else 256]")
@click.option("--parts", type=int, help="Cut a batch into so many, a step of its own each.  [the preset's, else 1]")
@click.option(
    *("--optimizer", "algorithm"),
    type=click.Choice(["sgd", "adam", "adamw"]),
    help="What takes the steps, with parameters that are to be trained alone.  [the preset's, else sgd]",
)
@click.option("--lr", type=float, help="Learning rate.  [the preset's, else 0.01]")
@click.option(
    "--schedule",
    type=click.Choice(["step", "milestones", "cosine"]),
    help="How the learning rate falls: by --lr-factor every --lr-step epochs, after each of --lr-milestones, or along "
    "half a cosine over --epochs.  [the preset's, else step]",
)
@click.option("--lr-step", type=int, help="Epochs after which it drops, each time.  [the preset's, else 30]")
@click.option(
    "--lr-milestones", metavar="E,E,...", callback=_parse_milestones, help="Epochs after which it drops, such as 50,60."
)
@click.option("--lr-factor", type=float, help="By what it is multiplied then.  [the preset's, else 0.1]")
@click.option(
    "--lr-drop",
    type=click.Choice(["documented", "reference"]),
    help="After --lr-step epochs, or one epoch later as in the code of Jeong et al.  [the preset's, else documented]",
)
@click.option(
    "--lr-warmup", type=int, help="Let it rise in a straight line for so many epochs first.  [the preset's, else 0]"
)
@click.option("--momentum", type=float, help="Momentum of sgd.  [the preset's, else 0.9]")
@click.option("--nesterov/--no-nesterov", default=None, help="Whether it is Nesterov's.  [as the preset, else not]")
@click.option("--weight-decay", type=float, help="Weight decay.  [the preset's, else 0.0001]")
@click.option(
    "--weight-decay-of",
    type=click.Choice(["all", "weights"]),
    help="Let all parameters decay, or the weights of linear and convolutional layers alone.  [the preset's, else all]",
)
@click.option(
    "--gradient-clip", type=float, help="Scale gradients down to this l2 norm.  [the preset's, else as they are]"
)
@click.option(
    "--augment/--no-augment", default=None, help="Crop and flip images at random.  [as the preset, else no-augment]"
)
@click.option("--extra", metavar="FORMAT[:PLACE]", help="More images to train on, such as ones with pseudo-labels.")
@click.option("--extra-weight", type=float, help="By what the loss of --extra is multiplied.  [1.0]")
@click.option(
    "--validation",
    metavar="FORMAT[:PLACE]",
    help="Measure an accuracy on these after each epoch: under one noise draw, for gls certified by its own bound, for "
    "sat under an attack.  [the part test of --data, if any]",
)
@click.option("--validation-images", type=int, help="So many of them, evenly spaced; 0: none.  [1000]")
@click.option(
    "--held-out",
    type=int,
    help="In place of --validation: measure on so many images of --data, evenly spaced, and do not train on them.",
)
@click.option(
    "--keep-best",
    is_flag=True,
    help="End with the epoch that is best on the images of --held-out or --validation, not with the last.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, order, noise and augmentation.")
@device_option
@click.option(
    "--precision",
    type=click.Choice(["32-true", "bf16-mixed"]),
    default="32-true",
    show_default=True,
    help="bf16-mixed is faster on hardware that has bfloat16.",
)
@click.option(
    "--channels-last/--no-channels-last",
    default=False,
    show_default=True,
    help="Lay the weights out with the channels last; may be faster.",
)
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that read images ahead.")
@click.option("--keep", type=int, default=2, show_default=True, help="How many checkpoints to keep, the latest ones.")
@quiet_option
def train(out: Path, quiet: bool, **options: Any) -> None:
    """Train a network for certification into a folder, with a checkpoint after each epoch.

    Stopped at any moment and started again with --resume, the job goes on; on a CPU the weights become those of an
    uninterrupted run, bit for bit. It refuses a folder of another run, but that --epochs may have become more (beside
    a preset or --schedule cosine it changes the recipe, and may not).

    Started by torchrun, all processes train one network together, on the batches that a single one would have.

    The folder is a model: rs-plugins certify --model DIR, and rs_plugins.load_trained in Python. The current folder is
    on the path, so a network defined in mynets.py there is mynets:FUNCTION; certify and attack call it for a folder
    with --trust-model. The same job in Python is rs_plugins.core.training.job.train_data_set.
    """
    try:
        with plain_warnings(shown=_first_process()), plain_model_errors():
            _run(out, quiet, **options)
    except KeyboardInterrupt:
        if _first_process():
            click.echo(f"\nstopped; {_written(out)}; go on with the same command and --resume", err=True)
        sys.exit(INTERRUPTED)


def _run(out: Path, quiet: bool, **options: Any) -> None:
    from rs_plugins.core.models import check_device
    from rs_plugins.core.training.initial import describe_network, initial_network
    from rs_plugins.core.training.job import train_data_set

    recipe, device = _recipe(options), check_device(options["device"] or default_device())
    drawn = find_spec("matplotlib") is not None
    if not drawn:
        warnings.warn(f"{PICTURE} needs matplotlib: pip install 'rs-plugins[plots]'", RSPluginsWarning, stacklevel=1)
    find_modules_here()
    data = open_training_data(options)
    with _about_the_network(recipe.architecture):
        network = describe_network(
            *(data.whole, recipe.architecture),
            normalise=recipe.normalise,
            activation=recipe.activation,
            activation_options=recipe.activation_options,
            seed=options["seed"],
        )
        of_weights = _classes_in_weights(options, network)
        model = initial_network(network, options["weights"], classes=of_weights, initial=recipe.initial)
        if _first_process():
            click.echo(title(recipe, model, data.chosen))
        history = train_data_set(
            *(model, data.chosen, recipe, out),
            network=network,
            extra=data.extra,
            extra_weight=_weight_of_extra(options),
            validation=data.validation,
            device=device,
            after_epoch=None if quiet or sys.stderr.isatty() else partial(tell, recipe.epochs),
            progress=not quiet and sys.stderr.isatty(),
            **{name: options[name] for name in _PASSED_ON},
        )
    if _first_process():
        click.echo(f"\n{table(history)}\n{best(history) if options['keep_best'] else ''}")
        show_files(out, history, drawn=drawn)
        click.echo(f"\nnext: {next_command(out, recipe, options)}")


def _recipe(options: Mapping[str, Any]) -> "Recipe":
    """Return the recipe, which has no say in the initial weights beside ``weights``."""
    recipe = choose_recipe(options)
    if options["weights"] is None:
        return recipe
    if options["initial"] not in (None, "default"):
        raise InputError(f"initial: expected --weights or --initial {options['initial']}, got both")
    return recipe.changed(initial="default")


@contextmanager
def _about_the_network(architecture: str) -> Iterator[None]:
    """Add to errors that images do not fit a network how to choose another one."""
    try:
        yield
    except (InputError, ModelError) as error:
        if str(error).startswith(("channels:", "model: it fails on")):
            raise type(error)(f"{error}; --arch {architecture} is not for such images, choose another") from None
        raise


def _weight_of_extra(options: Mapping[str, Any]) -> float:
    weight: float | None = options["extra_weight"]
    if weight is not None and options["extra"] is None:
        raise InputError("extra_weight: expected --extra beside it, got none")
    return 1.0 if weight is None else weight


def _classes_in_weights(options: Mapping[str, Any], network: Mapping[str, Any]) -> int | None:
    """Return the number of classes of the network in the file of weights if its head is to be replaced."""
    if not options["replace_head"]:
        if options["weights_classes"] is not None:
            raise InputError("weights_classes: only with --replace-head, got it without")
        return None
    if options["weights"] is None:
        raise InputError("replace_head: expected --weights beside it, got none")
    return network["classes"] if options["weights_classes"] is None else int(options["weights_classes"])


def _first_process() -> bool:
    """Whether this is the one of the processes started by torchrun that speaks, or was not started by it."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def _written(out: Path) -> str:
    if not out.is_dir():
        return "nothing is trained yet"
    from rs_plugins.core.training.folder import checkpoints_in

    places = checkpoints_in(out)
    return f"the last checkpoint is {places[-1]}" if places else "there is no checkpoint yet"
