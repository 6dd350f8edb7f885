"""What a step of training costs over the passes that its method needs.

* ours: `train`, the loop itself: set-up, shuffling, reading, noise, attack, loss, backward pass and optimiser.
* floor: the passes alone, written by hand, on noisy images that are there already, in batches of the same size and in
  the same order:
  - a climb: forward, and gradient of the cross-entropy in the noisy images; eval mode, parameters frozen;
  - a look: forward without gradient, in eval mode;
  - a training pass: forward in train mode; all those of a step share one backward pass to the parameters.
  Then one step of the optimiser. No noise, no projections, no loss but the cross-entropy, no data loading.

For n images with m draws each, a step needs
  - gaussian: one training pass of n;
  - stability: two training passes, of n clean and of n noisy images;
  - smoothadv: T climbs and one training pass, of n·m; with DDN also a look at the last image;
  - smoothmix: T climbs and two training passes, of n·m;
  - consistency, macer: one training pass of n·m.

The settings are those of the recipes for MNIST at sigma 0.5, on all networks, in an epoch in which nothing is warming
up and MACER's second term is there. The two take turns, from the same weights; the figure is the median of the ratios.
"""

import copy
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from attack_networks import VICTIMS
from machine import Clock, environment, keep
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from rs_plugins.core.training.inner_attacks import DDN
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.presets import preset
from rs_plugins.core.training.recipe import Recipe

HERE = Path(__file__).parent


class Case(NamedTuple):
    """A method and the passes of one of its steps.

    Attributes:
        objective: The method.
        recipe: Of which it is part.
        draws: Noise draws per image.
        climbs: Passes of n·draws images to the gradient in the images.
        looks: Passes of n·draws images without a gradient.
        trained: Copies of each image in each training pass.
    """

    objective: Objective
    recipe: Recipe
    draws: int
    climbs: int
    looks: int
    trained: tuple[int, ...]

    @property
    def images(self) -> int:
        """Images of a step, in the recipe."""
        return self.recipe.batch_size // self.recipe.parts

    @property
    def needs(self) -> str:
        words = [f"{self.climbs} climbs"] * (self.climbs > 0) + [f"{self.looks} look"] * (self.looks > 0)
        return ", ".join([*words, f"{len(self.trained)} training"])


def case(method: str) -> Case:
    """Return the case of that name, one of ``METHODS``."""
    recipe = preset(f"{method.partition('-')[0]}-mnist-0.5")
    objective: Any = recipe.objective()
    if method == "smoothadv-ddn":
        objective = replace(objective, attack=DDN(eps=objective.attack.eps, steps=objective.attack.steps))
    draws = objective.samples
    climbs = {"smoothadv-pgd": 10, "smoothadv-ddn": 10, "smoothmix": 4}.get(method, 0)
    trained = {"stability": (1, draws), "smoothmix": (draws, draws)}.get(method, (draws,))
    return Case(objective, recipe, draws, climbs, int(method == "smoothadv-ddn"), trained)


METHODS = ["gaussian", "stability", "smoothadv-pgd", "smoothadv-ddn", "smoothmix", "consistency", "macer"]


class Pass(NamedTuple):
    """A forward pass: its mode, how many images, whether parameters ask for gradients, and whether one came back."""

    training: bool
    images: int
    frozen: bool
    backward: bool


@contextmanager
def passes_of(model: nn.Module) -> Iterator[list[Pass]]:
    """Note the passes of ``model``, in the order of the forward ones."""
    seen: list[Pass] = []

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        place = len(seen)
        seen.append(Pass(module.training, len(args[0]), frozen, backward=False))

        def backward(_: Tensor) -> None:
            seen[place] = seen[place]._replace(backward=True)

        if output.requires_grad:
            output.register_hook(backward)

    handle = model.register_forward_hook(forward)
    try:
        yield seen
    finally:
        handle.remove()


class Batch(NamedTuple):
    """Noisy images and their labels."""

    x: Tensor
    y: Tensor


def made(case: Case, x: Tensor, y: Tensor) -> tuple[Batch, list[Batch]]:
    """Return what the floor attacks and what it trains on, of the images of a step."""
    copies = sorted({case.draws, *case.trained})
    batches = {m: Batch(x.repeat(m, 1, 1, 1), y.repeat(m)) for m in copies}
    sigma = case.recipe.sigma
    batches = {m: Batch(batch.x + sigma * torch.randn_like(batch.x), batch.y) for m, batch in batches.items()}
    return batches[case.draws], [batches[m] for m in case.trained]


def floor(
    model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, attacked: Batch, trained: list[Batch]
) -> None:
    """Make the passes of one step; ``model`` is in train mode."""
    if case.climbs:
        model.eval().requires_grad_(False)
        for _ in range(case.climbs):
            leaf = attacked.x.detach().requires_grad_()
            torch.autograd.grad(cross_entropy(model(leaf), attacked.y, reduction="sum"), leaf)
        with torch.no_grad():
            for _ in range(case.looks):
                model(attacked.x)
        model.train().requires_grad_(True)
    loss = torch.stack([cross_entropy(model(batch.x), batch.y) for batch in trained]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def ours(
    model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int, seed: int
) -> None:
    """Train for some epochs, the last ones of the recipe."""
    how = {"batch_size": case.images, "epochs": epochs, "first_epoch": case.recipe.epochs - epochs, "seed": seed}
    train(model, x, y, case.objective, optimizer=optimizer, **how)


def times(model: nn.Module, case: Case, x: Tensor, y: Tensor, steps: int, repeats: int, clock: Clock) -> dict[str, Any]:
    """Return the ratio to the floor, the median of ``repeats`` rounds, all of them, and the milliseconds of a step."""
    n = min(case.images, len(x))
    epochs = -(-steps * n // len(x))
    batches = [made(case, *part) for part in zip(x.split(n), y.split(n), strict=True)] * epochs
    ratios, milliseconds = [], []
    for seed in range(repeats + 1):
        theirs, mine = copy.deepcopy(model).train(), copy.deepcopy(model)
        lean, own = case.recipe.optimizer(theirs), case.recipe.optimizer(mine)
        started = clock()
        for attacked, trained in batches:
            floor(theirs, case, lean, attacked, trained)
        middle = clock()
        ours(mine, case, own, x, y, epochs, seed)
        spent = clock() - middle
        if seed:  # the first round is to warm up
            ratios.append(spent / (middle - started))
            milliseconds.append(1000 * spent / len(batches))
    row = {"images": n, "draws": case.draws, "passes": case.needs, "steps": len(batches)}
    figures = {"ratio": statistics.median(ratios), "ratios": ratios, "milliseconds": statistics.median(milliseconds)}
    return row | figures


def markdown(made: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the table, what it was made with, and what the floor is."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += ["", "| network | method | images a step | draws | passes a step | ms a step | time by the floor's |"]
    lines[-1] += " slowest | fastest |"
    lines += ["|---|---|--:|--:|---|--:|--:|--:|--:|"]
    for row in rows:
        ends = f"{max(row['ratios']):.3f} | {min(row['ratios']):.3f}"
        what = f"| {row['network']} | {row['method']} | {row['images']} | {row['draws']} | {row['passes']}"
        lines.append(f"{what} | {row['milliseconds']:.0f} | {row['ratio']:.3f} | {ends} |")
    return "\n".join([*lines, "", (__doc__ or "").strip()]) + "\n"


@click.command()
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Separated by commas.")
@click.option("--networks", default=",".join(VICTIMS), show_default=True, help="Separated by commas.")
@click.option("--images", default=256, show_default=True, help="Images; a step has no more.")
@click.option("--steps", default=4, show_default=True, help="At least this many steps in a round.")
@click.option("--repeats", default=7, show_default=True, help="Rounds.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "training_cost", help="No suffix.")
def cost(
    methods: str, networks: str, images: int, steps: int, repeats: int, threads: int, device: str, out: Path
) -> None:
    """Time of a step by that of the method's own passes."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning_fabric")
    clock, rows = Clock(device, threads), list[dict[str, Any]]()
    for network in networks.split(","):
        victim = VICTIMS[network](images)
        model, x, y = victim.model.to(device), victim.x.to(device), victim.y.to(device)
        for method in tqdm(methods.split(","), desc=victim.name):
            row = times(model, case(method), x, y, steps, repeats, clock)
            rows.append({"network": victim.name, "method": method} | row)
            click.echo(f"{victim.name}: {method}: {row['ratio']:.3f}")
    made_with = environment("bench_training.py", clock)
    text = markdown(made_with, rows)
    keep(out, text, {"made": made_with, "rows": rows})
    click.echo(text)
