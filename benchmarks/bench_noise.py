"""What noise on the grid costs: certification with `LatticeGaussianNoise` against `GaussianNoise`.

python benchmarks/bench_noise.py      seconds by those with ordinary noise: a LeNet on MNIST, a ResNet-20 on CIFAR-10

Both certify the same images with the same plan, at the chunk that the library finds for ordinary noise. The repetitions
are interleaved; on a CPU with one thread the clock is the processor time of this process.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import click
import torch
from certify_speed import MODELS, N0, Setting, own_chunk
from machine import Clock, environment
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins import FixedBudget, GaussianNoise, LatticeGaussianNoise, certify
from rs_plugins.core.noise import Family
from rs_plugins.core.perturbing import perturb_

HERE = Path(__file__).parent
FAMILIES: dict[str, Family] = {"ordinary": GaussianNoise, "lattice": LatticeGaussianNoise}
LIMITS = {"lenet": 1.5, "resnet20": 1.1}
BLOCKS = 200  # of 64 noisy images, for the time of a pixel


@dataclass(frozen=True)
class Row:
    """What noise on the grid costs with one model.

    Attributes:
        model: What was certified.
        sigma: Standard deviation of the noise, in pixels.
        batch: Noisy images per forward pass.
        ordinary: Noisy images per second with ordinary noise, the median of the repetitions.
        lattice: The same with noise on the grid.
        cost: Median over the repetitions of the time with noise on the grid by that with ordinary noise.
        least: The smallest of these.
        most: The largest.
        limit: What the cost should not exceed.
        ordinary_pixel: Nanoseconds that drawing and adding ordinary noise takes for a pixel.
        lattice_pixel: The same of noise on the grid.
    """

    model: str
    sigma: float
    batch: int
    ordinary: float
    lattice: float
    cost: float
    least: float
    most: float
    limit: float
    ordinary_pixel: float
    lattice_pixel: float


def measure(
    name: str, model: nn.Module, images: Tensor, sigma: float, clock: Clock, repeats: int, seconds: float
) -> Row:
    """Certify ``images`` with each family in turn, ``repeats`` times."""
    chunk, _ = own_chunk(model, images, Setting(images.device.type))
    images = (images * 255).round() / 255

    def run(family: Family, n: int) -> float:
        started = clock()
        list(certify(model, images, sigma, family=family, plan=FixedBudget(n0=N0, n=n), chunk=chunk))
        return clock() - started

    rough = len(images) * (N0 + 300) / run(GaussianNoise, 300)
    n = max(300, ceil(rough * seconds / len(images)))
    taken: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for repeat in tqdm(range(repeats), desc=f"{name}, sigma {sigma:g}"):
        for family in list(FAMILIES)[:: 1 if repeat % 2 else -1]:
            taken[family].append(run(FAMILIES[family], n))
    costs = [lattice / ordinary for ordinary, lattice in zip(taken["ordinary"], taken["lattice"], strict=True)]
    paces = {family: len(images) * (N0 + n) / statistics.median(times) for family, times in taken.items()}
    pixel = {family: nanoseconds(FAMILIES[family], sigma, images[0], clock) for family in FAMILIES}
    return Row(
        name,
        sigma,
        chunk,
        **paces,
        cost=statistics.median(costs),
        least=min(costs),
        most=max(costs),
        limit=LIMITS[name],
        ordinary_pixel=pixel["ordinary"],
        lattice_pixel=pixel["lattice"],
    )


def nanoseconds(family: Family, sigma: float, image: Tensor, clock: Clock) -> float:
    """Return how long it takes to draw and add the noise of one pixel: the fastest of five rounds."""
    noise, block = family(sigma), torch.empty(64, *image.shape, device=image.device)
    source = torch.Generator(image.device).manual_seed(0)

    def round_() -> float:
        started = clock()
        with torch.inference_mode():
            for _ in range(BLOCKS):
                perturb_(noise, block, image, source)
        return (clock() - started) / (BLOCKS * block.numel()) * 1e9

    return min(round_() for _ in range(5))


def rows(models: str, sigmas: str, device: str, clock: Clock, repeats: int, seconds: float) -> Iterator[Row]:
    for name in models.split(","):
        found = MODELS[name](device)
        for sigma in map(float, sigmas.split(",")):
            if found is not None:
                yield measure(name, *found, sigma, clock, repeats, seconds)


def markdown(made: dict[str, object], measured: list[Row]) -> str:
    """Return the table and what it was made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += [
        "",
        "Cost: seconds with noise on the grid by those with ordinary noise, median (least to most) of the repetitions.",
        "",
        "| model | sigma | batch | ordinary, images / s | lattice, images / s | cost | limit | ns a pixel, both |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in measured:
        cost = f"{row.cost:.3f} ({row.least:.3f} to {row.most:.3f})"
        pixel = f"{row.ordinary_pixel:.2f}, {row.lattice_pixel:.2f}"
        paces = f"{row.ordinary:,.0f} | {row.lattice:,.0f}"
        lines.append(f"| {row.model} | {row.sigma:g} | {row.batch} | {paces} | {cost} | {row.limit:g} | {pixel} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--models", default="lenet,resnet20", show_default=True, help="Which models, separated by commas.")
@click.option("--sigmas", default="0.25,1.0", show_default=True, help="Noise levels, separated by commas.")
@click.option("--repeats", default=7, show_default=True, help="Repetitions of each.")
@click.option("--seconds", default=4.0, show_default=True, help="About how long each repetition takes.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of torch on the CPU.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "bench_noise", help="No suffix.")
def main(models: str, sigmas: str, repeats: int, seconds: float, device: str, threads: int, out: Path) -> None:
    """What noise on the grid costs, against ordinary noise."""
    torch.set_num_threads(threads)
    clock = Clock(device, threads)
    measured = list(rows(models, sigmas, device, clock, repeats, seconds))
    made = environment("bench_noise.py", clock)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"made": made, "rows": [asdict(row) for row in measured]}, indent=1)
    out.with_name(out.name + ".json").write_text(record + "\n", encoding="utf-8")
    text = markdown(made, measured)
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
