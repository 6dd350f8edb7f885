"""Certified training within a budget, and what the network is worth then; kept in a folder."""

import json
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from certify_networks import DATA
from machine import Clock
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set, open_training_set
from rs_plugins.core.relaxations.job import certify_bounds_data_set
from rs_plugins.core.training.batches import Batches, tensors
from rs_plugins.core.training.fabric import launched_fabric
from rs_plugins.core.training.gls import Gls
from rs_plugins.core.training.ibp_initial import ibp_initial
from rs_plugins.core.training.loop import minimise
from rs_plugins.core.training.objective import Batch, Draws
from rs_plugins.core.training.trained import plain_tensors

PLACE = f"mnist:{DATA / 'MNIST'}"
BATCH_SIZE = 128
RAMP = 0.5  # of the budget; the last quarter and tenth have smaller learning rates
LR = {"plain": 5e-3, "rgs": 5e-3, "pgpe": 1e-3}
NOISE: dict[str, dict[str, Any]] = {"plain": {}, "rgs": {"sigma_w": 0.1, "sigma_w_end": 0.01}, "pgpe": {}}
CLIP = 10.0
WARM = 0.5  # of the budget of PGPE goes on plain gradients of interval bounds, as it does not begin from nothing


@dataclass(frozen=True)
class Run:
    """A network trained in one of the ways.

    Attributes:
        network: Name of the architecture.
        width: What its numbers of channels are multiplied by.
        eps: Radius in l-infinity, in pixels.
        bound: What bounds the margins.
        gradient: How the gradient is estimated.
        seed: Of initial weights, order and noise.
        amount: How much training there is.
        unit: Of it, ``"epochs"`` or ``"seconds"`` (of the clock of the benchmark).
        images: Number of training images.
        population: Losses per step of PGPE.
        folder: Where everything is kept.
    """

    network: str
    width: float
    eps: float
    bound: str
    gradient: str
    seed: int
    amount: float
    unit: str
    images: int
    population: int
    folder: Path

    @property
    def title(self) -> str:
        """What its files begin with."""
        way = f"pgpe{self.population}" if self.gradient == "pgpe" else self.gradient
        return (
            f"{self.network}x{self.width:g}-eps-{self.eps:g}-{self.bound}-{way}-"
            f"{self.amount:g}-{self.unit}-{self.images}-images-seed-{self.seed}"
        )

    def objective(self, gradient: str) -> Gls:
        """Return what is minimised; its clock runs from 0 to 1."""
        noise = dict(NOISE[gradient])
        if gradient == "pgpe":
            noise["population"] = self.population
        if "sigma_w_end" in noise:
            noise["decay"] = 1 - RAMP
        bound: Any = "ibp" if gradient != self.gradient else self.bound
        how: Any = gradient
        return Gls(self.eps, bound=bound, gradient=how, ramp=RAMP, ramp_shape="linear", **noise)

    def train(self, clock: Clock) -> dict[str, float]:
        """Train the network, unless that is done, and return what it took."""
        weights, spent = (self.folder / f"{self.title}{end}" for end in (".safetensors", ".json"))
        if spent.exists():
            kept: dict[str, float] = json.loads(spent.read_text())
            return kept
        model = self.made()
        ibp_initial(model, seed=self.seed)
        taken = self._minimise(model, clock)
        save_file(plain_tensors(model.state_dict()), weights)
        spent.write_text(json.dumps(taken))
        return taken

    def made(self) -> nn.Module:
        """Return the network with its initial weights."""
        return make_network(self.network, width=self.width, seed=self.seed, channels=1)

    def _minimise(self, model: nn.Module, clock: Clock) -> dict[str, float]:
        x, y = training_images(self.images)
        objectives = {way: self.objective(way) for way in {self.gradient, *(["plain"] if self._warms_up else [])}}
        share, loss, epochs, before = 0.0, 0.0, 0.0, clock()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR[self.gradient])

        def way() -> str:
            return "plain" if self._warms_up and share < WARM else self.gradient

        def objective(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
            # while PGPE waits, the ramp is as short as its time; it finds the whole radius
            elapsed = 1.0 if self._warms_up and share >= WARM else share / (WARM if self._warms_up else 1)
            return objectives[way()](model, replace(batch, elapsed=elapsed), draws)

        steps = minimise(
            *(launched_fabric("cpu", "32-true"), model, objective, [tensors(x, y)]),
            *(Batches([len(x)], BATCH_SIZE, seed=self.seed), optimizer),
            epochs=range(10**6),
            gradient_clip=CLIP,
        )
        with closing(steps), tqdm(total=100, desc=self.title, unit="%") as bar:
            for number in count(1):
                for group in optimizer.param_groups:
                    group["lr"] = LR[way()] * (1 if share < 0.75 else 0.2 if share < 0.9 else 0.04)
                _, loss = next(steps)
                epochs, seconds = number * BATCH_SIZE / len(x), clock() - before
                share = (epochs if self.unit == "epochs" else seconds) / self.amount
                bar.update(min(100, int(100 * share)) - bar.n)
                if share >= 1:
                    break
        return {"epochs": epochs, "steps": number, "seconds": seconds, "loss": loss}

    @property
    def _warms_up(self) -> bool:
        return self.gradient == "pgpe"

    def figures(self, test_images: int, clock: Clock) -> dict[str, float]:
        """Return natural accuracy, what an attack leaves of it, and the certified one, on evenly spaced test images."""
        spent = self.train(clock)
        model = self.made()
        load_weights(model, self.folder / f"{self.title}.safetensors")
        results = certify_bounds_data_set(
            model.eval(),
            spaced_images(open_data_set(PLACE), test_images),
            self.eps,
            self.folder / f"{self.title}-{test_images}-test-images.tsv",
            batch_size=100,
            resume=True,
        )
        natural, attacked, certified = (
            proportion.share
            for proportion in (
                results.natural_accuracy(),
                results.robust_accuracy_at_most(),
                results.certified_accuracy(),
            )
        )
        return {**spent, "natural": natural, "attacked": attacked, "certified": certified}


def training_images(count: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced training images and their labels."""
    data = spaced_images(open_training_set(PLACE), count)
    return data.read(range(len(data))), torch.from_numpy(data.labels).long()
