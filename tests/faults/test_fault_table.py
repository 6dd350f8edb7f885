"""Each line of the table of faults is a test that there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [line for line in TABLE.splitlines() if line.startswith("|") and not line.startswith(("| Input", "|---"))]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_tests_of_the_table_are_there(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_each_line_of_the_table_is_a_test():
    assert len(ROWS) > 40
    for row in ROWS:
        cells = row.strip("|").split("|")
        assert len(cells) == 4, row
        assert "::" in cells[3], row
