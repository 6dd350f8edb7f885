"""Certified training through ART's contract: each step is core's, ART's words mean what they mean there."""

import copy
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator
from art.defences.preprocessor import SpatialSmoothing
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn

import rs_plugins
from rs_plugins.core.relaxations.bounds import margins
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gls import Gls
from rs_plugins.core.training.loop import train
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.bounds_trainer import CertifiedEpoch, GlsTrainer
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, cnn, seeded
from .test_bounds_classifier import Odd, Steps, network, state, trainable

EPS = 0.05
# Options at values that are not the defaults, and the objective that they make in 10 epochs
CASES = {
    "defaults": ({}, Gls(0.1, w_rob=0.5, ramp=3.0, ramp_shape="linear")),
    "ART's words": (
        {"nb_epochs": 20, "bound": EPS, "batch_size": 7, "loss_weighting": 0.75, "use_loss_weighting_schedule": True},
        Gls(EPS, w_rob=0.75, ramp=6.0, ramp_shape="linear"),
    ),
    "no schedule": (
        {"eps": EPS, "use_certification_schedule": False, "use_loss_weighting_schedule": False},
        Gls(EPS, w_rob=0.5, ramp=0.0, ramp_shape="linear"),
    ),
    "rgs": (
        {"method": "crown", "gradient": "rgs", "draws": 4, "noise_mode": "fixed", "sigma_w": 0.02, "sigma_w_end": 0.01}
        | {"decay": 2.0, "ramp": 2.5, "ramp_start": 1.0, "ramp_shape": "smooth", "lower_slope": "parallel"},
        Gls(
            0.1,
            bound="crown",
            gradient="rgs",
            draws=4,
            noise_mode="fixed",
            sigma_w=0.02,
            sigma_w_end=0.01,
            decay=2.0,
            ramp=2.5,
            ramp_start=1.0,
            ramp_shape="smooth",
            lower_slope="parallel",
            w_rob=0.5,
        ),
    ),
    "pgpe": (
        {"method": "ibp", "gradient": "pgpe", "population": 8, "ranks": True, "l1": 1e-4, "regulariser": 0.1},
        Gls(
            0.1,
            bound="ibp",
            gradient="pgpe",
            population=8,
            ranks=True,
            l1=1e-4,
            regulariser=0.1,
            w_rob=0.5,
            ramp=3.0,
            ramp_shape="linear",
        ),
    ),
    "plain": (
        {"gradient": "plain", "loss_weighting": 1.0},
        Gls(0.1, gradient="plain", w_rob=1.0, ramp=3.0, ramp_shape="linear"),
    ),
}


def plain(model=None, **settings):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    settings = {"optimizer": optimizer, "clip_values": (0, 1), "device_type": "cpu"} | settings
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, **settings)


def weights(classifier):
    return torch.cat([parameter.detach().flatten() for parameter in classifier.model.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_words_reach_the_objective(case):
    options, objective = CASES[case]
    trainer = GlsTrainer(trainable(), **{"nb_epochs": 10} | options)
    assert trainer.objective == objective
    assert trainer.eps == objective.eps
    assert trainer.batch_size == options.get("batch_size", 32)


def test_arts_words_come_in_its_order():
    from art.defences.trainer import AdversarialTrainerCertifiedIBPPyTorch as Theirs

    for ours, theirs in ((GlsTrainer, Theirs), (GlsTrainer.fit, Theirs.fit)):
        names = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        expected = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert names == expected
    documented = inspect.getdoc(GlsTrainer)
    assert all(
        f"\n    {name}: " in documented for name in inspect.signature(GlsTrainer).parameters if name != "options"
    )
    assert rs_plugins.GlsTrainer is GlsTrainer


@pytest.mark.parametrize("bounded", [True, False], ids=["bounds", "plain"])
@pytest.mark.parametrize("case", ["rgs", "pgpe", "plain"])
def test_a_step_is_that_of_cores_loop(case, bounded, x, y):
    options, objective = CASES[case]
    objective = replace(objective, ramp=options.get("ramp", 0.3 * 3))
    model = network()
    twin = copy.deepcopy(model)
    if bounded:
        trainer = GlsTrainer(trainable(model, seed=3), **options, parts=2)
    else:
        trainer = GlsTrainer(classifier=plain(model), seed=3, **options, parts=2)
    trainer.fit(x, np.eye(CLASSES)[y], limits=[0.0, 1.0], batch_size=4, nb_epochs=3, drop_last=True)
    seed = stream(3, "fit", 1).initial_seed()
    losses = train(
        twin,
        torch.tensor(x),
        torch.tensor(y),
        objective,
        optimizer=torch.optim.SGD(twin.parameters(), lr=0.005),
        epochs=3,
        seed=seed,
        batch_size=4,
        parts=2,
        drop_last=True,
    )
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not torch.equal(weights(trainer.classifier), weights(trainable()))
    eps = [objective.schedule(epoch + 1) for epoch in range(3)]
    assert trainer.history == [CertifiedEpoch(*row) for row in zip(range(3), losses, eps, strict=True)]
    assert eps[-1] > eps[0] or eps[0] == objective.eps


def test_the_hosts_contract(x, y):
    classifier = trainable()
    trainer = GlsTrainer(classifier, nb_epochs=2, bound=EPS, batch_size=2)
    assert isinstance(trainer, Trainer)
    assert trainer.classifier is trainer.get_classifier() is classifier
    before, scheduler = weights(classifier), Steps()
    x.setflags(write=False)
    assert trainer.fit(x, y, scheduler=scheduler) is None
    assert (len(trainer.history), scheduler.count) == (2, 2)
    assert trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=5), nb_epochs=3, scheduler=scheduler) is None
    assert trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=5)) is None
    assert (len(trainer.history), scheduler.count) == (7, 5)
    assert not torch.equal(weights(classifier), before)
    assert np.array_equal(trainer.predict(x, batch_size=2), classifier.predict(x, 2))
    for mode in ("concrete", "abstract"):
        trainer.set_forward_mode(mode)
        assert classifier.model.forward_mode == mode
    found = trainer.predict_intervals(x, False, EPS, [0, 1], 2)
    assert np.array_equal(found, classifier.predict_intervals(x, bounds=EPS, limits=[0, 1], batch_size=2))
    for call in (trainer.fit, trainer.fit_generator):
        with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
            call(x, y, epochs=1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'w_rob'; Gls has draws, .*"):
        GlsTrainer(classifier, w_rob=1.0)


def test_the_ramp_goes_by_the_epochs_of_the_training(x, y):
    trainer = GlsTrainer(trainable(), eps=EPS, batch_size=5, ramp=4, gradient="plain")
    trainer.fit(x, y, nb_epochs=2)
    trainer.fit(x, y, nb_epochs=3, first_epoch=2)
    trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=5), nb_epochs=1, first_epoch=1)
    assert [epoch.number for epoch in trainer.history] == [0, 1, 2, 3, 4, 1]
    shares = [0.25, 0.5, 0.75, 1, 1, 0.5]
    assert [epoch.eps for epoch in trainer.history] == pytest.approx([share * EPS for share in shares])
    own = GlsTrainer(trainable(), eps=EPS, batch_size=5)
    own.fit(x, y, nb_epochs=10)
    assert own.objective.ramp == pytest.approx(3)
    own.fit(x, y, nb_epochs=5, first_epoch=15)
    assert own.objective.ramp == pytest.approx(6)


@pytest.mark.parametrize("bounded", [True, False], ids=["bounds", "plain"])
def test_validation_is_written_down_and_changes_nothing(bounded, x, y):
    make = trainable if bounded else plain
    with_it, without = (GlsTrainer(make(), eps=0.01, batch_size=2, method="crown") for _ in range(2))
    right = network()(torch.tensor(x)).argmax(1).numpy()
    with_it.fit(x, y, nb_epochs=2, validation_data=(x, np.eye(CLASSES)[right]))
    without.fit(x, y, nb_epochs=2)
    assert [epoch[:3] for epoch in with_it.history] == [epoch[:3] for epoch in without.history]
    assert without.history[-1][3:] == (None, None)
    model = with_it.classifier.model.module if bounded else with_it.classifier.model
    model.eval()
    accuracy = float((model(torch.tensor(x)).argmax(1).numpy() == right).mean())
    found = margins(model, torch.tensor(x), torch.tensor(right), 0.01, method="crown")
    certified = float((found > 1e-4).all(dim=1).double().mean())
    assert with_it.history[-1][3:] == (accuracy, certified)
    assert certified > 0


def test_state_is_left_as_it_was_also_after_an_exception(x, y):
    model = network().train()
    model.relu1.eval()
    model.linear2.bias.requires_grad_(False)
    classifier, before, random = trainable(model), state(model), torch.random.get_rng_state()
    trainer = GlsTrainer(classifier, eps=EPS)

    class Stop(Exception):
        def step(self):
            raise self

    trainer.fit(x, y, nb_epochs=1, validation_data=(x, y))
    with pytest.raises(Stop):
        trainer.fit(x, y, nb_epochs=2, scheduler=Stop())
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert len(trainer.history) == 1


def test_a_plain_classifier_is_followed(x, y):
    classifier = plain()
    trainer = GlsTrainer(classifier, eps=EPS)
    before = weights(classifier)
    classifier.set_params(optimizer=torch.optim.SGD(classifier.model.parameters(), lr=0.0))
    trainer.fit(x, y, nb_epochs=1)
    assert torch.equal(weights(classifier), before)
    classifier.set_params(preprocessing_defences=[SpatialSmoothing()])
    with pytest.raises(InputError, match="preprocessing_defences: expected None"):
        trainer.fit(x, y)


def test_batch_statistics_or_those_that_are_there(x, y):
    def make():
        return seeded(
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
            )
        )

    frozen, moving = make(), make()
    GlsTrainer(trainable(frozen), eps=EPS).fit(x, y, nb_epochs=1, training_mode=False)
    GlsTrainer(trainable(moving), eps=EPS).fit(x, y, nb_epochs=1)
    assert torch.equal(frozen[1].running_mean, torch.zeros(4))
    assert not torch.equal(moving[1].running_mean, torch.zeros(4))


WRONG = {
    "two names": ({"bound": 0.1, "eps": 0.1}, r"bound, eps: expected one of them, as they are the same, got 0\.1 and"),
    "bound": ({"bound": 0}, "bound: expected a finite number > 0, got 0"),
    "eps": ({"eps": -1}, "eps: expected a finite number > 0, got -1"),
    "eps of 255": ({"bound": 8}, "eps: expected a radius in pixels of .* divide by 255"),
    "epochs": ({"nb_epochs": -1}, "nb_epochs: expected an integer >= 0, got -1"),
    "batch": ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
    "weight": ({"loss_weighting": 2}, r"loss_weighting: expected a number in \[0, 1\], got 2"),
    "negative weight": ({"loss_weighting": "a"}, "loss_weighting: expected a finite number >= 0, got 'a'"),
    "schedule": (
        {"certification_schedule": Steps()},
        "certification_schedule: expected None, .* ramp and ramp_shape",
    ),
    "weights": ({"loss_weighting_schedule": Steps()}, "loss_weighting_schedule: expected None, got .* grows with the"),
    "pgd": ({"augment_with_pgd": True}, "augment_with_pgd: expected False, got True; bounds cover what"),
    "pgd params": ({"pgd_params": {"eps": 0.3}}, "pgd_params: expected None, got {'eps': 0.3}; bounds cover what"),
    "one schedule": (
        {"use_loss_weighting_schedule": False, "loss_weighting": 0.5},
        "use_loss_weighting_schedule: expected True like use_certification_schedule, .* got False",
    ),
    "ramp without": ({"use_certification_schedule": False, "ramp": 2}, "ramp: expected None without .* got 2"),
    "no flag": ({"use_certification_schedule": 3}, "use_certification_schedule: expected True or False, got 3"),
    "ramp": ({"ramp": -1}, "ramp: expected a finite number >= 0, got -1"),
    "method": ({"method": "sdp"}, "^method: expected one of 'ibp', 'crown-ibp', 'crown', got 'sdp'"),
    "gradient": ({"gradient": "sgd"}, "gradient: expected one of 'plain', 'rgs', 'pgpe', got 'sgd'"),
    "idle": ({"gradient": "plain", "draws": 4}, "draws: only for the gradient 'rgs', got 4 with 'plain'"),
    "parts": ({"parts": 0}, "parts: expected an integer >= 1, got 0"),
    "seed": ({"seed": 1}, "seed: expected 0, which the classifier brings, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_settings(case):
    options, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        GlsTrainer(trainable(), **options)


def test_classifiers_that_cannot_be_trained(x, y):
    message = "classifier: expected a BoundsClassifier or another PyTorchClassifier, got Sequential"
    with pytest.raises(InputError, match=message):
        GlsTrainer(cnn())
    with pytest.raises(InputError, match="preprocessing: expected the identity"):
        GlsTrainer(plain(preprocessing=(0.5, 0.5)))
    with pytest.raises(InputError, match="seed: expected an integer or None, got 'a'"):
        GlsTrainer(plain(), seed="a")
    with pytest.raises(InputError, match="noise would be added twice"):
        GlsTrainer(SmoothedClassifier(cnn(), 0.25, input_shape=SHAPE))
    with pytest.raises(ModelError, match="strange"):
        GlsTrainer(plain(Odd()))
    for trainer in (GlsTrainer(BoundsClassifier(network())), GlsTrainer(plain(optimizer=None))):
        with pytest.raises(InputError, match="optimizer: needed for training"):
            trainer.fit(x, y)


def test_impossible_data(x, y):
    trainer = GlsTrainer(trainable())
    for limits in ([0, 255], 1.0, [0, 0.5, 1], (x.min(), x.max())):
        with pytest.raises(InputError, match=r"limits: expected \[0, 1\] or None, got"):
            trainer.fit(x, y, limits=limits)
    for loss in ("max_logit_loss", sum):
        with pytest.raises(InputError, match=r"certification_loss: expected 'interval_loss_cce', .* got"):
            trainer.fit(x, y, certification_loss=loss)
    with pytest.raises(InputError, match=r"y: expected .*integer labels"):
        trainer.fit(x, np.full((5, CLASSES), 0.25))
    with pytest.raises(InputError, match="validation_data: expected a pair of images and labels, got tuple"):
        trainer.fit(x, y, validation_data=(x, y, x))
    with pytest.raises(InputError, match="first_epoch: expected an integer >= 0, got -1"):
        trainer.fit(x, y, first_epoch=-1)
    with pytest.raises(InputError, match=r"generator\.size: expected an integer >= 1, got None"):
        trainer.fit_generator(object())
    assert trainer.history == []


# ---- what it is for ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


def for_digits(bound):
    def make():
        hidden = nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 32), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(32, 10))

    model = seeded(make).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return BoundsClassifier(model, input_shape=(1, 8, 8), nb_classes=10, optimizer=optimizer, bound=bound)


@pytest.mark.parametrize(
    ("bound", "gradient", "more"),
    [("ibp", "plain", 0.4), ("ibp", "rgs", 0.4), pytest.param("crown-ibp", "rgs", 0.08, marks=pytest.mark.slow)],
)
def test_digits_are_certified_better_than_after_plain_training(bound, gradient, more, digits):
    (x, y), eps = digits, 0.05
    test = x[800:900], y[800:900]
    standard, trained = for_digits(bound), for_digits(bound)
    standard.fit(x[:600], y[:600], batch_size=30, nb_epochs=8)
    trainer = GlsTrainer(trained, eps=eps, method=bound, gradient=gradient, loss_weighting=1.0)
    trainer.fit(x[:600], y[:600], batch_size=30, nb_epochs=8, validation_data=test)
    before, after = (classifier.certify(*test, eps, attack_steps=0).mean() for classifier in (standard, trained))
    assert after > before + more
    losses = [np.log1p(np.exp(-c.margins(*test, eps)).sum(1)).mean() for c in (standard, trained)]
    assert losses[1] < 0.8 * losses[0]
    last = trainer.history[-1]
    assert last.certified_accuracy == pytest.approx(after, abs=0.02)
    assert last.certified_accuracy > trainer.history[0].certified_accuracy
    assert last.validation_accuracy > last.certified_accuracy
