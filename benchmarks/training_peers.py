"""Our training loop beside ART's own trainers of smoothed classifiers, from the same weights on the same images.

Both have the same batches, noise draws and attack steps, SGD with the same settings, and take turns. ART gets what
suits it best: images without preprocessing, which its noise would come after; seeds for the global generators of torch
and NumPy; SmoothAdv with and without ``clip_values``; in SmoothMix its ``alpha`` as the length of a step, which the
paper has at 1. Forward inputs are the images that went through the network, counted by a hook. Noisy accuracy is that
of the network on noisy test images, the same for all; after so few epochs it says little: other seeds move it by more.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import art
import click
import numpy as np
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.certification.randomized_smoothing.macer.pytorch import PyTorchMACER
from art.estimators.certification.randomized_smoothing.smooth_adv.pytorch import PyTorchSmoothAdv
from art.estimators.certification.randomized_smoothing.smooth_mix.pytorch import PyTorchSmoothMix
from certify_networks import DATA
from machine import Clock, environment, keep
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix

HERE = Path(__file__).parent
SIGMA = 0.25
TEST_IMAGES, TEST_DRAWS = 1000, 4


class Settings(NamedTuple):
    """What both have in common."""

    batch_size: int
    epochs: int
    rate: float

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)


Trainer = Callable[[nn.Module, Tensor, Tensor, Settings, int], None]


def ours(objective: Objective, parts: int = 1) -> Trainer:
    """Return our loop with ``objective``."""

    def run(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, seed: int) -> None:
        how = {"batch_size": settings.batch_size, "epochs": settings.epochs, "parts": parts, "seed": seed}
        train(model, x, y, objective, optimizer=settings.optimizer(model), **how)

    return run


def arts(estimator: Any, **options: Any) -> Trainer:
    """Return ``fit`` of ART's ``estimator``."""

    def run(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, seed: int) -> None:
        made = estimator(
            model,
            nn.CrossEntropyLoss(),
            tuple(x.shape[1:]),
            10,
            optimizer=settings.optimizer(model),
            device_type="cpu",
            scale=SIGMA,
            **options,
        )
        with global_randomness(seed):
            made.fit(x.numpy().copy(), y.numpy(), batch_size=settings.batch_size, nb_epochs=settings.epochs)

    return run


class Row(NamedTuple):
    """One trainer of a method; the first one of a method is ours."""

    method: str
    name: str
    trainer: Trainer
    note: str = ""


BOX = (0.0, 1.0)
ADV = {"epsilon": 1.0, "num_steps": 10}
MIX = {"eta": 5.0, "num_noise_vec": 4, "num_steps": 4, "warmup": 10}
GAUSSIAN, ADV_1, ADV_4 = "gaussian, 1 draw", "smoothadv, 1 draw, 10 steps", "smoothadv, 4 draws, 10 steps"
MIX_4, MACER_16 = "smoothmix, 4 draws, 4 steps", "macer, 16 draws"
FORGETS = "attacks in linf with steps of 0.1 whatever its epsilon, which its warm-up writes elsewhere"
ROWS = [
    Row(GAUSSIAN, "ours", ours(Gaussian(SIGMA))),
    Row(GAUSSIAN, "ART PyTorchRandomizedSmoothing", arts(PyTorchRandomizedSmoothing)),
    Row(ADV_1, "ours", ours(SmoothAdv(SIGMA, attack=PGD(eps=1.0, steps=10), samples=1, warmup=1))),
    Row(ADV_1, "ART PyTorchSmoothAdv", arts(PyTorchSmoothAdv, **ADV), FORGETS),
    Row(
        ADV_1,
        "ART PyTorchSmoothAdv, clip_values",
        arts(PyTorchSmoothAdv, clip_values=BOX, **ADV),
        "as above; clips the noisy image, so it trains on noise that is cut off",
    ),
    Row(ADV_4, "ours", ours(SmoothAdv(SIGMA, attack=PGD(eps=1.0, steps=10), samples=4, warmup=1), parts=4)),
    Row(ADV_4, "ART PyTorchSmoothAdv", arts(PyTorchSmoothAdv, num_noise_vec=4, **ADV), "repeats labels, not images"),
    Row(MIX_4, "ours", ours(SmoothMix(SIGMA, step=1.0, steps=4, w_mix=5.0, warmup=10, samples=4), parts=4)),
    Row(
        MIX_4,
        "ART PyTorchSmoothMix",
        arts(PyTorchSmoothMix, alpha=1.0, **MIX),
        "its alpha, 0.001 by default, is the length of a step and the failure probability of its certificates",
    ),
    Row(MACER_16, "ours", ours(Macer(SIGMA, lam=16.0, samples=16))),
    Row(MACER_16, "ART PyTorchMACER", arts(PyTorchMACER, lmbda=16.0), "the same loss"),
]


def figures(
    row: Row, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], settings: Settings, seed: int, clock: Clock
) -> dict[str, Any]:
    """Train once, and return seconds and forward inputs per image of an epoch, and noisy accuracy; or the error."""
    model = make_network("lenet", seed=seed)
    with inputs_of(model) as sizes:
        started = clock()
        try:
            row.trainer(model, *data, settings, seed)
        except (ValueError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        seconds = (clock() - started) / settings.epochs
    inputs = sum(sizes) / settings.epochs / len(data[0])
    return {"seconds": seconds, "inputs": inputs, "accuracy": accuracy(model, *test)}


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[list[int]]:
    """Note how many images each forward pass has, at the first layer: ART calls the layers of a Sequential itself."""
    sizes: list[int] = []
    first = next(module for module in model.modules() if not list(module.children()))
    handle = first.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def accuracy(model: nn.Module, noisy: Tensor, y: Tensor) -> float:
    """Return the share of the noisy images (draws, n, *input) that ``model`` gets right."""
    with torch.no_grad():
        return statistics.mean(float((model.eval()(x).argmax(1) == y).double().mean()) for x in noisy)


def summary(row: Row, own: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of ``row`` over all rounds, with its time by that of ours in the same round."""
    made = {"method": row.method, "trainer": row.name, "note": row.note}
    if "error" in found[0]:
        return made | found[0]
    ratios = [each["seconds"] / mine["seconds"] for each, mine in zip(found, own, strict=True)]
    return made | {
        "seconds": statistics.median(each["seconds"] for each in found),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "inputs": found[0]["inputs"],
        "accuracy": statistics.mean(each["accuracy"] for each in found),
        "accuracies": [each["accuracy"] for each in found],
    }


def markdown(made: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the table, and what it was made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += ["", "| method | trainer | s an epoch | time by ours | slowest | fastest | forward inputs an image |"]
    lines[-1] += " noisy accuracy | lowest | highest | note |"
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        what = f"| {row['method']} | {row['trainer']}"
        if "error" in row:
            lines.append(f"{what} | fails | | | | | | | | {row['error']}: {row['note']} |")
            continue
        time = f"{row['seconds']:.2f} | {row['ratio']:.2f} | {max(row['ratios']):.2f} | {min(row['ratios']):.2f}"
        right = f"{row['accuracy']:.3f} | {min(row['accuracies']):.3f} | {max(row['accuracies']):.3f}"
        lines.append(f"{what} | {time} | {row['inputs']:g} | {right} | {row['note']} |")
    return "\n".join([*lines, "", (__doc__ or "").strip()]) + "\n"


@click.command()
@click.option("--images", default=512, show_default=True, help="Training images.")
@click.option("--batch-size", default=64, show_default=True, help="Images in a batch.")
@click.option("--epochs", default=2, show_default=True, help="Epochs.")
@click.option("--rate", default=0.05, show_default=True, help="Learning rate.")
@click.option("--repeats", default=3, show_default=True, help="Rounds, each from other weights.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "training_peers", help="No suffix.")
def peers(images: int, batch_size: int, epochs: int, rate: float, repeats: int, threads: int, out: Path) -> None:
    """Seconds, forward inputs and noisy accuracy against ART's own trainers, on MNIST with the LeNet."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    clock, settings = Clock("cpu", threads), Settings(batch_size, epochs, rate)
    data, test = mnist("train", images), mnist("test", TEST_IMAGES)
    noise = torch.randn(TEST_DRAWS, *test[0].shape, generator=torch.Generator().manual_seed(0))
    noisy = (test[0] + SIGMA * noise, test[1])
    for row in ROWS:  # to warm up
        figures(row, (data[0][:batch_size], data[1][:batch_size]), noisy, settings._replace(epochs=1), 0, clock)
    found = [[figures(row, data, noisy, settings, seed, clock) for row in ROWS] for seed in tqdm(range(repeats))]
    columns = [list(column) for column in zip(*found, strict=True)]
    own = {row.method: column for row, column in zip(ROWS, columns, strict=True) if row.name == "ours"}
    rows = [summary(row, own[row.method], column) for row, column in zip(ROWS, columns, strict=True)]
    made = environment("bench_training.py", clock) | {"art": art.__version__, "sigma": SIGMA}
    text = markdown(made, rows)
    keep(out, text, {"made": made, "rows": rows})
    click.echo(text)


def mnist(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` images and labels of MNIST."""
    data = open_data_set(f"mnist:{DATA / 'MNIST'}", split=split)
    return data.read(range(count)), torch.from_numpy(np.asarray(data.labels[:count])).long()
