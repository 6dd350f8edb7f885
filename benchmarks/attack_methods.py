"""The attacks that are compared: a function of the base classifier, images, labels and what may be spent, each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from attack_networks import SIGMA
from torch import Tensor, nn

from rs_plugins import SmoothedModel


class Budget(NamedTuple):
    """What an attack may spend on each image.

    Attributes:
        eps: Radius in pixels, a number or one per image, (n,).
        steps: Steps.
        samples: Noise draws per step.
        seed: Of the attack.
        chunk: Noisy images in a pass of ours; their own choice if None.
    """

    eps: float | Tensor
    steps: int
    samples: int
    seed: int
    chunk: int | None = None

    @property
    def passes(self) -> int:
        return self.steps * self.samples


Attack = Callable[[nn.Module, Tensor, Tensor, Budget], Tensor]


def smooth_adv(name: str, **settings: Any) -> Attack:
    """Return ours of that ``name``."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
        import torchattacks

        how = {"eps": budget.eps, "steps": budget.steps, "samples": budget.samples, "chunk": budget.chunk} | settings
        made = getattr(torchattacks, name)
        if how.pop("published", False):
            made = made.published
        return made(model, sigma=SIGMA, seed=budget.seed, **how)(x, y)  # type: ignore[no-any-return]

    return attack


def more_steps(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack with two draws at each step, and as many more steps."""
    return smooth_adv("SmoothAdvPGD", steps=budget.passes // 2, samples=2)(model, x, y, budget)


def ddn(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack by DDN with the paper's settings; it looks once more than it steps."""
    import torchattacks

    how = {"max_norm": budget.eps, "steps": budget.steps - 1, "samples": budget.samples}
    how |= {"seed": budget.seed, "chunk": budget.chunk}
    return torchattacks.SmoothAdvDDN.published(model, sigma=SIGMA, **how)(x, y)  # type: ignore[no-any-return]


def pgd_on_base(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack the base classifier without noise by torchattacks' PGDL2."""
    import torchattacks

    step = 2.5 * float(budget.eps) / budget.passes
    return torchattacks.PGDL2(model, eps=float(budget.eps), alpha=step, steps=budget.passes)(x, y)  # type: ignore[no-any-return]


def pgdrsl2(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack by torchattacks' own SmoothAdv, with its own ratio of step to radius."""
    import torchattacks

    how = {"eps": float(budget.eps), "alpha": float(budget.eps) / 5, "steps": budget.steps}
    noise = {"noise_type": "guassian", "noise_sd": SIGMA, "noise_batch_size": budget.samples}
    return torchattacks.PGDRSL2(model, **how, **noise, batch_max=64 * budget.samples)(x, y)  # type: ignore[no-any-return]


def eotpgd(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack by torchattacks' EOTPGD in the linf ball inside the l2 ball."""
    import torchattacks

    noisy = SmoothedModel(model, SIGMA, samples=1, noise="fresh", seed=budget.seed).eval()
    eps = float(budget.eps) / math.sqrt(x[0].numel())
    how = {"eps": eps, "alpha": eps / 4, "steps": budget.steps, "eot_iter": budget.samples}
    return torchattacks.EOTPGD(noisy, **how)(x, y)  # type: ignore[no-any-return]


def eotpgd_linf(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack by torchattacks' EOTPGD, with its own ratio of step to radius."""
    ball = budget._replace(eps=float(budget.eps) * math.sqrt(x[0].numel()))
    return eotpgd(model, x, y, ball)


def pgdrs(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack by torchattacks' own SmoothAdv in linf, with its own ratio of step to radius."""
    import torchattacks

    how = {"eps": float(budget.eps), "alpha": float(budget.eps) / 4, "steps": budget.steps}
    noise = {"noise_type": "guassian", "noise_sd": SIGMA, "noise_batch_size": budget.samples}
    return torchattacks.PGDRS(model, **how, **noise, batch_max=64 * budget.samples)(x, y)  # type: ignore[no-any-return]


def art_pgd(classifier: Any, x: Tensor, y: Tensor, eps: float, steps: int, norm: float = 2) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent

    how = {"norm": norm, "eps": eps, "eps_step": 2.5 * eps / steps, "max_iter": steps, "verbose": False}
    found = ProjectedGradientDescent(classifier, batch_size=64, **how).generate(x.numpy(), y.numpy())
    return torch.from_numpy(found)


def art_on_art(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack ART's smoothed classifier by ART's PGD, which does not see the smoothing."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    how = {"sample_size": 100, "scale": SIGMA, "device_type": "cpu", "clip_values": (0, 1)}
    classifier = PyTorchRandomizedSmoothing(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, **how)
    return art_pgd(classifier, x, y, float(budget.eps), budget.passes)


def art_on_ours(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack our smoothed classifier by ART's PGD."""
    return art_pgd(smoothed_classifier(model, x, budget), x, y, float(budget.eps), budget.steps)


def smoothed_classifier(model: nn.Module, x: Tensor, budget: Budget) -> Any:
    from rs_plugins import SmoothedClassifier

    how = {"samples": budget.samples, "noise": "fresh", "seed": budget.seed, "chunk": budget.chunk}
    return SmoothedClassifier(model, SIGMA, input_shape=tuple(x.shape[1:]), nb_classes=10, **how)


def art_linf_on_ours(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Attack our smoothed classifier by ART's PGD in linf."""
    return art_pgd(smoothed_classifier(model, x, budget), x, y, float(budget.eps), budget.steps, math.inf)


OURS: dict[str, Attack] = {
    "SmoothAdvPGD": smooth_adv("SmoothAdvPGD"),
    "SmoothAdvPGD, 2 draws a step": more_steps,
    "SmoothAdvPGD.published": smooth_adv("SmoothAdvPGD", published=True),
    "SmoothAdvDDN.published, max_norm": ddn,
}
PEERS: dict[str, Attack] = {
    "torchattacks PGDL2, no noise": pgd_on_base,
    "torchattacks PGDRSL2": pgdrsl2,
    "torchattacks EOTPGD, in the linf ball inside": eotpgd,
    "ART PGD on ART's": art_on_art,
    "ART PGD on ours": art_on_ours,
}
OURS_LINF: dict[str, Attack] = {
    "SmoothAdvLinfPGD": smooth_adv("SmoothAdvLinfPGD"),
    "SmoothAdvLinfPGD.published": smooth_adv("SmoothAdvLinfPGD", published=True),
}
PEERS_LINF: dict[str, Attack] = {
    "torchattacks PGDRS": pgdrs,
    "torchattacks EOTPGD": eotpgd_linf,
    "ART PGD on ours": art_linf_on_ours,
}
INSIDE: dict[str, Attack] = {
    **{name: OURS[name] for name in ("SmoothAdvPGD", "SmoothAdvPGD.published", "SmoothAdvDDN.published, max_norm")},
    "SmoothAdvPGD, 3 restarts": smooth_adv("SmoothAdvPGD", random_start=True, restarts=3),
    "SmoothAdvPGD, mean cross-entropy": smooth_adv("SmoothAdvPGD", objective="mean-cross-entropy"),
    "SmoothAdvPGD, mean logits": smooth_adv("SmoothAdvPGD", objective="mean-logits"),
    "SmoothAdvPGD, centred Stein": smooth_adv("SmoothAdvPGD", gradient="centred-stein"),
}
