"""The host's wrappers and the ways in which other people's harnesses call an attack."""

import os
import subprocess
import sys

import pytest
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rs_plugins_torchattacks.attacks import SmoothAdvDDN, SmoothAdvPGD


def loader(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=3)


def test_multi_attack_runs_it_and_keeps_the_root_mode(cnn, x, y):
    cnn.train()
    first, second = SmoothAdvPGD(cnn, eps=0.0), SmoothAdvPGD(cnn, eps=5.0, alpha=1.0)
    both = torchattacks.MultiAttack([first, second])
    adversarial = both(x, y)
    assert cnn.training
    right = cnn.eval()(x).argmax(1) == y
    assert torch.equal(adversarial[~right], x[~right])
    assert torch.equal(adversarial[right], second(x[right], y[right]))
    assert right.any()


def test_multi_attack_passes_normalisation_on(cnn, x, y, normalisation):
    mean, std, normalise, _ = normalisation
    attacks = [SmoothAdvPGD(cnn, eps=0.0), SmoothAdvPGD(cnn, eps=5.0, alpha=1.0)]
    both = torchattacks.MultiAttack(attacks)
    both.set_normalization_used(mean, std)
    alone = SmoothAdvPGD(cnn, eps=5.0, alpha=1.0)
    alone.set_normalization_used(mean, std)
    right = cnn(normalise(x)).argmax(1) == y
    assert right.any()
    torch.testing.assert_close(both(normalise(x), y)[right], alone(normalise(x)[right], y[right]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", [None, "random", "least_likely"])
def test_lgv_runs_it_and_leaves_the_model_alone(cnn, x, y, undisturbed, mode):
    with torch.random.fork_rng():
        outer = torchattacks.LGV(
            cnn, loader(x, y), epochs=1, nb_models_epoch=1, attack_class=SmoothAdvPGD, verbose=False, eps=0.5, samples=2
        )
        if mode == "random":  # the two targeted modes that LGV passes on
            outer.set_mode_targeted_random(quiet=True)
        if mode == "least_likely":
            outer.set_mode_targeted_least_likely(quiet=True)
        with undisturbed(cnn):
            adversarial = outer(x, y)
    lengths = (adversarial - x).flatten(1).norm(dim=1)
    assert (lengths <= 0.5 + 1e-6).all()
    assert (lengths > 0.1).all()


@pytest.mark.parametrize("normalised", [False, True], ids=["pixels", "normalised"])
@pytest.mark.parametrize("save_type", ["float", "int"])
def test_save_and_load(cnn, x, y, tmp_path, normalisation, normalised, save_type, capsys):
    mean, std, normalise, denormalise = normalisation
    attack = SmoothAdvPGD(cnn, eps=0.5)
    if normalised:
        attack.set_normalization_used(mean, std)
    given = normalise(x) if normalised else x
    path = tmp_path / "adversarial.pt"
    options = {"return_verbose": True, "save_predictions": True, "save_clean_inputs": True, "save_type": save_type}
    accuracy, l2, seconds = attack.save(loader(given, y), str(path), **options)
    found = next(iter(SmoothAdvPGD.load(str(path), load_predictions=True, load_clean_inputs=True)))
    assert "Robust accuracy" in capsys.readouterr().out
    adversarial, labels, predictions, clean = found
    expected = attack(given, y)
    pixels = denormalise(expected) if normalised else expected
    grain = 1 / 255 if save_type == "int" else 1e-6  # the host truncates to 8 bits
    torch.testing.assert_close(adversarial, pixels, atol=grain, rtol=0)
    torch.testing.assert_close(clean, x, atol=grain, rtol=0)
    assert torch.equal(labels, y)
    assert torch.equal(predictions, cnn(expected).argmax(1))
    assert accuracy == 100 * (predictions == y).float().mean()
    assert l2 > 0
    assert seconds > 0


def separator():
    """Two classes on two sides of a plane; under noise the smoothed classifier has the same plane."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    weight = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 2.0, -0.5, 1.0])
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([weight, -weight]))
        model[1].bias.copy_(torch.tensor([-0.7, 0.7]))
    return model, weight


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("batched", [False, True], ids=["float eps", "tensor eps"])
def test_a_search_for_the_smallest_budget_finds_the_distance_to_the_plane(batched, targeted):
    """Bisection that assigns ``attack.eps`` between calls, as AttackBench does, with the exact answer at hand."""
    model, weight = separator()
    x = 0.35 + 0.3 * torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    distance = (logits[:, 0].abs() / weight.norm()).tolist()

    attack = SmoothAdvPGD(model=model, eps=1.0, alpha=0.1, steps=10, sigma=0.5, samples=8)
    labels = y
    if targeted:
        attack.set_mode_targeted_by_function(quiet=True)
        labels = 1 - y

    def wrong(images, goal, truth, eps):
        attack.eps = eps
        with torch.no_grad():
            return attack.model(attack(images, labels=goal)).argmax(1) != truth

    low, high = torch.zeros(6), torch.full((6,), 1.0)
    for _ in range(9):
        eps = (low + high) / 2
        if batched:
            success = wrong(x, labels, y, eps.reshape(6, 1, 1, 1))
        else:
            success = torch.cat([wrong(x[[i]], labels[[i]], y[[i]], eps[i].item()) for i in range(6)])
        low, high = torch.where(success, low, eps), torch.where(success, eps, high)

    assert high.tolist() == pytest.approx(distance, abs=2 / 2**9)
    assert min(distance) > 0.01


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn_finds_the_distance_to_the_plane_in_one_call(targeted):
    """The votes of antithetic draws are tied on the plane itself."""
    model, weight = separator()
    x = 0.35 + 0.3 * torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    attack = SmoothAdvDDN(
        model=model, steps=200, gamma=0.02, init_norm=0.2, levels=None, sigma=0.1, samples=200, antithetic=True
    )
    labels = y
    if targeted:
        attack.set_mode_targeted_by_function(quiet=True)
        labels = 1 - y
    found = attack(x, labels=labels)
    assert attack.success.all()
    distance = (logits[:, 0].abs() / weight.norm()).tolist()
    assert (found - x).flatten(1).norm(dim=1).tolist() == pytest.approx(distance, abs=0.005)


@pytest.mark.slow
@pytest.mark.skipif(
    "TORCHATTACKS_CHECKOUT" not in os.environ,
    reason="TORCHATTACKS_CHECKOUT must name a git checkout of torchattacks; its tests need robustbench and CIFAR-10",
)
def test_the_hosts_own_unmodified_test_passes_with_our_name_in_it():
    command = [sys.executable, "-m", "pytest", "-p", "rs_plugins.pytest_plugin", "-k", "SmoothAdv"]
    done = subprocess.run(
        [*command, "code_coverage/test_atks.py"],
        cwd=os.environ["TORCHATTACKS_CHECKOUT"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
