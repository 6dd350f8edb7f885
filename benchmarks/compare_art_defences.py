"""Defences of ART, of this library and of plugins beside each other: one data set, one network, one budget.

Every defence trains the same network from the same initial weights with the same optimiser, for the same number of
epochs or of processor seconds, and is examined by ART's and torchattacks' own code: accuracy on clean images, under PGD
of 50 steps (ART) and AutoAttack (torchattacks) in l2 and linf. Then every network is smoothed with the same noise,
whoever trained it: accuracy under SmoothAdv, certified accuracy at radii in l2, and ACR, the mean certified radius of
images that are right. ACR alone can be raised by giving hard images up: look at the accuracies beside it. Certificates
are those of `rs_plugins`, at a failure probability of 0.001 for each image.

A defence that does not run is listed with its error. ART's estimators for smoothing are as shipped; "alpha 0.5" gives
SmoothMix the step that it takes from its failure probability, and with "2 draws" each of its steps has half of a batch.
An ensemble of 3 takes three budgets of epochs. Each defence runs in a process of its own, whose peak memory is told;
what is finished is kept in a folder, and the same call goes on and tries again what failed.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm.auto import tqdm

HERE = Path(__file__).parent
SCALES = {"digits": (30, 0.1, 0.5), "mnist": (5, 0.1, 0.5), "cifar10": (5, 8 / 255, 0.25), "npz": (10, 8 / 255, 0.25)}
RADII = (0.25, 0.5, 0.75)
COLUMNS = (
    *("clean", "PGD l2", "PGD linf", "AutoAttack l2", "AutoAttack linf", "SmoothAdv"),
    *("smoothed clean", *(f"certified at {radius:g}" for radius in RADII), "ACR"),
    *("training seconds", "certification seconds", "memory"),
)
SHORT = ("clean", "PGD linf", "AutoAttack linf", "SmoothAdv", "smoothed clean", *COLUMNS[7:11], "training seconds")
LESS_IS_BETTER = ("training seconds", "certification seconds", "memory")


@click.command()
@click.option("--data", default="digits", show_default=True, help="digits, mnist:DIR, cifar10:DIR, npz:FILE, ….")
@click.option("--defences", "names", help="Names with ; between; all by default (--list).")
@click.option("--list", "listed", is_flag=True, help="Print the names and stop.")
@click.option("--epochs", type=int, help="Budget of each training; by default what the data set is given here.")
@click.option("--seconds", type=float, help="Budget in processor seconds instead; --epochs is then the most.")
@click.option("--train-images", type=int, help="Train on so many, spaced evenly.  [all]")
@click.option("--test-images", default=297, show_default=True, help="Examine so many, spaced evenly.")
@click.option("--attacked", default=100, show_default=True, help="Attack so many of them with PGD and SmoothAdv.")
@click.option("--auto-attacked", default=30, show_default=True, help="And so many with AutoAttack.")
@click.option("--sigma", default=0.25, show_default=True, help="Standard deviation of the noise, in pixels.")
@click.option("--eps", type=float, help="l2 budget of attacks, in pixels.  [0.5, and 0.25 in colour]")
@click.option("--eps-linf", type=float, help="linf budget of attacks, in pixels.  [0.1, and 8/255 in colour]")
@click.option("--n", default=10_000, show_default=True, help="Votes of a certificate.")
@click.option("--batch-size", default=64, show_default=True, help="Images per step.")
@click.option("--rate", default=2e-3, show_default=True, help="Learning rate of Adam.")
@click.option("--seed", default=0, show_default=True, help="Of weights, order, noise and attacks.")
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Processes at a time, one thread each.")
@click.option("--folder", type=click.Path(path_type=Path), default=HERE / "cache" / "defences", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Without ending; a table and its figures.")
@click.option("--one", hidden=True, help="Do this one defence here and print its figures.")
def main(
    names: str | None, listed: bool, jobs: int, folder: Path, out: Path | None, one: str | None, **how: Any
) -> None:
    """Train and examine all defences, and print the table; what is done is not done again."""
    epochs, eps_linf, eps = SCALES.get(how["data"].partition(":")[0], SCALES["npz"])
    for name, value in (("epochs", epochs), ("eps", eps), ("eps_linf", eps_linf)):
        how[name] = value if how[name] is None else how[name]
    if one is not None:
        click.echo(json.dumps(figures(one, how)))
        return
    from defences import defences

    known = list(defences())
    chosen = known if names is None else [name.strip() for name in names.split(";")]
    if unknown := set(chosen) - set(known):
        raise click.ClickException(f"defences: expected of {'; '.join(known)}, got {min(unknown)}")
    if listed:
        click.echo("\n".join(known))
        return
    place = folder / "-".join(f"{value}" for value in how.values() if value is not None).replace("/", "_").replace(
        ":", "_"
    )
    place.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = list(
            tqdm(
                pool.map(lambda name: run(name, how, place), chosen), total=len(chosen), unit="defence", desc="compare"
            )
        )
    rows = dict(zip(chosen, found, strict=True))
    text = markdown(made(how), rows)
    click.echo(text)
    if out is not None:
        from machine import keep

        keep(out, text, {"made": made(how), "rows": rows})


def run(name: str, how: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return the figures of a defence: those that are kept, else those of a process of its own."""
    kept = place / f"{name.replace('/', '_')}.json"
    if kept.exists():
        return json.loads(kept.read_text())  # of one that failed nothing is kept
    options = [f"--{key.replace('_', '-')}={value}" for key, value in how.items() if value is not None]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, __file__, *options, "--one", name],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    if "error" not in found:
        kept.write_text(json.dumps(found))
    return found


def figures(name: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Train and examine the defence ``name`` in this process."""
    import torch
    from defence_evaluation import Examination, examine
    from defences import Setting, defences

    torch.set_num_threads(1)
    x, y, classes = images(how["data"], "train", how["train_images"])
    same = {key: how[key] for key in ("sigma", "eps", "eps_linf", "seed")}
    setting = Setting(x, y, classes, **same, **{key: how[key] for key in ("epochs", "seconds", "batch_size", "rate")})
    start = time.process_time()
    try:
        defended = defences()[name](setting)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.process_time() - start
    x, y, _ = images(how["data"], "test", how["test_images"])
    asked = Examination(
        *(x, y, classes),
        **same,
        **{key: how[key] for key in ("attacked", "auto_attacked", "n")},
        radii=(0.0, *RADII),
    )
    found = examine(defended, asked)
    certified = found.pop("certified", [])
    at_radii = zip(("smoothed clean", *(f"certified at {radius:g}" for radius in RADII)), certified, strict=False)
    return {**found, **dict(at_radii), "training seconds": seconds}


def images(place: str, split: str, count: int | None) -> tuple[Any, Any, int]:
    """Return images, labels and the number of classes."""
    from rs_plugins.core.data_sets.data_set import spaced_images
    from rs_plugins.core.data_sets.opening import open_data_set

    whole = open_data_set(place, split=split)
    data = whole if count is None or count >= len(whole) else spaced_images(whole, count)
    classes = int(whole.labels.max()) + 1 if whole.classes is None else whole.classes
    return data.read(range(len(data))).numpy(), np.asarray(data.labels).astype(np.int64), classes


def made(how: Mapping[str, Any]) -> dict[str, Any]:
    """Return with what the figures were made."""
    import art
    import torchattacks
    from machine import Clock, environment

    day = datetime.now(tz=timezone.utc).date().isoformat()
    versions = {"art": art.__version__, "torchattacks": torchattacks.__version__, "date": day}
    found = environment("compare_art_defences.py", Clock("cpu", 1)) | versions | {"threads": 1}  # of each process
    return found | {name: value for name, value in how.items() if value is not None}


def markdown(made: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables, what did not run, and what they were made with."""
    ran = {name: row for name, row in rows.items() if "error" not in row}
    failed = [f"* {name}: {row['error']}" for name, row in rows.items() if "error" in row]
    reasons = {row[column] for row in ran.values() for column in COLUMNS if isinstance(row.get(column), str)}
    parts = ["\n".join(f"{key}: {value}  " for key, value in made.items()), table(rows, SHORT), table(rows, COLUMNS)]
    parts += ["Did not run:\n\n" + "\n".join(failed)] if failed else []
    parts += ["–: " + "; ".join(sorted(reasons))] if reasons else []
    parts.append(
        "Accuracies in %, radii in pixels, processor seconds, peak memory of the process in MiB; the best in bold. "
        + f"Standard error of an accuracy near 80 %, from the choice of the images: {error_of(made['test_images'])} of "
        f"clean, smoothed and certified ones, {error_of(made['attacked'])} under PGD and SmoothAdv, "
        f"{error_of(made['auto_attacked'])} under AutoAttack."
    )
    return "\n\n".join([*parts, (__doc__ or "").strip()]) + "\n"


def error_of(images: int) -> str:
    """Return the standard error of a share of 80 % in points."""
    return f"{100 * (0.8 * 0.2 / images) ** 0.5:.1f} points"


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return ``columns`` of what ran as Markdown, the best of each in bold."""
    ran = {name: row for name, row in rows.items() if "error" not in row}
    best = {column: best_of(column, [row.get(column) for row in ran.values()]) for column in columns}
    lines = [f"| defence | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for name, row in ran.items():
        lines.append(f"| {name} | {' | '.join(cell(column, row.get(column), best[column]) for column in columns)} |")
    return "\n".join(lines)


def best_of(column: str, values: Sequence[Any]) -> float | None:
    """Return the best of ``values`` that are numbers."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return None
    return min(numbers) if column in LESS_IS_BETTER else max(numbers)


def cell(column: str, value: Any, best: float | None) -> str:
    """Return ``value`` as the table has it."""
    if not isinstance(value, int | float):
        return "–"
    text = f"{value:.3f}" if column == "ACR" else f"{value:.1f}"
    return f"**{text}**" if value == best else text


if __name__ == "__main__":
    main()
