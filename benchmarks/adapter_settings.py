"""How a learning rate does on training images that are held out: a short training each, the accuracy under noise."""

from dataclasses import replace
from typing import Any

import click
import torch
from adapter_methods import WAYS, held_out_images, training_images
from adapter_runs import table
from budgeted_training import Budget, train_within

from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.models import evaluating
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.draws import BlockDraws


@click.command(help=__doc__)
@click.option("--way", type=click.Choice(list(WAYS)), default="image", show_default=True)
@click.option("--rates", default="0.02,0.05,0.1", show_default=True, help="Highest learning rates.")
@click.option("--adam/--sgd", default=None, help="The optimiser.  [that of the way]")
@click.option("--sigma", type=float, default=0.25, show_default=True)
@click.option("--base", type=click.Choice(["resnet20", "resnet56"]), default="resnet20", show_default=True)
@click.option("--budget", type=float, default=50_000, show_default=True, help="Images of a training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def main(way: str, rates: str, adam: bool | None, threads: int, **how: Any) -> None:
    torch.set_num_threads(threads)
    chosen = WAYS[way] if adam is None else replace(WAYS[way], adam=adam)
    rows = []
    for rate in map(float, rates.split(",")):
        with global_randomness(how["seed"]):
            model = chosen.make(how["base"])
        budget, objective = Budget(how["budget"], "images"), chosen.objective(how["sigma"])
        spent = train_within(
            *(budget, model, *training_images(), objective),
            adam=chosen.adam,
            lr=rate,
            threads=threads,
            seed=how["seed"],
        )
        rows.append([f"{rate:g}", f"{spent.loss:.3f}", f"{accuracy(model, how['sigma']):.1%}", f"{spent.seconds:.0f}"])
    click.echo(table(["highest learning rate", "last loss", "accuracy under noise", "seconds"], rows))


def accuracy(model: torch.nn.Module, sigma: float) -> float:
    """Return the share of the held-out images that ``model`` gets right under one draw of noise."""
    x, y = held_out_images()
    right = 0
    with evaluating(model), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(x), 256):
            part = x[first : first + 256]
            e = BlockDraws(0, "held out", first=first, device="cpu").noise(GaussianNoise(sigma), part, 1)
            right += int((noisy_logits(model, part, e)[:, 0].argmax(dim=1) == y[first : first + 256]).sum())
    return right / len(x)


if __name__ == "__main__":
    main()
