"""Three certifying adapters on one extractor, trained at three sigmas: select beside average and route, and its time.

Takes the networks "image" that `compare_adapters.py` has trained with the same options. *select* is checked to give the
certificates of the single networks, count for count, on as many images as --check says.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from adapter_methods import PLACE, WAYS
from adapter_runs import GRID_NOTE, RADII, Run, cells, figures, grid, run_options, table
from budgeted_training import Budget
from machine import Clock, environment, keep
from torch import Tensor, nn

from rs_plugins.core.certification import certify
from rs_plugins.core.certifying_adapters.ensemble import AdapterEnsemble
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid

SIGMAS = (0.12, 0.25, 0.5)
NOTES = """\
* Difference in ACR from *select* at that sigma, image by image, ± its standard error.
* Time of a pass: of 128 images in bfloat16, as a multiple of one pass through the extractor; medians of interleaved
  rounds.
"""


@click.command(help=__doc__)
@click.option("--check", type=int, default=10, show_default=True, help="Images on which counts are compared.")
@click.option("--rounds", type=int, default=7, show_default=True, help="Of the measurement of times.")
@run_options(budget=100_000, images=200)
def main(
    budget: float, unit: str, out: Path | None, folder: Path, check: int, rounds: int, images: int, **how: Any
) -> None:
    torch.set_num_threads(how["threads"])
    runs = [
        Run(
            name="image",
            way=WAYS["image"],
            sigma=sigma,
            budget=Budget(budget, unit),
            folder=folder,
            images=images,
            **how,
        )
        for sigma in SIGMAS
    ]
    singles = [trained(run) for run in runs]
    ensemble = AdapterEnsemble(list(zip(singles, SIGMAS, strict=True))).eval().to(how["device"])
    equal = all(
        same_counts(single, ensemble.at(run.sigma), run, check) for single, run in zip(singles, runs, strict=True)
    )
    rows = [row for run in runs for row in beside(ensemble, run)]
    clock = Clock(how["device"], how["threads"])
    times = passes(ensemble, clock, rounds, how["device"])
    made = {**environment("adapter_ensemble.py", clock), **how, "images": images, "budget": f"{budget:g} {unit}"}
    text = markdown(made, rows, times, f"{'the same' if equal else 'NOT the same'} on {check} images at each sigma")
    click.echo(text)
    if out is not None:
        figures_of = {"made": made, "rows": rows, "passes": times, "same_counts": equal}
        keep(out, text, figures_of)


def trained(run: Run) -> nn.Module:
    """Return the network of a run, training it where that is not done."""
    run.train()
    model = run.network()
    load_weights(model, run.weights)
    return model.eval().to(run.device)


def same_counts(single: nn.Module, member: nn.Module, run: Run, images: int) -> bool:
    """Whether two networks get the same certificates, count for count."""
    x = spaced_images(open_data_set(PLACE), images).read(range(images))
    how = {"plan": FixedBudget(n=1000), "dtype": torch.bfloat16, "channels_last": True}
    found = [list(certify(model, x.to(run.device), run.sigma, **how)) for model in (single, member)]
    first, second = ([(c.prediction, c.radius, c.guess, c.count) for c in one] for one in found)
    return first == second


def beside(ensemble: AdapterEnsemble, run: Run) -> list[dict[str, Any]]:
    """Return the figures of select, average and route at the sigma of ``run``."""
    test = spaced_images(open_data_set(PLACE), run.images)
    modes = {"select": ensemble.at(run.sigma), "average": ensemble.average(), "route": ensemble.route()}
    rows: list[dict[str, Any]] = []
    for mode, model in modes.items():
        results = certify_data_set(
            model,
            test,
            run.sigma,
            run.folder / f"ensemble-{mode}-{run.title}-{run.images}-images-{run.n}-votes.tsv",
            plan=OnGrid(radii=grid(run.sigma), n=run.n),
            dtype=torch.bfloat16,
            channels_last=True,
            watch=lambda certificate: certificate.guess != int(test.labels[certificate.index]),
            resume=True,
            progress=True,
        )
        rows.append({"sigma": run.sigma, "mode": mode, **figures(results)})
    selected = rows[0]["radii"]
    for row in rows:
        less = row.pop("radii") - selected
        row["beside_select"] = [float(less.mean()), float(np.std(less, ddof=1) / len(less) ** 0.5)]
    return rows


def passes(ensemble: AdapterEnsemble, clock: Clock, rounds: int, device: str) -> dict[str, float]:
    """Return the time of a pass of each mode, and of the three members one by one, in passes of the extractor."""
    x = torch.rand(128, 3, 32, 32, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    whole = copy.deepcopy(ensemble).to(torch.bfloat16, memory_format=torch.channels_last).eval()
    members = [whole.at(sigma) for sigma in SIGMAS]
    timed: dict[str, Callable[[Tensor], object]] = {
        "extractor": members[0].extractor,
        "one member": members[0],
        "three members one by one": lambda batch: [member(batch) for member in members],
        "average": whole.average(),
        "route": whole.route(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first one warms up
            for name, run in timed.items():
                start = clock()
                run(x)
                seconds[name].append(clock() - start)
    middle = {name: median(times[1:]) for name, times in seconds.items()}
    return {name: middle[name] / middle["extractor"] for name in timed}


def markdown(made: dict[str, Any], rows: Sequence[dict[str, Any]], times: dict[str, float], counts: str) -> str:
    head = ["sigma", "mode", *(f"{radius:g}" for radius in RADII), "ACR", "beside select"]
    lines = [
        [f"{row['sigma']:g}", row["mode"], *cells(row), "{:+.3f} ± {:.3f}".format(*row["beside_select"])]
        for row in rows
    ]
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    pace = table(["one pass of", "time"], [[name, f"{value:.2f}"] for name, value in times.items()])
    return (
        f"# An ensemble of certifying adapters\n\n{about}\n* counts of select and of single networks: {counts}\n\n"
        f"{table(head, lines)}\n\n{pace}\n\n{GRID_NOTE}{NOTES}"
    )


if __name__ == "__main__":
    main()
