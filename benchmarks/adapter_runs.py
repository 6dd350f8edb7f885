"""Training within a budget and certification, kept in a folder: stopped at any moment, the same call goes on."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from adapter_methods import PLACE, Way, clean_trained, training_images
from budgeted_training import Budget, train_within
from machine import Clock
from safetensors.torch import save_file
from torch import nn

from rs_plugins.core.certification import Certificate
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.table import Results
from rs_plugins.core.training.trained import plain_tensors

RADII = (0.0, 0.25, 0.5, 0.75)
GRID_NOTE = """\
* Certified accuracy in % at each radius, in pixels, and ACR, each ± the standard error over images. Certified by
  sequential tests on a grid of radii, those of the table and multiples of sigma/2 as far as the votes reach; what
  counts is the largest of the grid that is certified, so ACR is up to sigma/2 lower than by a bound on the same votes.
* Computed in bfloat16, trained in mixed precision; it is the classifier in bfloat16 that is certified.
"""


def run_options(*, budget: float, images: int) -> Callable[[Any], Any]:
    """Return what gives a command the options of its runs, with these defaults."""
    shown: dict[str, Any] = {"show_default": True}
    path = click.Path(path_type=Path)
    options = [
        click.option("--base", type=click.Choice(["resnet20", "resnet56"]), default="resnet20", **shown),
        click.option("--budget", type=float, default=budget, help="Of a training.", **shown),
        click.option("--unit", type=click.Choice(["images", "seconds"]), default="images", **shown),
        click.option("--images", type=int, default=images, help="Test images to certify.", **shown),
        click.option("--n", type=int, default=10_000, help="The most votes an image.", **shown),
        click.option("--seed", type=int, default=0, **shown),
        click.option("--device", default="cpu", **shown),
        click.option("--threads", type=int, default=1, **shown),
        click.option("--folder", type=path, default=Path(__file__).parent / "cache" / "adapters", **shown),
        click.option("--out", type=path, help="Without ending; a table and its figures."),
    ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True, kw_only=True)
class Run:
    """A way to a certified classifier at one sigma.

    Attributes:
        name: Of the way, with its settings; with the rest it names the files.
        way: The way.
        sigma: Standard deviation of the noise, in pixels.
        base: Name of the clean-trained network.
        budget: What training may take.
        images: Number of test images.
        n: The most votes an image.
        seed: Of initial weights, order and noise.
        device: Where it is computed.
        threads: On how many.
        folder: Where everything is kept.
    """

    name: str
    way: Way
    sigma: float
    base: str
    budget: Budget
    images: int
    n: int
    seed: int
    device: str
    threads: int
    folder: Path

    @property
    def title(self) -> str:
        """What files of the run begin with."""
        if not self.way.trained:
            return f"{self.base}-{self.name}"
        return f"{self.base}-{self.name}-sigma-{self.sigma:g}-{self.budget}-seed-{self.seed}"

    @property
    def weights(self) -> Path:
        """Where the trained network is kept."""
        return self.folder / f"{self.title}.safetensors"

    @property
    def spent(self) -> Path:
        """Where it is kept what its training took; written last."""
        return self.folder / f"{self.title}.json"

    def network(self) -> nn.Module:
        """Return the network before training."""
        with global_randomness(self.seed):
            return self.way.make(self.base)

    def train(self) -> None:
        """Train the network, unless that is done."""
        if not self.way.trained:
            return
        settings = {"adam": self.way.adam, "lr": self.way.lr}
        if self.spent.exists():
            if not settings.items() <= (kept := json.loads(self.spent.read_text())).items():
                raise click.ClickException(
                    f"{self.spent}: of other settings, {kept}; remove it, or take another folder"
                )
            return
        model = self.network()
        spent = train_within(
            *(self.budget, model, *training_images(), self.way.objective(self.sigma)),
            adam=self.way.adam,
            lr=self.way.lr,
            device=self.device,
            threads=self.threads,
            seed=self.seed,
            title=self.title,
        )
        save_file(plain_tensors(model.state_dict()), self.weights)
        self.spent.write_text(json.dumps({**vars(spent), **settings}))

    def certified(self) -> dict[str, Any]:
        """Return the figures of the run: certify the trained network, unless that is done."""
        model, spent = self.network(), dict[str, float]()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if self.way.trained else 0
        if self.way.trained:
            load_weights(model, self.weights)
            spent = json.loads(self.spent.read_text())
        test = spaced_images(open_data_set(PLACE), self.images)

        def wrong(certificate: Certificate) -> bool:
            return certificate.guess != int(test.labels[certificate.index])  # not certified, whatever the votes say

        clock = Clock(self.device, self.threads)
        start = clock()
        results = certify_data_set(
            model.to(self.device).eval(),
            test,
            self.sigma,
            self.folder / f"{self.title}-certified-{self.sigma:g}-{self.images}-images-{self.n}-votes.tsv",
            plan=OnGrid(radii=grid(self.sigma), n=self.n),
            chunk=128,
            dtype=torch.bfloat16,
            channels_last=True,
            watch=wrong,
            resume=True,
            progress=True,
        )
        click.echo(f"{self.title}: certified in {clock() - start:.0f} s")
        return {
            "sigma": self.sigma,
            "way": self.name,
            "trained": trained,
            "pass": time_of_a_pass(model, clean_trained(self.base), clock, self.device),
            **spent,
            **figures(results),
        }


def time_of_a_pass(model: nn.Module, clean: nn.Module, clock: Clock, device: str, rounds: int = 5) -> float:
    """Return the time of a pass of 128 images in bfloat16, as a multiple of that of the clean-trained network."""
    x = torch.rand(128, 3, 32, 32, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    networks = [
        copy.deepcopy(one).to(device, torch.bfloat16, memory_format=torch.channels_last).eval()
        for one in (model, clean)
    ]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first one warms up
            for network, times in zip(networks, seconds, strict=True):
                start = clock()
                network(x)
                times.append(clock() - start)
    ours, theirs = (median(times[1:]) for times in seconds)
    return ours / theirs


def grid(sigma: float) -> tuple[float, ...]:
    """Return the radii of the tables, and multiples of sigma/2 as far as 10,000 votes reach."""
    return tuple(sorted({*(r for r in RADII if r < 3.1 * sigma), *(sigma * k / 2 for k in range(7))}))


def figures(results: Results) -> dict[str, Any]:
    """Return ACR and certified accuracy with standard errors, the mean number of votes, and all radii."""
    assert results.radius is not None
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
        "radii": radius,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Return what tables say of certified accuracy and ACR."""
    pairs = zip(row["certified"], row["certified_error"], strict=True)
    return [f"{share:.1f} ± {error:.1f}" for share, error in pairs] + [f"{row['acr']:.3f} ± {row['acr_error']:.3f}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
