"""ART trainers: each trains as core does, on a smoothed classifier or a plain one, and leaves the rest alone."""

import copy
import inspect

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor import SpatialSmoothing
from art.defences.trainer import (
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
    DPInstaHideTrainer,
    Trainer,
)
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rs_plugins
from rs_plugins.core.streams import stream
from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.inner_attacks import DDN, PGD, BallFirstPGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.methods import METHODS
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.core.training.stability import Stability
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_art.classifier import SmoothedClassifier
from rs_plugins_art.trainer_base import Epoch, SmoothedTrainer
from rs_plugins_art.trainers import (
    ConsistencyTrainer,
    GaussianTrainer,
    MacerTrainer,
    SmoothAdvTrainer,
    SmoothMixTrainer,
    StabilityTrainer,
)

from .conftest import CLASSES, SHAPE, Recorder, cnn, seeded
from .test_fit_methods import quiet
from .test_gradients import SOFT
from .test_state import Faulty, mixed, state
from .test_training import Steps, half, noise_seen, trainable, weights

BALL = BallFirstPGD(eps=0.5, steps=2)
# Every option at a value that is not its default, and the objective that this is
TRAINERS = {
    GaussianTrainer: ({"samples": 3}, Gaussian(0.25, samples=3)),
    StabilityTrainer: ({"lam": 3.0, "samples": 2}, Stability(0.25, lam=3.0, samples=2)),
    SmoothAdvTrainer: (
        {"attack": "ddn", "eps": 0.5, "max_iter": 3, "samples": 2, "multi_noise": False, "warmup": 2},
        SmoothAdv(0.25, attack=DDN(eps=0.5, steps=3), samples=2, multi_noise=False, warmup=2),
    ),
    SmoothMixTrainer: (
        {"eps_step": 0.5, "max_iter": 3, "mix_step": 1, "max_norm": 2.0, "max_norm_s": 0.25}
        | {"w_mix": 5.0, "warmup": 3, "samples": 2},
        SmoothMix(0.25, step=0.5, steps=3, mix_step=1, max_norm=2.0, max_norm_s=0.25, w_mix=5.0, warmup=3, samples=2),
    ),
    ConsistencyTrainer: (
        {"lam": 5.0, "w_ent": 0.25, "samples": 3, "attack": BALL, "warmup": 4},
        Consistency(0.25, lam=5.0, w_ent=0.25, samples=3, attack=BALL, warmup=4),
    ),
    MacerTrainer: (
        {"lam": 6.0, "margin": 4.0, "inv_temp": 8.0, "deferred": 2, "samples": 4},
        Macer(0.25, lam=6.0, margin=4.0, inv_temp=8.0, deferred=2, samples=4),
    ),
}
NOT_THE_METHODS = {"classifier", "sigma", "parts", "seed"}
BY_NAME = {"argvalues": list(TRAINERS), "ids": lambda kind: kind.__name__}


def plain(model, lr=0.1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = {"optimizer": optimizer, "clip_values": (0, 1), "device_type": "cpu"} | settings
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, **settings)


@pytest.mark.parametrize("kind", **BY_NAME)
def test_options_reach_the_objective_and_defaults_are_the_methods(kind):
    options, objective = TRAINERS[kind]
    classifier = trainable(cnn())
    assert kind(classifier, **options).objective == objective
    assert kind(classifier).objective == METHODS[kind.method](0.25)
    for name, value in options.items():
        assert kind(classifier, **{name: value}).objective != kind(classifier).objective
    parameters = inspect.signature(kind).parameters
    assert set(parameters) - NOT_THE_METHODS == set(options) | {
        name for name in ("form", "eps_step") if name in parameters
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "classifier")
    assert all(f"\n        {name}: " in inspect.getsource(kind) for name in parameters)


def test_the_options_that_exclude_others():
    classifier = trainable(cnn())
    assert ConsistencyTrainer(classifier, form="mse").objective == Consistency(0.25, form="mse")
    expected = SmoothAdv(0.25, attack=PGD(eps=0.5, steps=4, step=0.2))
    assert SmoothAdvTrainer(classifier, eps=0.5, eps_step=0.2, max_iter=4).objective == expected
    assert SmoothAdvTrainer(classifier, attack=BALL).objective == SmoothAdv(0.25, attack=BALL)


@pytest.mark.parametrize("smoothed", [True, False], ids=["smoothed", "plain"])
@pytest.mark.parametrize("kind", **BY_NAME)
def test_a_step_is_that_of_cores_loop(kind, smoothed, x, y):
    options, objective = TRAINERS[kind]
    model = quiet()
    twin = copy.deepcopy(model)
    if smoothed:
        trainer = kind(trainable(model, seed=3), **options)
    else:
        trainer = kind(classifier=plain(model), sigma=0.25, seed=3, **options)
    trainer.fit(x, y, nb_epochs=1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    seed = stream(3, "fit", 1).initial_seed()
    losses = train(twin, torch.tensor(x), torch.tensor(y), objective, optimizer=optimizer, epochs=1, seed=seed)
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in model.state_dict().items())
    assert trainer.history == [Epoch(0, losses[0])]


@pytest.mark.parametrize("kind", **BY_NAME)
def test_the_hosts_contract(kind, x, y):
    classifier = trainable(cnn())
    trainer = kind(classifier, **TRAINERS[kind][0])
    assert isinstance(trainer, Trainer)
    assert trainer.classifier is trainer.get_classifier() is classifier
    before = weights(classifier)
    x.setflags(write=False)
    assert trainer.fit(x, np.eye(CLASSES)[y], (x, y), 3, 2, None) is None
    assert trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=2), nb_epochs=1) is None
    assert not torch.equal(weights(classifier), before)
    assert np.array_equal(trainer.predict(x, batch_size=2), classifier.predict(x))
    assert trainer.predict(x, is_abstain=True).max() == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'nb_epoch'"):
        trainer.fit(x, y, nb_epoch=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        trainer.fit_generator(NumpyDataGenerator(x, y), epochs=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lamda'"):
        kind(classifier, lamda=1.0)


def test_the_public_names():
    for kind in TRAINERS:
        assert getattr(rs_plugins, kind.__name__) is kind


# ---- which noise ---------------------------------------------------------------------------------------------------


def noise_of_two_fits(classifier, trainer):
    """The noise of two calls of fit, each on one batch: the images are 1/2 everywhere."""
    x, y = half(8)
    recorder = next(part for part in classifier.model.modules() if isinstance(part, Recorder))
    recorder.batches = []
    for _ in range(2):
        trainer.fit(x, y, nb_epochs=1)
    return recorder.batches[-2:]


def test_noise_goes_on_from_call_to_call_and_can_be_repeated():
    runs = []
    for seed in (3, 3, 4):
        smoothed, bare = trainable(Recorder(cnn()), seed=seed), plain(Recorder(cnn()))
        runs.append(noise_of_two_fits(smoothed, GaussianTrainer(smoothed)))
        runs.append(noise_of_two_fits(bare, GaussianTrainer(bare, sigma=0.25, seed=seed)))
    first, second = runs[0]
    assert not torch.equal(first, second)
    assert all(torch.equal(run[0], first) and torch.equal(run[1], second) for run in runs[1:4])
    assert not any(torch.equal(run[0], first) for run in runs[4:])
    zero, default = (plain(Recorder(cnn())) for _ in range(2))
    expected = noise_of_two_fits(zero, GaussianTrainer(zero, sigma=0.25, seed=0))
    assert torch.equal(noise_of_two_fits(default, GaussianTrainer(default, sigma=0.25))[0], expected[0])


def test_trainers_one_after_the_other_do_not_repeat_each_others_noise():
    classifier = trainable(Recorder(cnn()))
    one, _ = noise_of_two_fits(classifier, GaussianTrainer(classifier))
    other, _ = noise_of_two_fits(classifier, GaussianTrainer(classifier))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_arts_smoothed_classifier_brings_its_scale_and_is_followed(sigma):
    model = Recorder(cnn())
    classifier = PyTorchRandomizedSmoothing(
        model,
        nn.CrossEntropyLoss(),
        SHAPE,
        CLASSES,
        torch.optim.SGD(model.parameters(), 0.1),
        device_type="cpu",
        scale=0.1,
    )
    trainer = GaussianTrainer(classifier)
    assert trainer.objective.sigma == 0.1
    classifier.set_params(scale=sigma)
    model.batches = []
    trainer.fit(*half(64), nb_epochs=1)
    assert float((torch.cat(model.batches[-1:]) - 0.5).std()) == pytest.approx(sigma, rel=0.05)


def test_a_plain_classifier_is_followed_and_its_own_fit_is_not_called(x, y):
    classifier = plain(cnn())
    classifier.fit = None
    trainer = GaussianTrainer(classifier, sigma=0.25)
    before = trainer.predict(x)
    classifier.set_params(optimizer=torch.optim.SGD(classifier.model.parameters(), lr=0.0))
    trainer.fit(x, y, nb_epochs=1, training_mode=False)
    assert np.array_equal(trainer.predict(x), before)
    classifier.set_params(optimizer=torch.optim.SGD(classifier.model.parameters(), lr=0.1))
    trainer.fit(x, y, nb_epochs=1, training_mode=False)
    assert not np.array_equal(trainer.predict(x), before)
    classifier.set_params(preprocessing_defences=[SpatialSmoothing()])
    with pytest.raises(InputError, match="preprocessing_defences: expected None"):
        trainer.fit(x, y)


def test_a_smoothed_classifier_may_change_its_sigma(x, y):
    classifier = trainable(cnn())
    trainer, bound = MacerTrainer(classifier), MacerTrainer(classifier, sigma=0.25)
    classifier.sigma = 0.5
    assert trainer.objective.sigma == 0.5
    trainer.fit(x, y, nb_epochs=1)
    with pytest.raises(InputError, match=r"sigma: expected 0\.5, which the smoothed classifier brings, got 0\.25"):
        bound.fit(x, y, nb_epochs=1)


# ---- epochs --------------------------------------------------------------------------------------------------------


class EpochTrainer(SmoothedTrainer):
    """Remembers of which epoch each batch was; the loss is the mean label."""

    method = "gaussian"

    def __init__(self, classifier, parts=1):
        super().__init__(classifier, sigma=None, parts=parts, seed=None)
        self.seen = []

    @property
    def objective(self):
        def loss(model, batch, draws):
            self.seen.append((batch.epoch, len(batch.x)))
            return 0 * model(batch.x).sum() + batch.y.float().mean()

        return loss


def test_each_fit_is_a_training_whose_first_epoch_can_be_said():
    trainer = EpochTrainer(trainable(cnn()), parts=2)
    x, y = half(6)
    trainer.fit(x, y, batch_size=6, nb_epochs=2)
    trainer.fit(x, y, batch_size=4, nb_epochs=1, drop_last=True)
    trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=6), nb_epochs=2)
    trainer.fit(x, y, batch_size=6, nb_epochs=1, first_epoch=7)
    trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=6), nb_epochs=1, first_epoch=8)
    epochs = [0, 1, 0, 0, 1, 7, 8]
    assert trainer.seen == [(epoch, 2 if number == 2 else 3) for number, epoch in enumerate(epochs) for _ in "ab"]
    assert [epoch.number for epoch in trainer.history] == epochs


def test_warm_up_goes_by_the_epochs():
    lengths = []

    def attack(model, x, y, e, share):
        found = PGD(eps=0.4, steps=2)(model, x, y, e, share)
        lengths.append(float((found - x).flatten(1).norm(dim=1).max()))
        return found

    trainer = SmoothAdvTrainer(trainable(cnn()), attack=attack, warmup=4)
    for _ in range(2):
        trainer.fit(*half(8), nb_epochs=3)
    trainer.fit_generator(NumpyDataGenerator(*half(8), batch_size=8), nb_epochs=5)
    trainer.fit(*half(8), nb_epochs=1, first_epoch=2)
    expected = [0.1, 0.2, 0.3] * 2 + [0.1, 0.2, 0.3, 0.4, 0.4] + [0.3]
    assert lengths == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("smoothed", [True, False], ids=["smoothed", "plain"])
def test_validation_is_written_down_and_changes_nothing(smoothed, x, y):
    make = trainable if smoothed else plain
    with_it, without = (GaussianTrainer(make(quiet()), sigma=0.25) for _ in range(2))
    scheduler = Steps()
    with_it.fit(x, y, validation_data=(x[:3], np.eye(CLASSES)[y[:3]]), batch_size=2, nb_epochs=3, scheduler=scheduler)
    without.fit(x, y, batch_size=2, nb_epochs=3)
    assert scheduler.count == 3
    assert [epoch[:2] for epoch in with_it.history] == [epoch[:2] for epoch in without.history]
    assert [epoch.validation_accuracy for epoch in without.history] == [None] * 3
    vote = with_it.classifier if smoothed else SmoothedClassifier(with_it.classifier.model, 0.25)
    expected = (vote.predict(x[:3]).argmax(1) == y[:3]).mean()
    assert with_it.history[-1].validation_accuracy == expected
    with_it.fit_generator(
        NumpyDataGenerator(x, y, batch_size=5), nb_epochs=2, validation_data=[x, y], scheduler=scheduler
    )
    assert scheduler.count == 5
    assert all(0 <= epoch.validation_accuracy <= 1 for epoch in with_it.history[3:])


def loader(x, y):
    return PyTorchDataGenerator(DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=8), len(x), 8)


@pytest.mark.parametrize("make", [loader, lambda x, y: NumpyDataGenerator(x, y, 8, drop_remainder=False)])
def test_arts_generators_train_with_fresh_noise(make):
    classifier = trainable(Recorder(cnn()), sigma=0.5)
    x, y = half(20)
    trainer = GaussianTrainer(classifier)
    noise = noise_seen(classifier, lambda: trainer.fit_generator(make(x, y), nb_epochs=2))
    assert [len(batch) for batch in noise] == [8, 8, 4] * 2
    draws = torch.cat(noise).flatten(1)
    assert len(draws.unique(dim=0)) == 40
    assert float(draws.std()) == pytest.approx(0.5, rel=0.05)


def test_the_loss_of_an_epoch_is_the_mean_over_its_images():
    trainer = EpochTrainer(trainable(cnn()))
    x, y = half(10)
    trainer.fit_generator(NumpyDataGenerator(x, y, 4, drop_remainder=False), nb_epochs=1)
    trainer.fit(x, y, batch_size=4, nb_epochs=1)
    assert [epoch.loss for epoch in trainer.history] == pytest.approx([y.mean()] * 2)


class Stop(Exception):
    """Raised by a scheduler."""


class StopsAfter:
    """A scheduler that raises at a step."""

    def __init__(self, epochs):
        self.left = epochs

    def step(self):
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.mark.parametrize("call", ["fit", "fit_generator"])
def test_the_history_holds_the_epochs_before_an_exception(call, x, y):
    def run(trainer, nb_epochs, **how):
        data = (x, y) if call == "fit" else (NumpyDataGenerator(x, y, batch_size=5),)
        getattr(trainer, call)(*data, nb_epochs=nb_epochs, validation_data=(x, y), first_epoch=4, **how)

    whole, stopped, diverged = (GaussianTrainer(trainable(quiet())) for _ in range(3))
    np.random.seed(0)  # noqa: NPY002  ART's generator draws the order from there
    run(whole, 2)
    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(Stop):
        run(stopped, 3, scheduler=StopsAfter(3))
    assert stopped.history == whole.history
    np.random.seed(0)  # noqa: NPY002
    rates = torch.optim.lr_scheduler.LambdaLR(diverged.classifier.optimizer, lambda epoch: 1e38 if epoch == 2 else 1)
    with pytest.raises(ModelError):
        run(diverged, 5, scheduler=rates)
    assert diverged.history[:2] == whole.history
    assert [epoch.number for epoch in whole.history] == [4, 5]
    assert all(epoch.validation_accuracy is not None for epoch in whole.history)


def test_whole_numbers_of_every_kind_are_taken(x, y):
    one, other = (GaussianTrainer(trainable(quiet()), parts=parts) for parts in (2, 2.0))
    one.fit(x, y, batch_size=4, nb_epochs=2, first_epoch=1)
    other.fit(x, y, batch_size=4.0, nb_epochs=np.int64(2), first_epoch=1.0)
    assert one.history == other.history
    assert [epoch.number for epoch in other.history] == [1, 2]


# ---- what stays as it was ------------------------------------------------------------------------------------------


def fit(trainer, x, y):
    trainer.fit(x, y, validation_data=(x, y), batch_size=2, nb_epochs=2)


def fit_generator(trainer, x, y):
    trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=2), nb_epochs=2, training_mode=False)


@pytest.mark.parametrize("call", [fit, fit_generator])
@pytest.mark.parametrize("kind", **BY_NAME)
def test_state_after_training_and_after_an_exception_in_the_middle(kind, call, x, y):
    classifier = mixed()
    trainer = kind(classifier, **TRAINERS[kind][0])
    before, start = state(classifier), weights(classifier)
    call(trainer, x, y)
    assert state(classifier) == before
    assert not torch.equal(weights(classifier), start)
    calls = iter(range(4))
    hook = classifier.base_model.register_forward_pre_hook(
        lambda model, _: setattr(model, "fails", not any_left(calls))
    )
    with pytest.raises(MemoryError):
        call(trainer, x, y)
    hook.remove()
    assert state(classifier) == before


def any_left(numbers):
    return next(numbers, None) is not None


def test_the_state_of_a_plain_classifier(x, y):
    model = Faulty()
    classifier = plain(model)
    model.train()
    model.network[1].eval()
    before = state(classifier)
    trainer = SmoothAdvTrainer(classifier, sigma=0.25, max_iter=1)
    trainer.fit(x, y, nb_epochs=1)
    assert state(classifier) == before
    model.fails = True
    with pytest.raises(MemoryError):
        trainer.fit(x, y, nb_epochs=1)
    assert state(classifier) == before


# ---- what is refused -----------------------------------------------------------------------------------------------


WRONG = {
    "no sigma": (GaussianTrainer, plain, {}, "sigma: needed, in pixels, because the estimator is not smoothed"),
    "another sigma": (
        GaussianTrainer,
        trainable,
        {"sigma": 0.5},
        r"sigma: expected 0\.25, which the smoothed classifier brings, got 0\.5",
    ),
    "impossible sigma": (GaussianTrainer, plain, {"sigma": -1}, "sigma: expected a finite number > 0, got -1"),
    "another seed": (GaussianTrainer, trainable, {"seed": 1}, "seed: expected 0, which the smoothed classifier brings"),
    "impossible seed": (
        GaussianTrainer,
        plain,
        {"sigma": 1, "seed": "a"},
        "seed: expected an integer or None, got 'a'",
    ),
    "parts": (GaussianTrainer, trainable, {"parts": 0}, "parts: expected an integer >= 1, got 0"),
    "samples": (MacerTrainer, trainable, {"samples": 0}, "samples: expected an integer >= 1, got 0"),
    "form": (ConsistencyTrainer, trainable, {"form": "l1"}, "form: expected one of 'default', .*, got 'l1'"),
    "mix steps": (SmoothMixTrainer, trainable, {"max_iter": 0}, "^max_iter: expected an integer >= 1, got 0"),
    "mix step": (SmoothMixTrainer, trainable, {"eps_step": 0}, "^eps_step: expected a finite number > 0, got 0"),
    "steps": (SmoothAdvTrainer, trainable, {"max_iter": 0}, "^max_iter: expected an integer >= 1, got 0"),
    "step": (SmoothAdvTrainer, trainable, {"eps_step": 0}, "^eps_step: expected a finite number > 0, got 0"),
    "eps": (SmoothAdvTrainer, trainable, {"eps": 0}, "^eps: expected a finite number > 0, got 0"),
    "step of ddn": (
        SmoothAdvTrainer,
        trainable,
        {"attack": "ddn", "eps_step": 0.1},
        r"eps_step: expected None with attack='ddn', which chooses its own, got 0\.1",
    ),
    "unknown attack": (SmoothAdvTrainer, trainable, {"attack": "fgsm"}, "attack: expected 'pgd', 'ddn' or .*'fgsm'"),
    "attack class": (SmoothAdvTrainer, trainable, {"attack": PGD}, "attack: expected an attack such as PGD"),
    "attack and its eps": (
        SmoothAdvTrainer,
        trainable,
        {"attack": PGD(eps=0.5), "eps": 0.25},
        r"attack: expected 'pgd' or 'ddn' with eps, eps_step or max_iter, got PGD\(eps=0\.5",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_settings(case):
    kind, make, options, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        kind(make(cnn()), **options)


def test_classifiers_that_cannot_be_trained(x, y):
    with pytest.raises(InputError, match="preprocessing: expected the identity"):
        SmoothMixTrainer(plain(cnn(), preprocessing=(0.5, 0.5)), sigma=0.25)
    with pytest.raises(InputError, match=r"clip_values: expected \(0, 1\) or None"):
        SmoothMixTrainer(plain(cnn(), clip_values=(0, 255)), sigma=0.25)
    message = "classifier: expected a SmoothedClassifier or another PyTorchClassifier, got"
    with pytest.raises(InputError, match=f"{message} Sequential"):
        SmoothMixTrainer(cnn(), sigma=0.25)
    with pytest.raises(InputError, match=f"{message} SmoothedBlackBox"):
        SmoothMixTrainer(SmoothedBlackBox(plain(cnn()), 0.25))
    trainers = [
        SmoothMixTrainer(SmoothedClassifier(cnn(), 0.25)),
        SmoothMixTrainer(plain(cnn(), optimizer=None), sigma=0.25),
    ]
    for trainer in trainers:
        with pytest.raises(InputError, match="optimizer: needed for training"):
            trainer.fit(x, y)


def test_impossible_data(x, y):
    trainer = SmoothAdvTrainer(trainable(cnn()))
    with pytest.raises(InputError, match="y: expected a tensor of integer labels"):
        trainer.fit(x, SOFT)
    for data, message in {
        (1, 2, 3): "expected a pair of images and labels, got tuple",
        "xy": "expected a pair of images and labels, got str",
        (x.tobytes(), 0): None,
    }.items():
        with pytest.raises(InputError, match=f"validation_data: {message}" if message else "x: expected"):
            trainer.fit(x, y, validation_data=data)
    with pytest.raises(InputError, match="validation_data: expected at least one image, got none"):
        trainer.fit(x, y, validation_data=(x[:0], y[:0]))
    with pytest.raises(InputError, match="validation_data: labels: expected one label per image"):
        trainer.fit(x, y, validation_data=(x, y[:2]))
    with pytest.raises(InputError, match="first_epoch: expected an integer >= 0, got -1"):
        trainer.fit(x, y, first_epoch=-1)
    with pytest.raises(InputError, match=r"generator\.size: expected an integer >= 1, got None"):
        trainer.fit_generator(object())
    assert trainer.history == []


# ---- what it is for ------------------------------------------------------------------------------------------------

CHEAP = {SmoothAdvTrainer: {"max_iter": 2, "eps": 0.5}, SmoothMixTrainer: {"max_iter": 2}, MacerTrainer: {"samples": 4}}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


@pytest.mark.parametrize("kind", **BY_NAME)
def test_digits_are_learnt_under_noise(kind, digits):
    x, y = digits
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    classifier = SmoothedClassifier(model, 0.25, optimizer=torch.optim.Adam(model.parameters(), lr=5e-3))
    trainer = kind(classifier, **CHEAP.get(kind, {}))
    before = (trainer.predict(x[1000:1400]).argmax(1) == y[1000:1400]).mean()
    trainer.fit(x[:1000], y[:1000], validation_data=(x[1000:1400], y[1000:1400]), batch_size=50, nb_epochs=10)
    accuracies = [epoch.validation_accuracy for epoch in trainer.history]
    assert before < 0.3
    assert accuracies[-1] > 0.8, accuracies


@pytest.mark.parametrize(
    "train_with",
    [
        lambda c, a, x, y: AdversarialTrainerMadryPGD(c, nb_epochs=1, batch_size=5, max_iter=1).fit(x, y),
        lambda c, a, x, y: AdversarialTrainerTRADESPyTorch(c, a, beta=1.0).fit(x, y, batch_size=5, nb_epochs=1),
        lambda c, a, x, y: AdversarialTrainerAWPPyTorch(c, trainable(quiet()), a, "PGD", 0.01, 1.0, 0).fit(
            x, y, batch_size=5, nb_epochs=1
        ),
        lambda c, a, x, y: AdversarialTrainerFBFPyTorch(c, eps=0.1).fit(x, y, batch_size=2, nb_epochs=1),
        lambda c, a, x, y: DPInstaHideTrainer(c, [], "gaussian", scale=0.01).fit(x, y, batch_size=5, nb_epochs=1),
    ],
    ids=["Madry", "TRADES", "AWP", "FBF", "DPInstaHide"],
)
def test_arts_own_trainers_take_the_classifier(train_with, x, y):
    classifier = trainable(quiet())
    attack = ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.1, max_iter=1, verbose=False)
    before = weights(classifier)
    train_with(classifier, attack, x, np.eye(CLASSES, dtype=np.float32)[y])
    assert not torch.equal(weights(classifier), before)
