"""A SmoothedModel as the model: its own noise, once; and normalisation, which is applied after the noise."""

import numpy as np
import pytest
import torch
import torchattacks
from torch import nn

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

REFUSED = "model: a SmoothedModel takes pixels, so normalisation belongs inside its base"


@pytest.mark.parametrize("sigma", [None, 0.7, np.float32(0.7)], ids=repr)
def test_a_smoothed_model_is_attacked_with_its_own_sigma(cnn, x, y, undisturbed, sigma):
    smoothed = SmoothedModel(cnn, 0.7, samples=64, seed=9)
    attack = SmoothAdvPGD(smoothed, samples=5, seed=2, sigma=sigma)
    expected = SmoothAdvPGD(cnn, samples=5, seed=2, sigma=0.7)(x, y)
    with undisturbed(smoothed):
        adversarial = attack(x, y)
    assert attack.model is smoothed
    assert torch.equal(adversarial, expected)


def test_a_smoothed_model_is_attacked_with_its_own_family_and_noise_is_added_once(cnn, x, y, seen):
    class Ones(GaussianNoise):
        def draw_(self, out, generator):
            return out.fill_(self.sigma)

    with seen(cnn) as inputs:
        SmoothAdvPGD(SmoothedModel(cnn, 0.7, family=Ones), eps=0, samples=2, antithetic=False, chunk=8)(x, y)
    assert torch.equal(inputs[0], x[:1])
    torch.testing.assert_close(inputs[1], x.repeat_interleave(2, 0) + 0.7)


def test_another_sigma_is_refused_also_when_the_model_is_replaced(cnn, x, y):
    attack = SmoothAdvPGD(cnn, sigma=0.5)
    attack.set_model(SmoothedModel(cnn, 0.25))
    with pytest.raises(InputError, match=r"sigma: expected 0\.25, which the SmoothedModel brings, or None; got 0\.5"):
        attack(x, y)


def test_the_attack_lowers_what_the_smoothed_model_says(cnn, x, y):
    smoothed = SmoothedModel(cnn, 0.25, samples=200, seed=5).eval()
    adversarial = SmoothAdvPGD(smoothed, eps=1.0)(x, y)
    with torch.no_grad():
        before, after = (smoothed(images)[range(4), y].exp() for images in (x, adversarial))
    assert (after < before - 0.02).all()


def test_normalisation_of_a_smoothed_model_is_refused(cnn, x, y, normalisation):
    mean, std, *_ = normalisation
    with pytest.raises(InputError, match=REFUSED):
        SmoothAdvPGD(SmoothedModel(cnn, 0.25)).set_normalization_used(mean, std)
    attack = SmoothAdvPGD(cnn)
    attack.set_normalization_used(mean, std)
    attack.set_model(SmoothedModel(cnn, 0.25))
    with pytest.raises(InputError, match=REFUSED):
        attack(x, y)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda v: torch.tensor(v).reshape(1, 2, 1, 1)])
def test_noise_is_added_in_pixels_before_normalisation(cnn, x, y, seen, normalisation, kind):
    mean, std, normalise, denormalise = normalisation
    attack = SmoothAdvPGD(cnn, eps=0, sigma=0.5, samples=3, chunk=12)
    with seen(cnn) as inputs:
        attack(x, y)
    pixels = inputs[1]
    attack.set_normalization_used(kind(mean), kind(std))
    with seen(cnn) as inputs:
        back = attack(normalise(x), y)
    torch.testing.assert_close(inputs[1], normalise(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(denormalise(back), x, atol=1e-6, rtol=0)


def test_normalisation_set_in_inference_mode_can_be_differentiated(cnn, x, y, normalisation):
    mean, std, normalise, _ = normalisation
    attack = SmoothAdvPGD(cnn)
    with torch.inference_mode():
        attack.set_normalization_used(mean, std)
    assert not torch.equal(attack(normalise(x), y), normalise(x))


@pytest.mark.parametrize(("mean", "std"), [([0.1, 0.2], [0.5]), ([0.1], [0.0]), ([0.1], [-1.0]), ([np.nan], [1.0])])
def test_impossible_normalisation_is_refused(cnn, mean, std):
    with pytest.raises(InputError, match="mean, std: expected finite values and as many positive ones, got"):
        SmoothAdvPGD(cnn).set_normalization_used(mean, std)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.flatten(1), r"shape \(n, 2, height, width\), as set_normalization_used was given 2 .* \(4, 72\)"),
        (lambda x: x[:, :1], r"shape \(n, 2, height, width\), .* got \(4, 1, 6, 6\)"),
        (lambda x: x.numpy(), r"shape \(n, 2, height, width\), .* got ndarray"),
        (lambda x: x + 9, r"inputs: expected pixels in \[0, 1\], got values from"),
    ],
    ids=["vectors", "one channel", "array", "outside"],
)
def test_inputs_that_cannot_have_been_normalised_are_refused(cnn, x, y, normalisation, spoil, message):
    mean, std, normalise, _ = normalisation
    attack = SmoothAdvPGD(cnn)
    attack.set_normalization_used(mean, std)
    with pytest.raises(InputError, match=message):
        attack(spoil(normalise(x)), y)


class RobModel(nn.Module):
    """Has the name and the attributes by which the host knows a model of MAIR."""

    def __init__(self, inner, mean, std):
        super().__init__()
        self.inner, self.mean, self.std = inner, torch.tensor(mean), torch.tensor(std)

    def forward(self, x):
        return self.inner(x)


def test_the_hosts_hook_for_mair_models_runs_in_our_constructor(cnn, x, y, normalisation):
    mean, std, normalise, _ = normalisation
    attack = SmoothAdvPGD(RobModel(cnn, mean, std))
    plain = SmoothAdvPGD(cnn)
    plain.set_normalization_used(mean, std)
    assert torch.equal(attack(normalise(x), y), plain(normalise(x), y))
    assert torchattacks.PGDL2(RobModel(cnn, mean, std)).normalization_used is not None
