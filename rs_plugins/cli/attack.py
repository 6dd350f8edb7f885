"""``rs-plugins attack``: an attack on a smoothed classifier, judged by many votes."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.model_errors import plain_model_errors
from rs_plugins.cli.noise import chosen_family, noise_option
from rs_plugins.cli.options import (
    INTERRUPTED,
    default_device,
    device_option,
    find_modules_here,
    load_network,
    model_options,
    open_data,
    quiet_option,
    range_options,
)
from rs_plugins.cli.plain_warnings import plain_warnings
from rs_plugins.errors import ResultsError, RSPluginsWarning

if TYPE_CHECKING:
    from rs_plugins.core.attacks.job import AttackedImages
    from rs_plugins.core.data_sets.data_set import DataSet

_PICTURE = "attack.png"


@click.command(
    epilog="Example: rs-plugins attack --model mynets:resnet20 --weights resnet20.safetensors --data cifar10:data "
    "--sigma 0.25 --attack SmoothAdvPGD:eps=0.5,steps=20 --skip 20 --out attacked"
)
@model_options
@noise_option(trained=True)
@click.option(
    "--attack",
    required=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Such as SmoothAdvPGD:eps=0.5,steps=20, art.SmoothAdvPGD or torchattacks.PGDL2:eps=0.5.",
)
@click.option(
    "--on",
    type=click.Choice(["smoothed", "base"]),
    default="smoothed",
    show_default=True,
    help="What the attack is given: the smoothed classifier, or the base classifier (for attacks that add noise of "
    "their own, as torchattacks.PGDRSL2). It is judged on the smoothed one.",
)
@click.option(
    "--samples",
    type=int,
    default=32,
    show_default=True,
    help="Noise draws of the smoothed classifier that the attack is given. Our attacks have an option samples instead.",
)
@click.option(
    *("--out", "out"),
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder to write: adversarial.npz, evaluation.json, attack.png.",
)
@click.option("--resume", is_flag=True, help="Go on with the folder if it has results.")
@range_options
@click.option("--n", type=int, default=10_000, show_default=True, help="Votes that judge an image, before and after.")
@click.option("--alpha", type=float, default=0.001, show_default=True, help="Chance that such a prediction is wrong.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the intervals over the images.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images attacked at once.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the judge, and of what others' attacks draw."
)
@click.option("--pictures", type=int, default=6, show_default=True, help="Images in attack.png.")
@device_option
@quiet_option
def attack(out: Path, quiet: bool, **options: Any) -> None:
    """Attack a smoothed classifier, and judge it by many noise draws that the attack has not seen.

    Shows accuracy before and after with intervals, abstentions apart, and how far the images were moved. Writes the
    images with their labels to adversarial.npz, which --data npz:DIR/adversarial.npz reads.

    Each finished batch is on disk before the next begins. Stopped at any moment and started again with --resume, the
    job goes on. It refuses a folder of another attack, model, data set, judge, hardware or version, and another
    --batch-size where the attack is not one of ours.

    Attacks are those of rs-plugins list, by full name or its last part, and torchattacks.NAME for every attack of that
    package. The smoothed classifier that they are given has fixed noise draws and returns log-probabilities. The judge
    in Python is rs_plugins.evaluate_attack, the job rs_plugins.core.attacks.job.attack_data_set.
    """
    try:
        with plain_warnings(), plain_model_errors():
            _run(out, not quiet and sys.stderr.isatty(), **options)
    except KeyboardInterrupt:
        click.echo(f"\nstopped; {_written(out)}; go on with the same command and --resume", err=True)
        sys.exit(INTERRUPTED)


def _run(out: Path, progress: bool, **options: Any) -> None:
    from rs_plugins.cli.attacks import parse_attack
    from rs_plugins.core.attacks.job import attack_data_set
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.models import check_device
    from rs_plugins.core.selection import Selection
    from rs_plugins.core.smoothing import SmoothedModel

    named, device = parse_attack(options["attack"]), check_device(options["device"] or default_device())
    selection = Selection(options["start"], options["stop"], options["skip"])
    shown = check_count(options["pictures"], "pictures", least=0)
    if shown and find_spec("matplotlib") is None:
        warnings.warn(f"{_PICTURE} needs matplotlib: pip install 'rs-plugins[plots]'", RSPluginsWarning, stacklevel=1)
        shown = 0
    find_modules_here()
    network, sigma = load_network(options)
    how = {"samples": options["samples"], "family": chosen_family(options)}
    smoothed = SmoothedModel(network.to(device), sigma, **how).eval()
    aimed = named.aimed(smoothed, base=options["on"] == "base")
    data = open_data(options)
    judge = {name: options[name] for name in ("n", "alpha", "confidence", "seed", "batch_size", "resume")}
    settings = {**named.record, "on": options["on"], "samples": options["samples"]}
    found = attack_data_set(
        *(aimed, smoothed, data, out),
        **{
            "settings": settings,
            "batches_matter": not named.ours,
            "selection": selection,
            "device": device,
            "progress": progress,
            **judge,
        },
    )
    click.echo(_report(out, options["attack"], found))
    if shown:
        try:
            _draw(out / _PICTURE, found, data, shown)
        except OSError as error:
            raise ResultsError(
                f"{out / _PICTURE}: cannot be written ({error.strerror or error}); the rest is complete"
            ) from error
        click.echo(f"  {out / _PICTURE}")


def _report(out: Path, name: str, found: "AttackedImages") -> str:
    lines = [f"{name} on {len(found.evaluation)} images\n", f"{found.evaluation}\n"]
    if found.claimed is not None:
        after = found.evaluation.after
        judged = {"another class": after.wrong, "undecided": after.abstained, "still the label": after.correct}
        counts = ", ".join(f"{name} {int((found.claimed & flags).sum())}" for name, flags in judged.items())
        lines.append(f"the attack itself claims {int(found.claimed.sum())} successes; judged: {counts}\n")
    return "\n".join([*lines, *(f"  {out / file}" for file in ("adversarial.npz", "evaluation.json"))])


def _draw(path: Path, found: "AttackedImages", data: "DataSet", most: int) -> None:
    """Draw ``most`` images, successes first."""
    from rs_plugins.plots import AttackedImage, save_attacked_images

    judged = found.evaluation
    rows = sorted(range(len(judged)), key=lambda row: not judged.success[row])[:most]
    clean = data.read([int(judged.indices[row]) for row in rows]).numpy()
    specimens = [
        AttackedImage(
            *(image, found.images[row]),
            label=int(judged.before.label[row]),
            before=int(judged.before.prediction[row]),
            after=int(judged.after.prediction[row]),
            l2=float(judged.l2[row]),
        )
        for image, row in zip(clean, rows, strict=True)
    ]
    save_attacked_images(path, specimens)


def _written(out: Path) -> str:
    if not out.is_dir():
        return "no image is done yet"
    from rs_plugins.core.attacks.folder import count_done

    done = count_done(out)
    return f"{done} {'image is' if done == 1 else 'images are'} in {out}" if done else "no image is done yet"
