"""Certified training beside ART's own trainer with interval bounds: what equal epochs lead to, and what they cost.

All begin with the same weights and take the same number of epochs with Adam, batches of the same size, a radius and a
weight of the certified loss that grow linearly over the first 30 % of the epochs, without a regulariser. ART's grow at
each epoch, over 30 % rounded down: with fewer than 7 epochs at once. Ours grow at each step. ART bounds one logit at a
time and turns convolutions into dense matrices anew after each step; the clean images of its steps are others than the
certified ones. All networks are certified by the same cascade, ours, in double precision, whoever trained them. Seconds
are processor time of an epoch.
"""

import contextlib
import io
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import art
import click
import numpy as np
import torch
from art.defences.trainer import AdversarialTrainerCertifiedIBPPyTorch
from art.estimators.certification.interval import PyTorchIBPClassifier
from certify_networks import DATA
from machine import Clock, environment, keep
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness, torch_randomness
from rs_plugins.core.relaxations.certifying import CASCADE, certify_bounds
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.bounds_trainer import GlsTrainer

HERE = Path(__file__).parent
SHAPE, CLASSES = (1, 28, 28), 10
FIGURES = ("seconds", "natural", "attacked", "certified", "by intervals")


class Network(nn.Module):
    """The CNN3 of public code for certified training, in the form that ART takes: layers as children alone."""

    def __init__(self, width: float) -> None:
        super().__init__()
        first, second = (check_count(round(width * channels), "width") for channels in (16, 32))
        self.conv1 = nn.Conv2d(1, first, 5, stride=2, padding=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(second * 49, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        logits: Tensor = self.linear(torch.flatten(x, 1))
        return logits


class Settings(NamedTuple):
    """What all have in common."""

    epochs: int
    batch_size: int
    rate: float
    eps: float
    weight: float

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.rate)


Trainer = Callable[[Network, Any, Any, Settings, int], nn.Module]


def arts(model: Network, x: Any, y: Any, settings: Settings, seed: int) -> nn.Module:
    """Train with ART, and return the network that its converted one is."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        classifier = PyTorchIBPClassifier(
            model,
            nn.CrossEntropyLoss(),
            SHAPE,
            CLASSES,
            optimizer=settings.optimizer(model),
            clip_values=(0, 1),
            device_type="cpu",
        )
        make = AdversarialTrainerCertifiedIBPPyTorch
        trainer = make(
            classifier,
            nb_epochs=settings.epochs,
            bound=settings.eps,
            batch_size=settings.batch_size,
            loss_weighting_schedule=make.initialise_default_scheduler(0.0, settings.weight, settings.epochs),
        )
        with global_randomness(seed):
            trainer.fit(
                x,
                y,
                limits=[0.0, 1.0],
                batch_size=settings.batch_size,
                nb_epochs=settings.epochs,
                verbose=False,
            )
    return unconverted(classifier.model, x)


def unconverted(converted: Any, x: Any) -> Network:
    """Return a network with the weights of ART's converted one, after a look whether both say the same of ``x``.

    It is a new one: ART leaves hooks in the network that it was given.
    """
    model = Network(converted.ops[0].out_channels / 16)
    parts = zip(converted.ops, model.children(), strict=True)
    with torch.no_grad():
        for op, module in parts:
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(op.conv.weight.reshape(module.weight.shape))
                module.bias.copy_(op.bias_to_grad)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(op.weight), module.bias.copy_(op.bias)
        converted.set_forward_mode("concrete")
        torch.testing.assert_close(model(torch.tensor(x[:64])), converted.forward(x[:64]), atol=1e-3, rtol=1e-3)
    return model


def ours(**options: Any) -> Trainer:
    """Return our trainer with ``options``."""

    def run(model: Network, x: Any, y: Any, settings: Settings, seed: int) -> nn.Module:
        optimizer = settings.optimizer(model)
        classifier = BoundsClassifier(model, input_shape=SHAPE, nb_classes=CLASSES, optimizer=optimizer, seed=seed)
        trainer = GlsTrainer(
            classifier,
            nb_epochs=settings.epochs,
            bound=settings.eps,
            batch_size=settings.batch_size,
            loss_weighting=settings.weight,
            regulariser=0.0,
            **options,
        )
        trainer.fit(x, y, limits=[0.0, 1.0])
        return model

    return run


ROWS: dict[str, Trainer] = {
    "ART, intervals": arts,
    "ours, IBP": ours(method="ibp", gradient="plain"),
    "ours, CROWN-IBP": ours(method="crown-ibp", gradient="plain"),
    "ours, CROWN-IBP, RGS": ours(method="crown-ibp", gradient="rgs"),
}


def figures(
    trainer: Trainer, width: float, data: tuple[Any, Any], test: tuple[Tensor, Tensor], how: Settings, seed: int
) -> dict[str, float]:
    """Train once, certify, and return the figures."""
    with torch_randomness(seed):
        model = Network(width)
    clock = Clock("cpu", 1)
    started = clock()
    trained = trainer(model, *data, how, seed).eval()
    seconds = (clock() - started) / how.epochs
    records = certify_bounds(trained, *test, how.eps, cascade=CASCADE, attack_steps=20, attack_restarts=2)
    if failed := [record for record in records if record.status == "failed"]:
        raise RuntimeError(f"{len(failed)} images failed: {failed[0].message}")
    return {
        "seconds": seconds,
        "natural": share(record.prediction == record.label for record in records),
        "attacked": share(record.status in ("verified", "unknown") for record in records),
        "certified": share(record.verified for record in records),
        "by intervals": share(record.verified and record.method == "ibp" for record in records),
    }


def share(flags: Any) -> float:
    return statistics.mean(map(float, flags))


def markdown(made: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the table, and what it was made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += ["", "Means over the seeds, with the lowest and the highest in brackets; accuracies in %.", ""]
    lines += ["| trainer | s an epoch | by ART's | natural | after PGD | certified | of it by intervals alone |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    slowest = statistics.mean(rows[0]["seconds"])
    for row in rows:
        cells = [spread(row[name], 100) for name in FIGURES[1:]]
        lines.append(
            f"| {row['trainer']} | {spread(row['seconds'], 1)} | {statistics.mean(row['seconds']) / slowest:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join([*lines, "", (__doc__ or "").strip()]) + "\n"


def spread(values: list[float], scale: float) -> str:
    low, mean, high = (scale * each(values) for each in (min, statistics.mean, max))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f}, {high:.1f})"


@click.command()
@click.option("--epochs", default=10, show_default=True, help="Epochs.")
@click.option("--train-images", default=10_000, show_default=True, help="Training images.")
@click.option("--test-images", default=500, show_default=True, help="Test images, spaced evenly.")
@click.option("--seeds", default=3, show_default=True, help="How many, from 0.")
@click.option("--eps", default=0.1, show_default=True, help="Radius in l-infinity, pixels.")
@click.option("--batch-size", default=128, show_default=True, help="Images in a batch.")
@click.option("--rate", default=2e-3, show_default=True, help="Learning rate of Adam.")
@click.option("--weight", default=0.5, show_default=True, help="Of the certified loss at the end; 0.5 in ART.")
@click.option("--width", default=1.0, show_default=True, help="What the numbers of channels are multiplied by.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "compare_art_ibp", help="No suffix.")
def main(
    epochs: int,
    train_images: int,
    test_images: int,
    seeds: int,
    eps: float,
    batch_size: int,
    rate: float,
    weight: float,
    width: float,
    out: Path,
) -> None:
    """ART's trainer with interval bounds and ours, on MNIST with a CNN3."""
    torch.set_num_threads(1)
    settings = Settings(epochs, batch_size, rate, eps, weight)
    x, y = mnist("train", train_images)
    data, test = (x.numpy(), y.numpy()), mnist("test", test_images)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    with tqdm(total=seeds * len(ROWS), unit="training") as bar:
        for seed in range(seeds):
            for name, trainer in ROWS.items():
                found[name].append(figures(trainer, width, data, test, settings, seed))
                bar.update()
    rows = [{"trainer": name} | {key: [run[key] for run in runs] for key in FIGURES} for name, runs in found.items()]
    made = environment("compare_art_ibp.py", Clock("cpu", 1)) | {"art": art.__version__} | settings._asdict()
    made |= {"training images": train_images, "test images": test_images, "seeds": seeds, "width": width}
    text = markdown(made, rows)
    keep(out, text, {"made": made, "rows": rows})
    click.echo(text)


def mnist(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` training images of MNIST, or test images spaced evenly, and their labels."""
    data = open_data_set(f"mnist:{DATA / 'MNIST'}", split=split)
    chosen = range(count) if split == "train" else np.linspace(0, len(data.labels) - 1, count).astype(int).tolist()
    return data.read(list(chosen)), torch.from_numpy(np.asarray(data.labels)[list(chosen)]).long()


if __name__ == "__main__":
    main()
