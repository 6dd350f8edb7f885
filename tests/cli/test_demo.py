import shlex

import pytest
from click.testing import CliRunner

from rs_plugins.cli.demo import demo
from rs_plugins.cli.report import report


def invoke(*arguments):
    return CliRunner().invoke(demo, list(arguments))


def test_options_reach_the_demo(tmp_path):
    small = ["--images", "3", "--n", "20", "--epochs", "1", "--sigma", "0.4", "--seed", "3", "--quiet"]
    result = invoke("--out", str(tmp_path / "x"), *small)
    assert result.exit_code == 0, result.output
    assert "| rs-plugins " in result.output
    assert "cert. 0.4" in result.output
    assert str(tmp_path / "x" / "report.md") in result.output
    rows = (tmp_path / "x" / "certified-rs-plugins.tsv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[-1].split("\t")[8:] == ["100", "20", "0.4", "0.001", "3", "", "", "0"]
    words = shlex.split(result.output.rpartition("as a page: ")[2])
    assert words[:2] == ["rs-plugins", "report"]
    page = CliRunner().invoke(report, words[2:])
    assert page.exit_code == 0, page.output
    assert (tmp_path / "x" / "page" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images: expected 1 to 500 of the digits' test images, got 0"),
        (["--sigma", "0"], "sigma: expected a finite number > 0, got 0.0"),
        (["--n", "5"], "n: expected at least 10, got 5"),
    ],
)
def test_bad_values_are_one_line_and_no_traceback(arguments, message, tmp_path):
    result = invoke("--out", str(tmp_path), "--quiet", *arguments)
    assert result.exit_code == 1
    assert f"Error: {message}" in result.output
    assert list(tmp_path.iterdir()) == []
