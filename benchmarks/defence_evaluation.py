"""What a defended network withstands: ART's and torchattacks' own evaluation code, and certificates."""

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from defences import Array, Defended
from torch import Tensor, nn

from rs_plugins.core.certification import certify
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

PGD_STEPS = 50


class Examination(NamedTuple):
    """What is asked of each defence.

    Attributes:
        x: Test images (n, channels, height, width) in [0, 1].
        y: Their labels (n,).
        classes: Number of classes.
        sigma: Standard deviation of the noise under which all are certified, in pixels.
        eps: l2 budget of attacks, in pixels.
        eps_linf: linf budget of attacks, in pixels.
        attacked: How many of the images PGD and SmoothAdv attack.
        auto_attacked: How many AutoAttack does.
        radii: At which certified accuracy is told.
        n: Votes of a certificate.
        seed: Of attacks and certificates.
    """

    x: Array
    y: npt.NDArray[np.int64]
    classes: int
    sigma: float
    eps: float
    eps_linf: float
    attacked: int
    auto_attacked: int
    radii: tuple[float, ...]
    n: int
    seed: int

    def first(self, count: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """Return ``count`` images and labels, spaced evenly."""
        rows = np.linspace(0, len(self.x) - 1, min(count, len(self.x))).astype(int)
        return self.x[rows], self.y[rows]


def examine(defended: Defended, asked: Examination) -> dict[str, Any]:
    """Return all figures of a defence; one that cannot be measured is a text, which says why."""
    defended.model.eval()
    classifier = _classifier(defended, asked)
    found: dict[str, Any] = {"clean": 100 * float((classifier.predict(asked.x).argmax(axis=1) == asked.y).mean())}
    for norm, eps in (("l2", asked.eps), ("linf", asked.eps_linf)):
        found[f"PGD {norm}"] = _attempt(lambda norm=norm, eps=eps: _pgd(classifier, asked, norm, eps))
    for norm, eps in (("l2", asked.eps), ("linf", asked.eps_linf)):
        found[f"AutoAttack {norm}"] = _attempt(lambda norm=norm, eps=eps: _auto_attack(defended, asked, norm, eps))
    start = time.process_time()
    try:
        found |= _certified(defended, classifier, asked)
        found["certification seconds"] = time.process_time() - start
    except Exception as error:
        found["ACR"] = f"{type(error).__name__}: {error}"
    found["SmoothAdv"] = _attempt(lambda: _smoothadv(defended, asked))
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB on Linux
    return found


def _classifier(defended: Defended, asked: Examination) -> PyTorchClassifier:
    return PyTorchClassifier(
        defended.model,
        nn.CrossEntropyLoss(),
        asked.x.shape[1:],
        asked.classes,
        clip_values=(0.0, 1.0),
        preprocessing_defences=defended.preprocessing,
        device_type="cpu",
    )


def _pgd(classifier: PyTorchClassifier, asked: Examination, norm: str, eps: float) -> float:
    x, y = asked.first(asked.attacked)
    attack = ProjectedGradientDescent(
        classifier,
        norm=2 if norm == "l2" else np.inf,
        eps=eps,
        eps_step=eps / 10,
        max_iter=PGD_STEPS,
        num_random_init=1,
        verbose=False,
    )
    with global_randomness(asked.seed):
        adversarial = attack.generate(x, y)
    return 100 * float((classifier.predict(adversarial).argmax(axis=1) == y).mean())


def _auto_attack(defended: Defended, asked: Examination, norm: str, eps: float) -> float:
    if _acts(defended):
        raise NotImplementedError("torchattacks does not see ART's preprocessing")
    x, y = map(torch.from_numpy, asked.first(asked.auto_attacked))
    named = {"l2": "L2", "linf": "Linf"}[norm]
    attack = torchattacks.AutoAttack(
        defended.model, norm=named, eps=eps, version="standard", n_classes=asked.classes, seed=asked.seed
    )
    with global_randomness(asked.seed):
        adversarial = attack(x, y)
    return 100 * float((_labels(defended.model, adversarial) == y).float().mean())


def _certified(defended: Defended, classifier: PyTorchClassifier, asked: Examination) -> dict[str, Any]:
    """Return certified accuracy at each radius and ACR, of the network smoothed at sigma, whoever trained it."""
    if _acts(defended):
        smoothed = SmoothedBlackBox(classifier, asked.sigma, seed=asked.seed)
        labels, radii = smoothed.certify(asked.x, n=asked.n)
    else:
        x = torch.from_numpy(asked.x)
        found = list(certify(defended.model, x, asked.sigma, plan=FixedBudget(n=asked.n), seed=asked.seed))
        labels, radii = ([getattr(one, name) for one in found] for name in ("prediction", "radius"))
    right = np.asarray(labels) == asked.y
    certified = [100 * float((right & (np.asarray(radii) >= radius)).mean()) for radius in asked.radii]
    return {"certified": certified, "ACR": float(np.where(right, radii, 0.0).mean())}


def _smoothadv(defended: Defended, asked: Examination) -> float:
    """Return the accuracy of the smoothed network under SmoothAdv, by votes that the attack has not seen."""
    if _acts(defended):
        raise NotImplementedError("SmoothAdv needs gradients, and ART's preprocessing has none")
    x, y = map(torch.from_numpy, asked.first(asked.attacked))
    attack = SmoothAdvPGD(defended.model, sigma=asked.sigma, eps=asked.eps, steps=20, samples=32)
    adversarial = attack(x, y)
    plan = FixedBudget(n=1000)
    found = certify(defended.model, adversarial, asked.sigma, plan=plan, seed=asked.seed + 1)
    return 100 * float(np.mean([one.prediction == label for one, label in zip(found, y.tolist(), strict=True)]))


def _acts(defended: Defended) -> bool:
    """Whether something is done to images that are predicted, not to those of training alone."""
    return defended.preprocessing is not None and defended.preprocessing.apply_predict


@torch.no_grad()
def _labels(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(dim=1)


def _attempt(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
