"""torchattacks' contract, mode by mode: each call equals the core attack with the right labels, in pixels."""

import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

SIGMA, SAMPLES = 0.3, 3
MODES = {
    "default": lambda attack: None,
    "custom": lambda attack: attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 5, quiet=True),
    "none": lambda attack: attack.set_mode_targeted_by_function(quiet=True),
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(quiet=True),
}


def goal(model, mode, x, y):
    """The labels that a mode means, for ``model`` in pixels."""
    if mode == "custom":
        return (y + 1) % 5
    if mode == "random":
        return SmoothAdvPGD(model).get_random_target_label(x, y)
    if mode == "least likely":
        scores = SmoothedModel(model, SIGMA, samples=SAMPLES).eval()(x)
        return scores.detach().scatter(1, y[:, None], torch.inf).argmin(1)
    return y


def laid_out(x, y, layout):
    if layout == "vectors":
        return x.flatten(1)[:, :7].clone(), y
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last), y
    return (x[:0], y[:0]) if layout == "empty" else (x, y)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("layout", "normalised"),
    [
        ("images", False),
        ("channels last", False),
        ("vectors", False),
        ("empty", False),
        ("images", True),
        ("channels last", True),
        ("empty", True),
    ],
)
@pytest.mark.parametrize("eps", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1, 1)], ids=["float", "tensor"])
@pytest.mark.parametrize("mode", MODES)
def test_every_call_equals_the_core_attack(
    cnn, mlp, x, y, normalisation, undisturbed, mode, eps, layout, normalised, context
):
    mean, std, normalise, denormalise = normalisation
    model = mlp if layout == "vectors" else cnn
    x, y = laid_out(x, y, layout)
    attack = SmoothAdvPGD(model, eps, 0.1, 2, sigma=SIGMA, samples=SAMPLES)
    MODES[mode](attack)
    given, in_pixels = x.clone(memory_format=torch.preserve_format), model
    if normalised:
        attack.set_normalization_used(mean, std)
        given, in_pixels = normalise(x), nn.Sequential(normalise, model)
        x = denormalise(given)  # a round trip moves the last bits
    unchanged = given.clone(), y.clone()

    with undisturbed(model), context():
        result = attack(given, labels=y)

    assert torch.equal(given, unchanged[0])
    assert torch.equal(y, unchanged[1])
    assert not result.requires_grad
    assert (result.shape, result.dtype) == (given.shape, given.dtype)
    if layout == "empty":
        return
    assert result.stride() == given.stride()
    found = denormalise(result) if normalised else result
    labels, targeted = goal(in_pixels, mode, x, y), mode != "default"
    expected = smooth_adv_pgd(
        in_pixels, x, labels, SIGMA, eps=eps, step=0.1, steps=2, samples=SAMPLES, targeted=targeted
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    slack = 1e-6 if normalised else 0.0
    assert found.min() >= -slack
    assert found.max() <= 1 + slack
    lengths = (found - x).flatten(1).norm(dim=1)
    assert (lengths <= torch.as_tensor(eps).flatten() + 1e-6).all()
    assert (lengths > 0.05).all()
