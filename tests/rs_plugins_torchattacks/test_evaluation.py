"""What one pass of a model that draws noise reports about an attack, and what many votes say."""

import math
import re

import pytest
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rs_plugins.core.attacks.evaluation import evaluate_attack
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.loop import train
from rs_plugins.errors import InputError
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

SIGMA = 0.25
IMAGES = 300


class HalfSpace(nn.Module):
    """Class 1 where the pixel exceeds one half: under noise its probability is Φ((x - 1/2) / sigma)."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        z = x.flatten(1) - self.threshold
        return torch.cat([-z, z], dim=1)


def identities(model):
    """Eight attacks that change nothing; an image is kept as soon as one pass is wrong about it."""
    return torchattacks.MultiAttack([torchattacks.VANILA(model) for _ in range(8)])


def test_identity_attacks_succeed_before_one_pass_and_not_before_many_votes():
    """Each pass is right with probability 0.8 and independent, so that eight are with 0.8^8 = 0.17."""
    images = torch.full((IMAGES, 1, 1, 1), 0.5 + SIGMA * 0.8416212)
    labels = torch.ones(IMAGES, dtype=torch.int64)
    model = SmoothedModel(HalfSpace(), SIGMA, samples=1, noise="fresh").eval()
    attack = identities(model)
    loader = DataLoader(TensorDataset(images, labels), batch_size=1)  # a pass draws one noise for all its images
    _, rates, l2, _ = attack.save(loader, verbose=False, return_verbose=True)
    unharmed = 0.8**8
    assert 1 - rates[-1] / 100 == pytest.approx(unharmed, abs=4 * math.sqrt(unharmed * (1 - unharmed) / IMAGES))
    assert l2 == 0
    attacked = attack(images, labels)
    assert torch.equal(attacked, images)
    found = evaluate_attack(model, images, attacked, labels, n=200)
    assert found.success_rate.count == 0
    assert found.clean_accuracy.share == found.robust_accuracy.share == 1


@pytest.mark.slow
def test_the_same_on_digits():
    """The figures in the documentation of `evaluate_attack`."""
    pytest.importorskip("sklearn")
    training, data = open_data_set("digits", split="train"), open_data_set("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    x_train, y_train = training.read(range(len(training))), torch.from_numpy(training.labels)
    train(network, x_train, y_train, gaussian(SIGMA), optimizer=optimizer, epochs=30, batch_size=64)
    images, labels = data.read(range(len(data))), torch.from_numpy(data.labels)
    model = SmoothedModel(network, SIGMA, samples=1, noise="fresh").eval()
    attack = identities(model)
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    _, rates, _, _ = attack.save(loader, verbose=False, return_verbose=True)
    found = evaluate_attack(model, images, attack(images, labels), labels, n=1000)
    assert found.success_rate.count == 0
    assert rates[-1] > 20
    assert found.clean_accuracy.share > 0.9
    assert abs(found.clean_accuracy.share - found.robust_accuracy.share) < 0.02


def test_an_attack_on_a_smoothed_model_is_judged_by_that(cnn, x, y):
    smoothed = SmoothedModel(cnn, SIGMA)
    attack = SmoothAdvPGD(smoothed, eps=1.0)
    attacked = attack(x, y)
    found, expected = (evaluate_attack(of, x, attacked, y, n=200) for of in (attack, smoothed))
    assert found.after.counts.tolist() == expected.after.counts.tolist()
    assert found.after.share.mean() < found.before.share.mean()


def test_an_attack_on_a_plain_model_is_refused(cnn, x, y):
    message = re.escape("got SmoothAdvPGD around a Sequential; wrap the base classifier: SmoothedModel(model, sigma)")
    with pytest.raises(InputError, match=message):
        evaluate_attack(SmoothAdvPGD(cnn, sigma=SIGMA), x, x, y)
