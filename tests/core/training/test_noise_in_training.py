"""Training under another noise than Gaussian."""

import torch

from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.uniform import UniformNoise
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.validation import measured, noisy_accuracy


def test_accuracy_is_measured_under_the_noise_of_the_objective():
    data: DataSet = open_data_set("digits")
    weights = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model[1].weight.data = weights
    uniform = measured(Gaussian(0.4, family=UniformNoise), model, data, 3)
    assert uniform == noisy_accuracy(model, data, UniformNoise(0.4), 3)
    assert uniform != noisy_accuracy(model, data, GaussianNoise(0.4), 3) == measured(Gaussian(0.4), model, data, 3)
