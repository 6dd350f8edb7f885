"""Smooth adversarial training (Xie et al. 2020): ReLU, smooth activations, and ReLU with smooth gradients alone.

All train a ResNet-20 with initial weights on the same images of CIFAR-10 (JPEG), one pass, batches of 128, SGD with
Nesterov's momentum, a learning rate that rises to 0.1 and falls to 0, weight decay 5e-4 on the weights of layers,
against PGD of one step from the recipe of the paper (a step of eps, a fifth of the batches from the image itself,
labels smoothed by 0.1). ReLU with a smooth gradient has that of softplus with a sharpness of 10, in the attack of
training, in the update or in both; attacked it is ReLU. Two rows are ART's AdversarialTrainerMadryPGD with the same
network, images (cropped and flipped beforehand), optimiser and steps, in single precision, as ART has no other; ours
train in bfloat16.

Accuracy is of networks in single precision on test images spaced evenly: clean; under torchattacks' PGD of 20 steps
from a random start (steps of eps/4); under torchattacks' AutoAttack, the standard one, on fewer. Seconds are processor
time of the pass over the training images, which depends on what else the machine did; so all ways have taken turns for
a few steps, too, and the cost of a step is a median of ratios.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import art
import click
import torch
import torchattacks
from adapter_methods import PLACE, SHAPE, Images, training_images
from adapter_runs import table
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from budgeted_training import BATCH_SIZE, Budget, learning_rate, optimizer_of, train_within
from machine import Clock, environment, keep
from safetensors.torch import save_file
from torch import nn
from torchattacks.attack import Attack
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.architectures.normalise import STATISTICS
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.streams import stream
from rs_plugins.core.training.augmentation import crop_and_flip
from rs_plugins.core.training.objective import StreamDraws
from rs_plugins.core.training.sat import Sat
from rs_plugins.core.training.trained import plain_tensors

HERE = Path(__file__).parent
LR = 0.1
FIGURES = ("clean", "PGD-20", "AutoAttack")


class Way(NamedTuple):
    """An activation, and who trains."""

    activation: str
    arts: bool = False


WAYS = {
    "ReLU": Way("relu"),
    "SiLU": Way("silu"),
    "GELU": Way("gelu"),
    "SmoothReLU": Way("smooth-relu"),
    "CELU": Way("celu"),
    "ReLU, smooth in the attack": Way("relu-attack-grad"),
    "ReLU, smooth in the update": Way("relu-update-grad"),
    "ReLU, smooth in both": Way("relu-both-grads"),
    "ART's Madry, ReLU": Way("relu", arts=True),
    "ART's Madry, SiLU": Way("silu", arts=True),
}


class Threat(NamedTuple):
    """What the networks are trained and attacked for."""

    norm: str
    eps: float

    def pgd(self, model: nn.Module) -> Attack:
        attack = torchattacks.PGD if self.norm == "linf" else torchattacks.PGDL2
        return attack(model, eps=self.eps, alpha=self.eps / 4, steps=20, random_start=True)

    def auto_attack(self, model: nn.Module) -> Attack:
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        return torchattacks.AutoAttack(model, norm=norm, eps=self.eps, version="standard", n_classes=10, seed=0)


THREATS = {"linf": Threat("linf", 8 / 255), "l2": Threat("l2", 0.5)}


@dataclass(frozen=True)
class Run:
    """A network of one way and seed, its weights and figures kept in files.

    Attributes:
        name: Of the way.
        threat: What it is trained and attacked for.
        images: Number of training images.
        seed: Of initial weights, order, augmentation and attacks.
        folder: Where the files are.
    """

    name: str
    threat: Threat
    images: int
    seed: int
    folder: Path

    @property
    def way(self) -> Way:
        return WAYS[self.name]

    @property
    def title(self) -> str:
        trainer = "art-" if self.way.arts else ""
        return f"{trainer}{self.way.activation}-{self.threat.norm}-{self.images}-images-seed-{self.seed}"

    def trained(self) -> nn.Module:
        """Return the trained network; it is trained unless that is done."""
        model = self.network()
        weights = self.folder / f"{self.title}.safetensors"
        if not weights.exists():
            images = Images(*(part[: self.images] for part in training_images()))
            self._note("seconds", self.train(model, images))
            save_file(plain_tensors(model.state_dict()), weights)
        load_weights(model, weights)
        return model.eval()

    def network(self) -> nn.Module:
        """Return the network with its initial weights."""
        normalise = STATISTICS["imagenet"]._asdict()
        return make_network("resnet20", activation=self.way.activation, shape=SHAPE, seed=self.seed, **normalise)

    def train(self, model: nn.Module, images: Images) -> float:
        """Train ``model`` on ``images`` and return the seconds that it took."""
        return (self._arts if self.way.arts else self._ours)(model, images)

    def _ours(self, model: nn.Module, images: Images) -> float:
        objective = Sat(self.threat.eps, norm=self.threat.norm)
        budget = Budget(len(images.x), "images")
        how: dict[str, Any] = {"adam": False, "lr": LR, "weight_decay_of": "weights", "seed": self.seed}
        return train_within(budget, model, *images, objective, title=self.title, **how).seconds

    def _arts(self, model: nn.Module, images: Images) -> float:
        optimizer = optimizer_of(model, lr=LR, weight_decay_of="weights")
        steps = -(-len(images.x) // BATCH_SIZE)
        rate = iter([learning_rate(step / steps) for step in range(1, steps + 1)])

        def set_rate(*_: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = LR * next(rate, 0.0)

        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.register_step_post_hook(set_rate)
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), SHAPE, 10, optimizer=optimizer, clip_values=(0, 1), device_type="cpu"
        )
        norm: dict[str, Any] = {
            "eps": self.threat.eps,
            "eps_step": self.threat.eps,
            "max_iter": 1,
            "num_random_init": 1,
        }
        trainer = AdversarialTrainerMadryPGD(classifier, nb_epochs=1, batch_size=BATCH_SIZE, **norm)
        trainer.trainer.attacks[0].set_params(norm="inf" if self.threat.norm == "linf" else 2)
        x = crop_and_flip(images.x, StreamDraws(stream(self.seed, "augmentation"))).numpy()
        clock = Clock("cpu", 1)
        with global_randomness(self.seed):
            start = clock()
            trainer.fit(x, images.y.numpy())
        return clock() - start

    def figure(self, name: str, test: Images) -> None:
        """Measure the accuracy ``name`` on ``test``, unless that is done."""
        key = f"{name} on {len(test.y)}"
        if key in self.noted():
            return
        model = self.trained()
        attack: Callable[[nn.Module], Attack] | None
        attack = {"clean": None, "PGD-20": self.threat.pgd, "AutoAttack": self.threat.auto_attack}[name]
        with global_randomness(self.seed):
            x = test.x if attack is None else torch.cat([attack(model)(*part) for part in _parts(test)])
        with torch.no_grad():
            right = torch.cat([model(part.x).argmax(dim=1) == part.y for part in _parts(Images(x, test.y))])
        self._note(key, 100 * float(right.float().mean()))

    def noted(self) -> dict[str, float]:
        """Return what is known of the run."""
        file = self.folder / f"{self.title}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _note(self, key: str, value: float) -> None:
        (self.folder / f"{self.title}.json").write_text(json.dumps({**self.noted(), key: value}))


def _parts(images: Images, size: int = 128) -> Iterator[Images]:
    return (Images(*part) for part in zip(images.x.split(size), images.y.split(size), strict=True))


def test_images(count: int) -> Images:
    """Return ``count`` test images, spaced evenly."""
    data = spaced_images(open_data_set(PLACE), count)
    return Images(data.read(range(count)), torch.from_numpy(data.labels).long())


def costs(names: Sequence[str], folder: Path, steps: int = 3, rounds: int = 3) -> dict[str, float]:
    """Return what a step of each way costs over one with ReLU, the median of rounds in which all take turns."""
    images = Images(*(part[: steps * BATCH_SIZE] for part in training_images()))
    runs = [Run(name, THREATS["linf"], len(images.x), 0, folder) for name in names]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        seconds = {run.name: run.train(run.network(), images) for run in runs}
        if number:  # the first round warms up
            for name, value in seconds.items():
                ratios[name].append(value / seconds["ReLU"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def row(name: str, runs: Sequence[Run], sizes: Sequence[int], cost: float | None) -> list[str]:
    """Return the row of a way: means over the seeds, with the lowest and the highest."""
    notes = [run.noted() for run in runs]
    keys = (f"{figure} on {size}" for figure, size in zip(FIGURES, sizes, strict=True))
    seconds = [note["seconds"] for note in notes if "seconds" in note]
    cells = [spread([note[key] for note in notes if key in note]) for key in keys]
    return [name, *cells, f"{min(seconds):.0f}" if seconds else "–", "–" if cost is None else f"{cost:.2f}"]


def spread(values: Sequence[float]) -> str:
    """Return the mean of ``values``, and if there are several how many, the lowest and the highest."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f}; {len(values)})"


@click.command()
@click.option("--norm", "norms", type=click.Choice([*THREATS]), multiple=True, default=[*THREATS], show_default=True)
@click.option("--ways", help=f"Of {'; '.join(WAYS)}; with ; between.  [all]")
@click.option("--train-images", default=30_000, show_default=True, help="Training images, each seen once.")
@click.option("--test-images", "clean", default=1000, show_default=True, help="Test images.")
@click.option("--pgd-images", default=300, show_default=True, help="Of which PGD attacks so many.")
@click.option("--auto-attack-images", default=50, show_default=True, help="And AutoAttack so many.")
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--auto-attack-seeds", default=1, show_default=True, help="For how many AutoAttack runs.")
@click.option("--art-seeds", default=1, show_default=True, help="How many with ART.")
@click.option("--kept", is_flag=True, help="Train and attack nothing; tell what is kept.")
@click.option("--folder", type=click.Path(path_type=Path), default=HERE / "cache" / "sat", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Without ending; a table and its figures.")
def main(
    norms: Sequence[str],
    ways: str | None,
    train_images: int,
    clean: int,
    pgd_images: int,
    auto_attack_images: int,
    seeds: int,
    auto_attack_seeds: int,
    art_seeds: int,
    kept: bool,
    folder: Path,
    out: Path | None,
) -> None:
    """Train each way for each norm and seed, attack it, and print the tables; what is done is not done again."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*WAYS] if ways is None else [name.strip() for name in ways.split(";")]
    sizes = (clean, pgd_images, auto_attack_images)
    runs = [
        Run(name, THREATS[norm], train_images, seed, folder)
        for seed in range(seeds)
        for norm in norms
        for name in names
        if seed < (art_seeds if WAYS[name].arts else seeds)
    ]
    for run in tqdm([] if kept else runs, unit="network"):
        for figure, size in zip(FIGURES, sizes, strict=True):
            if figure != "AutoAttack" or run.seed < auto_attack_seeds:
                run.figure(figure, test_images(size))
    cost = costs(names, folder) if "ReLU" in names else {}
    made = environment("compare_sat.py", Clock("cpu", 1)) | {
        "art": art.__version__,
        "torchattacks": torchattacks.__version__,
        "training images": train_images,
    }
    text = markdown(made, runs, names, norms, sizes, cost)
    click.echo(text)
    if out is not None:
        figures = {run.title: run.noted() for run in runs if run.noted()}
        keep(out, text, {"made": made, "runs": figures, "cost of a step": cost})


def markdown(
    made: dict[str, Any],
    runs: Sequence[Run],
    names: Sequence[str],
    norms: Sequence[str],
    sizes: Sequence[int],
    cost: dict[str, float],
) -> str:
    """Return the tables, and what they were made with."""
    parts = ["\n".join(f"{key}: {value}  " for key, value in made.items())]
    parts.append("Accuracy in %; means over seeds, with the lowest, the highest and the number of them in brackets.")
    head = ["trained with", *(f"{figure} ({size})" for figure, size in zip(FIGURES, sizes, strict=True))]
    head += ["seconds, the fewest", "a step, ReLU = 1"]
    for norm in norms:
        of_norm = [run for run in runs if run.threat.norm == norm]
        rows = [row(name, [run for run in of_norm if run.name == name], sizes, cost.get(name)) for name in names]
        parts += [f"## {norm}, eps {THREATS[norm].eps:.4g}", table(head, rows)]
    return "\n\n".join([*parts, (__doc__ or "").strip()]) + "\n"


if __name__ == "__main__":
    main()
