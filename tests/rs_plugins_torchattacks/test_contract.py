"""torchattacks' contract, mode by mode: each call equals the core attack with the right labels, in pixels."""

import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.smoothadv import smooth_adv_ddn, smooth_adv_pgd
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins_torchattacks.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD

SIGMA, SAMPLES = 0.3, 3
LENGTHS = {"float": 0.3, "tensor": torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1, 1)}
ATTACKS = {
    SmoothAdvPGD: lambda length: {"eps": length, "alpha": 0.1},
    SmoothAdvLinfPGD: lambda length: {"eps": length, "alpha": 0.1},
    # rounding pixels would make 1/255 of what is 1e-7 in another order of sums
    SmoothAdvDDN: lambda length: {"max_norm": length, "init_norm": length, "levels": None},
}
CALLS = [
    *((SmoothAdvPGD, context) for context in (torch.enable_grad, torch.no_grad, torch.inference_mode)),
    (SmoothAdvLinfPGD, torch.inference_mode),
    *((SmoothAdvDDN, context) for context in (torch.no_grad, torch.inference_mode)),
]
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


@pytest.mark.parametrize(("kind", "context"), CALLS, ids=lambda part: part.__name__)
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
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
def test_every_call_equals_the_core_attack(
    cnn, mlp, x, y, normalisation, undisturbed, kind, mode, length, layout, normalised, context
):
    mean, std, normalise, denormalise = normalisation
    model = mlp if layout == "vectors" else cnn
    x, y = laid_out(x, y, layout)
    how = ATTACKS[kind](LENGTHS[length])
    attack = kind(model, steps=2, sigma=SIGMA, samples=SAMPLES, **how)
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
    if kind is SmoothAdvDDN:
        assert (attack.success.shape, attack.success.dtype) == (y.shape, torch.bool)
    if layout == "empty":
        return
    assert result.stride() == given.stride()
    found = denormalise(result) if normalised else result
    expected = core_attack(attack, in_pixels, x, goal(in_pixels, mode, x, y), targeted=mode != "default", **how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    slack = 1e-6 if normalised else 0.0
    assert found.min() >= -slack
    assert found.max() <= 1 + slack
    flat = (found - x).flatten(1)
    lengths = flat.abs().amax(dim=1) if kind is SmoothAdvLinfPGD else flat.norm(dim=1)
    assert (lengths <= torch.as_tensor(LENGTHS[length]).flatten() + 1e-6).all()
    assert (lengths > 0.05).all() or kind is SmoothAdvDDN


def core_attack(attack, model, x, labels, *, targeted, **how):
    """What core makes of images in pixels, with the settings under core's names."""
    how |= {"steps": 2, "samples": SAMPLES, "targeted": targeted}
    if isinstance(attack, SmoothAdvDDN):
        expected, success = smooth_adv_ddn(model, x, labels, SIGMA, **how)
        assert torch.equal(attack.success, success)
        return expected
    norm = LINF if isinstance(attack, SmoothAdvLinfPGD) else L2
    return smooth_adv_pgd(model, x, labels, SIGMA, norm=norm, step=how.pop("alpha"), **how)
