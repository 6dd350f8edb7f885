"""Defences by name: ART's trainers, estimators and preprocessors, ours, and plugins'; all train one network.

Each is called with a `Setting` and returns what is deployed. All get the same network with the same initial weights,
the same optimiser, images in the same batches' size, and the same budget of epochs or of processor seconds.
"""

import atexit
import contextlib
import io
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences import trainer as art_trainers
from art.defences.preprocessor import FeatureSqueezing, GaussianAugmentation, JpegCompression
from art.estimators.certification import randomized_smoothing as art_smoothing
from art.estimators.certification.interval import PyTorchIBPClassifier
from art.estimators.classification import PyTorchClassifier
from torch import nn

from rs_plugins import registry
from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.certifying_adapters.design import adapt
from rs_plugins.core.ensembles import SoftEnsemble
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.objective import Batch, Draws, Objective

Array = npt.NDArray[np.float32]
PARTS = {"smoothadv": 8, "smoothmix": 4, "consistency": 4}  # steps of the optimiser a batch; the papers have one a draw
OURS = ("rs_plugins", "rs_plugins_art", "rs_plugins_torchattacks")


class Setting(NamedTuple):
    """What all defences have in common.

    Attributes:
        x: Training images (n, channels, height, width) in [0, 1].
        y: Their labels (n,).
        classes: Number of classes.
        sigma: Standard deviation of the noise, in pixels.
        eps: l2 budget of training under noise, in pixels.
        eps_linf: linf budget of adversarial and of certified training, in pixels.
        epochs: Passes over the images.
        seconds: Processor seconds instead; then ``epochs`` is the most.
        batch_size: Images per step.
        rate: Learning rate of Adam.
        seed: Of weights, order and noise.
    """

    x: Array
    y: npt.NDArray[np.int64]
    classes: int
    sigma: float
    eps: float
    eps_linf: float
    epochs: int
    seconds: float | None
    batch_size: int
    rate: float
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.x.shape[1:]

    @property
    def one_hot(self) -> Array:
        """The labels as ART's trainers take them, (n, classes)."""
        return np.eye(self.classes, dtype=np.float32)[self.y]


@dataclass(frozen=True)
class Defended:
    """What a defence leaves.

    Attributes:
        model: The network, from images in [0, 1] to logits.
        preprocessing: What ART does to images on their way to it, if anything.
    """

    model: nn.Module
    preprocessing: Any = None


Defence = Callable[[Setting], Defended]


class OutOfTimeError(Exception):
    """The budget of seconds is spent."""


class Network(nn.Module):
    """Two convolutions and a linear layer, as children alone, which is the form that all of ART takes."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        stride = 2 if min(height, width) > 16 else 1
        self.conv1 = nn.Conv2d(channels, 16, 3, stride, 1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 4, 2, 1)
        self.relu2 = nn.ReLU()
        rows, columns = (-(-size // stride) // 2 for size in (height, width))
        self.linear = nn.Linear(32 * rows * columns, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        logits: torch.Tensor = self.linear(torch.flatten(x, 1))
        return logits


def network(how: Setting) -> nn.Module:
    """Return the network with its initial weights."""
    with global_randomness(how.seed):
        return Network(how.shape, how.classes)


def adam(model: nn.Module, how: Setting) -> torch.optim.Optimizer:
    """Return the optimiser, which ends a training with `OutOfTimeError` when the seconds are spent."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=how.rate)
    if how.seconds is not None:
        end = time.process_time() + how.seconds

        def look(*_: Any) -> None:
            if time.process_time() >= end:
                raise OutOfTimeError

        optimizer.register_step_post_hook(look)
    return optimizer


@contextlib.contextmanager
def training(how: Setting) -> Iterator[None]:
    """Train with a seed, quietly, until it is done or time is out."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        global_randomness(how.seed),
        contextlib.suppress(OutOfTimeError),
    ):
        warnings.simplefilter("ignore")
        yield


# ---- ART's ---------------------------------------------------------------------------------------------------------


def classifier(model: nn.Module, how: Setting, **more: Any) -> PyTorchClassifier:
    """Return ``model`` as ART's classifier."""
    return _arts(PyTorchClassifier, model, how, **more)


def _arts(kind: Any, model: nn.Module, how: Setting, **more: Any) -> Any:
    return kind(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=how.shape,
        nb_classes=how.classes,
        optimizer=adam(model, how),
        clip_values=(0.0, 1.0),
        device_type="cpu",
        **more,
    )


def plain(how: Setting, preprocessing: Callable[[Setting], Any] | None = None) -> Defended:
    """Train on clean images with ART, maybe behind a preprocessor of ART's."""
    model = network(how)
    chosen = None if preprocessing is None else preprocessing(how)
    with training(how):
        classifier(model, how, preprocessing_defences=chosen).fit(how.x, how.y, how.batch_size, how.epochs)
    return Defended(model, chosen)


def art_trainer(name: str, settings: Callable[[PyTorchClassifier, Setting], dict[str, Any]], how: Setting) -> Defended:
    """Train with an adversarial trainer of ART's, with what ``settings`` makes of the classifier."""
    model = network(how)
    estimator = classifier(model, how)
    with training(how):
        trainer = getattr(art_trainers, name)(estimator, **settings(estimator, how))
        trainer.fit(how.x, how.one_hot, batch_size=how.batch_size, nb_epochs=how.epochs)
    return Defended(model)


def madry(_: PyTorchClassifier, how: Setting) -> dict[str, Any]:
    """Return the attack in numbers."""
    return {"eps": how.eps_linf, "eps_step": how.eps_linf / 4, "max_iter": 7}


def trades(estimator: PyTorchClassifier, how: Setting) -> dict[str, Any]:
    """Return the attack and the weight of robustness."""
    return {"attack": _attack(estimator, how), "beta": 6.0}


def fbf(_: PyTorchClassifier, how: Setting) -> dict[str, Any]:
    """Return the budget."""
    return {"eps": how.eps_linf}


def awp(estimator: PyTorchClassifier, how: Setting) -> dict[str, Any]:
    """Return the attack, and the network on which weights are perturbed."""
    proxy = classifier(network(how), how)
    return trades(estimator, how) | {"proxy_classifier": proxy, "mode": "PGD", "gamma": 0.01, "warmup": 0}


def oaat(estimator: PyTorchClassifier, how: Setting) -> dict[str, Any]:
    """Return the attack, the networks, and all parameters, which have no defaults; a folder is removed at the end."""
    first, tau, folder = max(1, how.epochs // 4), 0.995, tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    averaged: dict[str, Any] = {"list_swa_epoch": [first], "list_swa_tau": [tau], "swa_save_epoch": first}
    schedule = {"oaat_warmup": 0, "awp_warmup": first, "awp_gamma": 0.005, "beta": 1.5, "beta_final": 3.0}
    eps = {"epsilon": how.eps_linf, "i_epsilon": how.eps_linf / 4, "alternate_iter_eps": 0.75 * how.eps_linf}
    mixing = {"alpha": 1.0, "mixup_alpha": 0.2, "mixup_epsilon": how.eps_linf}
    perception = {"lpips_weight": 1.0, "i_lpips_weight": 0.0, "layer_names_activation": ["conv1", "conv2"]}
    descent = {"lr": 0.05, "lr_schedule": "cosine", "momentum": 0.9, "weight_decay": 5e-4}
    files = {"load_swa_model_tau": tau, "models_path": folder}
    proxies = [classifier(network(how), how) for _ in range(3)]
    return {
        "attack": _attack(estimator, how),
        "proxy_classifier": proxies[0],
        "lpips_classifier": proxies[1],
        "list_avg_models": proxies[2:],
        "train_params": {"max_iter": 7, "norm": "inf"}
        | (averaged | schedule | eps | mixing | perception | descent | files),
    }


def _attack(estimator: PyTorchClassifier, how: Setting) -> ProjectedGradientDescent:
    step: dict[str, Any] = {"eps": how.eps_linf, "eps_step": how.eps_linf / 4, "max_iter": 7}
    return ProjectedGradientDescent(estimator, num_random_init=1, batch_size=how.batch_size, verbose=False, **step)


def art_ibp(how: Setting) -> Defended:
    """Train with ART's certified training by intervals."""
    with training(how):
        estimator = _arts(PyTorchIBPClassifier, network(how), how)
        trainer = art_trainers.AdversarialTrainerCertifiedIBPPyTorch(
            estimator, nb_epochs=how.epochs, bound=how.eps_linf, batch_size=how.batch_size
        )
        trainer.fit(how.x, how.y, limits=[0.0, 1.0], batch_size=how.batch_size, nb_epochs=how.epochs, verbose=False)
    return Defended(_unconverted(estimator.model, how))


def _unconverted(converted: Any, how: Setting) -> nn.Module:
    """Return a network with the weights of ART's converted one, which has convolutions as dense matrices."""
    model = Network(how.shape, how.classes)
    with torch.no_grad():
        for op, module in zip(converted.ops, model.children(), strict=True):
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(op.conv.weight.reshape(module.weight.shape))
                module.bias.copy_(op.bias_to_grad)  # type: ignore[union-attr]
            elif isinstance(module, nn.Linear):
                module.weight.copy_(op.weight), module.bias.copy_(op.bias)
        converted.set_forward_mode("concrete")
        x = how.x[:64]
        torch.testing.assert_close(model(torch.tensor(x)), converted.forward(x), atol=1e-3, rtol=1e-3)
    return model


def art_smoothed(name: str, how: Setting, **options: Any) -> Defended:
    """Train with an estimator of ART's for randomised smoothing, as it is shipped."""
    model = network(how)
    with training(how):
        estimator = _arts(getattr(art_smoothing, name), model, how, scale=how.sigma, **options)
        estimator.fit(how.x, how.y, batch_size=how.batch_size, nb_epochs=how.epochs)
    return Defended(model)


# ---- ours, and plugins' ---------------------------------------------------------------------------------------------


def _trained(model: nn.Module, objective: Objective, how: Setting, parts: int = 1) -> Defended:
    with training(how):
        train(
            *(model, torch.from_numpy(how.x), torch.from_numpy(how.y), objective),
            optimizer=adam(model, how),
            epochs=how.epochs,
            batch_size=how.batch_size,
            parts=parts,
            seed=how.seed,
        )
    return Defended(model)


def by_plugin(name: str, how: Setting) -> Defended:
    """Train with a component of a plugin: of ART's kind if it takes a ``classifier``, else an objective."""
    trainer: Any = registry.component("trainer", name)
    if "classifier" not in signature(trainer).parameters:
        return by_objective(name, how)
    model = network(how)
    with training(how):
        trainer(classifier(model, how)).fit(how.x, how.one_hot, batch_size=how.batch_size, nb_epochs=how.epochs)
    return Defended(model)


def by_objective(name: str, how: Setting) -> Defended:
    """Train with a component of kind ``trainer``, which makes an objective of sigma, or without noise of eps."""
    make: Any = registry.component("trainer", name)
    takes = signature(make).parameters
    main = {"sigma": how.sigma} if "sigma" in takes else {"eps": how.eps_linf} if "eps" in takes else None
    if main is None:
        raise TypeError(f"{name}: expected an objective that takes sigma, or eps; it takes {', '.join(takes)}")
    return _trained(network(how), make(**main, **_options(name, how)), how, PARTS.get(name, 1))


def _options(name: str, how: Setting) -> Mapping[str, Any]:
    """Return what differs from the defaults: budgets as all have them, ramps and warm-ups that fit into the epochs.

    These and `PARTS` were chosen on a fifth of the training images of digits, which was held out, by ACR.
    """
    ramp = how.epochs / 2
    return {
        "smoothadv": {"attack": PGD(eps=how.eps, steps=4), "samples": 8, "warmup": 1},
        "smoothmix": {"samples": 4, "steps": 4, "step": how.eps, "mix_step": 1, "warmup": 1},
        "consistency": {"samples": 8, "lam": 10.0},
        "macer": {"deferred": how.epochs // 3},
        "gls": {"bound": "crown-ibp", "ramp": ramp, "w_rob": 0.7},
        "sat": {"steps": 4},
    }.get(name, {})


def sat(how: Setting) -> Defended:
    """Train with SAT as it is meant: with SiLU in the place of ReLU."""
    model = smooth_activations(network(how), "silu", how.shape).model
    objective = registry.component("trainer", "sat")
    return _trained(model, objective(how.eps_linf, **_options("sat", how)), how)  # type: ignore[operator]


def ensemble(name: str, members: int, how: Setting) -> Defended:
    """Train several networks from other initial weights: as long as each of the others, or sharing the seconds."""
    share = how._replace(seconds=None if how.seconds is None else how.seconds / members)
    trained = [by_objective(name, share._replace(seed=how.seed + place)).model for place in range(members)]
    return Defended(SoftEnsemble(trained))


def adapter(how: Setting) -> Defended:
    """Train on clean images for half of the epochs, freeze, and train a certifying adapter for the other half."""
    half = how._replace(epochs=how.epochs // 2, seconds=None if how.seconds is None else how.seconds / 2)
    extractor = _trained(network(how), clean, half).model
    adapted = adapt(extractor, how.shape)
    return _trained(adapted, gaussian(how.sigma), half)


def clean(model: nn.Module, batch: Batch, _draws: Draws) -> torch.Tensor:
    """Return the cross-entropy of the images as they are."""
    return nn.functional.cross_entropy(model(batch.x), batch.y.long())


def _jpeg(how: Setting) -> JpegCompression:
    return JpegCompression(clip_values=(0.0, 1.0), quality=50, channels_first=True, apply_fit=True)


def _squeezing(_: Setting) -> FeatureSqueezing:
    return FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=3, apply_fit=True)


def _augmentation(how: Setting) -> GaussianAugmentation:
    return GaussianAugmentation(sigma=how.sigma, augmentation=False, apply_fit=True, apply_predict=False)


def _needed(name: str) -> bool:
    """Whether an objective can be made of its sigma or eps and what `_options` says."""
    make: Any = registry.component("trainer", name)
    if not hasattr(make, "__dataclass_fields__"):
        return True
    needed = {each.name for each in fields(make) if each.default is MISSING and each.default_factory is MISSING}
    return needed <= {"sigma", "eps"}


ARTS: dict[str, Defence] = {
    "ART none": plain,
    "ART Madry": partial(art_trainer, "AdversarialTrainerMadryPGD", madry),
    "ART TRADES": partial(art_trainer, "AdversarialTrainerTRADESPyTorch", trades),
    "ART FBF": partial(art_trainer, "AdversarialTrainerFBFPyTorch", fbf),
    "ART AWP": partial(art_trainer, "AdversarialTrainerAWPPyTorch", awp),
    "ART OAAT": partial(art_trainer, "AdversarialTrainerOAATPyTorch", oaat),
    "ART IBP": art_ibp,
    "ART RandomizedSmoothing": partial(art_smoothed, "PyTorchRandomizedSmoothing"),
    "ART SmoothAdv": partial(art_smoothed, "PyTorchSmoothAdv", epsilon=0.5),
    "ART SmoothMix": partial(art_smoothed, "PyTorchSmoothMix"),
    "ART SmoothMix, alpha 0.5": partial(art_smoothed, "PyTorchSmoothMix", alpha=0.5),
    "ART SmoothMix, alpha 0.5, 2 draws": partial(art_smoothed, "PyTorchSmoothMix", alpha=0.5, num_noise_vec=2),
    "ART MACER": partial(art_smoothed, "PyTorchMACER"),
    "ART JPEG": partial(plain, preprocessing=_jpeg),
    "ART FeatureSqueezing": partial(plain, preprocessing=_squeezing),
    "ART GaussianAugmentation": partial(plain, preprocessing=_augmentation),
}


def defences() -> dict[str, Defence]:
    """Return all defences by name: ART's, ours, and those of third parties' plugins."""
    found = registry.components("trainer")
    packages = {part.name: part.target.partition(":")[0].partition(".")[0] for part in found}
    ours = [name for name, package in packages.items() if package == "rs_plugins"]
    others = [name for name, package in packages.items() if package not in OURS]
    return {
        **ARTS,
        **{name: partial(by_objective, name) for name in ours if name != "sat" and _needed(name)},
        "sat, SiLU": sat,
        "sat, ReLU": partial(by_objective, "sat"),
        "certifying adapter": adapter,
        "smoothadv, ensemble of 3": partial(ensemble, "smoothadv", 3),
        **{f"plugin {name}": partial(by_plugin, name) for name in others},
    }
