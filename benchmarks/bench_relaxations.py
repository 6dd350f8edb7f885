"""What bounds of a network cost, and how tight they are.

On networks of the papers with initial weights, or with those of a file: mean lower bound of the margins (higher is
tighter) by IBP, CROWN-IBP, CROWN and alpha-CROWN; the processor time of a batch, of the bounds alone and with the
gradient to the weights, over that of our IBP and of a plain forward pass of the network. Beside them ART's interval
classifier and its DeepZ, the latter one image at a time as it takes no more; ART's class scores are not folded into
margins, so its mean is that of the lower bound of the label's score less the upper bound of each other.
The methods take turns; figures are medians.
"""

import contextlib
import copy
import io
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from certify_networks import DATA
from machine import Clock, environment, keep
from torch import Tensor, nn
from tqdm.auto import tqdm

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.data_sets.data_set import DataSet, spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.text_tables import as_text

HERE = Path(__file__).parent
METHODS = ("ibp", "crown-ibp", "crown")


class Case(NamedTuple):
    """A network, a radius, how many images make a batch, and what the network's numbers of channels are multiplied by.

    The first three are those of the figures that we compare with.
    """

    network: str
    eps: float
    batch: int
    width: float = 1.0


CASES = (
    Case("cnn3", 0.1, 16),
    Case("cnn3", 0.02, 16),
    Case("cnn5", 0.02, 4),
    Case("cnn7", 2 / 255, 2, 0.25),
)


class Figures(NamedTuple):
    """Of one method on one case.

    Attributes:
        margin: Mean over images and rivals of the lower bound of the margin.
        forward: Seconds of a batch.
        both: Seconds of a batch with the gradient to the weights; None where there is none.
        batch: Images of a batch.
    """

    margin: float
    forward: float
    both: float | None
    batch: int


@click.command(help=__doc__)
@click.option("--cases", default="0,1,2,3", show_default=True, help="Numbers of the networks, with commas between.")
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option("--alpha-steps", type=int, default=20, show_default=True, help="0: without alpha-CROWN.")
@click.option("--art/--no-art", default=True, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="Of the network of a single case.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Without ending; a table and its figures.")
def main(cases: str, threads: int, device: str, out: Path | None, weights: Path | None, **how: Any) -> None:
    torch.set_num_threads(threads)
    clock = Clock(device, threads)
    found = {}
    for number in map(int, cases.split(",")):
        case = CASES[number]
        found[case] = measured(case, clock, device=device, weights=weights, **how)
        click.echo(table(case, found[case]))
    if out is not None:
        write(out, found, environment("bench_relaxations.py", clock))


def measured(
    case: Case, clock: Clock, *, device: str, weights: Path | None, repeats: int, alpha_steps: int, art: bool
) -> dict[str, Figures]:
    """Return the figures of each method; the plain forward pass is one of them, with the margins at the image."""
    data = data_of(case)
    network = make_network(case.network, classes=10, channels=data.shape[0], size=data.shape[1], width=case.width)
    if weights is not None:
        from rs_plugins.core.checkpoints import load_weights

        load_weights(network, weights)
    network.to(device).eval()
    x, y = images_of(data, case.batch, device)
    calls = ours(network, x, y, case.eps, alpha_steps)
    if art:
        calls |= of_art(network, x, y, case)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    margins = {name: float(call(False).mean()) for name, call in calls.items()}  # and everything is warm
    for _ in tqdm(range(repeats), desc=case.network, unit="round"):
        for name, call in calls.items():
            times[name][0].append(timed(clock, lambda call=call: call(False)))
            if name in ("forward", *METHODS):
                times[name][1].append(timed(clock, lambda call=call: call(True).mean().backward()))
    network.zero_grad(set_to_none=True)
    return {
        name: Figures(
            margins[name],
            statistics.median(alone),
            statistics.median(both) if both else None,
            1 if name == "ART DeepZ" else case.batch,
        )
        for name, (alone, both) in times.items()
    }


Call = Callable[[bool], Tensor]


def ours(network: nn.Module, x: Tensor, y: Tensor, eps: float, alpha_steps: int) -> dict[str, Call]:
    """Return what gives the margins, with or without a graph for the gradient."""
    relaxed = RelaxedNetwork(network, tuple(x.shape[1:]))

    def plain(gradient: bool) -> Tensor:
        with torch.set_grad_enabled(gradient):
            logits = network(x)
            return rivals(logits.gather(1, y[:, None]) - logits, y[:, None])

    def bounds(method: str) -> Call:
        def margins(gradient: bool) -> Tensor:
            with torch.set_grad_enabled(gradient):
                return relaxed.margins(Region(x, eps, "linf"), y, method=method)

        return margins

    calls: dict[str, Call] = {"forward": plain, **{method: bounds(method) for method in METHODS}}
    if alpha_steps:
        calls["alpha-crown"] = lambda _: relaxed.alpha_margins(Region(x, eps, "linf"), y, steps=alpha_steps)
    return calls


def of_art(network: nn.Module, x: Tensor, y: Tensor, case: Case) -> dict[str, Call]:
    """Return the same by ART's classes; none of the CNN7, of whose layers they know not all."""
    if case.network == "cnn7":
        return {}
    from art.estimators.certification.deep_z.pytorch import PytorchDeepZ
    from art.estimators.certification.interval.pytorch import PyTorchIBPClassifier

    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": tuple(x.shape[1:]),
        "nb_classes": 10,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
    }
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        interval = PyTorchIBPClassifier(Reshaping(network), **settings)
        deep_z = PytorchDeepZ(Reshaping(network), **settings)
    low, high = (x - case.eps).clamp(0, 1).cpu(), (x + case.eps).clamp(0, 1).cpu()
    label = y.cpu()[:, None]

    def by_intervals(_: bool) -> Tensor:
        box = torch.stack([low, high], dim=1).numpy()
        lower, upper = torch.from_numpy(interval.predict_intervals(box, is_interval=True)).unbind(1)
        return rivals(lower.gather(1, label) - upper, label)

    def by_zonotopes(_: bool) -> Tensor:
        centre, radius = ((low + high) / 2)[:1], ((high - low) / 2)[0]
        terms = torch.diag(radius.flatten())[radius.flatten() > 0].view(-1, *radius.shape)
        with torch.no_grad():
            scores, errors = deep_z.model.forward(cent=centre.numpy(), eps=terms.numpy())
        margin = scores[label[0]] - scores - (errors[:, label[0]] - errors).abs().sum(0)
        return rivals(margin[None], label[:1])

    return {"ART interval": by_intervals, "ART DeepZ": by_zonotopes}


class Reshaping(nn.Module):
    """The layers that ART's classes know, as children; between the last convolution and the first linear one a view."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        known = (nn.Conv2d, nn.Linear, nn.ReLU)
        layers = [copy.deepcopy(layer) for layer in network.modules() if isinstance(layer, known)]
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer.cpu())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
        return x


def rivals(margins: Tensor, y: Tensor) -> Tensor:
    """Return ``margins`` (n, classes) without those of the labels ``y`` (n, 1) themselves."""
    kept = torch.ones_like(margins, dtype=torch.bool).scatter_(1, y, False)
    return margins[kept].view(len(margins), -1)


def timed(clock: Clock, call: Callable[[], object]) -> float:
    before = clock()
    call()
    return clock() - before


def data_of(case: Case) -> DataSet:
    place = f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}" if case.network == "cnn7" else f"mnist:{DATA / 'MNIST'}"
    return open_data_set(place)


def images_of(data: DataSet, count: int, device: str) -> tuple[Tensor, Tensor]:
    chosen = spaced_images(data, count)
    x = chosen.read(range(count)).to(device)
    return x, torch.from_numpy(chosen.labels).long().to(device)


def table(case: Case, found: dict[str, Figures]) -> str:
    floor, ibp = found["forward"], found["ibp"]

    def over(seconds: float | None, other: float | None, batch: int) -> str:
        return "-" if seconds is None or other is None else f"{seconds / batch / (other / case.batch):.1f}"

    rows = [
        [
            *(name, f"{row.margin:.4f}", f"{row.forward * 1000 / row.batch:.2f}"),
            *(over(row.forward, base.forward, row.batch) for base in (ibp, floor)),
            *(over(row.both, base.both, row.batch) for base in (ibp, floor)),
        ]
        for name, row in found.items()
    ]
    head = ["method", "mean margin", "ms/image", "/ IBP", "/ forward", "both / IBP", "both / forward"]
    narrow = "" if case.width == 1 else f" at {case.width:g} of its width"
    return f"{case.network}{narrow}, eps {case.eps:.4g}, batch of {case.batch}\n{as_text([head, *rows])}\n"


def write(out: Path, found: dict[Case, dict[str, Figures]], made: dict[str, Any]) -> None:
    """Write the tables as Markdown, and the figures as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = "\n".join(f"```\n{table(case, figures)}```\n" for case, figures in found.items())
    settings = "\n".join(f"* {name}: {value}" for name, value in made.items())
    text = f"# Bounds: how tight, and what they cost\n\n{NOTES}\n{tables}\n{settings}\n"
    figures = [
        {**case._asdict(), "methods": {name: row._asdict() for name, row in rows.items()}}
        for case, rows in found.items()
    ]
    keep(out, text, {"made": made, "cases": figures})


NOTES = """\
* Mean margin: over images and rivals, of the lower bound (for "forward": of the margin itself); higher is tighter. Of
  ART DeepZ that of the first image alone.
* / IBP and / forward: time per image over that of our IBP and of a forward pass of the network; both: with the gradient
  to the weights. Each figure is the median of the rounds, in which the methods take turns.
* ART's classes compute no gradient here, and bound scores, not margins (its interval classifier).
"""


if __name__ == "__main__":
    main()
