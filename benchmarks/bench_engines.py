"""Certification in several processes against one: seconds for the same log, and whether it is the same.

The pretrained CIFAR-10 ResNet-20, or a LeNet with initial weights on random images, is certified by a single process
with all cores, by workers on Ray with the cores shared out, and by a single process with one thread. They take turns;
each share is the single process's time by theirs in the same turn, and figures are medians. The cluster is started
beforehand; how long that takes is given apart.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from certify_networks import cifar10_resnet20
from machine import Clock, environment
from torch import nn
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.data_sets.data_set import DataSet, in_memory
from rs_plugins.core.engines.cores import cores
from rs_plugins.core.engines.ray_cluster import connected
from rs_plugins.core.engines.ray_engine import RayEngine
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.text_tables import as_text

HERE = Path(__file__).parent
Run = Callable[[Path], None]


def network(name: str, images: int) -> tuple[nn.Module, DataSet]:
    if name == "resnet20":
        model, x, y = cifar10_resnet20(images)
        return model, in_memory("CIFAR-10", x.numpy(), y.numpy(), classes=10)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 1, 28, 28), dtype=np.uint8)
    return make_network("lenet").eval(), in_memory("random", pixels, np.arange(images) % 10)


def content(log: Path) -> tuple[list[list[str]], bytes]:
    rows = [line.split("\t") for line in log.read_text().split("\n")]
    return [[*row[:5], *row[6:]] for row in rows], log.with_name(log.name + ".json").read_bytes()


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(["resnet20", "lenet"]), default="resnet20", show_default=True)
@click.option("--images", type=int, default=64, show_default=True)
@click.option("-n", "n", type=int, default=1000, show_default=True, help="Votes an image.")
@click.option("--workers", type=int, multiple=True, help="Numbers of workers.  [2, and one a core]")
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "bench_engines", show_default=True)
def main(model: str, images: int, n: int, workers: tuple[int, ...], repeats: int, out: Path) -> None:
    net, data = network(model, images)
    clock = Clock("cpu", 0)  # several processes: wall clock
    started = clock()
    with connected(None, cpus=max([*workers, cores(), 2]), gpus=False), tempfile.TemporaryDirectory() as folder:
        start = clock() - started

        def job(log: Path, threads: int, count: int = 0) -> None:
            torch.set_num_threads(threads)
            engine = RayEngine(workers=count) if count else None
            certify_data_set(net, data, 0.25, log, plan=FixedBudget(n0=100, n=n), engine=engine)

        runs: dict[str, Run] = {"one process, all cores": lambda log: job(log, cores())}
        runs["one process, one thread"] = lambda log: job(log, 1)
        for count in sorted({*(workers or (2, cores()))}):
            runs[f"Ray, {count} workers"] = lambda log, count=count: job(log, cores(), count)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        same = True
        for turn in tqdm(range(repeats), desc=model):
            for place, (name, run) in enumerate(runs.items()):
                log, before = Path(folder, f"{turn}-{place}.tsv"), time.perf_counter()
                run(log)
                seconds[name].append(time.perf_counter() - before)
                same = same and content(log) == content(Path(folder, f"{turn}-0.tsv"))
    first = next(iter(seconds.values()))
    rows = [
        {
            "how": name,
            "seconds": round(statistics.median(times), 2),
            "faster by": round(statistics.median(a / b for a, b in zip(first, times, strict=True)), 3),
        }
        for name, times in seconds.items()
    ]
    made = environment("bench_engines.py", clock)
    figures = {"made with": made, "start of a cluster": round(start, 2), "all logs equal": same, "rows": rows}
    Path(f"{out}.json").write_text(json.dumps(figures | {"seconds": seconds}, indent=2) + "\n")
    table = as_text([["how", "seconds", "faster by"], *([str(cell) for cell in row.values()] for row in rows)])
    click.echo(
        f"{model}, {images} images, {n} votes; all logs equal: {same}; cluster started in {start:.1f} s\n{table}"
    )


if __name__ == "__main__":
    main()
