"""What the README shows is what happens."""

import math
import re
from pathlib import Path

import pytest
from scipy.stats import norm

from rs_plugins import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(capsys, tmp_path, run_python):
    names = run_python(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), "README.md")
    assert names["predictions"].shape == names["radii"].shape == (20,)
    assert (names["predictions"] == names["y_test"]).mean() > 0.5
    lines = capsys.readouterr().out.splitlines()
    attacked = lines.index(next(line for line in lines if line.startswith("turned by")))
    assert attacked == 2 + 20
    table = lines[attacked + 1 : -29]
    assert any(line.startswith("attack success") for line in table)
    assert [line.split()[0] for line in table[1:5]] == ["correct", "abstained", "wrong", "mean"]
    plain, certified = (int(line.rpartition(": ")[2].rstrip("%")) for line in lines[-27:-25])
    assert lines[-27].startswith("plain: right, and proved so")
    assert certified >= plain + 10
    assert {"verified", "falsified"} <= set(re.findall(r"\w+", lines[-25]))
    del lines[-27:-24]
    bare, adapted = (int(line.rpartition(": ")[2].rstrip("%")) for line in lines[-26:-24])
    assert lines[-26].startswith("bare: right and certified at 0.5")
    assert adapted >= bare + 5
    assert names["replaced"].calls == 2
    assert names["last"].validation_accuracy > names["last"].adversarial_accuracy > 0.3
    lines = [*lines[:attacked], *lines[-24:]]
    proved, resisted = (int(line.rpartition(": ")[2].rstrip("%")) for line in lines[:2])
    assert 40 <= proved <= resisted + 40 <= 140
    moved = (names["adversarial"] - names["torch"].tensor(names["x_test"])).flatten(1).norm(dim=1)
    assert moved.max() <= 0.5 * (1 + 1e-6)
    votes, right = zip(*((float(line.split()[0]), int(line.split()[4])) for line in lines[22:26]), strict=True)
    assert votes[0] == 10_100
    assert max(votes[1:3]) < 0.5 * votes[0]
    assert max(right) >= 10
    assert max(right) - min(right) <= 2
    certified = [line.split()[1] for line in lines[26:]]
    assert sum(map(str.__eq__, certified, map(str, names["y_test"]))) > 10
    assert (names["linear_predictions"] == names["y_test"]).sum() > 10
    assert names["linear_radii"].max() > 0.2
    assert {0.1, 0.2} & {certificate.radius for certificate in names["l1"]}
    assert 0.02 < max(certificate.radius for certificate in names["linf"]) < 0.08
    assert names["trained"].sigma == 0.25
    assert (tmp_path / "consistency" / "model.json").is_file()
    assert (names["record"].prediction, names["record"].radius > 0.2) == (names["y_test"][0], True)


def test_the_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 3
    titles = re.findall(r"^##+ (.*)$", README, flags=re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert [link for link in links if not link.startswith("#") and not (ROOT / link).exists()] == []
    assert {link[1:] for link in links if link.startswith("#")} - headings == set()


def test_each_noise_family_is_in_the_table():
    rows = re.findall(r"^\| `([a-z][a-z-]+)` \| `(\w+)` \| (\w+) \|", README, flags=re.MULTILINE)
    noises = [component for component in registry.components("noise") if component.target.startswith("rs_plugins.core")]
    classes = [registry.component("noise", component.name) for component in noises]
    assert sorted(rows) == sorted((noise.name, noise.__name__, noise.norm) for noise in classes)


@pytest.mark.parametrize(("n", "radius"), [(1000, 0.62), (100_000, 0.95)])
def test_the_largest_radii_of_the_readme(n, radius):
    assert f"{radius} at `n={n:_}`".replace("1_000`", "1000`") in README
    assert radius == math.floor(100 * 0.25 * norm.ppf(0.001 ** (1 / n)) + 0.5) / 100
