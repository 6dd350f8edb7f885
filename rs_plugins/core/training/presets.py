"""The papers' recipes by name, for example ``smoothmix-mnist-0.5`` or ``gls-mnist-0.1-crown-ibp``.

MNIST: those of Jeong et al. (2021), who also ran the baselines. CIFAR-10: theirs for SmoothMix; SmoothAdv's are those
of Jeong et al. (2023, CAT-RS), Consistency's of Jeong and Shin (2020). Recipes of which not every number is known to us
are left out: Stability and MACER on CIFAR-10, SmoothAdv with Consistency, ImageNet.

GLS: ``gls-DATA-EPS``, where 8-255 is 8/255, with interval bounds and RGS; ``-crown-ibp`` and ``-crown`` are with these
bounds, ``-plain`` with the gradient at the weights alone, ``-pgpe`` (MNIST) with PGPE, on a CNN3, best begun with the
weights of another run. The values of Balauca et al. (2024) are not known to us. Radii (0.2 for MNIST at 0.1), epochs,
learning rates, batches, ramps, clipping, the weights of the L1 norm and of the certified loss are those of public code
(CTBench) for training a CNN7 by IBP and CROWN-IBP, at 8/255 of its SABR, whose small boxes are not taken over. Ours are
what that says nothing of: all of the noise on weights (0.1 of their deviation, falling to 0.01 after the ramp; PGPE
0.01, 256 losses), for CROWN the values of CROWN-IBP, no weight decay, crops and flips on CIFAR-10, and that all C - 1
margins are bounded where CTBench bounds the loss at once.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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


def radius_of(name: str) -> float | None:
    """Return the radius in l-infinity, in pixels, that the networks of a preset are meant for; None under noise.

    On MNIST at 0.1 that is less than the radius that they are trained at.
    """
    return next((setting.radius for where, setting in _GLS.items() if name.startswith(f"gls-{where}")), None)


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


class _Setting(NamedTuple):
    """How GLS is done on a data set at a radius; pairs are for IBP and for CROWN-IBP.

    Networks for ``radius`` are trained at ``eps``, which may be larger.
    """

    radius: float
    eps: float
    epochs: int
    milestones: tuple[int, int]
    batch_size: int
    ramp_start: int
    ramp: int
    l1: tuple[float, float]
    w_rob: tuple[float, float]


_GLS = {
    "mnist-0.1": _Setting(0.1, 0.2, 70, (50, 60), 256, 0, 20, (2e-6, 5e-6), (0.7, 0.7)),
    "mnist-0.3": _Setting(0.3, 0.3, 70, (50, 60), 256, 0, 20, (2e-6, 1e-6), (0.7, 0.7)),
    "cifar10-2-255": _Setting(2 / 255, 2 / 255, 160, (120, 140), 128, 1, 80, (1e-6, 3e-6), (0.8, 1.0)),
    "cifar10-8-255": _Setting(8 / 255, 8 / 255, 240, (200, 220), 128, 1, 120, (0.0, 0.0), (1.0, 1.0)),
}


def _gls() -> Iterator[tuple[str, Recipe]]:
    for where, setting in _GLS.items():
        fall = {"sigma_w_end": 0.01, "decay": float(setting.epochs - setting.ramp_start - setting.ramp)}
        gradients = {"": ("rgs", {"sigma_w": 0.1, **fall}), "-plain": ("plain", {})}
        if where.startswith("mnist"):
            gradients["-pgpe"] = ("pgpe", {"population": 256, "sigma_w": 0.01})
        for bound in ("ibp", "crown-ibp", "crown"):
            for note, (gradient, noise) in gradients.items():
                name = f"gls-{where}{'' if bound == 'ibp' else f'-{bound}'}{note}"
                yield name, _certified(where, setting, bound, {"gradient": gradient, **noise})


def _certified(where: str, setting: _Setting, bound: str, noise: Mapping[str, Any]) -> Recipe:
    place, cifar10 = int(bound != "ibp"), where.startswith("cifar10")
    ramp = {"ramp_start": float(setting.ramp_start), "ramp": float(setting.ramp)}
    options = {"eps": setting.eps, "bound": bound, **noise, "w_rob": setting.w_rob[place], "l1": setting.l1[place]}
    return Recipe(
        method="gls",
        options=MappingProxyType({**options, **ramp}),
        architecture="cnn3" if noise["gradient"] == "pgpe" else "cnn7",
        initial="ibp",
        normalise="cifar10" if cifar10 else "data",
        augment=cifar10,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        algorithm="adam",
        lr=5e-4,
        schedule="milestones",
        lr_milestones=setting.milestones,
        lr_factor=0.2,
        weight_decay=0.0,
        gradient_clip=10.0,
    )


PRESETS: Mapping[str, Recipe] = MappingProxyType(dict([*_mnist(), *_cifar10(), *_gls()]))
