"""`rs-plugins demo`."""

import shlex
import sys
from pathlib import Path

import click

from rs_plugins.errors import RSPluginsError


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="rs-plugins-demo", show_default=True)
@click.option("--images", type=int, default=300, show_default=True, help="Test images, at most 500.")
@click.option("--sigma", type=float, default=0.25, show_default=True, help="Noise, in pixels of [0, 1].")
@click.option("--n", type=int, default=10_000, show_default=True, help="Votes an image.")
@click.option("--epochs", type=int, default=30, show_default=True, help="Training epochs of each network.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars; there are none either where stderr is no terminal.")
def demo(out: Path, images: int, sigma: float, n: int, epochs: int, seed: int, quiet: bool) -> None:
    """Train, attack and certify small networks on handwritten digits.

    Compares an undefended network with ART's randomized smoothing and with ours, in one table and one picture.
    """
    from rs_plugins.demo import run_demo
    from rs_plugins.demo.settings import Settings

    try:
        settings = Settings(images=images, sigma=sigma, n=n, epochs=epochs, seed=seed)
        click.echo("training, attacking and certifying three small networks: about two minutes on two cores", err=True)
        table = run_demo(out, settings, progress=not quiet and sys.stderr.isatty())
    except RSPluginsError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"\n{table}\n")
    click.echo(f"clean, PGD, SmoothAdv: accuracy without and under attack (l2 {settings.eps:g})")
    click.echo("cert. r: correct, and proved to stay so under every change up to l2 radius r\n")
    for file in sorted(path for path in out.iterdir() if path.suffix in (".tsv", ".png", ".md")):
        click.echo(f"  {file}")
    logs = shlex.join(map(str, sorted(out.glob("certified-*.tsv"))))
    click.echo(f"\nas a page: rs-plugins report {logs} --out {shlex.quote(str(out / 'page'))}")
