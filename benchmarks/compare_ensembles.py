"""Networks in folders alone, as a soft ensemble, and by K-consensus for each K: radii, and how many passes it saves.

The networks are those that `rs-plugins train` or `reproduce_mnist.py` left in FOLDERS, in this order: the first K have
to agree. All are certified with the same images and the same noise, so radii are compared image by image.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from certify_networks import DATA
from machine import Clock, environment
from torch import Tensor, nn

from rs_plugins.core.certification import certify
from rs_plugins.core.data_sets.data_set import spaced_images
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.ensembles import ConsensusEnsemble, SoftEnsemble
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.training.trained import load_trained

NOTES = """\
* Certified accuracy in % at radius 0, and the average certified radius (ACR) in pixels; beside the soft ensemble: the
  difference in ACR, image by image. Each ± the standard error over images.
* Passes: noisy images that a member was asked about, per noisy image that was voted on.
* Time: of all votes, as a multiple of the soft ensemble's.
"""


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", default=f"mnist:{DATA / 'MNIST'}", show_default=True)
@click.option("--sigma", default=0.5, show_default=True)
@click.option("--images", default=100, show_default=True, help="Evenly spaced test images.")
@click.option("--n", default=500, show_default=True, help="Votes an image.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.md and OUT.json.")
def main(folders: Sequence[Path], data: str, sigma: float, images: int, n: int, threads: int, out: Path | None) -> None:
    torch.set_num_threads(threads)
    members = [load_trained(folder).model for folder in folders]
    test, clock = spaced_images(open_data_set(data), images), Clock("cpu", threads)
    how = {"x": test.read(range(images)), "y": test.labels, "sigma": sigma, "n": n, "clock": clock}
    cases: dict[str, nn.Module] = {f"model {number}": member for number, member in enumerate(members)}
    cases["soft ensemble"] = SoftEnsemble(members)
    cases |= {f"consensus, k={k}": ConsensusEnsemble(members, k) for k in range(2, len(members))}
    rows = [{"name": name, **measured(model, members, **how)} for name, model in cases.items()]
    (soft,) = (dict(row) for row in rows if row["name"] == "soft ensemble")
    for row in rows:
        row["beside_soft"] = mean_and_error(np.array(row["gains"]) - np.array(soft["gains"]))
        row["time"] = row["seconds"] / soft["seconds"]
    made = {**environment("compare_ensembles.py", clock), "data": data, "sigma": sigma, "images": images, "n": n}
    text = markdown(made, [folder.name for folder in folders], rows)
    click.echo(text)
    if out is not None:
        out.with_name(out.name + ".md").write_text(text)
        out.with_name(out.name + ".json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


def measured(
    model: nn.Module, members: Sequence[nn.Module], *, x: Tensor, y: np.ndarray, sigma: float, n: int, clock: Clock
) -> dict[str, Any]:
    """Return certified accuracy, what each image adds to the ACR, passes per vote, and the seconds it took."""
    plan = FixedBudget(n=n)
    with images_seen(members) as seen:
        before = clock()
        found = list(certify(model, x, sigma, plan=plan, chunk=128, progress=True))
        seconds = clock() - before
    correct = np.array([c.prediction == label for c, label in zip(found, y, strict=True)])
    gains = correct * np.array([c.radius for c in found])
    return {
        "certified": mean_and_error(100.0 * correct),
        "acr": mean_and_error(gains),
        "passes": seen[0] / sum(c.n0 + c.n for c in found),
        "seconds": seconds,
        "gains": gains.tolist(),
    }


@contextmanager
def images_seen(members: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count the images that members are asked about inside the block, all together."""
    seen = [0]

    def count(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[0] += len(inputs[0])

    handles = [member.register_forward_hook(count) for member in members]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean, and its standard error over images."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def markdown(made: dict[str, Any], names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    about = "\n".join(f"* {name}: {value}" for name, value in made.items())
    which = "\n".join(f"* model {number}: {name}" for number, name in enumerate(names))
    lines = ["| | certified | ACR | beside the soft ensemble | passes | time |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            "{:.1f} ± {:.1f}".format(*row["certified"]),
            "{:.3f} ± {:.3f}".format(*row["acr"]),
            "{:+.4f} ± {:.4f}".format(*row["beside_soft"]),
            f"{row['passes']:.2f}",
            f"{row['time']:.2f}",
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "# Ensembles\n\n" + "\n\n".join([about, which, "\n".join(lines), NOTES])


if __name__ == "__main__":
    main()
