"""A certifying adapter trained on a data set into a folder, for a classifier that stays as it is."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.design import AdapterDesign, Kind, adapt
from rs_plugins.core.checks import check_count, check_positive, check_seed
from rs_plugins.core.data_sets.data_set import DataSet, split_off
from rs_plugins.core.data_sets.opening import as_training_set
from rs_plugins.core.identity import identity
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training.best import best_of
from rs_plugins.core.training.fabric import Precision
from rs_plugins.core.training.folder import Epoch
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.validation import noisy_accuracy
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning

EPOCHS = 20
_SHARE, _FEWEST, _MOST = 0.02, 100, 2000  # of the training images, held out to choose the epoch by


@dataclass(frozen=True, eq=False)
class Adaptation:
    """A classifier with a trained certifying adapter.

    Attributes:
        model: In eval mode; with the weights that are in the folder.
        history: What is known of each epoch.
        kept: The epoch whose weights they are; None without any.
        bare_noisy_accuracy: Accuracy of the classifier as it was, under one noise draw on the images that are held out,
            as the noisy accuracies of the epochs are; None if no images are held out.
    """

    model: AdaptedClassifier
    history: list[Epoch]
    kept: Epoch | None
    bare_noisy_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class _AdapterRecipe(Recipe):
    """A recipe for a certain certifying adapter beside a certain extractor, so that the run's settings name both.

    Attributes:
        adapter: What `load_trained` makes the certifying adapter of.
        extractor: The extractor's digits.
        extractor_code: Its identity, which tells its code as well.
    """

    adapter: Mapping[str, Any]
    extractor: str
    extractor_code: str


def default_recipe(sigma: float, epochs: int = EPOCHS, *, kind: Kind = "image") -> Recipe:
    """Return how certifying adapters of a ``kind`` are trained if nobody says.

    By SGD with a learning rate that falls along a cosine; inside a transformer by Adam. Deng et al. (2024) take Adam
    with a constant learning rate of 1e-3 for 200 epochs, 256 images a batch. In few trials with 20 epochs on the digits
    this here reached more under noise than Adam did.
    """
    recipe = Recipe(
        method="gaussian", sigma=sigma, epochs=epochs, batch_size=64, lr=0.02, schedule="cosine", weight_decay=5e-4
    )
    return recipe.changed(algorithm="adam", lr=1e-3, weight_decay=0.0) if kind == "token" else recipe


def default_held_out(images: int) -> int:
    """Return how many of so many training ``images`` are held out to choose the epoch by.

    That is 2 %, but at least 100 and at most 2,000 of them, and never more than a tenth.
    """
    return min(_MOST, max(round(_SHARE * images), min(_FEWEST, images // 10)))


def adapt_data_set(
    model: nn.Module,
    data: DataSet | str,
    sigma: float,
    folder: str | Path,
    *,
    design: AdapterDesign | None = None,
    recipe: Recipe | None = None,
    network: Mapping[str, Any] | None = None,
    held_out: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: Precision = "32-true",
    channels_last: bool = False,
    workers: int = 0,
    keep: int = 2,
    resume: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
) -> Adaptation:
    """Train a certifying adapter for ``model`` on ``data`` into ``folder`` (Deng et al. 2024).

    ``model`` stays as it is, and the extractor shares its weights where both are on one device: call this for several
    ``sigma``, each with a folder of its own, and the extractor is there once. `load_trained` reads the folder, which
    needs nothing else. The weights are those of the epoch with the highest accuracy under noise on training images
    that are held out. The run can be stopped and gone on with as in `train_data_set`.

    Args:
        model: The classifier, pixels to logits, normalisation inside; trained on clean images, say.
        data: The images with their labels, or a text as `open_training_set` takes it.
        sigma: Standard deviation of the noise, in pixels.
        folder: Where to keep the run, as in `train_data_set`.
        design: Which certifying adapter; that of `AdapterDesign` by default.
        recipe: How to train, by any method, for another sigma in place of its own; `default_recipe` by default.
        network: The arguments of `make_network` that made ``model``, so that `load_trained` can make it again.
        held_out: Number of images, evenly spaced, that are not trained on, and by which the epoch is chosen; None for
            `default_held_out`; 0: the last epoch is taken.
        seed: Seed of the initial weights, shuffling, noise and augmentation.
        device: As in `train_data_set`, like all that follow.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        channels_last: Whether the weights of convolutions lie in memory with the channels last.
        workers: Processes that read images ahead; 0: this one reads.
        keep: How many checkpoints are kept.
        resume: Go on with what is in ``folder``.
        after_epoch: Called with what is known of an epoch when its checkpoint is written.
        progress: Whether to show a progress bar.

    Returns:
        The adapted classifier with the chosen weights, what is known of each epoch, and which was chosen.

    Warns:
        RSPluginsWarning: If the images that are held out are not more often right under noise than without it.

    Raises:
        InputError: If an argument has an impossible value, or the model does not fit the design.
        ModelError: If the model cannot be run on the images, or the extractor is not what it was after training.
        DivergedError: If the loss or a weight becomes NaN or infinite.
        ResultsError: If ``folder`` holds another run, such as one with another extractor, or other code of it.
        KeyboardInterrupt: If a signal came; the checkpoint is written.
    """
    data, design = as_training_set(data), AdapterDesign() if design is None else design
    sigma = check_positive(sigma, "sigma")
    recipe = default_recipe(sigma, kind=design.kind) if recipe is None else replace(recipe, sigma=sigma)
    trained_on, chosen_by = _split(data, held_out)
    adapted = adapt(model, data.shape, design, seed=seed)
    bare = None if chosen_by is None else noisy_accuracy(model, chosen_by, GaussianNoise(sigma), check_seed(seed))
    extractor = adapted.extractor_fingerprint()
    with _unchanged(adapted, extractor, folder):
        history = train_data_set(
            *(adapted, trained_on, _for(recipe, design, data.shape, seed, network, adapted), folder),
            network=network,
            validation=chosen_by,
            keep_best=chosen_by is not None and recipe.epochs > 0,
            seed=seed,
            device=device,
            precision=precision,
            channels_last=channels_last,
            workers=workers,
            keep=keep,
            resume=resume,
            after_epoch=after_epoch,
            progress=progress,
        )
    kept = best_of(history) if chosen_by is not None else next(reversed(history), None)
    if bare is not None and kept is not None and kept.noisy_accuracy is not None and kept.noisy_accuracy <= bare:
        warnings.warn(
            f"sigma {sigma:g}: with the certifying adapter {kept.noisy_accuracy:.1%} of the images held out are right "
            f"under noise, without it {bare:.1%}; more epochs may help, or there is nothing to gain at this sigma",
            RSPluginsWarning,
            stacklevel=2,
        )
    return Adaptation(adapted.eval(), history, kept, bare)


@contextmanager
def _unchanged(adapted: AdaptedClassifier, extractor: str, folder: str | Path) -> Iterator[None]:
    """Say that the extractor has changed by itself, also where the best weights do not go beside it any more."""
    failure = None
    try:
        yield
    except InputError as error:
        failure = error
    if adapted.extractor_fingerprint() != extractor:
        raise ModelError(
            f"model: the extractor is not what it was before training, so {folder} is of no use; a part of it changes "
            "its own weights or buffers in eval mode"
        ) from failure
    if failure is not None:
        raise failure


def _split(data: DataSet, held_out: int | None) -> tuple[DataSet, DataSet | None]:
    """Return the images to train on and those to choose the epoch by."""
    count = default_held_out(len(data)) if held_out is None else check_count(held_out, "held_out", least=0)
    if count >= len(data):
        raise InputError(f"held_out: expected fewer images than {data.name} has, {len(data)}, got {count}")
    return split_off(data, count) if count else (data, None)


def _for(
    recipe: Recipe,
    design: AdapterDesign,
    shape: tuple[int, ...],
    seed: int,
    network: Mapping[str, Any] | None,
    adapted: AdaptedClassifier,
) -> _AdapterRecipe:
    settings = {field.name: getattr(recipe, field.name) for field in fields(Recipe)}
    settings["architecture"] = "given" if network is None else network.get("name")
    adapter = {**design.plain(), "shape": list(shape), "seed": check_seed(seed)}
    digits, code = adapted.extractor_fingerprint(), identity(adapted.extractor)
    return _AdapterRecipe(**settings, adapter=adapter, extractor=digits, extractor_code=code)
