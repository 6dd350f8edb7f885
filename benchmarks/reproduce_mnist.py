"""Trains the papers' MNIST networks, certifies them, and puts our figures beside theirs.

Training and certification are jobs in a folder: stopped at any moment, the same command goes on. --epochs shortens a
recipe with all that it counts in epochs (drops of the learning rate, warm-up) in the same proportion, --train-images
takes so many, evenly spaced; both are in the table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from certify_networks import DATA
from control_variates import acr_of_all_images
from machine import Clock, environment, keep
from published_mnist import PUBLISHED

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.table import Results
from rs_plugins.core.selection import Selection
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.presets import PRESETS
from rs_plugins.core.training.trained import load_trained

HERE = Path(__file__).parent
NAMES = [name for name, recipe in PRESETS.items() if "-mnist-" in name and recipe.sigma is not None]
PLACE = f"mnist:{DATA / 'MNIST'}"
NOTES = """\
* ACR: of the certified images, with the 95 % interval over such images.
* ACR of all images: estimated from those and the published radii of two other networks on all 10,000 (see
  `control_variates.py`), ± the standard error over images. Published: the mean of 5 networks, ± the standard deviation.
* With n votes no radius is above sigma · Φ⁻¹(0.001^(1/n)), at sigma 0.5 that is 1.60 with 10,000 and 1.91 with the
  100,000 of the published figures: with fewer votes radii near the cap, and their mean, are smaller.
* Certified accuracy in % at each radius. Times: training alone, and certification, on this machine beside other work.
"""
STEP = 0.25  # between the radii of the papers' tables


@click.command(help=__doc__)
@click.option("--presets", default=",".join(NAMES), help="Names with commas between; all of MNIST if not given.")
@click.option("--epochs", type=int, default=90, show_default=True)
@click.option("--train-images", type=int, default=60_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--skip", type=int, default=1, show_default=True, help="Certify each skip-th test image.")
@click.option("--n", type=int, default=100_000, show_default=True, help="Votes an image.")
@click.option("--precision", type=click.Choice(["32-true", "bf16-mixed"]), default="32-true", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--train-only", is_flag=True, help="Certify later.")
@click.option("--folder", type=click.Path(path_type=Path), default=HERE / "cache" / "mnist", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Without ending; a table and its figures.")
def main(presets: str, out: Path | None, train_only: bool, threads: int, folder: Path, **how: Any) -> None:
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    names = presets.split(",")
    for name in names:
        train(name, folder, how)
    if train_only:
        return
    rows = [certified(name, folder, how) for name in names]
    made = {**environment("reproduce_mnist.py", Clock(how["device"], threads)), "clock": "wall clock", **how}
    text = markdown(made, rows)
    click.echo(text)
    if out is not None:
        keep(out, text, {"made": made, "rows": rows})


def run_of(name: str, folder: Path, how: dict[str, Any]) -> Path:
    """Return the folder of a training run."""
    parts = (name, f"{how['epochs']}-epochs", f"{how['train_images']}-images", how["precision"], f"seed-{how['seed']}")
    return folder / "-".join(parts)


def train(name: str, folder: Path, how: dict[str, Any]) -> None:
    """Train a network by the preset ``name``, or go on with it, unless that is done."""
    if (run_of(name, folder, how) / "model.json").is_file():
        return
    recipe = PRESETS[name].shortened(how["epochs"])
    network = {"name": recipe.architecture, "seed": how["seed"]}
    train_data_set(
        *(make_network(**network), spaced_images(open_data_set(PLACE, split="train"), how["train_images"]), recipe),
        run_of(name, folder, how),
        network=network,
        validation=spaced_images(open_data_set(PLACE), 1000),
        seed=how["seed"],
        device=how["device"],
        precision=how["precision"],
        channels_last=True,
        resume=True,
        progress=True,
    )


def certified(name: str, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table: our figures of the preset ``name``, and the published ones."""
    run = run_of(name, folder, how)
    trained = load_trained(run)
    results = certify_data_set(
        trained.model.to(how["device"]),
        open_data_set(PLACE),
        trained.sigma,
        run / f"certified-every-{how['skip']}-{how['n']}-votes.tsv",
        plan=FixedBudget(n=how["n"]),
        selection=Selection(skip=how["skip"]),
        seed=how["seed"],
        channels_last=True,
        resume=True,
        progress=True,
    )
    lines = (run / "history.csv").read_text().splitlines()
    seconds = sum(float(line.rsplit(",", 1)[1]) for line in lines[1:])
    return {
        "preset": name,
        "acr": results.average_certified_radius,
        "acr_interval": results.average_certified_radius_interval(),
        "acr_of_all_images": acr_of_all_images(results),
        "certified": at_radii(results, len(PUBLISHED[name].certified)),
        "abstention": results.abstention,
        "images": len(results),
        "training_seconds": seconds,
        "certification_seconds": float(results.seconds.sum()),
        "published": PUBLISHED[name]._asdict(),
    }


def at_radii(results: Results, count: int) -> list[float]:
    """Return certified accuracy in % at 0, 0.25, …."""
    return [100 * float(share) for share in results.certified_accuracy([STEP * place for place in range(count)])]


def markdown(made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["certified"]) for row in rows)
    radii = [f"{STEP * place:g}" for place in range(width)]
    head = ["network", "ACR", "ACR of all images", *radii, "abstentions", "training", "certification"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["acr_interval"]
        ours = [f"{row['preset']}, here", f"{row['acr']:.3f} ({low:.3f} to {high:.3f})"]
        ours += ["{:.3f} ± {:.3f}".format(*row["acr_of_all_images"]) if row["acr_of_all_images"] else ""]
        ours += padded([f"{share:.1f}" for share in row["certified"]], width)
        ours += [f"{100 * row['abstention']:.1f} %", f"{row['training_seconds']:.0f} s"]
        ours += [f"{row['certification_seconds']:.0f} s"]
        paper = row["published"]
        theirs = ["published", "", f"{paper['acr']:.3f} ± {paper['spread']:.4f}"]
        theirs += [*padded([f"{share:.1f}" for share in paper["certified"]], width), "", "", ""]
        lines += [f"| {' | '.join(ours)} |", f"| {' | '.join(theirs)} |"]
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    return f"# MNIST: ours beside the published figures\n\n{about}\n\n" + "\n".join(lines) + f"\n\n{NOTES}"


def padded(cells: list[str], width: int) -> list[str]:
    return cells + [""] * (width - len(cells))


if __name__ == "__main__":
    main()
