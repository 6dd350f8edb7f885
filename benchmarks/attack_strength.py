"""How strong attacks on a smoothed classifier are at equal numbers of passes, and whether certificates hold.

Each attack has ``steps`` x ``samples`` forward and backward passes an image. What becomes of its images is judged by
votes that no attack has seen, the same for all attacks, so that differences between attacks are not differences of
luck: p(y) is the share of the votes for the true class, *correct* is what PREDICT says (Cohen et al. 2019). The
spread is the standard deviation over the attacks' seeds.

All images are certified first. An attack that stays inside the certified radius of an image and after which PREDICT
says another class is a violation; one attack of each kind goes to 0.999 of each image's radius.
"""

import json
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from attack_methods import INSIDE, OURS, OURS_LINF, PEERS, PEERS_LINF, Attack, Budget
from attack_networks import SIGMA, VICTIMS, Victim
from machine import Clock, environment
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins import FixedBudget, activate, certify
from rs_plugins.core.certification import majority
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.votes import Poll

HERE = Path(__file__).parent
JUDGE, CERTIFIER = 1_000_003, 7  # seeds
ALPHA = 0.001
METHODS = {"l2": OURS | PEERS, "linf": OURS_LINF | PEERS_LINF}
ALL_OURS, ALL_PEERS = OURS | OURS_LINF, PEERS | PEERS_LINF
LEADERS = ("SmoothAdvPGD", "SmoothAdvLinfPGD")  # the defaults, with as many steps and draws as the peers have
Row = dict[str, Any]


# ---- judging ---------------------------------------------------------------------------------------------------------


class Count:
    """Counts the images that go through a model with their gradient asked for."""

    def __init__(self, model: nn.Module) -> None:
        # ART calls the parts of an nn.Sequential one by one, so the model itself would not be noticed.
        self.entrance = next(module for module in model.modules() if not list(module.children()))
        self.images = 0

    def __enter__(self) -> "Count":
        self._hook = self.entrance.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0]) * torch.is_grad_enabled()


class Certified(NamedTuple):
    """Certified class of each image, or -1, and the radius, (n,)."""

    prediction: np.ndarray[Any, Any]
    radius: np.ndarray[Any, Any]


def certified(victim: Victim, n: int) -> Certified:
    """Certify the images."""
    how: dict[str, Any] = {"plan": FixedBudget(n=n, alpha=ALPHA), "seed": CERTIFIER, "channels_last": True}
    found = list(certify(victim.model, victim.x, SIGMA, **how))
    return Certified(np.array([c.prediction for c in found]), np.array([c.radius for c in found]))


def judge(victim: Victim, x: Tensor, votes: int) -> np.ndarray[Any, Any]:
    """Return the votes (n, classes) for the images ``x``, by draws that are the same for all attacks."""
    return Poll(victim.model, x, SIGMA, seed=JUDGE, channels_last=True).votes(votes)


def tried(name: str, attack: Attack, victim: Victim, budget: Budget, certificates: Certified, votes: int) -> Row:
    """Attack the images and judge what became of them."""
    torch.manual_seed(budget.seed)
    np.random.seed(budget.seed)  # noqa: NPY002  ART's attacks draw from it
    with Count(victim.model) as count:
        found = attack(victim.model, victim.x, victim.y, budget).detach()
    counts, rows = judge(victim, found, votes), np.arange(len(found))
    answers, labels = majority(counts, ALPHA), victim.y.numpy()
    distance = (found - victim.x).double().flatten(1).norm(dim=1).numpy()
    inside = (distance < certificates.radius) & (certificates.prediction != ABSTAIN)
    other = (answers != certificates.prediction) & (answers != ABSTAIN)
    return {
        **{"victim": victim.name, "attack": name, "seed": budget.seed, "passes": count.images / len(found)},
        **{"correct": float((answers == labels).mean()), "abstained": float((answers == ABSTAIN).mean())},
        **{"longest": float(distance.max()), "inside": int(inside.sum()), "violations": int((inside & other).sum())},
        "p(y)": (counts[rows, labels] / votes).tolist(),
    }


def nothing(model: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
    """Return the images as they are."""
    return x


def runs(radii: Sequence[str], seeds: int, steps: int, samples: int, within: Certified) -> Iterator[Any]:
    """Yield key, attack and budget of each run, for ``radii`` such as "l2:0.5"."""
    yield ("clean", "", 0), nothing, Budget(0.0, steps, samples, 0)
    for radius in radii:
        norm, _, eps = radius.partition(":")
        for seed in range(1, seeds + 1):
            for name, attack in METHODS[norm].items():
                yield (name, f"{norm} {eps}", seed), attack, Budget(float(eps), steps, samples, seed)
    edge = torch.from_numpy(0.999 * within.radius.clip(min=0)).float()
    for name, attack in INSIDE.items():
        yield (name, "0.999 of the certified radius", 1), attack, Budget(edge, steps, samples, 1)


# ---- results ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Return the rows of finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def table(rows: list[Row]) -> list[str]:
    """Return the lines of one network's and radius's table, the strongest attack first."""
    lines = [
        "| attack | backward passes an image | mean p(y) | correct | abstained | longest perturbation |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    groups = by(rows, "attack")
    for name in sorted(groups, key=lambda name: np.mean([row["p(y)"] for row in groups[name]])):
        group = groups[name]
        bold = "**" if name in ALL_OURS else ""
        shares = mean_and_spread([float(np.mean(row["p(y)"])) for row in group])
        correct = mean_and_spread([row["correct"] for row in group])
        abstained, longest = np.mean([row["abstained"] for row in group]), max(row["longest"] for row in group)
        passes = f"{group[0]['passes']:g}"
        lines.append(f"| {bold}{name}{bold} | {passes} | {shares} | {correct} | {abstained:.3f} | {longest:.6f} |")
    return lines


def lead(rows: list[Row]) -> str:
    """Return by how much our default is stronger than the strongest peer, image by image."""
    groups = by(rows, "attack")
    mean = {name: np.mean([row["p(y)"] for row in group], axis=0) for name, group in groups.items()}
    (ours,) = (name for name in mean if name in LEADERS)
    peer = min((name for name in mean if name in ALL_PEERS), key=lambda name: mean[name].mean())
    gap = mean[peer] - mean[ours]
    error = gap.std(ddof=1) / math.sqrt(len(gap))
    seeds = [[float(np.mean(row["p(y)"])) for row in groups[name]] for name in (ours, peer)]
    spread = max(statistics.stdev(means) if len(means) > 1 else math.nan for means in seeds)
    return (
        f"{ours} leaves p(y) lower than {peer} by {gap.mean():.4f}; the larger spread over seeds of the two is "
        f"{spread:.4f}, the standard error over images {error:.4f}."
    )


def by(rows: list[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def markdown(made: dict[str, Any], rows: list[Row]) -> str:
    """Return all tables and what they were made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    for victim, own in by(rows, "victim").items():
        radii = by(own, "eps")
        clean = radii.pop("")[0]
        lines += ["", f"## {victim}", ""]
        lines += [f"{clean['training']}; {len(clean['p(y)'])} test images, sigma {SIGMA}."]
        lines += [f"Clean: mean p(y) {np.mean(clean['p(y)']):.4f}, correct {clean['correct']:.4f}."]
        for eps, group in radii.items():
            lines += ["", f"### eps: {eps}", "", *table(group)]
            if any(row["attack"] in ALL_PEERS for row in group):
                lines += ["", lead(group)]
        attacked = [row for row in own if row["eps"]]
        inside, broken = (sum(row[key] for row in attacked) for key in ("inside", "violations"))
        bound = 2 * ALPHA * inside
        lines += ["", f"Attacked inside their certified radius: {inside} times an image; violations: {broken}. "]
        lines[-1] += f"Of wrong certificates and wrong predictions, {bound:.1f} at most would be expected."
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--victims", default=",".join(VICTIMS), show_default=True, help="Which networks, separated by commas.")
@click.option("--images", default=64, show_default=True, help="Test images.")
@click.option("--eps", "radii", default="l2:0.25,l2:0.5,l2:1.0,linf:0.03", show_default=True, help="Norms and budgets.")
@click.option("--seeds", default=3, show_default=True, help="Seeds of each attack.")
@click.option("--steps", default=10, show_default=True, help="Steps of an attack.")
@click.option("--samples", default=4, show_default=True, help="Noise draws per step.")
@click.option("--votes", default=10_000, show_default=True, help="Votes of the judge on each image.")
@click.option("--certify-votes", default=10_000, show_default=True, help="Votes of each certificate.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads of torch.")
@click.option("--resume", is_flag=True, help="Go on with the runs in --out.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "attack_strength", help="No suffix.")
def strength(
    victims: str,
    images: int,
    radii: str,
    seeds: int,
    steps: int,
    samples: int,
    votes: int,
    certify_votes: int,
    threads: int,
    resume: bool,
    out: Path,
) -> None:
    """What attacks leave of a smoothed classifier at equal numbers of passes, and whether certificates hold."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    activate()
    log = out.with_suffix(".jsonl")
    if log.exists() and not resume:
        log.unlink()
    out.parent.mkdir(parents=True, exist_ok=True)
    spent = {"images": images, "steps": steps, "samples": samples, "votes": votes, "certify_votes": certify_votes}
    if others := [row for row in read_rows(log) if any(row[name] != value for name, value in spent.items())]:
        raise click.ClickException(f"{log} holds runs of other settings ({others[0]['attack']}); choose another --out")
    for name in victims.split(","):
        victim = VICTIMS[name](images)
        done = {(row["attack"], row["eps"], row["seed"]) for row in read_rows(log) if row["victim"] == victim.name}
        within = certified(victim, certify_votes)
        todo = runs(radii.split(","), seeds, steps, samples, within)
        todo = [run for run in todo if run[0] not in done]
        for (attack, eps, _), function, budget in tqdm(todo, desc=victim.name):
            row = tried(attack, function, victim, budget, within, votes)
            row |= {"eps": eps, "training": victim.training, **spent}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
    text = markdown(environment("bench_attacks.py", Clock("cpu", threads)), read_rows(log))
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    click.echo(text)
