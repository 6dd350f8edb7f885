"""The papers' recipes by name, for example ``smoothmix-mnist-0.5``.

MNIST: those of Jeong et al. (2021), who also ran the baselines. CIFAR-10: theirs for SmoothMix; SmoothAdv's are those
of Jeong et al. (2023, CAT-RS), Consistency's of Jeong and Shin (2020). Recipes of which not every number is known to us
are left out: Stability and MACER on CIFAR-10, SmoothAdv with Consistency, ImageNet.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError

SIGMAS = (0.25, 0.5, 1.0)


def preset(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def _mnist() -> Iterator[tuple[str, Recipe]]:
    for sigma, steps, weak_steps, lam, robust in zip(
        SIGMAS, (2, 4, 8), (3, 4, 8), (10, 5, 5), (16, 16, 6), strict=True
    ):
        yield _lenet("gaussian", sigma)
        yield _lenet("stability", sigma, lam=2.0)
        attack = PGD(eps=255 / 256, steps=10)
        yield _lenet("smoothadv", sigma, parts=4, attack=attack, samples=4, warmup=10)
        yield _lenet("macer", sigma, lam=float(robust), margin=8.0, inv_temp=16.0, samples=16, deferred=30)
        yield _lenet("consistency", sigma, parts=2, lam=float(lam), w_ent=0.5, samples=2)
        for mix_step, w_mix, note in ((0, 5.0, ""), (1, 5.0, "-onestep"), (0, 1.0, "-w1"), (1, 1.0, "-onestep-w1")):
            mix = {"steps": steps if w_mix == 5 else weak_steps, "mix_step": mix_step, "w_mix": w_mix}
            yield _lenet("smoothmix", sigma, note, parts=4, step=1.0, warmup=10, samples=4, **mix)


def _cifar10() -> Iterator[tuple[str, Recipe]]:
    for sigma, eps, samples, lam, step in zip(
        SIGMAS, (1.0, 1.0, 2.0), (4, 8, 2), (20, 10, 10), (0.5, 1.0, 2.0), strict=True
    ):
        yield _resnet110("gaussian", sigma)
        attack = PGD(eps=eps, steps=10)
        yield _resnet110("smoothadv", sigma, parts=samples, attack=attack, samples=samples, warmup=10)
        yield _resnet110("consistency", sigma, parts=2, lam=float(lam), w_ent=0.5, samples=2)
        for mix_step, note in ((0, ""), (1, "-onestep")):
            mix = {"steps": 4, "step": step, "mix_step": mix_step, "w_mix": 5.0}
            yield _resnet110("smoothmix", sigma, note, parts=2, warmup=10, samples=2, **mix)


def _lenet(method: str, sigma: float, note: str = "", parts: int = 1, **options: Any) -> tuple[str, Recipe]:
    return f"{method}-mnist-{sigma}{note}", Recipe(
        method=method,
        options=MappingProxyType(options),
        sigma=sigma,
        architecture="lenet",
        epochs=90,
        parts=parts,
        lr=0.01,
        lr_step=30,
    )


def _resnet110(method: str, sigma: float, note: str = "", parts: int = 1, **options: Any) -> tuple[str, Recipe]:
    return f"{method}-cifar10-{sigma}{note}", Recipe(
        method=method,
        options=MappingProxyType(options),
        sigma=sigma,
        architecture="resnet110",
        normalise="cifar10",
        augment=True,
        epochs=150,
        parts=parts,
        lr=0.1,
        lr_step=50,
    )


PRESETS: Mapping[str, Recipe] = MappingProxyType(dict([*_mnist(), *_cifar10()]))
