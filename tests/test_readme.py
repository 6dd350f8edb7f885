"""What the README shows is what happens."""

import math
import re
from pathlib import Path

import pytest
from scipy.stats import norm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(capsys, run_python):
    names = run_python(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), "README.md")
    assert names["predictions"].shape == names["radii"].shape == (20,)
    assert (names["predictions"] == names["y_test"]).mean() > 0.5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 20
    proved, resisted = (int(line.rpartition(": ")[2].rstrip("%")) for line in lines[:2])
    assert 40 <= proved <= resisted + 40 <= 140
    moved = (names["adversarial"] - names["torch"].tensor(names["x_test"])).flatten(1).norm(dim=1)
    assert moved.max() <= 0.5 * (1 + 1e-6)


def test_the_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 3
    for link in links:
        place, _, anchor = link.partition("#")
        target = ROOT / place if place else ROOT / "README.md"
        assert target.is_file(), link
        titles = re.findall(r"^##+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in headings, link


def test_the_readme_leads_to_all_pages():
    section = README.partition("\n## Which page\n")[2].partition("\n## ")[0]
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(re.findall(r"\]\(([^)]+)\)", section)) == sorted(pages)


@pytest.mark.parametrize(("n", "radius"), [(1000, 0.62), (100_000, 0.95)])
def test_the_largest_radii_of_the_readme(n, radius):
    assert f"{radius} at `n={n:_}`".replace("1_000`", "1000`") in README
    assert radius == math.floor(100 * 0.25 * norm.ppf(0.001 ** (1 / n)) + 0.5) / 100
