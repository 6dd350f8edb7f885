"""The page: what is in it, that nothing of others' names is markup, and that it needs no other file."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rs_plugins.core.results.comparison import Curve, figures, incomparable
from rs_plugins.core.results.logged_noise import LoggedNoise
from rs_plugins.core.results.logged_plan import understood
from rs_plugins.core.results.table import Results
from rs_plugins.errors import InputError
from rs_plugins.report_page.content import Content, printable
from rs_plugins.report_page.page import GAMED
from rs_plugins.report_page.writing import write_report

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}|`_x_`[a](javascript:b)$\\frac{$\x1b[31m\u202e\udcff.tsv"
VOID = {"meta", "link", "img", "source", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page into tags with attributes, rows of tables, and text; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.rows, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append({**dict(attributes), "text": []})

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text.append(data)
        if {"td", "th"} & set(self._open) and data.strip():
            self.rows[-1][-1]["text"].append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def log(radius, right, *, sigma=0.25, alpha=0.001, label=None):
    n = len(radius)
    predict = np.where(np.array(radius) == 0, -1, np.where(right, 0, 1))
    label = np.zeros(n, dtype=np.int64) if label is None else np.array(label)
    seconds, samples = np.full(n, 90.0), np.full(n, 110)
    return Results(
        np.arange(n), label, predict, np.array(radius), predict == label, seconds, samples, sigma=sigma, alpha=alpha
    )


MANY = log([0.3, 0.3, 0.3, 0.0], [True] * 4)
FAR = log([0.6, 0.6, 0.1, 0.9], [True, True, True, False])


def content(logs, radii=(0, 0.25, 0.5), plans=None, noises=None, alpha=None, **options):
    plans, noises = plans or {}, noises or {}
    rows = [
        figures(name, table, radii, plan=plans.get(name), noise=noises.get(name), alpha=alpha)
        for name, table in logs.items()
    ]
    return Content(rows, logs, plans, noises, incomparable=incomparable(logs, noises), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "report"
    files = write_report(folder, content({"many": MANY, "far": FAR}), "log,figure\nmany,acr")
    return folder, files


@pytest.fixture(scope="module")
def page(written):
    return Page((written[0] / "report.html").read_text(encoding="utf-8"))


def test_files(written):
    folder, files = written
    names = ["report.html", "report.md", "report.csv"]
    names += ["certified-accuracy.png", "certified-accuracy.svg", "radii.png", "radii.svg"]
    assert files == [folder / name for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert (folder / "radii.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.csv").read_text() == "log,figure\nmany,acr\n"
    for name in ("certified-accuracy.svg", "radii.svg"):
        assert b"<text" not in (folder / name).read_bytes()  # no font is needed


def test_the_page_needs_no_other_file(written, page):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    addresses = [image["src"] for image in page.all("img")] + [source["srcset"] for source in page.all("source")]
    assert len(addresses) == 4
    for address in addresses:
        kind, data = re.fullmatch(r"data:(image/svg\+xml);base64,([\w+/=]+)", address).groups()
        svg = base64.b64decode(data)
        assert kind == "image/svg+xml"
        assert svg.startswith(b"<?xml")
        assert not re.search(rb"href=\"(?!#)", svg)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_is_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(image["alt"] for image in page.all("img"))
    assert [image["alt"] for image in page.all("img")] == [
        "Certified accuracy against radius of many, far",
        "Radii of the images of many, far",
    ]
    heads = {cell["scope"] for row in page.rows for cell in row if "scope" in cell}
    assert heads == {"col", "row"}
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) == 2


def test_figures_and_the_best_of_each_column(page):
    header, many, far = page.rows[:3]
    assert ["".join(cell["text"]) for cell in header] == ["log", "ACR", "clean %", "r = 0", "r = 0.25", "r = 0.5"]
    assert [cell["text"][0] for cell in many] == ["many", "0.225000", "75.00", "75.00", "75.00", "0.00"]
    assert [cell["text"][0] for cell in far] == ["far", "0.325000", "75.00", "75.00", "50.00", "50.00"]
    best = [[cell.get("class") == "best" for cell in row[1:]] for row in (many, far)]
    assert best == [[False, True, True, True, False], [True, True, True, False, True]]  # equals are both
    for row in (many, far):
        assert [("best" in cell["text"]) for cell in row[1:]] == [cell.get("class") == "best" for cell in row[1:]]
        assert [cell["data-head"] for cell in row[1:]] == [cell["text"][0] for cell in header[1:]]
    assert far[4]["text"] == ["50.00", "6.8-93.2", "≥ 25.00"]  # Clopper and Pearson: 2 of 4, as tables have it


def test_acr_is_never_alone(page):
    assert GAMED in page.text
    assert "can be gamed" in GAMED
    for row in page.rows:
        heads = [cell.get("data-head") for cell in row]
        assert ("ACR" in heads) <= ({"clean %", "r = 0.25"} <= set(heads))


def test_markdown_has_the_same_figures(written, page):
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (many|far) ", line)]
    assert lines[1][4].startswith("50.00 (6.8-93.2; ≥ 25.00)")
    for line, row in zip(lines, [*page.rows[1:3], *page.rows[4:6]], strict=True):
        for cell, there in zip(line[1:], row[1:], strict=True):
            bold = cell.startswith("**")
            assert bold == (there.get("class") == "best")
            assert re.match(r"[^ (]+|FixedBudget", cell.replace("*", "")).group() == there["text"][0].replace(" ", "")
    assert f"**{GAMED}**" in text
    assert "![Certified accuracy against radius of many, far](certified-accuracy.png)" in text


def test_names_of_others_are_text(tmp_path):
    noise = LoggedNoise("<img src=x>", "l2")
    plan = understood("<b>plan</b>")
    hostile = content(
        {HOSTILE: MANY, "_private": FAR}, plans={HOSTILE: plan}, noises={HOSTILE: noise}, notes=["<i>note</i>"]
    )
    write_report(tmp_path, hostile, f"{HOSTILE},x")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {"script", "b", "i"} & {tag for tag, _ in page.tags} == set()
    assert len(page.all("img")) == 2
    shown = printable(HOSTILE)
    assert "\\x1b" in shown
    assert "\\u202e" in shown
    assert "\\udcff" in shown
    assert page.rows[1][0]["text"] == [shown]
    assert "<b>plan</b>" in page.rows[4][-1]["text"]
    assert "<i>note</i>" in page.text
    assert "49" not in "".join(page.rows[1][0]["text"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    (line, _) = (line for line in markdown.splitlines() if "alert" in line and line.startswith("|"))
    assert "\\<script\\>" in line
    assert "\\[a\\](javascript" in line
    assert len(re.findall(r"(?<!\\)\|", line)) == 7
    for svg in tmp_path.glob("*.svg"):
        assert b"<script>alert" not in re.sub(rb"<!--.*?-->", b"", svg.read_bytes(), flags=re.DOTALL)
    assert next(csv.reader(io.StringIO((tmp_path / "report.csv").read_text())))


def test_no_best_and_a_warning_where_logs_are_not_alike(tmp_path):
    other = log([0.6, 0.6, 0.1, 0.9], [True] * 4, label=[1, 1, 1, 1], sigma=0.5, alpha=0.01)
    write_report(tmp_path, content({"one": MANY, "two": other}), "")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "no best is marked: one and two are not of the same images." in text
    assert "different noise levels: 0.25 (one), 0.5 (two)." in text
    assert "different failure probabilities alpha: 0.001 (one), 0.01 (two)." in text
    assert [attributes["class"] for attributes in page.all("p") if "role" in attributes] == ["warning"] * 3
    assert not page.all("strong")[4:]  # three warnings and ACR's
    assert "best" not in [cell.get("class") for row in page.rows for cell in row]
    assert "> **Take care.** The logs have" in (tmp_path / "report.md").read_text()


def test_radii_of_different_norms(tmp_path):
    noises = {"one": LoggedNoise("gaussian", "l2"), "two": LoggedNoise("laplace", "l1")}
    different = content({"one": MANY, "two": FAR}, noises=noises)
    assert different.norm == "l2, l1"
    assert different.warnings == [
        "These logs cannot be compared, so no best is marked: the radii of one are in l2, those of two in l1."
    ]


def test_one_log_has_no_best(tmp_path):
    alone = content({"one": MANY})
    assert (alone.comparable, alone.warnings) == (False, [])


def test_wide_tables_are_cut(tmp_path):
    write_report(tmp_path, content({"many": MANY, "far": FAR}, radii=[place / 20 for place in range(25)]), "")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    heads = [[cell["text"][0] for cell in row[1:]] for row in page.rows[:9:3]]
    assert [len(row) for row in heads] == [9, 9, 9]
    assert heads[0][2:] + heads[1] + heads[2] == [f"r = {place / 20:g}" for place in range(25)]


def test_logs_without_certificates(tmp_path):
    predictions = Results(*(getattr(MANY, name) for name in ("idx", "label", "predict")), None, *(MANY.correct,) * 2)
    curve = Curve(np.array([0.0, 0.5]), np.array([0.9, 0.5]))
    write_report(tmp_path / "a", content({"predictions": predictions}), "")
    page = Page((tmp_path / "a" / "report.html").read_text(encoding="utf-8"))
    assert page.all("img") == []
    assert [cell["text"][0] for cell in page.rows[1]] == ["predictions", "-", "75.00"]
    write_report(tmp_path / "b", content({"curve": curve, "many": MANY}, plans={}, radii=(0, 0.5)), "")
    page = Page((tmp_path / "b" / "report.html").read_text(encoding="utf-8"))
    assert [cell["text"] for cell in page.rows[1][3:]] == [["90.00"], ["50.00"]]
    assert "curve is a curve, which does not say" in " ".join(page.text)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out: .*file cannot be made \(File exists\)"):
        write_report(tmp_path / "file", content({"many": MANY}), "")
    with pytest.raises(InputError, match=r"out: .*there cannot be made \(No such file or directory\)"):
        write_report(tmp_path / "not" / "there", content({"many": MANY}), "")
