"""Targeted modes: which labels are aimed at, and what of it can be repeated."""

import pytest
import torch

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError
from rs_plugins_torchattacks.attacks import SmoothAdvPGD
from rs_plugins_torchattacks.targets import random_targets

MANY = torch.rand(600, 3, generator=torch.Generator().manual_seed(3))


def uniformly_random(images, classes, **settings):
    labels = torch.arange(len(images)) % classes
    return (random_targets(images, labels, classes, **settings) - labels) % classes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=repr)
@pytest.mark.parametrize("classes", [2, 5])
def test_random_targets_are_uniform_over_the_other_classes(dtype, classes):
    offsets = uniformly_random(MANY.to(dtype), classes, seed=0)
    counts = offsets.bincount(minlength=classes).tolist()
    each = 600 / (classes - 1)
    assert counts[0] == 0
    assert all(abs(count - each) <= 5 * each**0.5 for count in counts[1:])


def test_random_targets_of_binary_images_are_spread_too():
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    counts = uniformly_random(bits.float(), 5, seed=0).bincount(minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 30


def test_random_targets_depend_on_the_seed_and_the_image_and_not_on_its_neighbours():
    labels = torch.arange(600) % 7
    whole = random_targets(MANY, labels, 7, seed=1)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_targets(MANY[order], labels[order], 7, seed=1), whole[order])
    assert torch.equal(random_targets(MANY[:5], labels[:5], 7, seed=1), whole[:5])
    assert not torch.equal(random_targets(MANY, labels, 7, seed=2), whole)


def test_the_memory_format_does_not_change_a_random_target(cnn, x, y):
    attack = SmoothAdvPGD(cnn)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(attack.get_random_target_label(last, y), attack.get_random_target_label(x, y))


@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_without_labels_the_smoothed_prediction_stands_for_them(cnn, x, mode):
    attack = SmoothAdvPGD(cnn, sigma=0.4, samples=7, eps=0.5)
    getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
    predicted = SmoothedModel(cnn, 0.4, samples=7).eval()(x).argmax(1)
    assert torch.equal(attack(x), attack(x, predicted))
    assert (attack.get_target_label(x) != predicted).all()


@pytest.mark.parametrize("kth_min", [1, 2, 4])
def test_least_likely_counts_from_the_bottom_of_the_smoothed_scores(cnn, x, y, kth_min):
    attack = SmoothAdvPGD(cnn, sigma=0.4, samples=7)
    attack.set_mode_targeted_least_likely(kth_min, quiet=True)
    scores = SmoothedModel(cnn, 0.4, samples=7).eval()(x)
    expected = [[c for c in row.argsort() if c != label][kth_min - 1] for row, label in zip(scores, y, strict=True)]
    assert attack.get_target_label(x, y).tolist() == expected


def test_modes_are_named_printed_and_left_as_the_host_does(cnn, x, y, capsys):
    attack = SmoothAdvPGD(cnn)
    untargeted = attack(x, y)
    for call, name in [
        (lambda: attack.set_mode_targeted_by_function(), "targeted(custom)"),
        (lambda: attack.set_mode_targeted_random(), "targeted(random)"),
        (lambda: attack.set_mode_targeted_least_likely(2), "targeted(least-likely)"),
        (lambda: attack.set_mode_targeted_by_label(), "targeted(label)"),
    ]:
        call()
        assert attack.get_mode() == name
        assert f"Attack mode is changed to '{name}'." in capsys.readouterr().out
        assert not torch.equal(attack(x, y), untargeted)
    attack.set_mode_default()
    assert torch.equal(attack(x, y), untargeted)
    attack.supported_mode = ["default"]
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        attack.set_mode_targeted_by_function()


def test_the_target_function_is_called_once_with_pixels_and_labels(cnn, x, y, normalisation):
    mean, std, normalise, denormalise = normalisation
    calls = []

    def record(images, labels):
        calls.append((images, labels))
        return labels.to(torch.int32)

    attack = SmoothAdvPGD(cnn)
    attack.set_normalization_used(mean, std)
    attack.set_mode_targeted_by_function(record, quiet=True)
    attack(normalise(x), y)
    ((images, labels),) = calls
    assert torch.equal(images, denormalise(normalise(x)))
    assert torch.equal(labels, y)


def test_a_target_function_that_works_in_place_cannot_reach_the_callers_tensors(cnn, x, y):
    copies = x.clone(), y.clone()
    attack = SmoothAdvPGD(cnn)
    attack.set_mode_targeted_by_function(lambda images, labels: (images.zero_(), labels.fill_(3))[1], quiet=True)
    attack(x, y)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda x, y: y + 3, r"target labels: expected labels in \[0, 5\), got values from 3 to 7"),
        (lambda x, y: y[:2], r"target labels: expected one label per image, shape \(4,\), got shape \(2,\)"),
        (lambda x, y: y.tolist(), "target labels: expected a tensor of integer labels, got list"),
        (lambda x, y: None, "target labels: expected one integer label per image, got None"),
    ],
    ids=["range", "shape", "list", "none"],
)
def test_impossible_targets_are_refused(cnn, x, y, target, message):
    attack = SmoothAdvPGD(cnn)
    attack.set_mode_targeted_by_function(target, quiet=True)
    with pytest.raises(InputError, match=message):
        attack(x, y)


@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_labels_out_of_range_are_refused_by_name(cnn, x, y, mode):
    attack = SmoothAdvPGD(cnn)
    getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
    with pytest.raises(InputError, match=r"^labels: expected labels in \[0, 5\), got values from 1 to 5"):
        attack(x, y + 1)


def test_kth_min_must_name_another_class(cnn, x, y):
    attack = SmoothAdvPGD(cnn)
    with pytest.raises(InputError, match="kth_min: expected an integer >= 1, got 0"):
        attack.set_mode_targeted_least_likely(0, quiet=True)
    assert attack.get_mode() == "default"
    attack.set_mode_targeted_least_likely(5, quiet=True)
    with pytest.raises(InputError, match="kth_min: expected at most 4, the number of other classes, got 5"):
        attack(x, y)
