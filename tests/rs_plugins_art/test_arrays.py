import numpy as np
import pytest
import torch
from art.utils import is_probability
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax

from rs_plugins.errors import InputError
from rs_plugins_art.arrays import host_rows, to_classes, to_images, to_targets

HARD = [1, 0, 2]
ROWS = np.eye(3)[HARD]
SOFT = np.array([[0.1, 0.9, 0.0], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])

FORMS = {
    "list": HARD,
    "int64": np.array(HARD),
    "uint8": np.array(HARD, dtype=np.uint8),
    "whole floats": np.array(HARD, dtype=np.float32),
    "column": np.array(HARD)[:, None],
    "float column": np.array(HARD, dtype=np.float64)[:, None],
    "one-hot float64": ROWS,
    "one-hot float32": ROWS.astype(np.float32),
    "one-hot int": ROWS.astype(np.int64),
    "one-hot bool": ROWS.astype(bool),
    "tensor": torch.tensor(HARD),
    "int32 tensor": torch.tensor(HARD, dtype=torch.int32),
    "one-hot tensor": torch.tensor(ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_hard_labels_of_every_form_become_integers(form):
    targets = to_targets(FORMS[form], n=3, classes=3)
    assert targets.dtype == torch.int64
    assert targets.tolist() == HARD


def test_soft_labels_stay_soft_unless_classes_are_asked_for():
    assert torch.equal(to_targets(SOFT.astype(np.float32), n=3, classes=3).float(), torch.tensor(SOFT).float())
    assert to_classes(SOFT, n=3, classes=3).tolist() == [1, 0, 2]


def test_a_batch_without_labels():
    assert to_targets(np.zeros((0,), dtype=int), n=0, classes=3).shape == (0,)
    assert to_targets(np.zeros((0, 3)), n=0, classes=3).shape == (0,)


BAD_LABELS = {
    "too few": ([0, 1], r"y: expected one label per image, shape \(3,\), got shape \(2,\)"),
    "too large": ([0, 1, 3], r"y: expected labels in \[0, 3\), got values from 0 to 3"),
    "negative": ([0, 1, -1], r"y: expected labels in \[0, 3\), got values from -1 to 1"),
    "fractions": ([0.0, 1.0, 0.5], "y: expected a tensor of integer labels, got torch.float64"),
    "columns": (np.eye(4)[:3], r"y: expected labels of shape \(3,\), \(3, 1\) or \(3, 3\), got shape \(3, 4\)"),
    "rows": (np.eye(3)[:2], r"y: expected labels of shape \(3,\), \(3, 1\) or \(3, 3\), got shape \(2, 3\)"),
    "abstention": (np.zeros((3, 3)), "y: expected each row to be one-hot or class probabilities that sum to 1"),
    "all classes": (np.ones((3, 3)), "y: expected each row to be one-hot or class probabilities that sum to 1"),
    "NaN": (np.full((3, 3), np.nan), "y: expected each row to be one-hot or class probabilities that sum to 1"),
    "below zero": (ROWS * 2 - 1 / 3, "y: expected each row to be one-hot or class probabilities that sum to 1"),
    "words": (["a", "b", "c"], "y: expected an array or tensor of numbers, got list"),
    "cube": (np.zeros((3, 1, 1), dtype=int), r"y: expected one label per image, shape \(3,\), got shape \(3, 1, 1\)"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_fit_no_form(case):
    labels, message = BAD_LABELS[case]
    with pytest.raises(InputError, match=message):
        to_targets(labels, n=3, classes=3)


IMAGES = {
    "float32": np.random.default_rng(0).random((2, 3), dtype=np.float32),
    "float64": np.random.default_rng(0).random((2, 3)),
    "float16": np.random.default_rng(0).random((2, 3)).astype(np.float16),
    "backwards": np.random.default_rng(0).random((2, 3))[::-1],
    "list": [[0.5, 0.25, 1.0], [0.0, 0.5, 0.125]],
    "tensor": torch.rand(2, 3),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_every_form_become_the_models_dtype(form):
    images = to_images(IMAGES[form], torch.float32)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), np.asarray(IMAGES[form]), rtol=1e-7)


def test_images_are_read_only_safe_and_never_written_to():
    x = np.random.default_rng(0).random((2, 3), dtype=np.float32)
    x.flags.writeable = False
    before = x.copy()
    to_images(x, torch.float32).zero_()
    assert np.array_equal(x, before)


BAD_IMAGES = {
    "8-bit": (np.zeros((2, 3), np.uint8), "x: expected floating-point pixels in .*, got torch.uint8; divide 8-bit"),
    "boolean": (np.zeros((2, 3), bool), "x: expected floating-point pixels in .*, got torch.bool"),
    "one image": (np.zeros(3), r"x: expected a batch of shape \(n, \*input\), got shape \(3,\)"),
    "NaN": (np.full((2, 3), np.nan), "x: expected finite values, got NaN or infinity"),
    "infinite": (np.full((2, 3), np.inf), "x: expected finite values, got NaN or infinity"),
    "objects": (np.array([[None]]), "x: expected an array or tensor of numbers, got ndarray"),
    "ragged": ([[0.1], [0.1, 0.2]], "x: expected an array or tensor of numbers, got list"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_batch_of_images(case):
    images, message = BAD_IMAGES[case]
    with pytest.raises(InputError, match=message):
        to_images(images, torch.float32)


@settings(max_examples=200)
@given(st.integers(2, 1000).flatmap(lambda k: arrays(np.float32, (3, k), elements=st.floats(-60, 0, width=32))))
def test_host_rows_are_what_every_consumer_in_art_wants(logits):
    log_p = log_softmax(logits.astype(np.float64), axis=1).astype(np.float32)
    rows = host_rows(log_p)
    assert rows.dtype == np.float64
    assert np.array_equal(rows.argmax(1), log_p.argmax(1))
    np.testing.assert_allclose(softmax(rows, axis=1), softmax(log_p.astype(np.float64), axis=1), rtol=1e-9)
    np.testing.assert_allclose(rows - rows[:, :1], log_p.astype(np.float64) - log_p[:, :1], atol=1e-9)
    sums = rows.sum(axis=1)
    near_uniform = (log_p - log_p.mean(axis=1, keepdims=True)).min(axis=1) >= -1 / log_p.shape[1] + 1e-6
    assert ((sums >= 1 - 1.5e-6) & (sums <= 1))[~near_uniform].all()
    assert (sums != 0).all()
    assert not any(is_probability(row) for row in rows)


def test_nearly_uniform_rows_are_the_log_probabilities_themselves():
    log_p = np.log(np.array([[0.26, 0.25, 0.25, 0.24], [0.97, 0.01, 0.01, 0.01]]))
    rows = host_rows(log_p)
    assert np.array_equal(rows[0], log_p[0])
    assert not np.array_equal(rows[1], log_p[1])
