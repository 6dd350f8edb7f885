"""What an attack costs over its own passes, and how much memory.

* time: of an attack, by the time of as many forward and backward passes written by hand, on noisy images that are there
  already, in batches as ours have them; those of torchattacks choose their own. The two take turns; the figure is the
  median of the ratios.
* memory: the peak during an attack above what the process held before it, with few draws and with many, in passes of
  the same size.
"""

import ctypes
import multiprocessing
import statistics
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from attack_methods import OURS, PEERS, Attack, Budget
from attack_networks import SIGMA, VICTIMS, Victim
from attack_strength import Count
from machine import Clock, environment, keep
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from rs_plugins import activate

HERE = Path(__file__).parent
FEW, MANY = 8, 128  # draws
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TIMED = [
    "SmoothAdvPGD",
    "SmoothAdvPGD.published",
    "SmoothAdvDDN.published, max_norm",
    "torchattacks PGDRSL2",
    "torchattacks EOTPGD, in the linf ball inside",
    "ART PGD on ours",
]


def floor(model: nn.Module, noisy: Tensor, y: Tensor, passes: int) -> None:
    """Make ``passes`` forward and backward passes on the batch ``noisy``."""
    for _ in range(passes):
        leaf = noisy.detach().requires_grad_()
        torch.autograd.grad(cross_entropy(model(leaf), y, reduction="sum"), leaf)


def times(victim: Victim, name: str, attack: Attack, budget: Budget, batch: int, repeats: int, clock: Clock) -> Any:
    """Return the ratio to the floor, the median of ``repeats`` repetitions, and all of them."""
    with Count(victim.model) as count:
        attack(victim.model, victim.x, victim.y, budget)
    copies = -(-batch // len(victim.x))
    noisy = (victim.x.repeat(copies, 1, 1, 1) + SIGMA * torch.randn(copies * len(victim.x), *victim.x.shape[1:]))[
        :batch
    ]
    y, passes = victim.y.repeat(copies)[:batch], count.images / batch
    ratios = []
    for _ in tqdm(range(repeats), desc=f"{victim.name}: {name}"):
        started = clock()
        floor(victim.model, noisy, y, round(passes))
        middle = clock()
        attack(victim.model, victim.x, victim.y, budget)
        ratios.append((clock() - middle) / (middle - started) * round(passes) / passes)
    row = {"victim": victim.name, "attack": name, "passes": count.images / len(victim.x)}
    return row | {"ratio": statistics.median(ratios), "ratios": ratios}


def peak(victim_name: str, attack_name: str, samples: int, images: int) -> int:
    """Return how many bytes an attack needs at its peak, in a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    activate()
    # So that what is freed goes back at once, and the peak is of what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    victim, attack = VICTIMS[victim_name](images), (OURS | PEERS)[attack_name]
    attack(victim.model, victim.x[:1], victim.y[:1], Budget(0.5, 2, 1, 0, chunk=FEW * images))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _kilobytes("VmRSS")
    steps = 2 * MANY // samples  # as many passes with few draws as with many: what the allocator keeps is the same
    attack(victim.model, victim.x, victim.y, Budget(0.5, steps, samples, 0, chunk=FEW * images))
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def markdown(made: dict[str, Any], timed: list[dict[str, Any]], memory: list[dict[str, Any]]) -> str:
    """Return both tables and what they were made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += ["", "| network | attack | passes an image | time by that of the passes | slowest | fastest |"]
    lines += ["|---|---|--:|--:|--:|--:|"]
    for row in timed:
        ends = f"{max(row['ratios']):.3f} | {min(row['ratios']):.3f}"
        lines.append(f"| {row['victim']} | {row['attack']} | {row['passes']:g} | {row['ratio']:.3f} | {ends} |")
    lines += ["", f"| network | attack | memory, {FEW} draws | memory, {MANY} draws | ratio |", "|---|---|--:|--:|--:|"]
    for row in memory:
        few, many = (f"{row[key] / 2**20:.1f} MiB" for key in ("few", "many"))
        lines.append(f"| {row['victim']} | {row['attack']} | {few} | {many} | {row['many'] / row['few']:.2f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--victims", default=",".join(VICTIMS), show_default=True, help="Which networks, separated by commas.")
@click.option("--images", default=64, show_default=True, help="Test images.")
@click.option("--steps", default=10, show_default=True, help="Steps of an attack.")
@click.option("--samples", default=8, show_default=True, help="Noise draws per step.")
@click.option("--batch", default=128, show_default=True, help="Noisy images in a pass of the floor and of ours.")
@click.option("--repeats", default=7, show_default=True, help="Repetitions.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "attack_cost", help="No suffix.")
def cost(victims: str, images: int, steps: int, samples: int, batch: int, repeats: int, out: Path) -> None:
    """Time by that of an attack's own passes, with one thread, and memory."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    activate()
    clock, timed, memory = Clock("cpu", 1), list[dict[str, Any]](), list[dict[str, Any]]()
    budget = Budget(0.5, steps, samples, 1, chunk=batch)
    for victim_name in victims.split(","):
        victim = VICTIMS[victim_name](images)
        timed += [times(victim, name, (OURS | PEERS)[name], budget, batch, repeats, clock) for name in TIMED]
    for victim_name in victims.split(","):
        for name in TIMED[:4]:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                few, many = (pool.apply(peak, (victim_name, name, count, 16)) for count in (FEW, MANY))
            memory.append({"victim": victim_name, "attack": name, "few": few, "many": many})
    made = environment("bench_attacks.py", clock)
    text = markdown(made, timed, memory)
    keep(out, text, {"made": made, "time": timed, "memory": memory})
    click.echo(text)
