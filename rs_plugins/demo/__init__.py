"""The main job in two minutes: train, attack and certify a small network on handwritten digits.

Three networks of the same size are compared: undefended, trained and certified by ART's own randomized smoothing, and
trained and certified by ours, with the same noise, votes and confidence. The answers of the smoothed ones to an attack
are decided by a vote on fresh noise.
"""

from importlib.util import find_spec
from pathlib import Path

from rs_plugins.activation import activated
from rs_plugins.demo.settings import Settings
from rs_plugins.errors import MissingDependencyError


def run_demo(folder: Path, settings: Settings | None = None, *, progress: bool = True) -> str:
    """Train, attack and certify; write logs, a picture and a report into ``folder``; return the table as Markdown.

    Writes ``certified-*.tsv``, ``certified-accuracy.png`` and ``report.md``. The folder is made if absent; files of
    these names in it are replaced.

    Raises:
        MissingDependencyError: If scikit-learn (the digits), matplotlib, ART or torchattacks is not installed.
    """
    _check_installed()
    from rs_plugins.demo.defences import load_digits, train_art, train_ours, train_undefended
    from rs_plugins.demo.examination import choose_specimens, examine
    from rs_plugins.demo.report import save_figure, save_report, table_of

    settings = settings or Settings()
    folder.mkdir(parents=True, exist_ok=True)
    digits, failures = load_digits(settings), []
    defences = [train_undefended(digits, settings, progress)]
    try:
        defences.append(train_art(digits, settings))
    except Exception as error:  # a host that does not run is a line of the report, not the end of the demo
        failures.append(f"ART's PyTorchRandomizedSmoothing did not run: {type(error).__name__}: {error}")
    defences.append(train_ours(digits, settings, progress))
    with activated():  # from here on torchattacks has SmoothAdvPGD
        outcomes = [examine(defence, digits, settings, folder, progress) for defence in defences]
        specimens = choose_specimens(outcomes[-1], digits, settings)
    table = "\n".join([table_of(outcomes, settings), *failures])
    save_figure(folder / "certified-accuracy.png", outcomes, specimens, settings)
    save_report(folder / "report.md", table, settings)
    return table


def _check_installed() -> None:
    modules = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "art": "ART", "torchattacks": "torchattacks"}
    missing = [name for module, name in modules.items() if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}: pip install 'rs-plugins[all]'")
