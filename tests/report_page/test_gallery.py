"""The gallery: which images, as which pixels, and with what is said of them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.results.table import Results
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ResultsError
from rs_plugins.report_page.gallery import as_png, make_gallery, read_attacked

Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
DATA = in_memory("squares", PIXELS, np.arange(6))
# 0 and 5 right (5 safer), 1 and 3 wrong (3 by more), 2 abstains, 4 is not in the log
LOG = Results(
    *(np.array([0, 1, 2, 3, 5]), np.array([0, 1, 2, 3, 5]), np.array([0, 2, -1, 1, 5])),
    *(np.array([0.2, 0.1, 0.0, 0.7, 0.9]), np.array([True, False, False, False, True]), np.ones(5)),
    sigma=0.25,
)


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def in_folder(folder, *, made_with=None, index=(0, 3, 4), shape=(3, 4, 5), **columns):
    """Write what ``rs-plugins attack`` leaves."""
    folder.mkdir(exist_ok=True)
    votes = np.array([[0, 900, 0, 0, 0, 100], [1000, 0, 0, 0, 0, 0], [501, 499, 0, 0, 0, 0]])
    images = np.random.default_rng(1).random((3, *shape), dtype=np.float32)
    content = {
        **{"index": np.array(index), "images": images, "labels": np.array(index), "counts_before": votes},
        **{"counts_after": votes, "l2": np.array([0.5, 0.25, 0.125]), "linf": np.full(3, 0.1)},
    } | columns
    np.savez(folder / "adversarial.npz", **content)
    made = {"attack": "SmoothAdvPGD", "options": {"eps": 0.5}, "alpha": 0.001, "digest": DATA.digest, "model": "m"}
    (folder / "evaluation.json").write_text(json.dumps({"made_with": made | (made_with or {})}))
    return images


def test_pixels_are_those_of_the_data_set():
    gallery = make_gallery(DATA, {"a": LOG}, count=5)
    assert gallery.data == "squares"
    for exhibit in gallery.exhibits:
        (picture,) = exhibit.pictures
        np.testing.assert_array_equal(decoded(picture.png), PIXELS[exhibit.index].transpose(1, 2, 0))
    grey = np.array([[[0.0, 0.5, 1.0], [-0.3, 1.7, 0.25]]], dtype=np.float32)
    assert decoded(as_png(grey)).tolist() == [[0, 128, 255], [0, 255, 64]]


def test_images_from_the_worst_to_the_best():
    gallery = make_gallery(DATA, {"a": LOG}, count=9)
    assert [exhibit.index for exhibit in gallery.exhibits] == [3, 1, 2, 0, 5]
    assert [exhibit.label for exhibit in gallery.exhibits] == [3, 1, 2, 0, 5]
    said = [(v.outcome, v.prediction, v.radius) for exhibit in gallery.exhibits for v in exhibit.verdicts]
    assert said == [
        *(("wrong", 1, 0.7), ("wrong", 2, 0.1), ("abstains", None, 0.0)),
        *(("right", 0, 0.2), ("right", 5, 0.9)),
    ]
    assert [exhibit.index for exhibit in make_gallery(DATA, {"a": LOG}, count=3).exhibits] == [3, 2, 5]
    assert gallery.notes[0].startswith("The images are evenly spaced in the order of a, from the one that is wrong")
    assert gallery.notes[1].startswith("No noisy images")


def test_noisy_images_are_draws_of_the_noise():
    gallery = make_gallery(DATA, {"a": LOG}, count=2, noise=GaussianNoise(0.25), seed=3)
    expected = DATA.read([3, 5]) + GaussianNoise(0.25).draw_(torch.empty(2, 3, 4, 5), stream(3, "gallery"))
    for exhibit, noisy in zip(gallery.exhibits, expected.numpy(), strict=True):
        assert [picture.kind for picture in exhibit.pictures] == ["clean", "noisy"]
        np.testing.assert_allclose(
            decoded(exhibit.pictures[1].png), 255 * noisy.clip(0, 1).transpose(1, 2, 0), atol=0.51
        )
    assert "sigma 0.25" in gallery.notes[1]


def test_attacked_images(tmp_path):
    images = in_folder(tmp_path)
    records = {"a": {"model": "m", "digest": DATA.digest}, "b": {"model": "other"}}
    gallery = make_gallery(DATA, {"a": LOG, "b": LOG}, attacked=read_attacked(tmp_path), records=records)
    assert [exhibit.index for exhibit in gallery.exhibits] == [3, 0]  # 4 is attacked, but in no log
    for exhibit, row, about in zip(
        gallery.exhibits, (1, 0), ("predicted 0, moved by 0.25 (l2)", "predicted 1, moved by 0.50 (l2)"), strict=True
    ):
        picture = exhibit.pictures[-1]
        assert (picture.kind, picture.about) == ("adversarial", about)
        np.testing.assert_allclose(decoded(picture.png), 255 * images[row].transpose(1, 2, 0), atol=0.51)
        assert [verdict.log for verdict in exhibit.verdicts] == ["a", "b"]
    assert "The attacked images are" in gallery.notes[0]
    assert "SmoothAdvPGD(eps=0.5), against the model of a. Its" in gallery.notes[2]
    assert read_attacked(tmp_path).predictions == {0: 1, 3: 0, 4: -1}
    unknown = make_gallery(DATA, {"b": LOG}, attacked=read_attacked(tmp_path), records=records)
    assert "against a model that is not known to be a log's" in unknown.notes[2]


def test_logs_of_other_images_are_left_out():
    other = replace(LOG, label=LOG.label + 1)
    beyond = replace(LOG, idx=LOG.idx + 4)
    gallery = make_gallery(DATA, {"other": other, "beyond": beyond, "a": LOG}, count=1)
    assert [verdict.log for verdict in gallery.exhibits[0].verdicts] == ["a"]
    assert gallery.notes[-1] == "Of other images, and so left out: other, beyond."
    part = Results(*(getattr(LOG, name)[:2] for name in ("idx", "label", "predict", "radius", "correct", "seconds")))
    gallery = make_gallery(DATA, {"a": LOG, "part": part}, count=5)
    assert [len(exhibit.verdicts) for exhibit in gallery.exhibits] == [1, 2, 1, 2, 1]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="data: expected the data set of the logs, got squares, which none of x is of"):
        make_gallery(DATA, {"x": replace(LOG, label=LOG.label + 1)})
    with pytest.raises(InputError, match="none of x is of"):
        make_gallery(DATA, {"x": LOG}, records={"x": {"digest": "another"}})
    with pytest.raises(InputError, match="none of these logs is of"):
        make_gallery(DATA, {})
    with pytest.raises(InputError, match=r"gallery: expected images of 1 or 3 channels, got shape \(2, 4, 4\)"):
        make_gallery(in_memory("two", np.zeros((6, 2, 4, 4), dtype=np.uint8), np.arange(6)), {"x": LOG})
    with pytest.raises(InputError, match="gallery: expected an integer >= 1, got 0"):
        make_gallery(DATA, {"x": LOG}, count=0)
    in_folder(tmp_path / "a", made_with={"digest": "another", "data": "mnist test"})
    with pytest.raises(InputError, match="attacked: expected an attack on squares, got one on mnist test"):
        make_gallery(DATA, {"x": LOG}, attacked=read_attacked(tmp_path / "a"))
    in_folder(tmp_path / "b", index=(4, 7, 8))
    with pytest.raises(InputError, match="attacked: expected images that are in x, got none of them"):
        make_gallery(DATA, {"x": LOG}, attacked=read_attacked(tmp_path / "b"))
    in_folder(tmp_path / "c", shape=(3, 2, 2))
    with pytest.raises(InputError, match=r"attacked: expected images of shape \(3, 4, 5\), got \(3, 2, 2\)"):
        make_gallery(DATA, {"x": LOG}, attacked=read_attacked(tmp_path / "c"))


def test_folders_that_are_not_of_a_finished_attack(tmp_path):
    with pytest.raises(ResultsError, match=r"finished rs-plugins attack, but it has no adversarial\.npz"):
        read_attacked(tmp_path)
    in_folder(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ResultsError, match=r"evaluation.json: it is damaged, or of another program"):
        read_attacked(tmp_path)
    in_folder(tmp_path, made_with={"alpha": "x"})
    with pytest.raises(ResultsError, match="it is damaged"):
        read_attacked(tmp_path)
    in_folder(tmp_path, l2=np.zeros(2))
    with pytest.raises(ResultsError, match="expected 3 rows, as index has, got l2"):
        read_attacked(tmp_path)
