"""Votes per image of the certification plans, and the certified accuracy that each reports.

Two parts. On published logs: the probability of the top class of every image is recovered from its logged radius, and
each plan's own procedure is fed with binomial votes. On real images: the plans certify a network.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy
import torch
from scipy.special import ndtr
from scipy.stats import beta, binom
from tqdm.auto import tqdm

from rs_plugins import Anytime, AtRadius, FixedBudget, GaussianNoise, OnGrid, certify
from rs_plugins.core.plans.protocol import Case, Plan, Verdict
from rs_plugins.core.results.files import read_results
from rs_plugins.core.results.table import Results
from rs_plugins.core.sequential_test import fewest_to_certify

ALPHA, N0, N = 0.001, 100, 100_000
HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
LOGS = Path(os.environ.get("RS_PLUGINS_REFERENCE", SHARED / "reference")) / "certify-logs"
SLACKS = (0.0, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Log:
    """A published log: its file, its noise in pixels, and the radii of its table."""

    file: str
    sigma: float
    radii: tuple[float, ...]


PUBLISHED = (
    Log("cifar10-resnet110-smoothmix-0.25.tsv", 0.25, (0.0, 0.25, 0.5, 0.75)),
    Log("cifar10-consistency-0.25.tsv", 0.25, (0.0, 0.25, 0.5, 0.75)),
    Log("mnist-lenet-gaussian-0.25.tsv", 0.25, (0.0, 0.25, 0.5, 0.75)),
    Log("mnist-lenet-smoothmix-1.00.tsv", 1.0, tuple(0.25 * j for j in range(16))),
    Log("imagenet-resnet50-smoothadv-0.50.tsv", 0.5, tuple(0.25 * j for j in range(8))),
)


@dataclass(frozen=True)
class Row:
    """One plan on one set of images.

    Attributes:
        images: What was certified.
        plan: The plan with its settings.
        votes: Mean votes per image, selection included.
        saving: Votes of `FixedBudget` divided by these.
        accuracy: Certified accuracy at each radius of the plan, in percent.
        loss: What it is below that of `FixedBudget`, in points.
    """

    images: str
    plan: str
    votes: float
    saving: float
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]


def recover(log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Return the top-class probability of each image, (n,), and whether its prediction is correct, (n,).

    The logged radius gives the count out of 100,000, and the count the probability; an abstention is taken for 1/2.
    """
    results = read_results(LOGS / log.file)
    counts = np.arange(1, N)
    lower = np.concatenate([[0], beta.ppf(ALPHA, counts, N - counts + 1), [ALPHA ** (1 / N)]])
    logged = ndtr(results.radii / log.sigma)
    above = np.searchsorted(lower, logged).clip(1, N)
    nearest = above - (logged - lower[above - 1] < lower[above] - logged)
    return np.where(results.predict < 0, 0.5, nearest / N), results.correct


def fixed_accuracy(p: np.ndarray, correct: np.ndarray, needed: Sequence[float]) -> np.ndarray:
    """Return the expected certified accuracy of `FixedBudget` in percent, where radii need probabilities ``needed``."""
    tails = [binom.sf(fewest_to_certify(p0, N, ALPHA) - 1, N, p) for p0 in needed]
    return 100 * (np.array(tails) * correct).mean(1)


def simulate(plan: Plan, sigma: float, p: np.ndarray, seed: int) -> list[Verdict]:
    """Return the verdicts of ``plan`` on images of top-class probability ``p`` (n,), its votes drawn from binomials."""
    draw, noise = np.random.default_rng(seed), GaussianNoise(sigma)
    verdicts = []
    for probability in p:
        procedure = plan.procedure(Case(noise, draw.random(), lambda: 0.0, lambda _: False))
        wanted = next(procedure)
        votes = np.array([wanted, 0])  # the selection finds the top class
        try:
            while True:
                wanted = procedure.send(votes)
                wins = draw.binomial(wanted, probability)
                votes = np.array([wins, wanted - wins])
        except StopIteration as stop:
            verdicts.append(stop.value)
    return verdicts


def compare(name: str, log: Log, plans: Iterable[Plan], seed: int) -> list[Row]:
    """Return a row for each of ``plans`` on a published log."""
    p, correct = recover(log)
    noise, rows = GaussianNoise(log.sigma), []
    for plan in plans:
        radii = (plan.r,) if isinstance(plan, AtRadius) else log.radii
        verdicts = simulate(plan, log.sigma, p, seed)
        certified = np.array([v.radius if v.prediction >= 0 else -1.0 for v in verdicts])
        accuracy = 100 * np.array([(correct & (certified >= radius)).mean() for radius in radii])
        fixed = fixed_accuracy(p, correct, [noise.probability(radius) for radius in radii])
        rows.append(row(name, plan, np.mean([v.n0 + v.n for v in verdicts]), N0 + N, accuracy, fixed))
    return rows


def row(name: str, plan: Plan, votes: float, budget: int, accuracy: np.ndarray, fixed: np.ndarray) -> Row:
    """Return the row of one plan, rounded to what is meaningful."""
    two = [tuple(round(float(value), 2) for value in values) for values in (accuracy, fixed - accuracy)]
    return Row(name, repr(plan), round(float(votes), 1), round(budget / float(votes), 2), *two)


def standard(log: Log) -> list[Plan]:
    """Return the plans that are compared on every log."""
    kt = {"test": "betting", "slack": 0.0, "beta": ALPHA}
    return [
        FixedBudget(N0, N, ALPHA),
        *(AtRadius(r) for r in log.radii),
        *(AtRadius(r, slack=0.2, beta=0.2) for r in log.radii[1:4]),
        *(AtRadius(r, **kt) for r in log.radii[1:4]),
        OnGrid(log.radii),
        OnGrid(log.radii, test="betting"),
        OnGrid(log.radii, **kt),
    ]


def trade_off(log: Log) -> list[Plan]:
    """Return the plans of the curve of votes against loss."""
    grids: list[Plan] = [OnGrid(log.radii, slack=slack, beta=b) for slack in SLACKS for b in (0.1, 0.3)]
    return grids + [AtRadius(r, slack=slack) for r in log.radii[1:4] for slack in SLACKS]


def on_images(name: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, sigma: float, n: int) -> list[Row]:
    """Return the rows of plans of at most ``n`` estimation votes on real images ``x`` (n, *input) with labels ``y``."""
    radii = tuple(sigma * j for j in range(4))
    radii = tuple(r for r in radii if GaussianNoise(sigma).probability(r) ** n < 0.9 * ALPHA)
    plans: list[Plan] = [FixedBudget(N0, n), *(AtRadius(r, n=n) for r in radii), OnGrid(radii, n=n), Anytime(n=n)]
    rows, fixed = [], np.zeros(0)
    for plan in plans:
        certificates = list(certify(model, x, sigma, plan=plan, progress=True))
        table = Results.of(certificates, y.tolist())
        at = [plan.r] if isinstance(plan, AtRadius) else radii
        accuracy = 100 * table.certified_accuracy(at)
        if isinstance(plan, FixedBudget):
            fixed = accuracy
        reference = fixed[[radii.index(r) for r in at]]
        votes = np.mean([c.n0 + c.n for c in certificates])
        rows.append(row(name, plan, votes, N0 + n, accuracy, reference))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of ``rows``."""
    lines = ["| images | plan | votes/image | times fewer | certified % | loss, points |", "|---|---|---|---|---|---|"]
    for r in rows:
        accuracy, loss = (" ".join(f"{value:.2f}" for value in values) for values in (r.accuracy, r.loss))
        lines.append(f"| {r.images} | `{r.plan}` | {r.votes:,.0f} | {r.saving:.1f} | {accuracy} | {loss} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Row]], path: Path) -> None:
    """Draw how many times fewer votes each plan takes against the largest loss at any radius."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="largest loss of certified accuracy at any radius, points", yscale="log")
    axes.set_xlim(0, 4)
    axes.set_ylabel("times fewer votes than FixedBudget")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    for name, rows in curves.items():
        points = sorted((max(r.loss), r.saving) for r in rows)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set_title("What a little certified accuracy buys")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=130)


def curves_of(log: Log, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the trade-off curves among ``rows``: the grid by beta, and each radius."""
    stem = log.file.removesuffix(".tsv")
    chosen: dict[str, Callable[[Row], bool]] = {
        f"{stem}, OnGrid, beta {b}": lambda r, b=b: r.plan.startswith("OnGrid") and f"beta={b}" in r.plan
        for b in (0.1, 0.3)
    }
    for radius in log.radii[1:4]:
        chosen[f"{stem}, AtRadius {radius}"] = lambda r, radius=radius: f"AtRadius(r={radius}," in r.plan
    return {name: [r for r in rows if keep(r)] for name, keep in chosen.items()}


def environment(command: str, started: float) -> dict[str, Any]:
    """Return with what the figures were made."""
    return {
        "command": command,
        "seconds": round(time.perf_counter() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "cores": os.cpu_count(),
    }


@click.command()
@click.option("--seed", default=0, show_default=True, help="Seed of the simulated votes.")
@click.option("--curve/--no-curve", default=True, show_default=True, help="Also the curve of votes against loss.")
@click.option("--real/--no-real", default=True, show_default=True, help="Also real images through a network.")
@click.option("--images", default=20, show_default=True, help="Real images.")
@click.option("--n", default=6_000, show_default=True, help="Estimation votes for each real image.")
@click.option("--sigma", default=0.03, show_default=True, help="Noise on the real images, in pixels.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results", help="Folder of the results.")
def samples(seed: int, curve: bool, real: bool, images: int, n: int, sigma: float, out: Path) -> None:
    """Votes per image of each plan, on published logs and on real images."""
    started, rows, curves = time.perf_counter(), [], {}
    for log in tqdm([log for log in PUBLISHED if (LOGS / log.file).is_file()], desc="logs"):
        rows += compare(log.file, log, standard(log), seed)
        if curve and log in (PUBLISHED[0], PUBLISHED[3]):
            points = compare(log.file, log, trade_off(log), seed)
            curves |= curves_of(log, points)
    if real:
        from certify_networks import cifar10_resnet20

        model, x, y = cifar10_resnet20(images)
        rows += on_images("CIFAR-10 (JPEG q75), ResNet-20", model, x, y, sigma, n)
    out.mkdir(parents=True, exist_ok=True)
    made = environment(
        f"python benchmarks/bench_certify.py samples --seed {seed} --images {images} --n {n} --sigma {sigma}", started
    )
    record = {"made": made, "rows": [asdict(r) for r in rows]}
    record["curves"] = {name: [asdict(r) for r in points] for name, points in curves.items()}
    (out / "certify_samples.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(f"{key}: {value}  " for key, value in made.items()) + "\n\n" + markdown(rows) + "\n"
    (out / "certify_samples.md").write_text(text, encoding="utf-8")
    if curves:
        plot(curves, out / "certify_samples.png")
    click.echo(text)


if __name__ == "__main__":
    samples()
