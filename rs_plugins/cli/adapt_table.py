"""What ``rs-plugins adapt`` says: a table of a classifier without and with certifying adapters, and what to do next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_plugins.cli.adapt_inputs import Images
from rs_plugins.cli.tables import Table

if TYPE_CHECKING:
    from torch import nn

    from rs_plugins.core.certifying_adapters.job import Adaptation
    from rs_plugins.core.results.table import Results

CERTIFIED, BARE = "certified.tsv", "bare.tsv"
_MOST_RADII = 6  # in the table
_AT_ONCE = 256  # images


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one sigma; the logs by the names of their files."""

    sigma: float
    folder: Path
    adaptation: "Adaptation"
    logs: "dict[str, Results]" = field(default_factory=dict)


def title(model: "nn.Module", network: Mapping[str, Any], images: Images, right: float) -> str:
    """Return what is about to be adapted, on which images, and that it is ``right`` on such a share without noise."""
    looked_at = len(images.chosen.positions(len(images.test)))
    return (
        f"{network['name']} of {_count(model):,} parameters: right on {right:.1%} of {looked_at} "
        f"images of {images.test.name} without noise; certifying adapters on {len(images.train)} images of "
        f"{images.train.name}"
    )


def kept(sigma: float, adaptation: "Adaptation") -> str:
    """Return which epoch is kept, and how right it is under noise beside the classifier as it was."""
    chosen, bare = adaptation.kept, adaptation.bare_noisy_accuracy
    if chosen is None or chosen.noisy_accuracy is None or bare is None:
        return ""
    return (
        f"sigma {sigma:g}: epoch {chosen.epoch} of {len(adaptation.history)} is kept, right under noise on "
        f"{chosen.noisy_accuracy:.1%} of the images held out (without the certifying adapter {bare:.1%})"
    )


def _count(model: "nn.Module", *, trained: bool = False) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad or not trained)


def accuracy(model: "nn.Module", images: Images) -> float:
    """Return the share of the chosen test images whose class is right without noise."""
    import torch

    from rs_plugins.core.models import device_and_dtype, evaluating

    device, dtype = device_and_dtype(model)
    positions, right = images.chosen.positions(len(images.test)), 0
    with evaluating(model), torch.no_grad():
        for first in range(0, len(positions), _AT_ONCE):
            rows = positions[first : first + _AT_ONCE]
            found = model(images.test.read(rows).to(device, dtype)).argmax(dim=1).cpu()
            right += int((found == torch.from_numpy(images.test.labels[rows])).sum())
    return right / len(positions)


def table(model: "nn.Module", rows: Sequence[Row], images: Images, right: float) -> Table:
    """Return the classifier without and with each certifying adapter, a line each; ``right`` as in `title`."""
    from rs_plugins.core.results.comparison import default_radii

    logs = {f"{row.folder / name}": log for row in rows for name, log in row.logs.items()}
    radii = default_radii(logs) if logs else []
    radii = radii[:: -(-len(radii) // _MOST_RADII) or 1]
    header = ["", "no noise %", *(f"at {radius:g} %" for radius in radii)]
    lines = [[*header, *(["ACR", "abstain %"] if logs else []), "trained weights", "of the model's", "seconds"]]
    bare = _percent(right)
    for row in rows:
        adapted, history = row.adaptation.model, row.adaptation.history
        count = _count(adapted, trained=True)
        cost = [f"{count:,}", f"{count / _count(model):.1%}", f"{sum(epoch.seconds for epoch in history):.1f}"]
        if logs:
            lines.append([f"sigma {row.sigma:g} bare", bare, *_figures(row.logs[BARE], radii), "0", "-", "-"])
        figures = _figures(row.logs[CERTIFIED], radii) if logs else []
        lines.append([f"sigma {row.sigma:g} adapted", _percent(accuracy(adapted, images)), *figures, *cost])
    return lines


def _figures(results: "Results", radii: Sequence[float]) -> list[str]:
    at = map(_percent, results.certified_accuracy(radii).tolist())
    return [*at, f"{results.average_certified_radius:.4f}", _percent(results.abstention)]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def next_commands(rows: Sequence[Row], network: Mapping[str, Any], images: Images) -> list[list[str]]:
    """Return how to certify more images, to compare logs, and to attack."""
    folder, skip = rows[0].folder, images.chosen.skip
    trust = ["--trust-model"] if ":" in network["name"] else []
    model = ["--model", str(folder), *trust, *images.name]
    more = ["--skip", str(max(1, skip // 10)), "--plan", "fixed:n=100000", "--out", str(folder / "more.tsv")]
    logs = [str(row.folder / name) for row in rows for name in row.logs]
    attack = ["--attack", "SmoothAdvPGD:eps=0.5", "--skip", str(skip), "--out", str(folder / "attacked")]
    return [
        ["rs-plugins", "certify", *model, *more],
        *([["rs-plugins", "report", *logs]] if logs else []),
        ["rs-plugins", "attack", *model, *attack],
    ]
