"""What holds of every attack with the settings that it comes with; `test_attack_table.py` has the options."""

import copy
import math
import pickle

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError
from rs_plugins_torchattacks.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD

from .conftest import seeded

ATTACKS = (SmoothAdvPGD, SmoothAdvLinfPGD, SmoothAdvDDN)
every = pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)


def budget(kind, most):
    return {"max_norm" if kind is SmoothAdvDDN else "eps": most}


def lengths(kind, delta):
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if kind is SmoothAdvLinfPGD else flat.norm(dim=1)


SETTINGS = {
    "defaults": (ATTACKS, {}),
    "fixed": ((SmoothAdvPGD, SmoothAdvLinfPGD), {"noise": "fixed", "rule": "projected"}),
    "fresh": ((SmoothAdvDDN,), {"noise": "fresh", "max_norm": 0.5}),
    "confirm": ((SmoothAdvDDN,), {"confirm": 0.1}),
    "stein": (ATTACKS, {"gradient": "stein"}),
    "restarts": ((SmoothAdvPGD, SmoothAdvLinfPGD), {"restarts": 2, "random_start": True}),
    "early stop": ((SmoothAdvPGD, SmoothAdvLinfPGD), {"early_stop": 0.1}),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(kind, how, id=f"{kind.__name__}-{name}")
        for name, (kinds, how) in SETTINGS.items()
        for kind in kinds
    ],
)
def test_64_images_at_once_in_four_parts_or_one_by_one(kind, how):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4)))
    with torch.no_grad():
        model[3].weight.mul_(4)
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = SmoothedModel(model, 0.25).eval()(x).argmax(1)
    attack = kind(model, steps=4, samples=6, sigma=0.25, **how)

    def attacked(size):
        parts = zip(x.split(size), y.split(size), strict=True)
        found = [(attack(images, labels), getattr(attack, "success", labels)) for images, labels in parts]
        return [torch.cat(column) for column in zip(*found, strict=True)]

    whole, claimed = attacked(64)
    assert lengths(kind, whole - x).median() > 0.02
    for size in (16, 1):
        parts, claims = attacked(size)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        assert torch.equal(claims, claimed)


@every
@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    most=st.floats(0, 2),
    binary=st.booleans(),
    levels=st.sampled_from([None, 2, 256]),
)
def test_ball_and_box_hold_for_any_shape(kind, shape, most, binary, levels):
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    images = images.round() if binary else images
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    how = budget(kind, most) | ({"levels": levels} if kind is SmoothAdvDDN else {})
    adversarial = kind(model, samples=2, steps=3, **how)(images, torch.tensor([0, 2]))
    assert adversarial.shape == images.shape
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (lengths(kind, adversarial - images) <= most + 1e-6).all()


@every
def test_binary_images_move_at_both_ends(cnn, x, kind):
    binary = x.round()
    with torch.no_grad():
        y = SmoothedModel(cnn, 0.25, samples=100)(binary).argmax(1)
    moved = kind(cnn, steps=10)(binary, y) != binary
    assert (moved & (binary == 0)).flatten(1).any(dim=1).all()
    assert (moved & (binary == 1)).flatten(1).any(dim=1).all()


@every
def test_no_budget_returns_the_input(cnn, x, y, kind):
    assert torch.equal(kind(cnn, steps=5, **budget(kind, 0))(x, y), x)


@every
def test_a_model_without_slope_moves_to_the_sphere(x, kind):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    with torch.no_grad():
        flat[1].weight.zero_()
        flat[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    inside = 0.4 + 0.2 * x
    how = budget(kind, 0.1) | ({"levels": None} if kind is SmoothAdvDDN else {})  # rounding shortens
    moved = kind(flat, steps=10, samples=2, **how)(inside, torch.zeros(4, dtype=torch.int64)) - inside
    torch.testing.assert_close(lengths(kind, moved), torch.full((4,), 0.1), atol=1e-6, rtol=0)


class Rounding(nn.Module):
    """Sees images in steps of a quarter; what ``spoil`` says about its gradient is none that an attack could use."""

    def __init__(self, linear, spoil):
        super().__init__()
        self.linear, self.spoil = linear, spoil

    def forward(self, x):
        return self.spoil(self.linear((4 * x).round().flatten(1) / 4 - 0.5))


SPOILS = {
    "zero gradient": lambda output: output,
    "no gradient": lambda output: output.detach(),
    "labels alone": lambda output: 8.0 * nn.functional.one_hot(output.argmax(1), 3),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("gradient", ["stein", "centred-stein"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@every
def test_a_model_without_a_gradient_is_attacked_from_its_probabilities(kind, gradient, targeted, spoil):
    linear = seeded(lambda: nn.Linear(16, 3))
    with torch.no_grad():
        linear.weight.mul_(4)
    model = Rounding(linear, SPOILS[spoil])
    x = 0.25 + 0.5 * torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    judge = SmoothedModel(model, 0.25, samples=1000, seed=9).eval()
    with torch.no_grad():
        before = judge(x).exp()
    labels = before.argmin(1) if targeted else before.argmax(1)

    def gain(**how):
        if kind is SmoothAdvDDN:
            how |= {"init_norm": 0.5, "gamma": 0.1}
        attack = kind(
            model,
            steps=8,
            samples=200,
            sigma=0.25,
            seed=3,
            **budget(kind, 0.12 if kind is SmoothAdvLinfPGD else 0.5),
            **how,
        )
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        with torch.no_grad():
            after = judge(attack(x, labels)).exp()
        return (after - before)[range(4), labels]

    gained = gain(gradient=gradient)
    assert (gained > 0.05).all() if targeted else (gained < -0.05).all()
    if spoil == "zero gradient":
        assert gain().abs().mean() < gained.abs().mean() / 2  # a random direction
    else:
        with pytest.raises(ModelError, match="no gradient flows"):
            gain()


MODES = {
    "default": lambda attack: None,
    "custom": lambda attack: attack.set_mode_targeted_by_function(quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(quiet=True),
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
}


@every
@pytest.mark.parametrize("again", [copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack))])
@pytest.mark.parametrize("mode", MODES)
def test_copies_behave_the_same_also_after_use(cnn, x, y, kind, mode, again):
    attack = kind(cnn, steps=3, samples=3, seed=3, **budget(kind, 0.1 * torch.arange(1, 5)))
    attack.set_normalization_used([0.0, 0.0], [1.0, 1.0])
    MODES[mode](attack)
    with torch.inference_mode():
        first = attack(x, y)
    twin = again(attack)
    assert twin.model is not cnn
    if kind is SmoothAdvDDN:
        assert torch.equal(twin.success, attack.success)
    assert torch.equal(twin(x, y), first)


def test_repr_reads_like_the_call_that_makes_it(cnn, x, y):
    attack = SmoothAdvDDN(cnn, steps=5, max_norm=torch.rand(4, 1, 1, 1), samples=3)
    attack(x, y)
    assert repr(attack) == (
        "SmoothAdvDDN(steps=5, gamma=0.05, init_norm=1.0, max_norm=tensor(4, 1, 1, 1), levels=256, sigma=0.25, "
        "samples=3, noise='fixed', antithetic=True, objective='log-mean-softmax', gradient='backprop', confirm=None, "
        "chunk=None, seed=0, attack_mode='default', normalization_used=False)"
    )
    assert repr(SmoothAdvLinfPGD(cnn)).startswith("SmoothAdvLinfPGD(eps=0.03137254901960784, alpha=None, steps=10, ")


GOOD = {"model": nn.Linear(4, 2)}
OF_ALL = {
    "steps": [(0, "an integer >= 1"), (2.5, "an integer >= 1"), (None, "an integer >= 1")],
    "sigma": [(0.0, "a finite number > 0"), ("big", "a finite number > 0"), (math.nan, "a finite number > 0")],
    "samples": [(0, "an integer >= 1"), (2.5, "an integer >= 1")],
    "noise": [("pink", "'fixed' or 'fresh'"), (None, "'fixed' or 'fresh'")],
    "antithetic": [("no", "True or False"), (1, "True or False")],
    "objective": [("margin", "one of 'log-mean-softmax', 'mean-cross-entropy', 'mean-logits'")],
    "gradient": [("finite", "one of 'backprop', 'stein', 'centred-stein'"), (None, "one of 'backprop', ")],
    "chunk": [(0, "an integer >= 1")],
    "seed": [(1.5, "an integer or None"), ("a", "an integer or None")],
}
LENGTH = [
    (-0.5, "finite values >= 0"),
    (math.inf, "finite values >= 0"),
    ("far", "a number or one per image"),
    (torch.tensor([0.1, -0.1]), "finite values >= 0"),
]
OF_PGD = {
    "eps": [*LENGTH, (None, "a number or one per image")],
    "alpha": LENGTH,
    "rule": [("momentum", "one of 'dual-averaging', 'projected'"), (None, "one of 'dual-averaging'")],
    "random_start": [("no", "True or False"), (1, "True or False")],
    "restarts": [(0, "an integer >= 1")],
    "early_stop": [
        (0, r"a number in \(0, 1\)"),
        (1.0, r"a number in \(0, 1\)"),
        (True, r"a number in \(0, 1\)"),
        (1e-30, "at least 1.58e-29, the surest that 10 votes"),
    ],
}
OF_DDN = {
    "gamma": [(0, r"a number in \(0, 1\)"), (1, r"a number in \(0, 1\)")],
    "init_norm": [*LENGTH, (0, "finite values > 0"), (torch.tensor([0.1, 0.0]), "finite values > 0")],
    "max_norm": LENGTH,
    "levels": [(1, "an integer >= 2"), (2.5, "an integer >= 2")],
    "confirm": [
        (0, r"a number in \(0, 1\)"),
        (True, r"a number in \(0, 1\)"),
        (1e-29, "at least 1.59e-28, the surest"),
    ],
}
IMPOSSIBLE = [
    pytest.param(kind, name, value, expected, id=f"{kind.__name__}-{name}={value}")
    for kind in ATTACKS
    for name, values in {**OF_ALL, **(OF_DDN if kind is SmoothAdvDDN else OF_PGD)}.items()
    for value, expected in values
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), IMPOSSIBLE)
def test_impossible_settings_are_refused_at_once_and_at_the_call_before_the_model_is_run(
    cnn, x, y, seen, kind, name, value, expected
):
    with pytest.raises(InputError, match=f"^{name}: expected {expected}.*, got "):
        kind(cnn, **{name: value})
    attack = kind(cnn)
    setattr(attack, name, value)
    for images, labels in ((x, y), (x[:0], y[:0])):
        with seen(cnn) as batches, pytest.raises(InputError, match=f"^{name}: expected {expected}.*, got "):
            attack(images, labels)
        assert not batches


@every
def test_settings_that_do_not_fit_each_other_are_refused(cnn, kind):
    with pytest.raises(InputError, match="samples: expected an integer >= 2, got 1"):
        kind(cnn, gradient="stein", samples=1)
    with pytest.raises(InputError, match="objective: expected 'log-mean-softmax' with gradient='stein', got 'mean-l"):
        kind(cnn, gradient="stein", objective="mean-logits")


@every
def test_multi_attack_and_lgv_run_it_and_restore_the_model(cnn, x, y, undisturbed, kind):
    cnn.train()
    attack = kind(cnn, steps=3, samples=3, **budget(kind, 0.3))
    both = torchattacks.MultiAttack([torchattacks.VANILA(cnn), attack])
    adversarial = both(x, y)
    assert cnn.training
    right = cnn.eval()(x).argmax(1) == y
    assert torch.equal(adversarial[right], attack(x[right], y[right]))
    assert right.any()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    how = {"steps": 3, "samples": 3, **budget(kind, 0.3)}
    with torch.random.fork_rng(), undisturbed(cnn):
        outer = torchattacks.LGV(cnn, loader, epochs=1, nb_models_epoch=1, attack_class=kind, verbose=False, **how)
        found = outer(x, y)
    assert (lengths(kind, found - x) <= 0.3 + 1e-6).all()
    assert not torch.equal(found, x)


def half_space():
    """Two classes on two sides of a plane, at a distance of 0.3 from grey images of 16 pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    weight = torch.full((16,), 1 / 4)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([weight, -weight]))
        model[1].bias.copy_(torch.tensor([0.3 - 2, 2 - 0.3]))
    return model


def test_ddn_says_of_which_images_it_found_something(seen):
    model, x, y = half_space(), torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    attack = SmoothAdvDDN(model, steps=30, max_norm=torch.tensor([0.1, 1.0, 1.0, 0.1]), sigma=0.1)
    assert attack.success is None
    found = attack(x, y)
    assert attack.success.tolist() == [False, True, True, False]
    assert attack.success.dtype == torch.bool
    moved = (found - x).flatten(1).norm(dim=1)
    assert (moved > 0.09).all()  # also where nothing was found
    assert "success" not in repr(attack)
    with seen(model) as batches:
        SmoothAdvDDN(model, steps=1, sigma=0.1)(x[:1], y[:1])
    draws = batches[1] - x[:1]  # batches[0] is the look at the number of classes
    against = torch.stack([(model(image + draws).argmax(1) == 1).sum() for image in found])
    assert torch.equal(against > len(draws) / 2, attack.success)
    assert attack(x[:0], y[:0]).shape == (0, 1, 4, 4)
    assert (attack.success.shape, attack.success.dtype) == ((0,), torch.bool)
    with pytest.raises(InputError):
        attack(x, y[:2])
    assert attack.success is None


def test_success_can_be_changed_also_after_a_call_in_inference_mode(cnn, x, y):
    attack = SmoothAdvDDN(cnn, steps=2)
    with torch.inference_mode():
        attack(x, y)
    attack.success[0] = True
    assert attack.success[0]
