"""The demo's table, picture and report."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from rs_plugins.demo.examination import ART_BATCH, PGD, SMOOTHADV, Outcome
from rs_plugins.demo.settings import Settings
from rs_plugins.plots import Specimen, save_demo_figure


def table_of(outcomes: Sequence[Outcome], settings: Settings) -> str:
    """Return the outcomes as a Markdown table that is aligned in a terminal too."""
    header = ["accuracy in %", "clean", "PGD", "SmoothAdv", *(f"cert. {r:g}" for r in settings.radii)]
    rows = [[*header, "ACR", "train s", "certify s"]]
    for outcome in outcomes:
        shares = [outcome.clean, outcome.attacked[PGD, settings.eps], outcome.attacked[SMOOTHADV, settings.eps]]
        shares += outcome.results.certified_accuracy(settings.radii).tolist()
        figures = [f"{100 * share:.1f}" for share in shares]
        figures += [f"{outcome.results.average_certified_radius:.3f}"]
        rows.append([outcome.defence.name, *figures, f"{outcome.defence.seconds:.1f}", f"{outcome.seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save_figure(path: Path, outcomes: Sequence[Outcome], specimens: Sequence[Specimen], settings: Settings) -> None:
    """Draw what is certified and what attacks achieve, and some images."""
    undefended, ours = outcomes[0], outcomes[-1]
    save_demo_figure(
        path,
        f"Handwritten digits, noise {settings.sigma:g}, {settings.n:,} votes per image, alpha {settings.alpha:g}",
        {
            o.defence.name if o.defence.smoothed else f"{o.defence.name}, but smoothed": o.results
            for o in reversed(outcomes)
        },
        {
            f"{ours.defence.name}: under SmoothAdvPGD": ours.curve(SMOOTHADV),
            f"{undefended.defence.name}, not smoothed: under PGD": undefended.curve(PGD),
        },
        specimens,
    )


def save_report(path: Path, table: str, settings: Settings) -> None:
    """Write the report: the table, the picture, and how to read them."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("rs-plugins", "torch", "adversarial-robustness-toolbox", "torchattacks")
    )
    path.write_text(
        f"""# Certified digits

{table}

![Certified accuracy against radius](certified-accuracy.png)

* {settings.images} test images of scikit-learn's handwritten digits (8x8, {settings.epochs} epochs of training each).
* `PGD` attacks the network without noise, `SmoothAdv` the smoothed classifier; both may change an image by
  {settings.eps:g} in l2 norm, pixels in [0, 1].
* `cert. r`: share of images that are classified correctly and proved to stay so under every change of l2 norm up to r.
  A network that was not trained with noise is certified as it is: what is proved holds for its smoothed version.
* Votes: noise of standard deviation {settings.sigma:g}, {settings.n0} to choose the class, {settings.n} to bound its
  probability. Each certificate is wrong with probability at most {settings.alpha:g}.
* `ACR` is the mean certified radius, 0 where wrong. Easy images can inflate it: read it together with the accuracies.
* ART's model is trained and certified by ART's own code (batch size {ART_BATCH}), the others by ours. Seconds are
  wall-clock.
* {versions}, Python {platform.python_version()}, {torch.get_num_threads()} threads.
""",
        encoding="utf-8",
    )
