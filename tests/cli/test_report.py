import csv
import io
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rs_plugins.cli import main
from rs_plugins.core.results.files import read_results, write_results
from rs_plugins.core.results.table import Results

LOGS = Path(os.environ.get("RS_PLUGINS_REFERENCE", Path(__file__).parents[3] / "shared" / "reference")) / "certify-logs"
needs_logs = pytest.mark.skipif(
    not LOGS.is_dir(), reason="the published certification logs are not here; RS_PLUGINS_REFERENCE says where they are"
)


def invoke(command, *more):
    return CliRunner().invoke(main, [*shlex.split(command), *map(str, more)])


def report(*arguments, style="json"):
    result = invoke(f"report --format {style}", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if style == "json" else result.stdout


def cells(line):
    return re.split(r"  +", line.strip())


def published():
    """The tables of the logs' README: {log: its row} of the table that has ``header`` as its first column's second."""
    text, tables = (LOGS / "README.md").read_text(encoding="utf-8"), []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        tables.append((header, {row[0].removesuffix(".tsv"): row for row in rows}))
    _, (contents_header, contents), (radii, certified) = tables
    assert contents_header[-3:] == ["ACR", "abstain", "clean"]
    return contents, [float(r) for r in radii[1:]], certified


@needs_logs
def test_every_published_log_has_the_figures_of_its_readme():
    contents, radii, certified = published()
    logs = sorted(LOGS.glob("*.tsv"))
    assert {log.stem for log in logs} == set(contents)
    rows = {row["name"]: row for row in report(*logs, "--radii", ",".join(map(str, radii)))["logs"]}
    assert set(rows) == set(contents)
    compared = 0
    for name, line in contents.items():
        row, images = rows[name], int(line[2])
        if row["images"] is None:  # the curve
            continue
        assert row["images"] == images
        acr, abstain, clean = line[-3:]
        if acr != "–":
            assert f"{row['acr']:.6f}" == acr
        if abstain != "–":
            assert round(row["abstention"] * images) == int(abstain.split(" ")[0])
            assert round(row["clean"] * images) == int(clean.split(" ")[0])
        counts = [round(at["accuracy"] * images) for at in row["certified"]]
        if name in certified:
            expected = [int(cell) for cell in certified[name][1:] if cell]
            assert counts == expected + [0] * (len(radii) - len(expected))
            compared += 1
        else:
            assert counts == []
    assert compared == 8
    assert (rows["imagenet-header-only"]["images"], rows["imagenet-header-only"]["acr"]) == (0, None)
    prediction = rows["cifar10-predict-crlf"]
    assert (prediction["clean"], prediction["abstention"], prediction["acr"]) == (0.852, 0.026, None)


@needs_logs
def test_the_published_curve_is_the_log_with_parity():
    grid = ["--radii", "0:4:0.005"]
    log, curve = LOGS / "cifar10-consistency-0.25.tsv", LOGS / "cifar10-consistency-acc.tsv"
    lines = curve.read_text().splitlines()
    for options, differences in ((["--parity"], 0), ([], 17)):
        ours, theirs = report(log, curve, *grid, *options)["logs"]
        assert [f"{at['accuracy']:.5f}" for at in theirs["certified"]] == [line.split("\t")[1] for line in lines]
        differ = [
            a["radius"]
            for a, b in zip(ours["certified"], theirs["certified"], strict=True)
            if f"{a['accuracy']:.5f}" != f"{b['accuracy']:.5f}"
        ]
        assert len(differ) == differences
    assert (theirs["images"], theirs["acr"], theirs["clean"]) == (None, None, 0.7784)


@needs_logs
def test_a_published_table_in_the_terminal():
    overview, at_radii = report(LOGS / "cifar10-resnet110-smoothmix-0.25.tsv", style="text").split("\n\n")
    assert cells(overview.splitlines()[1])[:6] == [
        *("cifar10-resnet110-smoothmix-0.25", "10000", "-", "77.06", "3.20", "0.553396")
    ]
    lines = [cells(line) for line in at_radii.splitlines()]
    assert lines[0] == ["certified accuracy % at radius", "0", "0.25", "0.5", "0.75", "1"]
    assert lines[1] == ["cifar10-resnet110-smoothmix-0.25", "77.06", "67.90", "57.85", "46.73", "0.00"]


@pytest.fixture
def logs(tmp_path):
    """Two logs: the first is better at 0.25, the second at 0.5, both equal at 0."""

    def write(name, radius, right):
        label, n = np.zeros(len(radius), dtype=np.int64), len(radius)
        predict = np.where(np.array(radius) == 0, -1, np.where(right, 0, 1))
        table = Results(np.arange(n), label, predict, np.array(radius), predict == label, np.full(n, 90.0))
        write_results(tmp_path / name, table)
        return tmp_path / name

    many = write("many.tsv", [0.3, 0.3, 0.3, 0.0], [True] * 4)
    far = write("far.tsv", [0.6, 0.6, 0.1, 0.9], [True, True, True, False])
    return many, far


def test_figures_by_hand(logs):
    content = report(*logs, "--radii", "0,0.25,0.5")
    many, far = content["logs"]
    assert (many["name"], many["images"], many["clean"], many["abstention"]) == ("many", 4, 0.75, 0.25)
    assert (many["acr"], many["samples"], many["seconds"], many["sigma"]) == (pytest.approx(0.225), None, 360, None)
    assert [at["accuracy"] for at in far["certified"]] == [0.75, 0.5, 0.5]
    assert far["certified"][1]["interval"] == pytest.approx([0.0676, 0.9324], abs=1e-4)  # 2 of 4, as tables have it
    assert many["certified"][0]["lower"] is None
    assert content["confidence"] == 0.95
    assert [(at["radius"], at["name"]) for at in content["best"]] == [(0, "many"), (0.25, "many"), (0.5, "far")]


def test_of_equals_the_one_with_the_higher_clean_accuracy_is_best(logs):
    many, far = logs
    better = many.with_name("better.tsv")
    lines = far.read_text().splitlines()
    better.write_text("\n".join([*lines[:4], re.sub(r"\t1\t0.9\d*\t0\t", "\t0\t0.01\t1\t", lines[4])]) + "\n")
    assert read_results(better).accuracy == 1
    for order in ((far, better), (better, far)):
        (best,) = report(*order, "--radii", "0.5")["best"]
        assert (best["accuracy"], best["name"]) == (0.5, "better")


def test_options_change_the_figures(logs):
    wide, narrow = (report(logs[0], "--confidence", c)["logs"][0] for c in ("0.99", "0.5"))
    assert wide["certified"][0]["interval"][0] < narrow["certified"][0]["interval"][0]
    assert wide["acr_interval"][0] < narrow["acr_interval"][0]
    (row,) = report(logs[0], "--alpha", "0.01")["logs"]
    assert row["certified"][0]["lower"] == 0.5  # at most one of the four is wrong
    assert [at["radius"] for at in row["certified"]] == [0, 0.25, 0.5]
    (row,) = report(logs[0], "--radii", "0:0.3:0.1")["logs"]
    assert [at["accuracy"] for at in row["certified"]] == [0.75] * 4


def test_text(logs):
    overview, at_radii, note = report(*logs, "--alpha", "0.01", "--radii", "0,0.25,0.5", style="text").split("\n\n")
    header = ["images", "sigma", "clean %", "abstain %", "ACR", "95% interval", "votes/image", "time", "plan"]
    assert [cells(line) for line in overview.splitlines()[:2]] == [
        header,
        ["many", "4", "-", "75.00", "25.00", "0.225000", "0.0750-0.3000", "-", "0:06:00", "-"],
    ]
    assert [cells(line) for line in at_radii.splitlines()] == [
        ["certified accuracy % at radius", "0", "0.25", "0.5"],
        ["many", "*75.00", "*75.00", "0.00"],
        ["95% interval", "19.4-99.4", "19.4-99.4", "0.0-60.2"],
        ["lower bound", "50.00", "50.00", "0.00"],
        ["far", "75.00", "50.00", "*50.00"],
        ["95% interval", "19.4-99.4", "6.8-93.2", "6.8-93.2"],
        ["lower bound", "50.00", "25.00", "25.00"],
    ]
    assert note == "* the best at this radius; of equals the one with the highest clean accuracy\n"
    best = report(*logs, style="markdown").split("\n\n")[-1]
    assert best.startswith("- \\* the best")


def test_markdown(logs):
    text = report(logs[0], "--radii", "0.25", style="markdown")
    assert "| certified accuracy % at radius | 0.25 |\n| :--- | ---: |\n| many | 75.00 |\n" in text
    assert "best" not in text


def test_csv(logs):
    rows = list(csv.DictReader(io.StringIO(report(*logs, "--radii", "0,0.5", "--alpha", "0.01", style="csv"))))
    found = {(row["log"], row["figure"], row["radius"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (8 + 2 + 4) + 2
    assert found["many", "images", ""]["value"] == "4"
    assert float(found["far", "acr", ""]["value"]) == pytest.approx(1.3 / 4)
    assert float(found["far", "acr", ""]["low"]) < 1.3 / 4 < float(found["far", "acr", ""]["high"])
    assert found["far", "certified", "0.5"]["value"] == "0.5"
    assert found["many", "certified lower bound", "0.0"]["value"] == "0.5"
    assert found["far", "best", "0.5"]["value"] == "0.5"
    assert found["many", "samples", ""]["value"] == ""


def test_logs_of_ours_say_votes_sigma_and_alpha(tmp_path):
    header = "idx\tlabel\tpredict\tradius\tcorrect\ttime\tpa_lower\tcount\tn0\tn\tsigma\talpha\tseed\n"
    rows = "".join(f"{i}\t1\t1\t0.5\t1\t0:00:01\t0.9\t95\t10\t{n}\t0.5\t0.01\t0\n" for i, n in enumerate((100, 300)))
    log = tmp_path / "ours.tsv"
    log.write_text(header + rows)
    (row,) = report(log, "--alpha", "0.5", "--radii", "0")["logs"]
    assert (row["samples"], row["sigma"], row["certified"][0]["lower"]) == (210, 0.5, 0.5)
    assert cells(report(log, style="text").splitlines()[1])[-3:] == ["210", "0:00:02", "-"]


def test_logs_without_radii_or_rows(tmp_path, logs):
    (tmp_path / "predict.tsv").write_text("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t2.5\n")
    (tmp_path / "empty.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n")
    arguments = [tmp_path / "predict.tsv", tmp_path / "empty.tsv"]
    text = report(*arguments, style="text")
    assert "certified" not in text
    assert cells(text.splitlines()[2]) == ["empty", "0", "-", "-", "-", "-", "-", "-", "0:00:00", "-"]
    rows = report(*arguments, logs[0], "--radii", "0")
    assert [len(row["certified"]) for row in rows["logs"]] == [0, 0, 1]
    result = invoke("report", *arguments, "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "nothing to draw: none of predict, empty has certified radii" in result.output


def test_pictures(tmp_path, logs):
    pytest.importorskip("matplotlib")
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        result = invoke("report", *logs, "--plot", tmp_path / f"x{suffix}")
        assert (result.exit_code, result.stderr) == (0, f"{tmp_path / f'x{suffix}'}\n")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(start)


def with_plan(log, plan):
    log.with_name(log.name + ".json").write_text(json.dumps({"plan": plan}))
    return log


def test_the_plan_is_shown(logs):
    many, far = logs
    with_plan(many, "FixedBudget(n0=10, n=100, alpha=0.001)")
    overview, *_ = report(*logs, style="text").split("\n\n")
    assert [cells(line)[-1] for line in overview.splitlines()] == ["plan", "FixedBudget n=100", "-"]
    assert [row["plan"] for row in report(*logs)["logs"]] == ["FixedBudget(n0=10, n=100, alpha=0.001)", None]
    assert 'many,plan,,"FixedBudget(n0=10, n=100, alpha=0.001)",,' in report(*logs, style="csv")
    with_plan(far, "FixedBudget(n0=20, n=100, alpha=0.001)")
    for style, bullet in (("text", ""), ("markdown", "- ")):
        text = report(*logs, style=style)
        assert f"\n{bullet}[1] FixedBudget(n0=10, n=100, alpha=0.001)\n{bullet}[2] FixedBudget(n0=20," in text
    with_plan(far, f"OnGrid(radii={tuple(place / 100 for place in range(9))}, n=100)")
    text = report(*logs, style="text")
    assert cells(text.splitlines()[2])[-1] == "[1]"
    assert "\n[1] OnGrid(radii=(0.0, 0.01, " in text


def test_plans_with_radii_of_their_own(logs):
    many, far = logs
    with_plan(many, "AtRadius(r=0.3, n=100)")
    with_plan(far, "OnGrid(radii=(0.0, 0.1, 0.6, 0.9), n=100)")
    text = report(*logs, "--radii", "0.9,0.3", style="text")
    overview, at_radii, notes = text.split("\n\n")
    assert cells(overview.splitlines()[1])[3:7] == ["-", "25.00", "-", "-"]
    assert cells(overview.splitlines()[2])[3:6] == ["75.00", "0.00", "0.325000"]
    assert [cells(line) for line in at_radii.splitlines()][:3] == [
        ["certified accuracy % at radius", "0.3", "0.9"],
        ["many", "*75.00", "-"],
        ["95% interval", "19.4-99.4", "-"],
    ]
    assert notes.splitlines()[2:] == [
        "OnGrid: radii, and so ACR, are rounded down to those of the plan",
        "a plan that begins above radius 0 abstains where its first radius is not certified, so clean is -",
        "AtRadius and OnGrid show between their radii what holds at the next larger one, beyond them -",
    ]
    assert report(many, style="text").splitlines()[3].split()[-1] == "0.3"  # the plan's radius by default


def test_no_best_of_other_images(logs):
    many, far = logs
    lines = far.read_text().splitlines()
    far.write_text("\n".join(lines[:-1]) + "\n")
    text = report(*logs, style="text")
    assert "*" not in text
    assert text.endswith("\nno best is marked: many and far are not of the same images\n")
    content = report(*logs)
    assert (content["best"], content["notes"]) == (
        [],
        ["no best is marked: many and far are not of the same images"],
    )
    assert "no best" not in report(many, style="text")


def test_numbers_for_programs_are_rounded(tmp_path):
    label = np.zeros(10, dtype=np.int64)
    radius = np.full(10, 0.1) + np.arange(10) * 1e-17
    write_results(tmp_path / "x.tsv", Results(np.arange(10), label, label, radius, label == 0, np.full(10, 0.1)))
    (row,) = report(tmp_path / "x.tsv", "--radii", "0:1:0.1")["logs"]
    assert row["seconds"] == 1.0
    assert [at["radius"] for at in row["certified"]] == [place / 10 for place in range(11)]
    text = report(tmp_path / "x.tsv", "--radii", "0:1:0.1", style="csv")
    assert "0000000" not in text
    assert "99999" not in text


def test_a_picture_that_cannot_be_written(tmp_path, logs):
    pytest.importorskip("matplotlib")
    result = invoke("report", *logs, "--plot", tmp_path / "nowhere" / "x.png")
    assert result.exit_code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in re.sub(r"\s+", " ", result.output)
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere" / "x.png")
    result = invoke("report", *logs, "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert result.stderr == f"Error: plot: {tmp_path / 'x.png'}: cannot be written (No such file or directory)\n"
    assert "certified accuracy" in result.stdout


def test_names_of_logs(tmp_path, logs):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sigma_0.25").write_bytes(logs[0].read_bytes())
    names = [row["name"] for row in report(tmp_path / "a/sigma_0.25", tmp_path / "b/sigma_0.25", logs[0])["logs"]]
    assert names == [str(tmp_path / "a/sigma_0.25"), str(tmp_path / "b/sigma_0.25"), "many"]
    assert report(tmp_path / "a/sigma_0.25")["logs"][0]["name"] == "sigma_0.25"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--radii", "a,b"], 2, "expected 0,0.25,0.5 or START:STOP:STEP, radii >= 0, got 'a,b'"),
        (["--radii", "-1"], 2, "radii >= 0, got '-1'"),
        (["--radii", "nan"], 2, "radii >= 0, got 'nan'"),
        (["--radii", "0:1:0"], 2, "radii >= 0, got '0:1:0'"),
        (["--radii", "1:0:0.5"], 2, "radii >= 0, got '1:0:0.5'"),
        (["--radii", "0:1"], 2, "radii >= 0, got '0:1'"),
        (["--plot", "x.txt"], 2, "expected a name that ends in .png, .pdf, .svg, got x.txt"),
        (["--confidence", "95"], 1, "Error: confidence: expected a number in (0, 1), got 95"),
        (["--alpha", "0"], 1, "Error: alpha: expected a number in (0, 1), got 0"),
    ],
)
def test_mistakes_are_named(logs, arguments, code, message):
    result = invoke("report", logs[0], *arguments)
    assert result.exit_code == code
    assert message in re.sub(r"\s+", " ", result.output)


def test_the_same_log_twice(logs):
    result = invoke("report", logs[0], logs[0])
    assert result.exit_code == 1
    assert f"Error: logs: expected each once, got {logs[0]} twice" in result.output


def test_a_file_that_is_no_log(tmp_path):
    (tmp_path / "x.tsv").write_text("nothing\n")
    result = invoke("report", tmp_path / "x.tsv")
    assert result.exit_code == 1
    assert "x.tsv: expected a header with the columns idx label predict radius correct time" in result.output


@pytest.mark.filterwarnings("default::rs_plugins.errors.RSPluginsWarning")
def test_a_line_cut_off_is_a_warning(logs):
    logs[0].write_bytes(logs[0].read_bytes()[:-20])
    result = invoke("report", logs[0])
    assert result.exit_code == 0
    assert re.fullmatch(r"warning: .*many.tsv: left out line 5, cut off in the middle\n", result.stderr)


def with_noise(log, family, norm):
    log.with_name(log.name + ".json").write_text(json.dumps({"family": family, "norm": norm}))
    return log


def test_logs_of_other_norms_are_labelled_and_not_compared(logs, tmp_path):
    many, far = logs
    with_noise(many, "gaussian", "l2")
    overview, at_radii, note = report(*logs, "--radii", "0.25", style="text").split("\n\n")
    assert "norm" not in overview  # what everybody expects
    assert "*" in at_radii
    assert note.startswith("* the best")
    with_noise(far, "laplace", "l1")
    overview, at_radii, note = report(*logs, "--radii", "0.25", style="text").split("\n\n")
    assert [cells(line)[-2] for line in overview.splitlines()] == ["noise, norm", "gaussian, l2", "laplace, l1"]
    assert "*" not in at_radii
    assert note == "no best is marked: the radii of many are in l2, those of far in l1\n"
    found = report(*logs)
    assert [row["noise"] for row in found["logs"]] == [
        {"family": "gaussian", "norm": "l2"},
        {"family": "laplace", "norm": "l1"},
    ]
    assert found["best"] == []
    text = report(*logs, style="csv")
    assert "far,family,,laplace,,\nfar,norm,,l1,,\n" in text
    report(*logs, "--plot", tmp_path / "x.svg")
    assert legend(tmp_path / "x.svg") == ["many, l2", "far, l1"]


def legend(picture):
    """Matplotlib says in comments what it writes in curves."""
    return [text for text in re.findall(r"<!-- (.*?) -->", picture.read_text()) if text.startswith(("many", "far"))]


def test_a_best_between_failure_probabilities_is_marked_with_a_word_on_them(tmp_path):
    header = "idx\tlabel\tpredict\tradius\tcorrect\ttime\tpa_lower\tcount\tn0\tn\tsigma\talpha\tseed\n"
    logs = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    for log, alpha in zip(logs, (0.001, 0.01), strict=True):
        log.write_text(f"{header}0\t1\t1\t0.5\t1\t0:00:01\t0.9\t99\t10\t100\t0.5\t{alpha}\t0\n")
    note = "the logs have different failure probabilities alpha: 0.001 (a), 0.01 (b)"
    assert note in report(*logs, style="text")
    assert note in report(*logs, style="markdown")
    assert note in "".join(report(*logs)["notes"])
