"""SmoothAdv training (Salman et al. 2019) with ReLU and with smooth activations: certified accuracy at equal images.

A ResNet-20 with initial weights, CIFAR-10 (JPEG), PGD of two steps on two noise draws within 0.5 (l2), a budget of
images (`budgeted_training.py`); the networks differ in the activation alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from adapter_methods import SHAPE, Way
from adapter_runs import GRID_NOTE, RADII, Run, cells, run_options, table
from budgeted_training import Budget
from machine import Clock, environment, keep
from torch import nn
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.smoothadv import SmoothAdv

STEPS, SAMPLES, EPS = 2, 2, 0.5


def network(base: str, activation: str) -> nn.Module:
    """Return ``base`` with initial weights and ``activation``."""
    return make_network(base, activation=activation, shape=SHAPE, **STATISTICS["imagenet"]._asdict())


def objective(sigma: float) -> Objective:
    """Return SmoothAdv at ``sigma``, with the whole attack from the first step on."""
    return SmoothAdv(sigma, attack=PGD(eps=EPS, steps=STEPS), samples=SAMPLES, warmup=1)


@click.command()
@click.option("--activations", default="relu,silu", show_default=True, help="With commas between.")
@click.option("--sigma", default=0.25, show_default=True, help="Standard deviation of the noise, in pixels.")
@click.option("--seeds", default=1, show_default=True, help="How many, from --seed.")
@run_options(budget=30_000, images=500)
def main(
    activations: str,
    sigma: float,
    seeds: int,
    base: str,
    budget: float,
    unit: str,
    seed: int,
    out: Path | None,
    **options: Any,
) -> None:
    """Train with each activation and seed, certify, and print the table; what is done is not done again."""
    torch.set_num_threads(options["threads"])
    options["folder"].mkdir(parents=True, exist_ok=True)
    runs = [
        Run(
            name=f"smoothadv-{activation}",
            way=Way(make=partial(network, activation=activation), objective=objective, lr=0.1),
            sigma=sigma,
            base=base,
            budget=Budget(budget, unit),
            seed=each,
            **options,
        )
        for each in range(seed, seed + seeds)
        for activation in activations.split(",")
    ]
    rows = []
    for run in tqdm(runs, unit="network"):
        run.train()
        rows.append(run.certified() | {"seed": run.seed})
    made = environment("compare_sat_smoothadv.py", Clock(options["device"], options["threads"]))
    head = ["activation", "seed", *map(str, RADII), "ACR", "s of training", "a pass, clean ReLU network's = 1"]
    lines = [
        [
            *(row["way"].removeprefix("smoothadv-"), str(row["seed"])),
            *cells(row),
            f"{row['seconds']:.0f}",
            f"{row['pass']:.2f}",
        ]
        for row in rows
    ]
    parts = ["\n".join(f"{key}: {value}  " for key, value in made.items()), table(head, lines), GRID_NOTE.strip()]
    text = "\n\n".join([*parts, (__doc__ or "").strip()]) + "\n"
    click.echo(text)
    if out is not None:
        figures = [{key: value for key, value in row.items() if key != "radii"} for row in rows]
        keep(out, text, {"made": made, "rows": figures})


if __name__ == "__main__":
    main()
