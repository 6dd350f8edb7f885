"""How much the certified radius depends on the settings of a certifying adapter: width × depth × learning rate.

Deng et al. (2024) claim that it does not depend on them much. Each certifying adapter with initial weights of its own
(kind "image") is trained for the same number of images; for comparison a copy of the extractor at some learning rates.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from adapter_methods import SHAPE, Way, adapted, clean_trained
from adapter_runs import GRID_NOTE, RADII, Run, cells, run_options, table
from budgeted_training import Budget
from machine import Clock, environment, keep
from torch import nn

from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.backbones import ImageBackbone
from rs_plugins.core.certifying_adapters.features import split_features
from rs_plugins.core.certifying_adapters.modules import ImageCertifyingAdapter


@click.command(help=__doc__)
@click.option("--sigma", type=float, default=0.25, show_default=True)
@click.option("--widths", default="8,16,32", show_default=True, help="Channels of the first stage.")
@click.option("--blocks", default="1,2", show_default=True, help="In each of four stages.")
@click.option("--rates", default="0.03,0.1", show_default=True, help="Highest learning rates of SGD.")
@click.option("--copy-rates", default="0.02,0.05,0.1", show_default=True, help="The same for the copy.")
@run_options(budget=50_000, images=200)
def main(
    widths: str,
    blocks: str,
    rates: str,
    copy_rates: str,
    budget: float,
    unit: str,
    out: Path | None,
    folder: Path,
    **how: Any,
) -> None:
    torch.set_num_threads(how["threads"])
    folder.mkdir(parents=True, exist_ok=True)
    ways = {
        f"width {width}, blocks {count}, rate {rate:g}": Way(make=partial(fresh, width=width, blocks=count), lr=rate)
        for width, count, rate in product(numbers(widths, int), numbers(blocks, int), numbers(rates, float))
    }
    ways |= {f"copy, rate {rate:g}": Way(make=adapted, lr=rate) for rate in numbers(copy_rates, float)}
    rows = []
    for name, way in ways.items():
        files = name.replace(", ", "-").replace(" ", "-")
        run = Run(name=files, way=way, budget=Budget(budget, unit), folder=folder, **how)
        run.train()
        rows.append({**run.certified(), "way": name})
    clock = Clock(how["device"], how["threads"])
    made = {**environment("adapter_sensitivity.py", clock), **how, "budget": f"{budget:g} {unit}"}
    text = markdown(made, rows)
    click.echo(text)
    if out is not None:
        plain = [{key: value for key, value in row.items() if key != "radii"} for row in rows]
        keep(out, text, {"made": made, "rows": plain})


def numbers(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in text.split(",")] if text else []


def fresh(base: str, *, width: int, blocks: int) -> nn.Module:
    """Return ``base``, frozen, with a network of that width and depth beside it."""
    normalise, network = clean_trained(base)
    split = split_features(network, torch.full((1, *SHAPE), 0.5))
    backbone = ImageBackbone(SHAPE[0], width=width, blocks=blocks)
    adapter = ImageCertifyingAdapter(backbone, split.feature_dim, backbone_dim=backbone.features)
    return AdaptedClassifier(split.extractor, adapter, split.head, normalise=normalise, combine="gated")


def markdown(made: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    head = ["certifying adapter", "trained", "seconds", *(f"{radius:g}" for radius in RADII), "ACR"]
    lines = [[row["way"], f"{row['trained']:,}", f"{row['seconds']:.0f}", *cells(row)] for row in rows]
    spreads = [spread(rows, kind) for kind in ("width", "copy")]
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    text = "\n".join(f"* {line}" for line in spreads if line)
    return f"# Settings of a certifying adapter\n\n{about}\n\n{table(head, lines)}\n\n{text}\n{GRID_NOTE}"


def spread(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Return in words how much ACR differs among the rows of a kind."""
    found = [row["acr"] for row in rows if row["way"].startswith(kind)]
    if len(found) < 2:
        return ""
    return (
        f"ACR of the {len(found)} rows that begin with {kind!r}: {min(found):.3f} to {max(found):.3f}, mean "
        f"{mean(found):.3f}, standard deviation {stdev(found):.3f}"
    )


if __name__ == "__main__":
    main()
