"""What benchmarks compare with is what they say."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from rs_plugins.core.training.gaussian import gaussian

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


def test_training_within_a_budget_sees_its_images_and_ends_with_a_learning_rate_of_0(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    budgeted = importlib.import_module("budgeted_training")
    x, y = torch.rand(300, 3, 4, 4), torch.arange(300) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    rates = []
    monkeypatch.setattr(budgeted, "_set", lambda optimizer, lr: rates.append(lr))
    budget = budgeted.Budget(1000, "images")
    spent = budgeted.train_within(budget, model, x, y, gaussian(0.1), adam=False, lr=0.5)
    assert 1000 <= spent.images < 1000 + budgeted.BATCH_SIZE
    assert (rates[0], max(rates)) == (0.0, pytest.approx(0.5, rel=0.05))
    assert rates[-1] < 0.05
    assert [budgeted.learning_rate(share) for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    seconds = budgeted.Budget(0.2, "seconds")
    assert budgeted.train_within(seconds, model, x, y, gaussian(0.1), adam=True, lr=0.01).seconds >= 0.2


@pytest.mark.parametrize(("way", "trained"), [("image", 273_946), ("feature", 4_906), ("denoised-mse", 38_880)])
def test_the_ways_to_a_certified_classifier_train_what_they_say_and_begin_as_the_clean_one(way, trained, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    methods = importlib.import_module("adapter_methods")
    if not methods.MODELS.is_dir():
        pytest.skip("the pretrained networks are not beside the project")
    model, clean = methods.WAYS[way].make("resnet20").eval(), methods.clean_trained("resnet20")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), clean(x))
