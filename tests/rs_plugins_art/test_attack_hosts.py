"""ART's own metrics, trainers and writers run our attacks unedited; what was found, and what not, is said."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoAttack
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy, empirical_robustness
from art.metrics.metrics import SUPPORTED_METHODS
from art.summary_writer import SummaryWriter, SummaryWriterDefault
from torch import nn

from rs_plugins.core.attacks.smoothadv import smooth_adv_ddn
from rs_plugins_art.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, Sharp, cnn
from .test_state import state

ATTACKS = (SmoothAdvPGD, SmoothAdvLinfPGD, SmoothAdvDDN)
each_attack = pytest.mark.parametrize("attack", ATTACKS)
SIGMA = 0.25


def smoothed(model=None, **more):
    return SmoothedClassifier(cnn(3) if model is None else model, SIGMA, **more)


def plain(model=None):
    return PyTorchClassifier(
        cnn(3) if model is None else model, nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu"
    )


def line(**more):
    """A classifier whose decision is where the mean of the pixels is one half, and images at known distances to it."""
    direction = np.ones(72, np.float32) / 72**0.5
    classifier = smoothed(Sharp(torch.tensor(direction) * 50, 0.5 * 50 * 72**0.5), device_type="cpu", **more)
    distances = np.array([0.2, 0.5, 0.9], np.float32)
    x = np.full((3, 72), 0.5, np.float32) + distances[:, None] * direction
    return classifier, x.reshape(3, *SHAPE), np.ones(3, int), distances


# ---- smallest perturbations ------------------------------------------------------------------------------------------

SMALLEST = {
    "SmoothAdvDDN": lambda c, **more: SmoothAdvDDN(c, max_iter=80, samples=65, levels=None, **more),
    "minimal": lambda c, eps=1.0, **more: SmoothAdvPGD(c, max_iter=80, samples=65, minimal=True, eps=eps, **more),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_perturbation_is_found_where_there_is_one(name):
    classifier, x, y, distances = line()
    attack = SMALLEST[name](classifier)
    adv = attack.generate(x, y)
    assert attack.success.tolist() == [True] * 3
    assert attack.success.dtype == np.bool_
    np.testing.assert_allclose(np.linalg.norm((adv - x).reshape(3, -1), axis=1), distances, atol=0.12)
    bounded = SMALLEST[name](classifier, eps=0.7, batch_size=2)
    adv = bounded.generate(x, y)
    assert bounded.success.tolist() == [True, True, False]
    spent = np.linalg.norm((adv - x).reshape(3, -1).astype(np.float64), axis=1)
    assert 0.6 < spent[2] <= 0.7 * (1 + 1e-6)  # not the unchanged image
    already = SMALLEST[name](classifier)
    assert np.array_equal(already.generate(x, 1 - y), x)
    assert already.success.all()


def test_success_is_that_of_core_and_of_the_last_call(x, y):
    attack = SmoothAdvDDN(smoothed(), max_iter=10, batch_size=2, eps=0.1)
    attack.generate(x, y)
    _, success = smooth_adv_ddn(cnn(3), torch.tensor(x), torch.tensor(y), SIGMA, steps=10, max_norm=0.1)
    assert attack.success.tolist() == success.tolist()
    assert 0 < success.sum() < 5
    attack.generate(x[:1], y[:1])
    assert attack.success.shape == (1,)
    attack.estimator.base_model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        attack.generate(x, y)
    assert attack.success is None


def test_an_attack_with_a_fixed_budget_claims_no_success(x, y):
    attack = SmoothAdvPGD(smoothed(), minimal=True, max_iter=3)
    attack.generate(x, y)
    assert attack.success is not None
    attack.set_params(minimal=False)
    attack.generate(x, y)
    assert attack.success is None


# ---- metrics and trainers --------------------------------------------------------------------------------------------


@each_attack
def test_metrics_of_an_object(attack, x):
    classifier = smoothed()
    crafter = attack(classifier, eps=0.1 if attack is SmoothAdvLinfPGD else 1.5)
    assert adversarial_accuracy(classifier, x, attack_crafter=crafter) < 0.7
    assert adversarial_accuracy(classifier, x, attack_crafter=attack(classifier, eps=0)) == 1


@pytest.mark.parametrize("attack", [SmoothAdvPGD, SmoothAdvPGD.published, SmoothAdvDDN])
def test_metrics_by_name_get_the_smallest_perturbation(attack, monkeypatch):
    """They set minimal=True and compare what they predict before and after, in the attack's norm.

    The smallest perturbation lies where the attack's draws change their mind, which the classifier's own need not have
    done yet: with this seed they have.
    """
    monkeypatch.setitem(SUPPORTED_METHODS, "ours", {"class": attack, "params": {"samples": 33, "max_iter": 60}})
    classifier, images, y, distances = line(seed=1)
    relative = distances / np.linalg.norm(images.reshape(3, -1), axis=1)
    assert empirical_robustness(classifier, images, "ours", {"eps": 2.0}) == pytest.approx(relative.mean(), rel=0.2)
    assert adversarial_accuracy(classifier, images, y, "ours", {"eps": 0.05}) == 1


@each_attack
def test_a_member_of_autoattack(attack, x):
    classifier = smoothed()
    y = np.eye(CLASSES)[classifier.predict(x).argmax(axis=1)]
    norm, eps = (np.inf, 0.1) if attack is SmoothAdvLinfPGD else (2, 1.0)
    for targeted in (False, True):
        member = attack(classifier, eps=eps, max_iter=6)
        adv = AutoAttack(classifier, norm=norm, eps=eps, attacks=[member], targeted=targeted).generate(x, y)
        assert member.targeted is targeted
        assert (classifier.predict(adv).argmax(axis=1) != y.argmax(axis=1)).sum() >= 2
        assert np.linalg.norm((adv - x).reshape(5, -1), ord=norm, axis=1).max() <= eps * (1 + 1e-6)


@each_attack
def test_adversarial_training_crafts_fresh_examples(attack, x, y):
    model = cnn(3)
    classifier = smoothed(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), input_shape=SHAPE)
    calls = []

    class Counted(attack):
        def generate(self, x, y=None, **more):
            calls.append(len(x))
            return super().generate(x, y, **more)

    before = classifier.predict(x)
    trainer = AdversarialTrainer(classifier, Counted(classifier, max_iter=2, verbose=True), ratio=1.0)
    trainer.fit(x, np.eye(CLASSES)[y], batch_size=3, nb_epochs=2)
    assert calls == [3, 2, 3, 2]
    assert not np.array_equal(classifier.predict(x), before)


# ---- writers ---------------------------------------------------------------------------------------------------------


class Listener(SummaryWriter):
    def __init__(self):
        self.updates, self.resets = [], 0

    def update(self, **what):
        assert not torch.is_inference_mode_enabled()
        what["estimator"].loss_gradient(what["x"], what["y"])  # a writer may look for itself
        self.updates.append(what)

    def reset(self):
        self.resets += 1


@each_attack
@pytest.mark.parametrize("make", [smoothed, plain])
def test_a_writer_hears_of_every_step_and_may_ask_for_gradients(make, attack, x, y):
    classifier, writer = make(), Listener()
    made = attack(classifier, sigma=SIGMA, max_iter=3, batch_size=3, summary_writer=writer)
    before = state(classifier)
    adv = made.generate(x, y)
    assert state(classifier) == before
    assert np.array_equal(adv, attack(classifier, sigma=SIGMA, max_iter=3, batch_size=3).generate(x, y))
    assert [(u["batch_id"], u["global_step"]) for u in writer.updates] == [(b, s) for b in (0, 1) for s in (1, 2, 3)]
    assert writer.resets == 1
    first, second, *_ = writer.updates
    assert np.array_equal(first["x"], x[:3])
    assert np.abs(second["x"] - first["x"]).max() > 1e-3  # what was handed over is not changed later
    assert all(type(first[name]) is np.ndarray for name in ("x", "y", "grad"))


def test_a_writer_knows_an_image_by_its_place_also_after_others_have_stopped():
    """ART's own compares steps image by image; a batch that shrinks would be an error there, or another's numbers."""
    classifier, x, y, _ = line()
    writer = Listener()
    settings = {"eps": 1.5, "max_iter": 8, "samples": 32, "early_stop": 0.5}
    adv = SmoothAdvPGD(classifier, **settings, eps_step=0.2, summary_writer=writer).generate(x, y)
    assert np.array_equal(adv, SmoothAdvPGD(classifier, **settings, eps_step=0.2).generate(x, y))
    moved = np.array([np.abs(b["x"] - a["x"]).reshape(3, -1).max(axis=1) > 0 for a, b in pairwise(writer.updates)])
    stops = moved.sum(axis=0)
    assert stops[0] < stops[1] < stops[2]  # the nearest to the boundary stops first
    for update in writer.updates:
        assert update["x"].shape == update["grad"].shape == x.shape
        assert (np.abs(update["grad"]).reshape(3, -1).max(axis=1) > 0).all()
    assert np.array_equal(writer.updates[-1]["x"][0], adv[0])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning:art")
@each_attack
def test_arts_own_writer_with_all_its_indicators(attack, x, y, tmp_path, monkeypatch):
    import tensorboardX

    written = []
    add = tensorboardX.SummaryWriter.add_scalars

    def listening(self, tag, values, *args, **kwargs):
        written.append((tag, list(values.values())))
        return add(self, tag, values, *args, **kwargs)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalars", listening)
    writer = SummaryWriterDefault(str(tmp_path), ind_1=True, ind_2=True, ind_3=True, ind_4=True)
    stops = {} if attack is SmoothAdvDDN else {"early_stop": 0.5}
    made = attack(smoothed(), max_iter=4, batch_size=3, summary_writer=writer, **stops)
    made.generate(x, y)
    made.summary_writer.summary_writer.close()
    assert {len(values) for tag, values in written if tag.endswith("batch-0")} == {3}
    assert {len(values) for tag, values in written if tag.endswith("batch-1")} == {2}
    assert sum("Indicator" in tag for tag, _ in written) >= 8
    finite = [values for tag, values in written if "Indicator 2" not in tag]  # it divides by a difference of losses
    assert all(np.isfinite(np.asarray(values, float)).all() for values in finite)
    made.set_params(summary_writer=False)
    assert made.summary_writer is None
    made.set_params(summary_writer=str(tmp_path / "other"))
    made.generate(x, y)
    made.summary_writer.summary_writer.close()
    assert list((tmp_path / "other").rglob("*tfevents*"))


@each_attack
def test_passes_are_what_the_settings_say(attack, x, y):
    """No hidden predictions: a step is one pass over samples, DDN judges its last image."""
    model = Recorder(cnn(3))
    classifier = smoothed(model, input_shape=SHAPE)
    model.batches = []
    attack(classifier, max_iter=3, samples=4).generate(x, y)
    assert model.inputs == 5 * 4 * (4 if attack is SmoothAdvDDN else 3)
