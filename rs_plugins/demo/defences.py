"""The three networks of the demo: undefended, trained by ART, trained by us."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import plain
from rs_plugins.core.training.loop import train
from rs_plugins.demo.settings import TEST_IMAGES, Settings

BATCH, LEARNING_RATE = 64, 2e-3


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, (n, 1, 8, 8) in [0, 1], and their labels (n,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Defence:
    """A trained network and how it answers.

    Attributes:
        name: What it is called in tables.
        network: The base classifier, in eval mode.
        seconds: Wall-clock time of training.
        smoothed: Whether it answers by a vote on noisy copies, or directly.
        art: ART's estimator, where that certifies.
    """

    name: str
    network: nn.Module
    seconds: float
    smoothed: bool = True
    art: Any = None


def load_digits(settings: Settings) -> Digits:
    """Return scikit-learn's handwritten digits, shuffled by the seed and split."""
    from sklearn.datasets import load_digits as sklearn_digits

    images, labels = sklearn_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=stream(settings.seed, "split"))
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    test = slice(len(x) - TEST_IMAGES, len(x) - TEST_IMAGES + settings.images)
    return Digits(x[:-TEST_IMAGES], y[:-TEST_IMAGES], x[test], y[test])


def small_cnn(seed: int) -> nn.Module:
    """Return a convolutional network for 8x8 digits; ``seed`` gives its initial weights."""
    with global_randomness(seed):
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
        )


def train_undefended(digits: Digits, settings: Settings, progress: bool) -> Defence:
    """Train on the images as they are."""
    network, started = small_cnn(settings.seed), time.perf_counter()
    train(
        network,
        *(digits.x_train, digits.y_train, plain),
        optimizer=optimizer_of(network),
        epochs=settings.epochs,
        batch_size=BATCH,
        progress=progress and "train undefended",
    )
    return Defence("undefended", network.eval(), time.perf_counter() - started, smoothed=False)


def train_art(digits: Digits, settings: Settings) -> Defence:
    """Train with ART's own randomized smoothing, as shipped."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    network = small_cnn(settings.seed)
    estimator = PyTorchRandomizedSmoothing(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        optimizer=optimizer_of(network),
        clip_values=(0.0, 1.0),
        device_type="cpu",
        sample_size=settings.n0,
        scale=settings.sigma,
        alpha=settings.alpha,
    )
    started = time.perf_counter()
    with global_randomness(settings.seed):
        estimator.fit(
            *(digits.x_train.numpy(), digits.y_train.numpy()),
            batch_size=BATCH,
            nb_epochs=settings.epochs,
            verbose=False,
        )
    return Defence("ART smoothing", network.eval(), time.perf_counter() - started, art=estimator)


def train_ours(digits: Digits, settings: Settings, progress: bool) -> Defence:
    """Train with our classifier, called as ART code calls any classifier."""
    from rs_plugins import SmoothedClassifier

    network = small_cnn(settings.seed)
    classifier = SmoothedClassifier(network, settings.sigma, optimizer=optimizer_of(network), seed=settings.seed)
    started = time.perf_counter()
    classifier.fit(
        *(digits.x_train.numpy(), digits.y_train.numpy()),
        batch_size=BATCH,
        nb_epochs=settings.epochs,
        verbose=progress,
    )
    return Defence("rs-plugins", network.eval(), time.perf_counter() - started)


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser that all three are trained with."""
    return torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
