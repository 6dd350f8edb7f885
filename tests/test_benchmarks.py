"""What benchmarks compare with is what they say."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("method", "inputs", "backward"),
    [
        ("gaussian", 6, 1),
        ("stability", 12, 2),
        ("smoothadv-pgd", 11 * 4 * 6, 11),
        ("smoothadv-ddn", 12 * 4 * 6, 11),
        ("smoothmix", 6 * 4 * 6, 6),
        ("consistency", 2 * 6, 1),
        ("macer", 16 * 6, 1),
    ],
)
def test_the_floor_of_a_training_step_makes_the_passes_of_the_step_itself(method, inputs, backward, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training_cost = importlib.import_module("training_cost")
    case = training_cost.case(method)
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = case.recipe.optimizer(model)

    with training_cost.passes_of(model.train()) as lean:
        training_cost.floor(model, case, optimizer, *training_cost.made(case, x, y))
    with training_cost.passes_of(model) as own:
        training_cost.ours(model, case, optimizer, x, y, epochs=1, seed=0)

    assert lean == own
    assert sum(each.images for each in own) == inputs
    assert sum(each.backward for each in own) == backward
