import json

import pytest

from rs_plugins.core.results.logged_noise import LoggedNoise, read_noise, unlike

L1, L2, LINF = LoggedNoise("laplace", "l1"), LoggedNoise("gaussian", "l2"), LoggedNoise("uniform-linf", "linf")


def test_the_record_says_it(tmp_path):
    log = tmp_path / "log.tsv"
    assert read_noise(log) is None
    record = tmp_path / "log.tsv.json"
    record.write_text(json.dumps({"family": "laplace", "norm": "l1", "sigma": 0.5}))
    assert read_noise(log) == L1
    assert str(L1) == "laplace, l1"


@pytest.mark.parametrize("content", ["", "[1]", '{"family": "laplace"}', '{"family": 3, "norm": "l1"}', "[" * 100_000])
def test_a_record_that_does_not_say_it(tmp_path, content):
    (tmp_path / "log.tsv.json").write_text(content)
    assert read_noise(tmp_path / "log.tsv") is None


def test_radii_of_several_norms_are_unlike():
    noises = {"a": L1, "b": L2, "c": LINF, "d": None, "e": L2}
    assert unlike(noises, ["b", "e", "d"]) is None  # published logs say nothing, and are of l2
    assert unlike(noises, ["a"]) is unlike({}, ["a", "b"]) is unlike(noises, ["d"]) is unlike(noises, []) is None
    assert unlike(noises, ["e", "c", "b"]) == "the radii of e are in l2, those of c in linf"
    assert unlike(noises, ["d", "a"]) == "the radii of a are in l1, d does not say in which norm its are"
