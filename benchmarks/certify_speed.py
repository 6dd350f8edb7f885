"""Noisy images per second: `certify` against the best loop written by hand, and against two other certifiers.

* ours: `certify` with `FixedBudget`, the chunk by its own trial.
* floor: the best loop written by hand, with nothing but the work: noise drawn in place into a buffer that is kept, the
  image added, the model, argmax and bincount on the device, one transfer an image; the batch size that a sweep finds.
* ART: `PyTorchRandomizedSmoothing.certify`, at the batch size that a sweep finds.
* reference loop: the per-image loop of Cohen et al.'s code (2019), batches of 1000, votes counted in Python.

All of them select a class by 100 votes and then estimate. On a CPU with one thread the clock is the processor time of
this process, so that other programs on the machine disturb little; else it is the wall clock.
"""

import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import Clock, environment, keep
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins import FixedBudget, certify
from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.chunks import default_chunk
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.loop import train
from rs_plugins.core.votes import Poll

HERE = Path(__file__).parent
DATA = Path(os.environ.get("RS_PLUGINS_DATA", HERE.parents[1] / "shared" / "data"))
SIGMA, N0, IMAGES, TRAINING_IMAGES = 0.25, 100, 4, 30_000
FULL_WORK = 10_000 * 100_100  # votes of a table in the papers: long enough for the trial of chunk sizes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Pass = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """How the model is run."""

    device: str
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        words = [self.device, self.dtype, "channels last" * self.channels_last, "compiled" * self.compile]
        return ", ".join(filter(None, words))

    @property
    def plain(self) -> bool:
        return self == Setting(self.device)


@dataclass(frozen=True)
class Row:
    """The pace of one method with one model and setting, in noisy images per second.

    Attributes:
        model: What was certified.
        setting: How it was run.
        method: Who certified.
        batch: Noisy images per forward pass.
        pace: Median over the repetitions.
        slowest: The slowest repetition.
        fastest: The fastest repetition.
        share: Median over the repetitions of this pace by the floor's in the same repetition.
    """

    model: str
    setting: str
    method: str
    batch: int
    pace: float
    slowest: float
    fastest: float
    share: float


# ---- methods: each certifies all images with N0 + n votes and returns how many noisy images it classified ------------


def ours(model: nn.Module, images: Tensor, n: int, chunk: int, setting: Setting) -> int:
    """Certify with this library."""
    options: dict[str, Any] = {"channels_last": setting.channels_last, "compile": setting.compile, "chunk": chunk}
    dtype = None if setting.dtype == "float32" else DTYPES[setting.dtype]
    list(certify(model, images, SIGMA, plan=FixedBudget(n0=N0, n=n), dtype=dtype, **options))
    return len(images) * (N0 + n)


def floor(forward: Pass, images: Tensor, n: int, batch: int) -> int:
    """Count votes by the best loop written by hand; whole batches only, in its favour."""
    batches = ceil((N0 + n) / batch)
    with torch.inference_mode():
        buffer = torch.empty(batch, *images.shape[1:], device=images.device)
        for image in images:
            counts = torch.zeros(10, dtype=torch.int64, device=images.device)
            ones = counts.new_ones(batch)
            for _ in range(batches):
                winners = forward(buffer.normal_(0, SIGMA).add_(image)).argmax(1)
                # On a GPU, bincount would wait for the device.
                counts += torch.bincount(winners, minlength=10) if counts.is_cpu else count_on_gpu(winners, ones)
            counts.cpu()
    return batches * batch * len(images)


def count_on_gpu(winners: Tensor, ones: Tensor) -> Tensor:
    return ones.new_zeros(10).scatter_add_(0, winners, ones)


def art(model: nn.Module, images: Tensor, n: int, batch: int) -> int:
    """Certify with the Adversarial Robustness Toolbox."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    shape = tuple(images.shape[1:])
    device_type = "gpu" if images.is_cuda else "cpu"
    smoothed = PyTorchRandomizedSmoothing(
        model, nn.CrossEntropyLoss(), shape, 10, sample_size=N0, scale=SIGMA, alpha=0.001, device_type=device_type
    )
    smoothed.certify(images.cpu().numpy(), n=n, batch_size=batch)
    return len(images) * (N0 + n)


def reference_loop(model: nn.Module, images: Tensor, n: int, batch: int = 1000) -> int:
    """Count votes as the code of Cohen et al. (2019) does."""
    for image in images:
        for remaining in (N0, n):
            counts = np.zeros(10, dtype=int)
            with torch.no_grad():
                while remaining > 0:
                    this = min(batch, remaining)
                    remaining -= this
                    repeated = image.repeat((this, 1, 1, 1))
                    noise = torch.randn_like(repeated) * SIGMA
                    for winner in model(repeated + noise).argmax(1).cpu().numpy():
                        counts[winner] += 1
    return len(images) * (N0 + n)


# ---- models and settings ---------------------------------------------------------------------------------------------


def lenet(device: str) -> tuple[nn.Module, Tensor]:
    """Return the LeNet of the SmoothMix paper, trained for a minute if MNIST is there, and images."""
    model = make_network("lenet").to(device)
    if not (DATA / "MNIST").is_dir():
        click.echo("MNIST is not there: LeNet with random weights on random images")
        return model.eval(), torch.rand(IMAGES, 1, 28, 28, device=device)
    data = open_data_set(f"mnist:{DATA / 'MNIST'}", split="train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = data.read(range(TRAINING_IMAGES)), torch.from_numpy(data.labels[:TRAINING_IMAGES])
    train(model, x, y, gaussian(SIGMA), optimizer=optimizer, epochs=1)
    return model.eval(), open_data_set(f"mnist:{DATA / 'MNIST'}").read(range(IMAGES)).to(device)


def resnet20(device: str) -> tuple[nn.Module, Tensor] | None:
    """Return the pretrained CIFAR-10 ResNet-20 and test images, or None where the weights are missing."""
    from certify_networks import cifar10_resnet20

    try:
        model, images, _ = cifar10_resnet20(IMAGES)
    except (OSError, ValueError, ImportError) as error:
        click.echo(f"ResNet-20 is left out: {error}")
        return None
    return model.to(device).eval(), images.to(device)


MODELS: dict[str, Callable[[str], tuple[nn.Module, Tensor] | None]] = {"lenet": lenet, "resnet20": resnet20}


def forward_of(model: nn.Module, setting: Setting) -> Pass:
    """Return the forward pass of the loop written by hand."""
    dtype = DTYPES[setting.dtype]
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    run: Any = copy.deepcopy(model).to(dtype)
    run = run.to(memory_format=layout) if setting.channels_last else run
    run = torch.compile(run, dynamic=False) if setting.compile else run
    return lambda x: run(x.to(dtype=dtype, memory_format=layout))  # type: ignore[no-any-return]


def settings_of(device: str, dtype: str | None, channels_last: bool, compiled: bool) -> list[Setting]:
    """Return the plain setting and the one asked for; on a GPU, the fastest if none is asked for."""
    asked = Setting(device, dtype or "float32", channels_last, compiled)
    if asked.plain and device == "cuda":
        asked = Setting(device, "bfloat16", channels_last=True, compile=True)
    return list(dict.fromkeys([Setting(device), asked]))


# ---- measuring -------------------------------------------------------------------------------------------------------


def best_batch(count: Callable[[int], int], sizes: list[int], clock: Clock) -> int:
    """Return the size at which ``count`` classifies most noisy images a second, the best of three rounds."""
    paces = dict.fromkeys(sizes, 0.0)
    for _ in range(3):
        for size in sizes:
            started = clock()
            done = count(size)
            paces[size] = max(paces[size], done / (clock() - started))
    return max(paces, key=lambda size: paces[size])


def own_chunk(model: nn.Module, images: Tensor, setting: Setting) -> tuple[int, float]:
    """Return the chunk that the library finds, and how many seconds it takes to find it."""
    if setting.compile:
        return 0, 0.0
    dtype = None if setting.dtype == "float32" else DTYPES[setting.dtype]
    poll = Poll(model, images, SIGMA, dtype=dtype, channels_last=setting.channels_last)
    started = time.perf_counter()
    next(poll.run(lambda _: one_vote(), most=FULL_WORK))
    return poll.chunk, time.perf_counter() - started


def one_vote() -> Any:
    """A procedure that asks for one vote."""
    yield 1


def measure(
    name: str, model: nn.Module, images: Tensor, setting: Setting, clock: Clock, repeats: int, seconds: float
) -> Iterator[Row]:
    """Yield the rows of one model in one setting; the repetitions are interleaved."""
    sizes = [16, 32, 64, 128, 256, 512] if setting.device == "cpu" else [256, 512, 1024, 2048, 4096, 8192, 16384]
    chunk, trial = own_chunk(model, images, setting)
    forward = forward_of(model, setting)
    floor(forward, images[:1], 1, sizes[1])  # compiles, if it does
    started = clock()
    rough = floor(forward, images[:1], 512, sizes[1]) / (clock() - started)
    if setting.compile:
        batch = chunk = default_chunk(images[0], images.device)  # compiled for one size
    else:
        batch = best_batch(lambda size: floor(forward, images[:1], ceil(rough / 2), size), sizes, clock)
    click.echo(f"{name} ({setting}): floor {batch} a batch; ours {chunk} a batch, found in {trial:.1f} s")
    n = max(1000, ceil(rough * seconds / len(images)))
    methods: dict[str, tuple[int, Callable[[], int]]] = {
        "floor": (batch, lambda: floor(forward, images, n, batch)),
        "ours": (chunk, lambda: ours(model, images, n, chunk, setting)),
    }
    if setting.plain:
        peers = peer_methods(model, images, n, ceil(rough), sizes, clock)
        methods |= peers
    yield from rows_of(name, setting, methods, clock, repeats)


def peer_methods(
    model: nn.Module, images: Tensor, n: int, rough: int, sizes: list[int], clock: Clock
) -> dict[str, tuple[int, Callable[[], int]]]:
    """Return the other certifiers; ART, where it is installed, at its best batch size."""
    methods: dict[str, tuple[int, Callable[[], int]]] = {
        "reference loop": (1000, lambda: reference_loop(model, images, n)),
    }
    try:
        art(model, images[:1], 20, 32)
    except ImportError:
        click.echo("ART is not installed: left out")
        return methods
    best = best_batch(lambda size: art(model, images[:1], max(size, rough // 2), size), sizes, clock)
    return methods | {"ART": (best, lambda: art(model, images, n, best))}


def rows_of(
    name: str, setting: Setting, methods: dict[str, tuple[int, Callable[[], int]]], clock: Clock, repeats: int
) -> Iterator[Row]:
    """Run the methods in turn, ``repeats`` times, and yield what they reached."""
    paces: dict[str, list[float]] = {method: [] for method in methods}
    for repeat in tqdm(range(repeats), desc=f"{name}, {setting}"):
        order = list(methods) if repeat % 2 else list(methods)[::-1]
        for method in order:
            started = clock()
            done = methods[method][1]()
            paces[method].append(done / (clock() - started))
    for method, (batch, _) in methods.items():
        share = statistics.median(mine / base for mine, base in zip(paces[method], paces["floor"], strict=True))
        pace = statistics.median(paces[method])
        yield Row(name, str(setting), method, batch, pace, min(paces[method]), max(paces[method]), share)


# ---- results ---------------------------------------------------------------------------------------------------------


def markdown(made: dict[str, Any], rows: list[Row]) -> str:
    """Return the table and what it was made with."""
    lines = [f"{key}: {value}  " for key, value in made.items()]
    lines += ["", "Noisy images per second: median (slowest to fastest) of the repetitions.", ""]
    lines += [
        "| model | run as | method | batch | noisy images / s | share of the floor |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        pace = f"{row.pace:,.0f} ({row.slowest:,.0f} to {row.fastest:,.0f})"
        lines.append(f"| {row.model} | {row.setting} | {row.method} | {row.batch} | {pace} | {row.share:.3f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True, help="Which models, separated by commas.")
@click.option("--repeats", default=7, show_default=True, help="Repetitions of each method.")
@click.option("--seconds", default=8.0, show_default=True, help="About how long the floor runs in each repetition.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of torch on the CPU.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Beside the plain model, run it in this type.")
@click.option("--channels-last", is_flag=True, help="Beside the plain model, run it with the channels last.")
@click.option("--compile", "compiled", is_flag=True, help="Beside the plain model, run it compiled.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "certify_speed", help="No suffix.")
def speed(
    models: str,
    repeats: int,
    seconds: float,
    device: str,
    threads: int,
    dtype: str | None,
    channels_last: bool,
    compiled: bool,
    out: Path,
) -> None:
    """Noisy images per second, against the best loop written by hand, ART and the reference code's loop."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    clock, rows = Clock(device, threads), list[Row]()
    for name in models.split(","):
        found = MODELS[name](device)
        if found is not None:
            for setting in settings_of(device, dtype, channels_last, compiled):
                rows += measure(name, *found, setting, clock, repeats, seconds)
    made = environment("bench_certify.py", clock)
    text = markdown(made, rows)
    keep(out, text, {"made": made, "rows": [asdict(row) for row in rows]})
    click.echo(text)


if __name__ == "__main__":
    speed()
