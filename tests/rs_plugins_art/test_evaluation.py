"""Our ART classifiers and attacks before `evaluate_attack`."""

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from rs_plugins.core.attacks.evaluation import evaluate_attack
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_art.classifier import SmoothedClassifier


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


X = np.random.default_rng(0).random((5, 1, 4, 4), dtype=np.float32)
Y = np.array([0, 1, 2, 0, 1])


def test_a_classifier_with_labels_as_art_gives_them(network):
    classifier = SmoothedClassifier(network, 0.25, input_shape=(1, 4, 4), nb_classes=3)
    attacked = SmoothAdvPGD(classifier, eps=0.5).generate(X, Y)
    found = evaluate_attack(classifier, X, attacked, np.eye(3, dtype=np.float32)[Y], n=300)
    expected = evaluate_attack(SmoothedModel(network, 0.25), X, attacked, Y, n=300)
    assert found.after.counts.tolist() == expected.after.counts.tolist()
    assert found.after.share.mean() < found.before.share.mean()
    assert found.l2.max() <= 0.5 + 1e-6


def plain(network):
    return PyTorchClassifier(network, loss=nn.CrossEntropyLoss(), input_shape=(1, 4, 4), nb_classes=3)


def test_a_black_box(network):
    found = evaluate_attack(SmoothedBlackBox(plain(network), 0.25), X, X, Y, n=300)
    expected = evaluate_attack(SmoothedModel(network, 0.25), X, X, Y, n=300)
    assert np.abs(found.before.counts - expected.before.counts).max() <= 1  # the box rounds as its batches do


def test_a_plain_classifier_is_refused(network):
    with pytest.raises(InputError, match="got PyTorchClassifier around a Sequential; wrap the base classifier"):
        evaluate_attack(plain(network), X, X, Y)
