"""What must be as before after any call: the model, the normalisation flag, the global generator."""

import pytest
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import RSPluginsWarning
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

from .conftest import BATCHNORM, DROPOUT, Fuse

MODES = {
    "eval": lambda model: model.eval(),
    "train": lambda model: model.train(),
    "frozen batchnorm": lambda model: model.train()[BATCHNORM].eval(),
    "dropout on": lambda model: model.eval()[DROPOUT].train(),
}
USES = {
    "call": lambda attack, x, y: attack(x, y),
    "random": lambda attack, x, y: attack.set_mode_targeted_random(quiet=True) or attack(x, y),
    "least likely": lambda attack, x, y: attack.set_mode_targeted_least_likely(quiet=True) or attack(x, y),
    "random labels": lambda attack, x, y: attack.get_random_target_label(x),
    "output": lambda attack, x, y: attack.get_output_with_eval_nograd(x),
    "save": lambda attack, x, y: attack.save(DataLoader(TensorDataset(x, y), batch_size=3)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_as_before(cnn, x, y, undisturbed, seen, mode, smoothed, use):
    MODES[mode](cnn)
    cnn[0].weight.requires_grad_(False)
    cnn[0].bias.grad = torch.ones(4)
    model = SmoothedModel(cnn, 0.25) if smoothed else cnn
    during = []
    hook = cnn.register_forward_pre_hook(lambda *_: during.append([m.training for m in cnn.modules()]))
    with undisturbed(model):
        USES[use](SmoothAdvPGD(model, steps=2, samples=2), x, y)
    hook.remove()
    assert during
    assert not any(flag for flags in during for flag in flags)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("use", ["call", "save"])
@pytest.mark.parametrize("mode", MODES)
def test_the_model_and_the_normalisation_flag_are_as_before_after_an_exception(
    cnn, x, y, undisturbed, normalisation, mode, use, calls
):
    mean, std, normalise, _ = normalisation
    MODES[mode](cnn)
    model = nn.Sequential(cnn, Fuse(calls))
    attack = SmoothAdvPGD(model, steps=3, chunk=1000)
    attack.set_normalization_used(mean, std)
    with undisturbed(model), pytest.raises(RuntimeError, match="out of memory"):
        USES[use](attack, normalise(x), y)
    model[1].left = 1000
    fresh = SmoothAdvPGD(cnn, steps=3, chunk=1000)
    fresh.set_normalization_used(mean, std)
    assert torch.equal(attack(normalise(x), y), fresh(normalise(x), y))


def test_an_exception_in_a_target_function_leaves_the_model_as_it_was(cnn, x, y, undisturbed):
    attack = SmoothAdvPGD(cnn.train())
    attack.set_mode_targeted_by_function(lambda images, labels: labels.no_such_method(), quiet=True)
    with undisturbed(cnn), pytest.raises(AttributeError, match="no_such_method"):
        attack(x, y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, set()),
        ({"dropout_training": True}, set()),
        ({"model_training": True}, {"model"}),
        ({"model_training": True, "dropout_training": True}, {"model", "dropout"}),
        ({"model_training": True, "batchnorm_training": True}, {"model", "batchnorm"}),
    ],
    ids=["none", "dropout alone", "model", "dropout", "batchnorm"],
)
@pytest.mark.filterwarnings("ignore:batchnorm_training=True.*:rs_plugins.errors.RSPluginsWarning")  # tested below
def test_the_training_flags_hold_during_the_attack_only(cnn, x, y, mode, flags, trained):
    MODES[mode](cnn)
    before = [module.training for module in cnn.modules()]
    statistics = cnn[BATCHNORM].running_mean.clone()
    attack = SmoothAdvPGD(cnn, steps=2, samples=2)
    attack.set_model_training_mode(**flags)
    during = []
    hook = cnn.register_forward_pre_hook(
        lambda *_: during.append({"model": cnn.training, "batchnorm": cnn[1].training, "dropout": cnn[3].training})
    )
    attack(x, y)
    hook.remove()
    assert not any(during[0].values())  # the look at the number of classes
    assert all({name for name, training in flags.items() if training} == trained for flags in during[1:])
    assert [module.training for module in cnn.modules()] == before
    assert torch.equal(cnn[BATCHNORM].running_mean, statistics) == ("batchnorm" not in trained)


def test_training_batchnorm_during_the_attack_warns(cnn):
    attack = SmoothAdvPGD(cnn)
    with pytest.warns(RSPluginsWarning, match="batchnorm_training=True: the attack will change the running statistics"):
        attack.set_model_training_mode(model_training=True, batchnorm_training=True)
    with pytest.warns(RSPluginsWarning, match="batchnorm_training=True has no effect without model_training=True"):
        attack.set_model_training_mode(batchnorm_training=True)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("seed", [0, None])
def test_the_global_generators_are_left_alone(cnn, x, y, seed, use):
    attack = SmoothAdvPGD(cnn, steps=2, samples=2, noise="fresh", seed=seed)
    before = torch.get_rng_state()
    list(DataLoader(TensorDataset(x, y), batch_size=3)) if use == "save" else None  # a loader draws a seed itself
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    USES[use](attack, x, y)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("mode", ["default", "random", "least likely"])
@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_batch_splits_and_order_change_nothing(cnn, x, y, noise, mode):
    attack = SmoothAdvPGD(cnn, samples=4, noise=noise)
    if mode != "default":
        USES[mode](attack, x, y)
    whole = attack(x, y)
    parts = torch.cat([attack(x[:1], y[:1]), attack(x[1:], y[1:])])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attack(x[order], y[order]), whole[order], atol=1e-5, rtol=0)


def test_equal_seeds_repeat_and_the_attackers_seeding_does_not_reach_us(cnn, x, y):
    seeded, unseeded = SmoothAdvPGD(cnn, seed=4), SmoothAdvPGD(cnn, seed=None)
    peer = torchattacks.APGD(cnn, steps=1, seed=0)  # seeds the global generator
    results = []
    with torch.random.fork_rng():
        for _ in range(2):
            peer(x, y)
            results.append((seeded(x, y), unseeded(x, y), torch.rand(1)))
    assert results[0][2] == results[1][2]
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], SmoothAdvPGD(cnn, seed=5)(x, y))
