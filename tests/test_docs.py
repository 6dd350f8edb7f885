"""What the pages show is what happens: every block runs, every link leads somewhere, no page is left out."""

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from scipy.stats import norm

from rs_plugins import registry
from rs_plugins.cli import main as command_line
from rs_plugins.core.results.files import read_results

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
NOTEBOOKS = sorted(path.name for path in DOCS.glob("notebooks/*.py"))
BIN = Path(sys.executable).parent


class Block(NamedTuple):
    """A block of code: its language, its text, the file that it is, if any, and why it is not run, if so."""

    language: str
    text: str
    file: str | None
    not_run: str | None


def blocks(page, *languages):
    text = (DOCS / page).read_text(encoding="utf-8")
    shown = r"^(?:`(?P<file>[\w./]+)`\n\n|<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$"
    found = re.finditer(shown, text, flags=re.DOTALL | re.MULTILINE)
    all_of_them = [Block(each["language"], each["text"], each["file"], each["why"]) for each in found]
    return [block for block in all_of_them if not languages or block.language in languages]


def commands(text):
    """Return the commands of a console block, and the files that `cat` shows, each with its text."""
    steps = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append([line[2:], []])
        elif steps[-1][0].endswith("\\"):
            steps[-1][0] = steps[-1][0][:-1] + line
        else:
            steps[-1][1].append(line)
    return [(command, "\n".join(output) + "\n") for command, output in steps]


def with_blocks(*languages, run):
    return [page for page in PAGES if any((block.not_run is None) == run for block in blocks(page, *languages))]


@pytest.mark.parametrize("page", PAGES)
def test_languages(page):
    """What is neither run nor a file of a package is in no language: equations, and what is printed."""
    assert len(blocks(page)) == (DOCS / page).read_text(encoding="utf-8").count("\n```") / 2
    assert {block.language for block in blocks(page)} <= {"python", "console", "pycon", "toml", "text"}
    assert all(block.not_run is None or block.language == "console" for block in blocks(page))
    assert all(block.file is not None for block in blocks(page, "toml"))


@pytest.mark.parametrize("page", sorted({*with_blocks("python", run=True)} - {"components.md", "plugins.md"}))
def test_the_python_of_a_page_runs(page, run_python, capsys, tmp_path):
    names = run_python(shown_python(page), page)
    check = {
        "jobs.md": check_jobs,
        "methods/bounds.md": check_bounds,
        "methods/certifying_adapters.md": check_certifying_adapters,
        "methods/noise.md": check_noise,
        "methods/sat.md": check_sat,
        "methods/smoothadv.md": check_smoothadv,
        "methods/smoothing.md": check_smoothing,
        "methods/smoothmix.md": check_smoothmix,
    }.get(page)
    if check is not None:
        check(names, capsys.readouterr().out.splitlines(), tmp_path)


def check_jobs(names, lines, folder):
    assert len(names["results"]) == len(read_results(folder / "log.tsv")) == 10


def check_bounds(names, lines, folder):
    plain, certified = map(percent, lines[:2])
    assert lines[0].startswith("plain: right, and proved so")
    assert certified >= plain + 10
    assert {"verified", "falsified"} <= set(re.findall(r"\w+", lines[2]))


def check_certifying_adapters(names, lines, folder):
    bare, adapted = map(percent, lines[:2])
    assert lines[0].startswith("bare: right and certified at 0.5")
    assert adapted >= bare + 5


def check_noise(names, lines, folder):
    assert {0.1, 0.2} & {certificate.radius for certificate in names["l1"]}
    assert 0.02 < max(certificate.radius for certificate in names["linf"]) < 0.08
    assert f'"{names["for_whom"]}": any image' in (DOCS / "methods/noise.md").read_text(encoding="utf-8")


def check_sat(names, lines, folder):
    assert names["replaced"].calls == 2
    assert names["last"].validation_accuracy > names["last"].adversarial_accuracy > 0.3


def check_smoothadv(names, lines, folder):
    assert lines[0].startswith("turned by the attack's own votes")
    assert any(line.startswith("attack success") for line in lines)
    table = lines.index(next(line for line in lines if line.split()[:1] == ["correct"]))
    assert [line.split()[0] for line in lines[table : table + 4]] == ["correct", "abstained", "wrong", "mean"]


def check_smoothing(names, lines, folder):
    plans = lines[20:24]
    votes, right = zip(*((float(line.split()[0]), int(line.split()[4])) for line in plans), strict=True)
    assert votes[0] == 10_100
    assert max(votes[1:3]) < 0.5 * votes[0]
    assert max(right) >= 10
    assert max(right) - min(right) <= 2
    certified = [line.split()[1] for line in lines[24:]]
    assert sum(map(str.__eq__, certified, map(str, names["y_test"]))) > 10
    assert (names["linear_predictions"] == names["y_test"]).sum() > 10
    assert names["linear_radii"].max() > 0.2


def check_smoothmix(names, lines, folder):
    assert names["trained"].sigma == 0.25
    assert (folder / "consistency" / "model.json").is_file()
    assert (names["record"].prediction, names["record"].radius > 0.2) == (names["labels"][1500], True)


def percent(line):
    return int(line.rpartition(": ")[2].rstrip("%"))


def shown_python(page):
    return [block.text for block in blocks(page, "python") if block.file is None]


def install(page, site):
    """Put the packages that a page shows file by file on the path, as pip would."""
    for block in blocks(page):
        if block.file == "pyproject.toml":
            project = tomllib.loads(block.text)["project"]
            folder = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
            points = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["rs_plugins"].items())
            version = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
            site.write(f"{folder}/METADATA", version)
            site.write(f"{folder}/entry_points.txt", f"[rs_plugins]\n{points}")
        elif block.file is not None:
            site.write(block.file, block.text)
            site.write(f"{block.file.partition('/')[0]}/__init__.py", "")


@pytest.fixture
def fresh_registry(monkeypatch):
    """Plugins that a test puts on the path are found, and forgotten afterwards."""
    monkeypatch.setattr(registry, "_DEFAULT", registry.Registry())


def test_the_package_with_a_component_of_each_kind(site, fresh_registry, run_python):
    """Found by the command line as the page says, and what they make does what it should."""
    from rs_plugins.cli.attacks import parse_attack
    from rs_plugins.cli.plans import parse_plan

    install("components.md", site)
    ours = [(each.kind, each.name) for each in registry.components() if each.target.startswith("rs_four")]
    assert sorted({kind for kind, _ in ours}) == ["attack", "certifier", "estimator", "trainer"]
    assert parse_attack("Sign:eps=0.25").name == "four.Sign"
    plan = parse_plan("half-and-half:n=300", ["half-and-half"], lambda name: registry.component("certifier", name))
    assert (plan.n, plan.most, plan.alpha) == (300, 600, 0.001)
    names = run_python(shown_python("components.md"), "components.md")
    assert [(each.n0, each.n) for each in names["found"]] == [(200, 200)] * 3
    assert all(each.radius <= 0.25 * norm.ppf(0.001 ** (1 / 200)) for each in names["found"])
    moved = (names["adversarial"] - names["torch"].tensor(names["x"][:3])).flatten(1).norm(dim=1)
    assert 0 < moved.min() <= moved.max() <= 0.25 + 1e-6
    assert names["estimator"].sigma == 0.5


@pytest.mark.parametrize("page", with_blocks("pycon", run=True))
def test_sessions(page, site, fresh_registry):
    install(page, site)
    for block in blocks(page, "pycon"):
        test = doctest.DocTestParser().get_doctest(block.text, {}, page, page, 0)
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("console", run=True))
def test_the_commands_of_a_page_run(page, tmp_path):
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    for block in blocks(page, "console"):
        if block.not_run is not None:
            continue
        for command, output in commands(block.text):
            if command.startswith("cat "):
                (tmp_path / command.split()[1]).write_text(output)
                continue
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
                timeout=3600,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if page == "methods/smoothmix.md":
        assert read_results(tmp_path / "run/certified.tsv").certified_accuracy([0.25])[0] > 0.5
    if page == "jobs.md":
        assert read_results(tmp_path / "digits.tsv").certified_accuracy([0.25])[0] > 0.5
        assert (tmp_path / "report/report.html").is_file()


@pytest.mark.parametrize("page", with_blocks("console", run=False))
def test_what_is_not_run_can_be_run(page):
    """Commands that take hours name scripts, verbs, options and extras that are there."""
    for block in blocks(page, "console"):
        for command, _ in commands(block.text) if block.not_run is not None else ():
            words = shlex.split(command)
            if "rs_plugins" in words or words[0] == "rs-plugins":
                after = words.index("rs_plugins" if "rs_plugins" in words else "rs-plugins") + 1
                check_options(command_line, words[after:])
            elif words[0] == "python":
                assert words[1].startswith("benchmarks/")
                assert (ROOT / words[1]).is_file()
                check_script(words[1], words[2:])
            else:
                assert words[:2] == ["pip", "install"]
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.findall(r"\w+", words[2])) <= set(extras)


def check_options(command, words):
    """Parse ``words`` as click does, without running anything."""
    with click.Context(command, info_name="it") as context:
        while isinstance(command, click.Group):
            name, command, words = command.resolve_command(context, list(words))
            assert command is not None, name
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def check_script(name, words):
    """Look for the options in the text of a benchmark: importing one may take its data."""
    folder = ROOT / "benchmarks"
    text = (ROOT / name).read_text(encoding="utf-8")
    if "import sections" in text:
        (module,) = re.findall(rf"\b{words.pop(0)}=\"(\w+)\"", text)
        text = (folder / f"{module}.py").read_text(encoding="utf-8")
    known = set(re.findall(r"click\.option\(\s*\"(--[\w-]+)", text))
    for module in re.findall(r"^from (\w+) import", text, flags=re.MULTILINE):
        if (folder / f"{module}.py").is_file():
            known |= set(re.findall(r"click\.option\(\s*\"(--[\w-]+)", (folder / f"{module}.py").read_text()))
    assert {word for word in words if word.startswith("--")} <= known, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_run(name, tmp_path):
    source = (DOCS / "notebooks" / name).read_text(encoding="utf-8")
    assert source.startswith("# ---\n# jupyter:\n")
    assert source.count("\n# %%") > 8
    command = [sys.executable, str(DOCS / "notebooks" / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "smoothing_with_art.py":
        certified = [int(share) for share in re.findall(r"right, and certified at 0.5: (\d+)%", done.stdout)]
        assert certified[0] > certified[1]
    else:
        assert "closer than certified: 0" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        place, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (DOCS / page).parent / place if place else DOCS / page
        assert target.is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w]+", "-", title.lower()).strip("-") for title in titles], link


def test_each_noise_family_is_in_the_table():
    text = (DOCS / "methods/noise.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z][a-z-]+)` \| `(\w+)` \| (\w+) \|", text, flags=re.MULTILINE)
    noises = [component for component in registry.components("noise") if component.target.startswith("rs_plugins.core")]
    classes = [registry.component("noise", component.name) for component in noises]
    assert sorted(rows) == sorted((noise.name, noise.__name__, noise.norm) for noise in classes)


def test_figures_are_linked():
    """A page of a method says where its figures come from."""
    for page in PAGES:
        if page.startswith("methods/") and page != "methods/ensembles.md":
            assert "benchmarks/results/" in (DOCS / page).read_text(encoding="utf-8"), page


def test_the_navigation_has_all_pages():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_what_is_documented_exists(page):
    for name in re.findall(r"^::: (\S+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert registry.load_target(f"{module}:{attribute}").__doc__, name


def test_all_public_names_are_documented():
    import rs_plugins

    text = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in rs_plugins.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_requirements_are_pinned():
    lines = (DOCS / "requirements.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert pinned
    assert all(re.match(r"[\w-]+==[\w.]+( #.*)?$", line) for line in pinned)
