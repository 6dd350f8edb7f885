"""The model, the data and the sanity check that the scripts in this folder share."""

import torch
from torch import nn

torch.set_num_threads(1)


def load():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    ).eval()
    images = torch.rand(6, 1, 10, 10)
    return model, images, model(images).argmax(1)


def check(adversarial, images, eps=None):
    adversarial, images = torch.as_tensor(adversarial), torch.as_tensor(images)
    assert adversarial.shape == images.shape, adversarial.shape
    assert 0 <= adversarial.min() and adversarial.max() <= 1
    distance = (adversarial - images).flatten(1).norm(dim=1)
    assert distance.max() > 0, "the attack did nothing"
    assert eps is None or distance.max() <= eps * (1 + 1e-5), distance
    print("mean distance %.4f" % distance.mean())
