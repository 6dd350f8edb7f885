"""From a clean-trained classifier to a certified one: certifying adapters beside other ways, on CIFAR-10 (JPEG q75).

Every way trains for the same number of images, or for the same time, with the settings of `adapter_methods.py`, which
were chosen on held-out training images. Then evenly spaced test images are certified. Stopped at any moment, the same
command goes on; networks and logs are kept in a folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from adapter_methods import PLACE, WAYS, training_images
from budgeted_training import Budget, train_within
from machine import Clock, environment
from safetensors.torch import save_file
from torch import nn

from rs_plugins.core.certification import Certificate
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import DataSet, spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results import Results
from rs_plugins.core.training.trained import plain_tensors

HERE = Path(__file__).parent
RADII = (0.0, 0.25, 0.5, 0.75)
NOTES = """\
* Certified accuracy in % at each radius, in pixels, and ACR, each ± the standard error over images. Certified by
  sequential tests on a grid of radii, the four above and multiples of sigma/8 as far as the votes reach; what counts is
  the largest of the grid that is certified, so ACR is about sigma/16 lower than with a bound on the same votes.
* Beside fine-tuning: difference in ACR from the row "fine-tune" of that sigma, image by image, ± its standard error.
* Trained: parameters that are trained, and their number as a share of those of the clean-trained network.
* Seconds: of the steps of training alone. Settings of each way were chosen on 2,000 held-out training images.
* Computed in bfloat16, trained in mixed precision; it is the classifier in bfloat16 that is certified.
"""


@click.command(help=__doc__)
@click.option("--base", type=click.Choice(["resnet20", "resnet56"]), default="resnet20", show_default=True)
@click.option("--sigma", "sigmas", type=float, multiple=True, default=(0.12, 0.25, 0.5), show_default=True)
@click.option("--ways", default=",".join(WAYS), show_default=True, help="Names with commas between.")
@click.option("--budget", type=float, default=200_000, show_default=True)
@click.option("--unit", type=click.Choice(["images", "seconds"]), default="images", show_default=True)
@click.option("--images", type=int, default=500, show_default=True, help="Test images to certify.")
@click.option("--n", type=int, default=10_000, show_default=True, help="The most votes an image.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--train-only", is_flag=True, help="Certify later.")
@click.option("--folder", type=click.Path(path_type=Path), default=HERE / "cache" / "adapters", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Without ending; a table and its figures.")
def main(
    sigmas: Sequence[float],
    ways: str,
    budget: float,
    unit: str,
    out: Path | None,
    train_only: bool,
    threads: int,
    folder: Path,
    **how: Any,
) -> None:
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    how |= {"budget": Budget(budget, unit), "threads": threads}
    runs = [(name, sigma) for sigma in sigmas for name in ways.split(",")]
    for name, sigma in runs:
        train(name, sigma, folder, how)
    if train_only:
        return
    test = spaced_images(open_data_set(PLACE), how["images"])
    rows = [certified(name, sigma, test, folder, how) for name, sigma in runs]
    compare(rows)
    clock = Clock(how["device"], threads)
    made = {**environment("compare_adapters.py", clock), **how, "budget": str(how["budget"])}
    text = markdown(made, rows)
    click.echo(text)
    if out is not None:
        out.with_suffix(".md").write_text(text)
        out.with_suffix(".json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


def place_of(name: str, sigma: float, folder: Path, how: dict[str, Any]) -> Path:
    """Return where a trained network is kept, without ending."""
    if not WAYS[name].trained:
        return folder / f"{how['base']}-{name}"
    return folder / f"{how['base']}-{name}-sigma-{sigma:g}-{how['budget']}-seed-{how['seed']}"


def made_network(name: str, how: dict[str, Any]) -> nn.Module:
    """Return the network of a way before training, made from the seed."""
    with global_randomness(how["seed"]):
        return WAYS[name].make(how["base"])


def train(name: str, sigma: float, folder: Path, how: dict[str, Any]) -> None:
    """Train the network of a way, unless that is done."""
    way, place = WAYS[name], place_of(name, sigma, folder, how)
    if not way.trained or place.with_suffix(".json").exists():
        return
    model, images = made_network(name, how), training_images()
    spent = train_within(
        *(how["budget"], model, *images, way.objective(sigma)),
        adam=way.adam,
        lr=way.lr,
        device=how["device"],
        threads=how["threads"],
        seed=how["seed"],
        title=place.name,
    )
    save_file(plain_tensors(model.state_dict()), place.with_suffix(".safetensors"))
    place.with_suffix(".json").write_text(json.dumps(vars(spent)))


def certified(name: str, sigma: float, test: DataSet, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table: the figures of a way at ``sigma``."""
    place = place_of(name, sigma, folder, how)
    model, before = made_network(name, how), made_network("bare", how)
    spent: dict[str, float] = {}
    if WAYS[name].trained:
        load_weights(model, place.with_suffix(".safetensors"))
        spent = json.loads(place.with_suffix(".json").read_text())

    def wrong(certificate: Certificate) -> bool:
        return certificate.guess != int(test.labels[certificate.index])  # it counts as not certified in any case

    clock = Clock(how["device"], how["threads"])
    start = clock()
    results = certify_data_set(
        model.to(how["device"]).eval(),
        test,
        sigma,
        folder / f"{place.name}-certified-{sigma:g}-{how['images']}-images-{how['n']}-votes.tsv",
        plan=OnGrid(radii=grid(sigma), n=how["n"]),
        dtype=torch.bfloat16,
        channels_last=True,
        watch=wrong,
        resume=True,
        progress=True,
    )
    click.echo(f"{place.name}: certified in {clock() - start:.0f} s")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if WAYS[name].trained else 0
    return {
        "sigma": sigma,
        "way": name,
        "trained": trained,
        "share": trained / sum(parameter.numel() for parameter in before.parameters()),
        **spent,
        **figures(results),
    }


def grid(sigma: float) -> tuple[float, ...]:
    """Return the radii of the tables, and multiples of sigma/8 as far as 10,000 votes reach."""
    return tuple(sorted({*(r for r in RADII if r < 3.1 * sigma), *(sigma * k / 8 for k in range(25))}))


def figures(results: Results) -> dict[str, Any]:
    """Return ACR and certified accuracy, with standard errors, and the mean number of votes."""
    radius = np.where(results.correct, results.radius, 0.0)
    right = [results.correct & (results.radius >= r) for r in RADII]
    count = len(results)
    return {
        "images_certified": count,
        "acr": float(radius.mean()),
        "acr_error": float(radius.std(ddof=1) / count**0.5),
        "certified": [100 * float(one.mean()) for one in right],
        "certified_error": [100 * float((one.mean() * (1 - one.mean()) / count) ** 0.5) for one in right],
        "votes": float(np.mean(results.samples)),
        "radii": radius.tolist(),
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Put into each row its difference in ACR from fine-tuning, and its standard error, in place of the radii."""
    tuned = {row["sigma"]: np.array(row["radii"]) for row in rows if row["way"] == "fine-tune"}
    for row in rows:
        radii = np.array(row.pop("radii"))
        if row["sigma"] in tuned:
            less = radii - tuned[row["sigma"]]
            row["beside_fine_tuning"] = [float(less.mean()), float(less.std(ddof=1) / len(less) ** 0.5)]


def markdown(made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    head = ["sigma", "way", "trained", "images seen", "seconds", *(f"{radius:g}" for radius in RADII), "ACR"]
    head += ["beside fine-tuning"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['sigma']:g}", row["way"], f"{row['trained']:,} ({row['share']:.0%})"]
        cells += [f"{row['images']:,}", f"{row['seconds']:.0f}"] if "images" in row else ["", ""]
        pairs = zip(row["certified"], row["certified_error"], strict=True)
        cells += [f"{share:.1f} ± {error:.1f}" for share, error in pairs]
        cells += [f"{row['acr']:.3f} ± {row['acr_error']:.3f}"]
        cells += ["{:+.3f} ± {:.3f}".format(*row["beside_fine_tuning"]) if "beside_fine_tuning" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    return f"# Certifying adapters beside other ways\n\n{about}\n\n" + "\n".join(lines) + f"\n\n{NOTES}"


if __name__ == "__main__":
    main()
