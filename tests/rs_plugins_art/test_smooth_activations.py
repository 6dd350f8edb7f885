"""Converted models in ART's classifiers: predictions, gradients, attacks."""

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from torch import nn
from torch.nn import functional as F

from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, seeded


class Network(nn.Module):
    def __init__(self, activation=F.relu):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 4, 3), nn.Linear(64, CLASSES)
        self.activation = activation

    def forward(self, x):
        return self.last(self.activation(self.conv(x)).flatten(1))


@pytest.mark.parametrize("mechanism", ["fx", "mode"])
def test_a_smoothed_classifier_of_a_converted_model(mechanism):
    x = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)
    model = smooth_activations(seeded(Network), "silu", SHAPE, mechanism=mechanism).model.eval()
    written = seeded(lambda: Network(F.silu)).eval()
    converted, expected = (SmoothedClassifier(part, 0.25, samples=4) for part in (model, written))
    np.testing.assert_allclose(converted.predict(x), expected.predict(x), atol=1e-5)
    y = np.eye(CLASSES)[[0, 1, 2]]
    np.testing.assert_allclose(converted.loss_gradient(x, y), expected.loss_gradient(x, y), atol=1e-5)
    attacked, wanted = (
        ProjectedGradientDescent(part, eps=0.1, eps_step=0.05, max_iter=2, verbose=False).generate(x, y)
        for part in (converted, expected)
    )
    np.testing.assert_allclose(attacked, wanted, atol=1e-5)
    assert not np.allclose(SmoothedClassifier(seeded(Network), 0.25, samples=4).predict(x), expected.predict(x))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(torch.tensor(x)), model(torch.tensor(x)))
