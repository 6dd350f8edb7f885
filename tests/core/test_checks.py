import numpy as np
import pytest
import torch

from rs_plugins.core import checks
from rs_plugins.errors import InputError

GOOD = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [1, 0, "no", None, 1.0])
def test_flags_are_true_or_false(value):
    assert checks.check_flag(np.bool_(True), "x") is True
    with pytest.raises(InputError, match=f"x: expected True or False, got {value!r}"):
        checks.check_flag(value, "x")


def spoiled(value):
    x = GOOD.clone()
    x[1, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD.numpy(), "images: expected a torch.Tensor, got ndarray; use torch.from_numpy"),
        ((GOOD * 255).to(torch.uint8), r"images: expected floating-point pixels in \[0, 1\], got torch.uint8; divide"),
        (GOOD[0], r"images: expected a batch of shape \(n, \*input\), got shape \(3,\)"),
        (spoiled(float("nan")), "images: expected finite values, got NaN or infinity"),
        (spoiled(float("inf")), "images: expected finite values, got NaN or infinity"),
        (spoiled(-0.5), r"images: expected pixels in \[0, 1\], got values from -0.5 to"),
        (spoiled(1.00001), r"images: expected pixels in \[0, 1\], got values from .* to 1.00001; scale to"),
    ],
    ids=["numpy", "integers", "rank", "nan", "inf", "below", "above"],
)
def test_images_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        checks.check_images(x, "images")


@pytest.mark.parametrize(
    "x", [GOOD, spoiled(1 + 5e-7), GOOD[:0], GOOD.half()], ids=["good", "rounded", "empty", "half"]
)
def test_images_are_accepted(x):
    assert checks.check_images(x) is x


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1], "y: expected a tensor of integer labels, got list"),
        (torch.tensor([0.0, 1.0]), "y: expected a tensor of integer labels, got torch.float32"),
        (
            torch.eye(2),
            r"y: expected a tensor of integer labels, got torch.float32; of one-hot labels take y.argmax\(1\)",
        ),
        (torch.tensor([True, False]), "y: expected a tensor of integer labels, got torch.bool"),
        (torch.tensor([0, 1, 2]), r"y: expected one label per image, shape \(2,\), got shape \(3,\)"),
        (torch.tensor([0, 3]), r"y: expected labels in \[0, 3\), got values from 0 to 3"),
        (torch.tensor([-1, 0]), r"y: expected labels in \[0, 3\), got values from -1 to 0"),
    ],
    ids=["list", "float", "one-hot", "bool", "shape", "high", "low"],
)
def test_labels_are_refused(y, message):
    with pytest.raises(InputError, match=message):
        checks.check_labels(y, n=2, classes=3)


@pytest.mark.parametrize("value", [0, -1, 2.5, "3x", "3", None, True, float("nan"), float("inf")], ids=repr)
def test_counts_are_refused(value):
    with pytest.raises(InputError, match="n: expected an integer >= 1, got"):
        checks.check_count(value, "n")


@pytest.mark.parametrize("value", [1, 7, np.int64(3), 4.0], ids=repr)
def test_counts_are_accepted(value):
    assert checks.check_count(value, "n") == value
    assert type(checks.check_count(value, "n")) is int


def test_counts_have_a_largest_value_where_one_is_given():
    assert checks.check_count(5, "k", least=0, most=5) == 5
    with pytest.raises(InputError, match="k: expected an integer from 0 to 5, got 6"):
        checks.check_count(6, "k", least=0, most=5)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "a", None], ids=repr)
def test_numbers_that_may_be_zero(value):
    assert checks.check_nonnegative(0, "slack") == 0.0
    with pytest.raises(InputError, match="slack: expected a finite number >= 0, got"):
        checks.check_nonnegative(value, "slack")


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "a", None], ids=repr)
def test_positive_numbers(value):
    assert checks.check_positive(0.25, "sigma") == 0.25
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got"):
        checks.check_positive(value, "sigma")


@pytest.mark.parametrize("value", [0, 1, 2, -1, float("nan")], ids=repr)
def test_probabilities(value):
    assert checks.check_probability(0.001, "alpha") == 0.001
    with pytest.raises(InputError, match=r"alpha: expected a number in \(0, 1\), got"):
        checks.check_probability(value, "alpha")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1], r"indices: expected one per image \(3\), got 2"),
        ([0, 1, 1], "indices: expected distinct positions"),
        ([0, 1, -1], "indices: expected an integer >= 0, got -1"),
    ],
    ids=["number", "repeated", "negative"],
)
def test_indices(indices, message):
    assert checks.check_indices(None, 3) == [0, 1, 2]
    assert checks.check_indices(np.array([5, 2, 9]), 3) == [5, 2, 9]
    with pytest.raises(InputError, match=message):
        checks.check_indices(indices, 3)


@pytest.mark.parametrize("seed", [1.5, "1", True], ids=repr)
def test_seeds(seed):
    assert checks.check_seed(np.int64(3)) == 3
    with pytest.raises(InputError, match="seed: expected an integer or None, got"):
        checks.check_seed(seed)


@pytest.mark.parametrize("value", [np.zeros(1), np.int64(1), float("inf"), {1, 2}, [object]], ids=repr)
def test_plain_data(value):
    plain = {"name": "x", "numbers": [1, 2.5], "none": None, "more": {"a": True}}
    assert checks.check_plain(plain, "it") == plain
    with pytest.raises(InputError, match="it: expected plain data without infinite numbers, got value="):
        checks.check_plain({**plain, "value": value}, "it")
    with pytest.raises(InputError, match="it: expected plain data without infinite numbers, got 3='x'"):
        checks.check_plain({3: "x"}, "it")


def test_a_number_that_is_too_large_for_any_float():
    with pytest.raises(InputError, match="x: expected a finite number > 0, got 1000"):
        checks.check_positive(10**400, "x")
