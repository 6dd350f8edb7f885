"""Certify and attack a defence."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rs_plugins.core.certification import certify, majority
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.models import evaluating
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.results.files import write_results
from rs_plugins.core.results.table import Results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.core.rounding import decimals_below
from rs_plugins.core.streams import stream
from rs_plugins.core.votes import Poll
from rs_plugins.demo.defences import Defence, Digits
from rs_plugins.demo.settings import Settings
from rs_plugins.plots import Specimen

PGD, SMOOTHADV = "PGDL2", "SmoothAdvPGD"  # as torchattacks calls them
STEPS = 20
ART_BATCH = 512  # of 32, 128, 512 and 2048


@dataclass(frozen=True)
class Outcome:
    """What became of a defence.

    Attributes:
        defence: The defence.
        clean: Accuracy without attack.
        attacked: Accuracy under attack, by the attack's name and its budget in pixels.
        results: The certificates of the smoothed network.
        seconds: Wall-clock time of certification.
    """

    defence: Defence
    clean: float
    attacked: dict[tuple[str, float], float]
    results: Results
    seconds: float

    def curve(self, attack: str) -> tuple[list[float], list[float]]:
        """Return the budgets, 0 included, at which ``attack`` was tried, and the accuracies."""
        points = {0.0: self.clean} | {eps: share for (name, eps), share in self.attacked.items() if name == attack}
        return sorted(points), [points[eps] for eps in sorted(points)]


def examine(defence: Defence, digits: Digits, settings: Settings, folder: Path, progress: bool) -> Outcome:
    """Certify and attack one defence; its certificates go to a log in ``folder``.

    PGD and SmoothAdvPGD are tried at the budget of the table, the one that fits the defence also at those of the plot,
    where ART's is not shown.
    """
    log = folder / f"certified-{defence.name.replace(' ', '-')}.tsv"
    started = time.perf_counter()
    by_whom = _certify if defence.art is None else _certify_by_art
    results = by_whom(defence, digits, settings, log, progress)
    seconds = time.perf_counter() - started
    fitting, other = (SMOOTHADV, PGD) if defence.smoothed else (PGD, SMOOTHADV)
    budgets = settings.budgets if defence.art is None else (settings.eps,)
    trials = [*((fitting, eps) for eps in budgets), (other, settings.eps)]
    attacked = {}
    for name, eps in tqdm(trials, desc=f"attack {defence.name}", unit="attack", disable=not progress):
        adversarial = attack(name, defence, digits.x_test, digits.y_test, eps, settings)
        attacked[name, eps] = _accuracy(defence, adversarial, digits.y_test, settings)
    clean = _accuracy(defence, digits.x_test, digits.y_test, settings)
    return Outcome(defence, clean, attacked, results, seconds)


def attack(name: str, defence: Defence, x: Tensor, y: Tensor, eps: float, settings: Settings) -> Tensor:
    """Return ``x`` (n, 1, 8, 8) after torchattacks' attack ``name`` with l2 budget ``eps`` pixels."""
    import torchattacks

    options: dict[str, Any] = {"eps": eps, "alpha": 2.5 * eps / STEPS, "steps": STEPS}
    if name == PGD:
        options |= {"random_start": False}
    else:
        options |= {"sigma": settings.sigma, "noise": "fresh", "seed": settings.seed}
    attacker = getattr(torchattacks, name)(defence.network, **options)
    adversarial: Tensor = attacker(x, y)
    return adversarial


def choose_specimens(outcome: Outcome, digits: Digits, settings: Settings, rows: int = 4) -> list[Specimen]:
    """Return images from the least to the most robust of those that are certified correctly."""
    radius = outcome.results.radii
    correct = np.flatnonzero(outcome.results.correct)
    order = correct[np.argsort(radius[correct])]
    chosen = order[np.linspace(0, len(order) - 1, min(rows, len(order))).astype(int)].tolist()
    if not chosen:
        return []
    x, y, eps = digits.x_test[chosen], digits.y_test[chosen], settings.budgets[-1]
    attacked = attack(SMOOTHADV, outcome.defence, x, y, eps, settings)
    noisy = x + GaussianNoise(settings.sigma).draw_(torch.empty_like(x), stream(settings.seed, "gallery"))
    answers = _answers(outcome.defence, attacked, settings).tolist()
    specimens = []
    for row, index in enumerate(chosen):
        clean, seen, after = (images[row, 0].numpy() for images in (x, noisy, attacked))
        specimens.append(Specimen(clean, seen, after, _caption(int(y[row]), answers[row], float(radius[index]), eps)))
    return specimens


def _caption(label: int, answer: int, radius: float, eps: float) -> str:
    fate = "undecided" if answer < 0 else str(answer)
    return f"it is a {label}, certified to r = {decimals_below(radius, 2)}  ·  after an attack of size {eps:g}: {fate}"


def _certify(defence: Defence, digits: Digits, settings: Settings, log: Path, progress: bool) -> Results:
    for old in (log, log.with_name(log.name + ".json")):
        old.unlink(missing_ok=True)
    labels, made = digits.y_test.tolist(), []
    plan, seed = settings.plan, settings.seed
    certificates = certify(defence.network, digits.x_test, settings.sigma, plan=plan, seed=seed, progress=progress)
    with ResultsWriter(log) as writer:
        for certificate, label in zip(certificates, labels, strict=True):
            writer.write(certificate, label)
            made.append(certificate)
    return Results.of(made, labels)


def _certify_by_art(defence: Defence, digits: Digits, settings: Settings, log: Path, progress: bool) -> Results:
    """Let ART certify, with a batch size that was its fastest for this network."""
    if progress:
        tqdm.write("certify: ART shows no progress, please wait")
    started = time.perf_counter()
    with global_randomness(settings.seed):
        predict, radius = defence.art.certify(digits.x_test.numpy(), n=settings.n, batch_size=ART_BATCH)
    n, label = len(digits.y_test), digits.y_test.numpy()
    seconds = np.full(n, (time.perf_counter() - started) / n)
    results = Results(
        np.arange(n), label, predict.astype(np.int64), radius.astype(np.float64), predict == label, seconds
    )
    write_results(log, results)
    return results


def _accuracy(defence: Defence, x: Tensor, y: Tensor, settings: Settings) -> float:
    return float(np.mean(_answers(defence, x, settings) == y.numpy()))


def _answers(defence: Defence, x: Tensor, settings: Settings) -> Any:
    """Return the class of each image (n,); -1 where a vote cannot tell the two first classes apart."""
    if not defence.smoothed:
        with evaluating(defence.network), torch.no_grad():
            return defence.network(x).argmax(1).numpy()
    fresh_noise = settings.seed + 1  # neither the attack's nor the certificates'
    return majority(Poll(defence.network, x, settings.sigma, seed=fresh_noise).votes(settings.judge), settings.alpha)
