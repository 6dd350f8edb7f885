"""Ensembles as the base classifier of a SmoothedClassifier."""

import copy

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod

from rs_plugins.core.certification import certify
from rs_plugins.core.ensembles import ConsensusEnsemble, SoftEnsemble
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import cnn

MAKE = {"soft": SoftEnsemble, "consensus": lambda models: ConsensusEnsemble(models, 2)}


def three():
    """Return three networks that do not always agree."""
    models = [cnn(20), cnn(20), cnn(20)]
    with torch.no_grad():
        for number, model in enumerate(models):
            source = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=source)
    return models


@pytest.mark.parametrize("kind", MAKE)
def test_an_ensemble_is_certified_predicted_and_attacked(kind, x, y):
    models = three()
    classifier = SmoothedClassifier(MAKE[kind](models), 0.1, samples=4)
    _, radii = classifier.certify(x, 300)
    expected = list(certify(MAKE[kind](models), torch.tensor(x), 0.1, plan=FixedBudget(n=300)))
    assert radii.tolist() == [certificate.radius for certificate in expected]
    assert classifier.predict(x).shape == (len(x), 4)
    before = classifier.compute_loss(x, y).mean()
    moved = FastGradientMethod(classifier, eps=0.05).generate(x, y)
    assert classifier.compute_loss(moved, y).mean() > before
    assert np.abs(moved - x).max() <= 0.05 + 1e-6


@pytest.mark.parametrize("kind", MAKE)
def test_fit_trains_every_member(kind, x, y):
    models = three()
    before = copy.deepcopy(models)
    ensemble = MAKE[kind](models)
    classifier = SmoothedClassifier(ensemble, 0.1, optimizer=torch.optim.SGD(ensemble.parameters(), lr=0.1))
    classifier.fit(x, y, batch_size=len(x), nb_epochs=1)
    for old, new in zip(before, models, strict=True):
        assert not torch.equal(old[0].weight, new[0].weight)
