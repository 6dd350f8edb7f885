"""From a clean-trained classifier to a certified one: certifying adapters beside other ways, on CIFAR-10 (JPEG q75).

Every way trains for the same number of images, or for the same time, with the settings of `adapter_methods.py`, which
were chosen on held-out training images. Then evenly spaced test images are certified. Stopped at any moment, the same
command goes on; networks and logs are kept in a folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from adapter_methods import WAYS, clean_trained
from adapter_runs import GRID_NOTE, RADII, Run, cells, run_options, table
from budgeted_training import Budget
from machine import Clock, environment, keep

DEFAULT = [name for name in WAYS if name != "lora"]
NOTES = """\
* Beside fine-tuning: difference in ACR from the row "fine-tune" of that sigma, image by image, ± its standard error.
  One training each, so this says nothing of how trainings differ.
* Trained: parameters that are trained, and their number as a share of those of the clean-trained network. Pass: the
  time of a forward pass, as a multiple of that network's.
* Seconds: of the steps of training alone. Learning rates were chosen by a few trials on 2,000 training images that are
  held out here (`adapter_settings.py`); the clean-trained network, which is somebody else's, has seen them.
  That a copy and a gate do better was first seen on the first 2,000 test images, 100 of which are among these 500.
* image: a copy of the extractor, trained on, added to gated features; image-added: without gate; image-fresh: a network
  of 16 to 128 channels with initial weights, gated; image-paper: the same added, with a fresh head and Adam, the layout
  of Deng et al. (2024), much smaller and with much less training; feature: a bottleneck on the features.
* denoised: a DnCNN of 6 layers and 32 channels (17 and 64 in the paper) before the frozen network, by three objectives.
"""


@click.command(help=__doc__)
@click.option("--sigma", "sigmas", type=float, multiple=True, default=(0.12, 0.25, 0.5), show_default=True)
@click.option("--ways", default=",".join(DEFAULT), show_default=True, help="With commas between; also lora, by peft.")
@run_options(budget=100_000, images=500)
def main(
    sigmas: Sequence[float], ways: str, budget: float, unit: str, out: Path | None, folder: Path, **how: Any
) -> None:
    torch.set_num_threads(how["threads"])
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(name=name, way=WAYS[name], sigma=sigma, budget=Budget(budget, unit), folder=folder, **how)
        for sigma in sigmas
        for name in ways.split(",")
    ]
    rows = []
    for run in runs:
        run.train()
        rows.append(run.certified())
    compare(rows)
    clock = Clock(how["device"], how["threads"])
    made = {**environment("compare_adapters.py", clock), **how, "budget": f"{budget:g} {unit}"}
    text = markdown(made, rows, sum(parameter.numel() for parameter in clean_trained(how["base"]).parameters()))
    click.echo(text)
    if out is not None:
        keep(out, text, {"made": made, "rows": rows})


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Put into each row its difference in ACR from fine-tuning, and its standard error, in place of the radii."""
    tuned = {row["sigma"]: row["radii"] for row in rows if row["way"] == "fine-tune"}
    for row in rows:
        radii = row.pop("radii")
        if row["sigma"] in tuned:
            less = radii - tuned[row["sigma"]]
            row["beside_fine_tuning"] = [float(less.mean()), float(np.std(less, ddof=1) / len(less) ** 0.5)]


def markdown(made: dict[str, Any], rows: Sequence[dict[str, Any]], whole: int) -> str:
    head = [
        "sigma",
        "way",
        "trained",
        "pass",
        "images seen",
        "seconds",
        *(f"{r:g}" for r in RADII),
        "ACR",
        "beside fine-tuning",
    ]
    lines = [
        [
            *(f"{row['sigma']:g}", row["way"], f"{row['trained']:,} ({row['trained'] / whole:.0%})"),
            f"{row['pass']:.2f}",
            *([f"{row['images']:,}", f"{row['seconds']:.0f}"] if "images" in row else ["", ""]),
            *cells(row),
            "{:+.3f} ± {:.3f}".format(*row["beside_fine_tuning"]) if "beside_fine_tuning" in row else "",
        ]
        for row in rows
    ]
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    return f"# Certifying adapters beside other ways\n\n{about}\n\n{table(head, lines)}\n\n{GRID_NOTE}{NOTES}"


if __name__ == "__main__":
    main()
