import math
from dataclasses import replace

import pytest

from rs_plugins.core.relaxations.bound_files import (
    COLUMNS,
    HEADER,
    BoundsWriter,
    format_row,
    is_bound_log,
    parse_bounds,
    read_bounds,
)
from rs_plugins.core.relaxations.bound_results import BoundCertificate, BoundProvenance, BoundResults
from rs_plugins.core.results.files import HEADER as OTHER_HEADER
from rs_plugins.errors import ResultsError, ResultsWarning

RUN = BoundProvenance(0.1, "linf", "ibp, crown", "none", 0, "small", "float64", "cpu", "AVX2", "0" * 64, "torch 3")
ROWS = [
    (3, 1, 1, "verified", "ibp", 0.123456789, 1.000000001e-10),
    (4, 1, 1, "verified", "crown", 2.0, 3e-10),
    (5, 0, 0, "unknown", "crown", -0.123456789, 1e-10),
    (6, 0, 0, "unknown", "crown", math.nan, math.nan),
    (7, 2, 2, "falsified", "pgd", -1.5, None),
    (8, 2, 1, "misclassified", "prediction", -0.0, None),
    (9, 2, 2, "failed", "crown", -2.0, 3e-10),
    (11, 2, -1, "failed", "prediction", math.nan, None),
]


def certificates():
    made = [BoundCertificate(*row, seconds=0.25 * place, made_with=RUN) for place, row in enumerate(ROWS)]
    made[6] = replace(made[6], message="MemoryError:\tno\nmore   " + 400 * "x")
    return made


def written(path, made):
    with BoundsWriter(path) as writer:
        for certificate in made:
            writer.write(certificate)
    return path


def test_the_figures_are_shares_of_all_images():
    results = BoundResults.of(certificates())
    natural, certified, at_most = (
        each(confidence=0.9)
        for each in (results.natural_accuracy, results.certified_accuracy, results.robust_accuracy_at_most)
    )
    assert [(share.count, share.total) for share in (natural, certified, at_most)] == [(6, 8), (2, 8), (6, 8)]
    assert natural.confidence == 0.9
    assert certified.share == 0.25
    assert results.counts == {"verified": 2, "falsified": 1, "misclassified": 1, "unknown": 2, "failed": 2}
    assert results.verified_by == {"ibp": 1, "crown-ibp": 0, "crown": 1, "alpha-crown": 0}
    assert results.mean_seconds == pytest.approx(0.875)
    assert (results.eps, results.norm, results.dtype, len(results)) == (0.1, "linf", "float64", 8)


def test_of_no_images_there_are_no_figures():
    results = BoundResults.of([])
    assert math.isnan(results.certified_accuracy().share)
    assert math.isnan(results.mean_seconds)
    assert results.eps is None


def test_written_logs_are_read_back(tmp_path):
    made = certificates()
    results, direct = read_bounds(written(tmp_path / "log.tsv", made)), BoundResults.of(made)
    for name in ("idx", "label", "predict", "status", "method", "seconds"):
        assert getattr(results, name).tolist() == getattr(direct, name).tolist()
    for name in ("margin", "slack"):
        assert getattr(results, name) == pytest.approx(getattr(direct, name), rel=1e-7, nan_ok=True)
    assert (results.eps, results.norm, results.dtype) == (0.1, "linf", "float64")
    assert is_bound_log(tmp_path / "log.tsv")


def test_a_margin_is_rounded_down_and_its_slack_up():
    rows = [dict(zip(COLUMNS, format_row(c).rstrip("\n").split("\t"), strict=True)) for c in certificates()]
    assert [row["margin"] for row in rows[:3]] == ["0.12345678", "2", "-0.12345679"]
    assert (rows[0]["slack"], rows[4]["slack"], rows[3]["margin"]) == ("1.0000001E-10", "", "nan")
    assert rows[6]["message"].startswith("MemoryError: no more xxx")
    assert len(rows[6]["message"]) == 300


def test_a_line_that_is_cut_off_is_left_out(tmp_path):
    path = written(tmp_path / "log.tsv", certificates())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(ResultsWarning, match="log.tsv: left out line 9, cut off in the middle"):
        assert len(read_bounds(path)) == 7


def line(**changes):
    cells = dict(zip(COLUMNS, format_row(certificates()[0]).rstrip("\n").split("\t"), strict=True))
    return "\t".join({**cells, **changes}.values()) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OTHER_HEADER, "expected a header with the columns idx label predict status"),
        (HEADER + "1\t2\n", "line 2: expected 12 columns, got 2"),
        (HEADER + line(idx="one"), "line 2: expected an integer, got 'one'"),
        (HEADER + line() + line(), "line 3: idx: expected more than 3, got 3"),
        (HEADER + line(idx="-1"), "idx: expected more than -1, got -1"),
        (HEADER + line(status="proved"), "status: expected one of verified, falsified, .*, got 'proved'"),
        (HEADER + line(method="pgd"), "method: expected one of ibp, crown-ibp, crown, alpha-crown, got 'pgd'"),
        (HEADER + line(status="failed", method="magic"), "method: expected one of prediction, pgd, .*, got 'magic'"),
        (HEADER + line(predict="2"), "status: got verified for label 1 and prediction 2"),
        (HEADER + line(status="misclassified", method="prediction"), "got misclassified for label 1 and prediction 1"),
        (HEADER + line(margin="-1"), "margin: expected a finite number > 0 of a verified image, got -1.0"),
        (HEADER + line(margin="nan"), "margin: expected a finite number > 0 of a verified image, got nan"),
        (
            HEADER + line(margin="9e-11"),
            "margin: expected more than the slack 1.0000001e-10 of .*, got 9e-11",
        ),
        (HEADER + line(slack=""), "margin: expected more than the slack nan of a verified image, got 0.12345678"),
        (HEADER + line(status="falsified", method="pgd"), "margin: expected a number < 0 of a falsified image"),
        (HEADER + line(eps=""), "line 2: eps: expected a finite number >= 0, got nan"),
        (HEADER + line(eps="-0.1"), "eps: expected a finite number >= 0, got -0.1"),
        (HEADER + line(eps="inf"), "eps: expected a finite number >= 0, got inf"),
        (HEADER + line(norm="l1"), "norm: expected one of linf, l2, got 'l1'"),
        (HEADER + line(time="soon"), "line 2: expected a number, got 'soon'"),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(ResultsError, match=f"a.tsv.*{message}"):
        parse_bounds(text.encode(), "a.tsv")


def test_a_margin_just_above_its_slack_is_read_back(tmp_path):
    least = replace(certificates()[0], margin=1.00000001e-10, slack=1e-10)
    assert read_bounds(written(tmp_path / "log.tsv", [least])).counts["verified"] == 1


def test_the_writer_goes_on_with_its_own_logs_only(tmp_path):
    made = certificates()
    path = written(tmp_path / "log.tsv", made[:3])
    with BoundsWriter(path) as writer:
        assert writer.done == {3, 4, 5}
        with pytest.raises(ResultsError, match=r"begun by another run \(eps: 0.1 -> 0.2\)"):
            writer.write(replace(made[3], made_with=replace(RUN, eps=0.2)))
        with pytest.raises(ResultsError, match="expected images in increasing order, got 4 after 5"):
            writer.write(made[1])
        writer.write(made[3])
    (tmp_path / "other.tsv").write_text(OTHER_HEADER)
    assert not is_bound_log(tmp_path / "other.tsv")
    with pytest.raises(ResultsError, match="expected a log begun by rs-plugins, got another file"):
        BoundsWriter(tmp_path / "other.tsv")
