import math

import pytest

from rs_plugins.cli.tables import for_programs, plain
from rs_plugins.text_tables import percent, percent_below


@pytest.mark.parametrize(
    ("share", "near", "below"),
    [
        (0.99996, "100.00", "99.99"),
        (0.57, "57.00", "57.00"),
        (1, "100.00", "100.00"),
        (0.0, "0.00", "0.00"),
        (2 / 3, "66.67", "66.66"),
        (1e-7, "0.00", "0.00"),
        (None, "-", "-"),
        (math.nan, "-", "-"),
    ],
)
def test_shares_as_percent(share, near, below):
    assert (percent(share), percent_below(share)) == (near, below)


def test_figures_for_programs_keep_the_digits_of_a_log():
    values = {"radius": 0.50196078, "sum": 0.7999999999999999, "images": 300, "none": math.nan, "ends": (0.25, 1 / 3)}
    expected = {"radius": 0.50196078, "sum": 0.8, "images": 300, "none": None, "ends": [0.25, 0.33333333]}
    assert for_programs(values) == expected
    assert [plain(value) for value in (0.50196078, 300, None, math.nan)] == ["0.50196078", "300", "", ""]
