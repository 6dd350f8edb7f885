"""What a certifying adapter is for: a network trained on clean MNIST, certified with it and without."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.training.gaussian import gaussian, plain
from rs_plugins.core.training.loop import train

MNIST = Path(os.environ.get("RS_PLUGINS_DATA", Path(__file__).parents[4] / "shared" / "data")) / "MNIST"
SIGMA = 0.5


def certified(model, x, y):
    """Return certified accuracy at 0.5 and 0.75, in percent."""
    certificates = list(certify(model.eval(), x, SIGMA, plan=FixedBudget(n=1000)))
    right = np.array([c.radius if c.prediction == label else -1 for c, label in zip(certificates, y, strict=True)])
    return [100 * float((right >= radius).mean()) for radius in (0.5, 0.75)]


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not beside the project")
@pytest.mark.parametrize("size", ["tiny", "copy"])
def test_certified_accuracy_of_a_clean_network_rises(size):
    data, test = open_data_set(f"mnist:{MNIST}", split="train"), open_data_set(f"mnist:{MNIST}")
    x, y = data.read(range(12_000)), torch.from_numpy(data.labels[:12_000]).long()
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    clean = nn.Sequential(*layers, nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10))
    how = {"epochs": 3, "batch_size": 128}
    train(clean, x, y, plain, optimizer=torch.optim.Adam(clean.parameters(), 1e-3), **how)
    adapted = adapt(clean, (1, 28, 28), AdapterDesign(size=size))
    train(adapted, x, y, gaussian(SIGMA), optimizer=torch.optim.Adam(adapted.trainable_parameters(), 1e-3), **how)
    unseen = test.read(range(200)), test.labels[:200]
    before, after = certified(clean, *unseen), certified(adapted, *unseen)
    assert all(late >= early + 5 for early, late in zip(before, after, strict=True)), (before, after)
