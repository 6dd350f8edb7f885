"""Smooth adversarial training through ART's contract: each step is core's, ART's words mean what they mean there."""

import copy
import inspect

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    FastGradientMethod,
    MomentumIterativeMethod,
    ProjectedGradientDescent,
)
from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
    ProjectedGradientDescentPyTorch,
)
from art.data_generators import NumpyDataGenerator
from art.defences.preprocessor import SpatialSmoothing
from art.defences.trainer import (
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
    Trainer,
)
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn

import rs_plugins
from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.smooth_backward import ReLUWithSmoothBackward
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.sat import Sat
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.classifier import SmoothedClassifier
from rs_plugins_art.sat_trainer import AdversarialEpoch, SATTrainer

from .conftest import CLASSES, SHAPE, Recorder, cnn, seeded
from .test_bounds_classifier import Steps, state

EPS = 0.05
# Words at values that are not the defaults, and the objective that they make
CASES = {
    "defaults": ({}, Sat(4 / 255)),
    "a longer attack": ({"eps": EPS, "eps_step": 0.02, "max_iter": 3}, Sat(EPS, steps=3, step=0.02)),
    "from the image": ({"num_random_init": 0, "max_iter": 2}, Sat(4 / 255, steps=2, clean_start=1.0)),
    "one start": ({"num_random_init": 1, "clean_start": 0.6}, Sat(4 / 255, clean_start=0.6)),
    "l2": (
        {"norm": 2, "eps": 1.5, "max_iter": 2, "eps_step": 1.2, "label_smoothing": 0.0},
        Sat(1.5, norm="l2", steps=2, step=1.2, label_smoothing=0.0),
    ),
    "by our names": ({"norm": "l2", "eps": 0.5, "use_amp": False}, Sat(0.5, norm="l2")),
    "by ART's names": ({"norm": np.inf, "label_smoothing": 0.3}, Sat(4 / 255, label_smoothing=0.3)),
}


def network(activation=nn.SiLU):
    """A network for images (n, 2, 6, 6), of four classes, with batch normalisation."""
    layers = nn.Conv2d, nn.BatchNorm2d, activation, nn.Flatten, nn.Linear
    arguments = (2, 4, 3), (4,), (), (), (64, CLASSES)
    return seeded(lambda: nn.Sequential(*(make(*how) for make, how in zip(layers, arguments, strict=True)))).eval()


def plain(model=None, lr=0.1, **settings):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    settings = {"optimizer": optimizer, "clip_values": (0, 1), "device_type": "cpu"} | settings
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, **settings)


def pgd(classifier, **how):
    return ProjectedGradientDescent(classifier, **{"eps": EPS, "eps_step": 0.02, "max_iter": 3, "verbose": False} | how)


def weights(classifier):
    return torch.cat([parameter.detach().flatten() for parameter in classifier.model.parameters()])


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_words_reach_the_objective(case):
    words, objective = CASES[case]
    assert SATTrainer(plain(), **words).objective == objective


@pytest.mark.parametrize("kind", [ProjectedGradientDescent, ProjectedGradientDescentPyTorch])
def test_an_attack_of_art_brings_its_settings(kind):
    classifier = plain()
    attack = kind(classifier, norm="inf", eps=EPS, eps_step=0.02, max_iter=3, num_random_init=1, verbose=False)
    assert SATTrainer(classifier, attack=attack).objective == Sat(EPS, steps=3, step=0.02)
    same = {"eps": EPS, "eps_step": 0.02, "max_iter": 3, "num_random_init": 1, "norm": np.inf}
    trainer = SATTrainer(classifier, attack=attack, clean_start=0.5, **same)
    assert trainer.objective == Sat(EPS, steps=3, step=0.02, clean_start=0.5)
    with pytest.raises(InputError, match=r"max_iter: expected 3, which the attack brings, got 4"):
        SATTrainer(classifier, attack=attack, max_iter=4)
    with pytest.raises(InputError, match=r"norm: expected inf, which the attack brings, got l2"):
        SATTrainer(classifier, attack=attack, norm="l2")
    plainly = SATTrainer(classifier, attack=attack)
    attack.set_params(norm=2, eps=1.5, eps_step=0.5, max_iter=4, num_random_init=0)
    assert plainly.objective == Sat(1.5, norm="l2", steps=4, step=0.5, clean_start=1.0)


def test_arts_words_come_in_its_order():
    def names(call):
        parameters = inspect.signature(call).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert names(SATTrainer) == names(AdversarialTrainerMadryPGD)
    assert names(SATTrainer.fit) == names(AdversarialTrainerTRADESPyTorch.fit)
    for theirs in (AdversarialTrainerMadryPGD, AdversarialTrainerFBFPyTorch):
        assert names(SATTrainer.fit)[:-1] == names(theirs.fit)
    assert names(SATTrainer.fit_generator) == names(AdversarialTrainerTRADESPyTorch.fit_generator)
    offered = set(inspect.signature(SATTrainer).parameters)
    for theirs, lacking in ((AdversarialTrainerFBFPyTorch, set()), (AdversarialTrainerTRADESPyTorch, {"beta"})):
        assert set(inspect.signature(theirs).parameters) - offered == lacking
    documented = inspect.getdoc(SATTrainer)
    assert all(f"\n    {name}: " in documented for name in offered)
    assert rs_plugins.SATTrainer is SATTrainer


WRONG = {
    "eps": ({"eps": 0}, "eps: expected a finite number > 0, got 0"),
    "eps of 255": ({"eps": 8}, "eps: expected a radius in pixels of .* got 8.0; divide by 255"),
    "step": ({"eps_step": -1}, "eps_step: expected a finite number > 0, got -1"),
    "step of 255": ({"eps_step": 2}, r"eps_step: expected a length in pixels of \[0, 1\], got 2; divide by 255"),
    "steps": ({"max_iter": 0}, "max_iter: expected an integer >= 1, got 0"),
    "starts": ({"num_random_init": 2}, "num_random_init: expected 0 or 1, got 2; there is one start"),
    "no starts": ({"num_random_init": -1}, "num_random_init: expected an integer >= 0, got -1"),
    "two words": (
        {"num_random_init": 0, "clean_start": 0.2},
        "clean_start: expected None or 1 with num_random_init=0, got 0.2",
    ),
    "clean start": ({"clean_start": 1.5}, r"clean_start: expected a share in \[0, 1\], got 1.5"),
    "labels": ({"label_smoothing": -0.1}, "label_smoothing: expected a finite number >= 0, got -0.1"),
    "norm": ({"norm": 1}, "norm: expected one of 'linf', 'l2', got 1"),
    "l2 without eps": ({"norm": "l2"}, "eps: needed in l2"),
    "amp": ({"use_amp": True}, "use_amp: expected False; give a model"),
    "epochs": ({"nb_epochs": -1}, "nb_epochs: expected an integer >= 0, got -1"),
    "batch": ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
    "parts": ({"parts": 0}, "parts: expected an integer >= 1, got 0"),
    "seed": ({"seed": "a"}, "seed: expected an integer or None, got 'a'"),
    "attack": ({"attack": "pgd"}, "attack: expected ART's ProjectedGradientDescent or None, got str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_settings(case):
    words, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        SATTrainer(plain(), **words)


def test_attacks_that_are_others():
    classifier = plain()
    expected = "attack: expected ART's ProjectedGradientDescent or None, got "
    for kind in (FastGradientMethod, AutoProjectedGradientDescent, MomentumIterativeMethod):
        attack = kind(classifier, eps=EPS, eps_step=0.02)
        with pytest.raises(InputError, match=f"{expected}{kind.__name__}"):
            SATTrainer(classifier, attack=attack)
    with pytest.raises(InputError, match="attack: expected one on the classifier that is trained"):
        SATTrainer(plain(), attack=pgd(classifier))
    for name in ("targeted", "random_eps"):
        with pytest.raises(InputError, match=f"attack: expected one with {name}=False, got {name}=True"):
            SATTrainer(classifier, attack=pgd(classifier, **{name: True}))
    attack = pgd(classifier, eps=np.full(5, EPS), eps_step=np.full(5, 0.02))
    with pytest.raises(InputError, match="attack: expected one with the same eps for all images, got an array"):
        SATTrainer(classifier, attack=attack)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["words", "attack", "bounds"])
@pytest.mark.parametrize("case", ["defaults", "a longer attack", "l2"])
def test_a_step_is_that_of_cores_loop(case, by, x, y):
    words, objective = CASES[case]
    model = network()
    twin = copy.deepcopy(model)
    rates = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    if by == "bounds":
        optimizer = torch.optim.SGD(model.parameters(), **rates)
        trainer = SATTrainer(BoundsClassifier(model, input_shape=SHAPE, optimizer=optimizer, seed=3), parts=2, **words)
    else:
        classifier = plain(model, lr=0.05)
        if by == "attack":
            attack = pgd(
                classifier,
                norm={"linf": "inf", "l2": 2}[objective.norm],
                eps=objective.eps,
                eps_step=objective.step or objective.eps,
                max_iter=objective.steps,
                num_random_init=1,
            )
            words = {"attack": attack, "label_smoothing": objective.label_smoothing}
        trainer = SATTrainer(classifier, parts=2, seed=3, **words)
    trainer.fit(x, np.eye(CLASSES)[y], batch_size=4, nb_epochs=3, drop_last=True)
    losses = train(
        twin,
        torch.tensor(x),
        torch.tensor(y),
        objective,
        optimizer=torch.optim.SGD(twin.parameters(), **rates),
        epochs=3,
        seed=stream(3, "fit", 1).initial_seed(),
        batch_size=4,
        parts=2,
        drop_last=True,
    )
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not torch.equal(weights(trainer.classifier), weights(plain()))
    assert trainer.history == [AdversarialEpoch(*row) for row in zip(range(3), losses, strict=True)]


def test_the_hosts_contract(x, y):
    classifier = plain()
    trainer = SATTrainer(classifier, 2, 2, EPS, 0.02, 2, 1)
    assert isinstance(trainer, Trainer)
    assert trainer.classifier is trainer.get_classifier() is classifier
    before, scheduler = weights(classifier), Steps()
    x.setflags(write=False)
    assert trainer.fit(x, y, scheduler=scheduler) is None
    assert (len(trainer.history), scheduler.count) == (2, 2)
    assert trainer.fit(x, np.eye(CLASSES)[y], (x, y), 3, 1, scheduler) is None
    generator = NumpyDataGenerator(x, y, batch_size=5)
    assert trainer.fit_generator(generator, 3, scheduler) is None
    assert trainer.fit_generator(generator, validation_data=(x, y), first_epoch=4) is None
    assert (len(trainer.history), scheduler.count) == (8, 6)
    assert [epoch.number for epoch in trainer.history] == [0, 1, 0, 0, 1, 2, 4, 5]
    assert not torch.equal(weights(classifier), before)
    assert np.array_equal(trainer.predict(x, batch_size=2), classifier.predict(x, 2))
    assert trainer.fit(x, y, nb_epochs=0) is None
    for call in (trainer.fit, trainer.fit_generator):
        with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
            call(x, y, epochs=1)


def test_the_epochs_and_the_batches_are_the_trainers_unless_fit_is_told(x, y):
    for words, how, batches in (
        ({"nb_epochs": 2, "batch_size": 3}, {}, [3, 2] * 2),
        ({"nb_epochs": 2, "batch_size": 3}, {"nb_epochs": 1, "batch_size": 5}, [5]),
        ({"nb_epochs": 1}, {}, [5]),
        ({"nb_epochs": 1}, {"batch_size": 3, "drop_last": True}, [3]),
    ):
        recorder = Recorder(network())
        trainer = SATTrainer(plain(recorder), **words)
        recorder.batches = []
        trainer.fit(x, y, **how)
        assert [len(batch) for batch in recorder.batches[1::2]] == batches  # each attack step before an update


def test_validation_is_written_down_and_changes_nothing(x, y):
    with_it, without = (SATTrainer(plain(), batch_size=2, eps=0.02) for _ in range(2))
    with_it.fit(x, y, nb_epochs=2, validation_data=(x, np.eye(CLASSES)[y]))
    without.fit(x, y, nb_epochs=2)
    assert [epoch[:2] for epoch in with_it.history] == [epoch[:2] for epoch in without.history]
    assert without.history[-1][2:] == (None, None)
    classifier = with_it.classifier
    clean = (classifier.predict(x).argmax(1) == y).mean()
    attack = ProjectedGradientDescent(classifier, eps=0.02, eps_step=0.005, max_iter=10, verbose=False)
    robust = (classifier.predict(attack.generate(x, y)).argmax(1) == y).mean()
    assert with_it.history[-1][2:] == (clean, robust)
    assert clean > 0.5


def test_starts_and_order_go_by_the_seed_and_go_on(x, y):
    def runs(seed):
        recorder = Recorder(network())
        trainer = SATTrainer(plain(recorder, lr=0.0), clean_start=0.0, seed=seed)
        recorder.batches = []
        for _ in range(2):
            trainer.fit(x, y, nb_epochs=1)
        return recorder.batches[0], recorder.batches[2]

    first, same, zero, default, other = (runs(seed) for seed in (3, 3, 0, None, 4))
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert torch.equal(zero[0], default[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


# ---- what the attack sees, and what stays as it was ----------------------------------------------------------------


def test_batch_statistics_are_those_of_the_updates_alone(x, y):
    model = network()
    seen = []
    model[1].register_forward_pre_hook(
        lambda part, inputs: seen.append((part.training, int(part.num_batches_tracked), inputs[0].detach()))
    )
    trainer = SATTrainer(plain(model, lr=0.0, optimizer=torch.optim.SGD(model.parameters(), 0.0)), max_iter=3)
    seen.clear()
    trainer.fit(x, y, nb_epochs=2)
    assert [training for training, _, _ in seen] == [False, False, False, True] * 2
    assert [tracked for _, tracked, _ in seen] == [0] * 4 + [1] * 4
    mean = torch.zeros(4)
    for _, _, values in seen[3::4]:
        mean = 0.9 * mean + 0.1 * values.mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean)


def test_batch_statistics_that_are_there_stay_if_wanted(x, y):
    model = network()
    SATTrainer(plain(model)).fit(x, y, nb_epochs=1, training_mode=False)
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(model[1].running_var, torch.ones(4))


def test_one_step_goes_as_far_as_eps(x, y):
    recorder = Recorder(network())
    x = 0.25 + x / 2
    classifier = plain(recorder)
    trainer = SATTrainer(classifier, eps=EPS, num_random_init=0, eps_step=EPS / 10)
    before = copy.deepcopy(recorder.network)
    recorder.batches = []
    trainer.fit(x, y, nb_epochs=1)
    start, end = recorder.batches
    assert (end - start).abs().flatten() == pytest.approx(EPS, rel=1e-5)
    found = [int((torch.tensor(x) - image).flatten(1).norm(dim=1).argmin()) for image in start]
    assert sorted(found) == list(range(5))
    images = torch.tensor(x)[found].requires_grad_()
    nn.functional.cross_entropy(before(images), torch.tensor(y)[found]).backward()
    torch.testing.assert_close(end, images.detach() + EPS * images.grad.sign())


@pytest.mark.parametrize("call", ["fit", "fit_generator"])
def test_frozen_layers_stay_frozen(call, x, y):
    model = network()
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = SATTrainer(plain(model), max_iter=2)
    data = (x, y) if call == "fit" else (NumpyDataGenerator(x, y, batch_size=5),)
    getattr(trainer, call)(*data, nb_epochs=3, training_mode=False)
    after = model.state_dict()
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["4.weight", "4.bias"]
    assert not any(value.requires_grad for layer in (model[0], model[1]) for value in layer.parameters())


def test_state_is_left_as_it_was_also_after_an_exception(x, y):
    model = network().train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    classifier, before, random = plain(model), state(model), torch.random.get_rng_state()
    trainer = SATTrainer(classifier, max_iter=2)

    class Stop(Exception):
        def step(self):
            raise self

    trainer.fit(x, y, nb_epochs=1, validation_data=(x, y))
    with pytest.raises(Stop):
        trainer.fit(x, y, nb_epochs=2, scheduler=Stop(), validation_data=(x, y))
    modes, gradients = state(model)
    assert modes == before[0]
    assert all(now[0] == then[0] and now[1] is then[1] for now, then in zip(gradients, before[1], strict=True))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert len(trainer.history) == 1


def test_a_plain_classifier_is_followed(x, y):
    classifier = plain()
    trainer = SATTrainer(classifier)
    before = weights(classifier)
    classifier.set_params(optimizer=torch.optim.SGD(classifier.model.parameters(), lr=0.0))
    trainer.fit(x, y, nb_epochs=1)
    assert torch.equal(weights(classifier), before)
    classifier.set_params(preprocessing_defences=[SpatialSmoothing()])
    with pytest.raises(InputError, match="preprocessing_defences: expected None"):
        trainer.fit(x, y)


def test_classifiers_that_cannot_be_trained(x, y):
    with pytest.raises(InputError, match="classifier: expected a PyTorchClassifier, got Sequential"):
        SATTrainer(network())
    with pytest.raises(InputError, match=r"preprocessing: expected the identity.* put normalisation inside the model"):
        SATTrainer(plain(preprocessing=(0.5, 0.5)))
    with pytest.raises(InputError, match=r"clip_values: expected \(0, 1\) or None, got .*255"):
        SATTrainer(plain(clip_values=(0, 255)))
    assert SATTrainer(plain(clip_values=None)).objective == Sat(4 / 255)
    stock = (nn.CrossEntropyLoss(), SHAPE, CLASSES)
    for noisy in (
        SmoothedClassifier(cnn(), 0.25, input_shape=SHAPE),
        PyTorchRandomizedSmoothing(cnn(), *stock, device_type="cpu", scale=0.25),
        PyTorchClassifier(SmoothedModel(cnn(), 0.25), *stock),
    ):
        with pytest.raises(InputError, match=f"classifier: expected one without noise, got {type(noisy).__name__}"):
            SATTrainer(noisy)
    with pytest.raises(InputError, match="seed: expected 0, which the classifier brings, got 1"):
        SATTrainer(BoundsClassifier(network()), seed=1)
    for trainer in (SATTrainer(plain(optimizer=None)), SATTrainer(BoundsClassifier(network()))):
        with pytest.raises(InputError, match="optimizer: needed for training"):
            trainer.fit(x, y)
    other = torch.optim.SGD(network().parameters(), lr=0.1)  # of the network before it was converted, say
    with pytest.raises(InputError, match="optimizer: expected one over the model's parameters"):
        SATTrainer(plain(optimizer=other))


def test_impossible_data(x, y):
    trainer = SATTrainer(plain())
    with pytest.raises(InputError, match=r"y: expected .*integer labels"):
        trainer.fit(x, np.full((5, CLASSES), 0.25))
    with pytest.raises(InputError, match=r"x: expected pixels in \[0, 1\]"):
        trainer.fit(255 * x, y)
    with pytest.raises(InputError, match="validation_data: expected a pair of images and labels, got tuple"):
        trainer.fit(x, y, validation_data=(x, y, x))
    for wrong in ({"batch_size": 0}, {"nb_epochs": -1}, {"first_epoch": -1}):
        (name,) = wrong
        with pytest.raises(InputError, match=f"{name}: expected an integer >= "):
            trainer.fit(x, y, **wrong)
    with pytest.raises(InputError, match=r"generator\.size: expected an integer >= 1, got None"):
        trainer.fit_generator(object())
    assert trainer.history == []


class Stuck(nn.Module):
    """Lets no gradient through."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(72, CLASSES)

    def forward(self, x):
        return self.last(x.detach().flatten(1))


def test_a_model_without_gradients_is_named(x, y):
    with pytest.raises(ModelError, match="no gradient flows"):
        SATTrainer(plain(Stuck())).fit(x, y)


# ---- smooth activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["attack_grad", "update_grad", "both_grads"])
def test_gradients_alone_may_be_smooth(where, x, y):
    relu, smooth = (plain(network(make)) for make in (nn.ReLU, lambda: ReLUWithSmoothBackward(where, sharpness=2.0)))
    assert np.array_equal(relu.predict(x), smooth.predict(x))
    for classifier in (relu, smooth):
        SATTrainer(classifier, eps=EPS, norm="l2").fit(x, y, nb_epochs=1)
    assert not torch.equal(weights(relu), weights(smooth))


@pytest.mark.parametrize("mechanism", ["modules", "fx", "mode"])
def test_a_converted_model_is_trained_in_the_way_of_one_that_is_written_so(mechanism, x, y):
    converted = smooth_activations(network(nn.ReLU), "silu", SHAPE, mechanism=mechanism).model
    models = plain(converted), plain(network(nn.SiLU))
    for classifier in models:
        SATTrainer(classifier, eps=EPS, max_iter=2).fit(x, y, nb_epochs=3)
    np.testing.assert_allclose(models[0].predict(x), models[1].predict(x), atol=1e-4)
    assert not np.allclose(models[1].predict(x), plain(network(nn.SiLU)).predict(x), atol=1e-2)


def test_the_curvature_of_smooth_relu_is_trained_and_does_not_decay(x, y):
    model = smooth_activations(network(nn.ReLU), "smooth-relu", SHAPE).model
    recipe = Recipe(method="sat", options={"eps": EPS}, lr=0.1, nesterov=True, weight_decay_of="weights")
    classifier = plain(model, optimizer=recipe.optimizer(model))
    before = [value.clone() for name, value in model.named_parameters() if "b_raw" in name]
    SATTrainer(classifier, eps=EPS).fit(x, y, nb_epochs=2)
    after = [value for name, value in model.named_parameters() if "b_raw" in name]
    assert len(before) == 1
    assert not torch.equal(before[0], after[0])
    groups = classifier.optimizer.param_groups
    decays = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    assert decays[id(after[0])] == 0
    assert decays[id(model[0].weight)] > 0


# ---- what it is for ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


def for_digits():
    def make():
        layers = nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 32), nn.ReLU(), nn.Linear(32, 10)
        return nn.Sequential(*layers)

    model = smooth_activations(seeded(make), "silu", (1, 8, 8)).model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stock = {"clip_values": (0, 1), "device_type": "cpu"}
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=optimizer, **stock)


def test_digits_resist_attacks_and_can_be_certified(digits):
    (x, y), eps = digits, 0.1
    test, true = x[800:900], y[800:900]
    standard, trained = for_digits(), for_digits()
    how = {"input_shape": (1, 8, 8), "optimizer": standard.optimizer}  # whose fit goes by a seed, unlike ART's
    BoundsClassifier(standard.model, **how).fit(x[:600], y[:600], batch_size=50, nb_epochs=6)
    trainer = SATTrainer(trained, eps=eps, batch_size=50)
    trainer.fit(x[:600], y[:600], nb_epochs=5)
    trainer.fit(x[:600], y[:600], nb_epochs=1, first_epoch=5, validation_data=(test, true))
    robust = []
    for classifier in (standard, trained):
        attack = pgd(classifier, eps=eps, eps_step=eps / 4, max_iter=10)
        robust.append((classifier.predict(attack.generate(test, true)).argmax(1) == true).mean())
    assert robust[1] > robust[0] + 0.1
    last = trainer.history[-1]
    assert last.adversarial_accuracy == pytest.approx(robust[1], abs=0.02)
    assert last.adversarial_accuracy < last.validation_accuracy
    certified = []
    for classifier in (standard, trained):
        smoothed = SmoothedClassifier(classifier.model, 0.25, input_shape=(1, 8, 8))
        classes, radii = smoothed.certify(test[:20], n=1000)
        certified.append(np.mean((classes == true[:20]) * radii))
    assert certified[1] > certified[0]
    bounded = [BoundsClassifier(classifier.model, input_shape=(1, 8, 8)) for classifier in (standard, trained)]
    proved = [(one.margins(test, true, eps=eps).min(axis=1) > 0).mean() for one in bounded]
    assert proved[1] > proved[0] + 0.08
