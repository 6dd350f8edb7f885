"""The classifier with certificates by bounds: what it says is what core says, and ART's own class agrees."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchattacks
from art import config
from art.attacks.evasion import (
    AutoProjectedGradientDescent,
    DeepFool,
    FastGradientMethod,
    HopSkipJump,
    ProjectedGradientDescent,
)
from art.data_generators import NumpyDataGenerator
from art.estimators.certification.interval import PyTorchIBPClassifier
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.nn import functional

import rs_plugins
from rs_plugins.core.relaxations.certifying import certify_bounds
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning
from rs_plugins_art.bounds_classifier import BoundsClassifier
from rs_plugins_art.bounds_module import MODES, BoundedModel
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, cnn, seeded

EPS = 0.03
QUIET = {"verbose": False}
BOUNDS = ("ibp", "crown-ibp", "crown")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:art"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:art"),
]


class Plain(nn.Module):
    """A network that ART's interval classifier takes: layers as children, in order, the reshape in between."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.relu2 = nn.ReLU()
        self.linear1 = nn.Linear(24, 12)
        self.relu3 = nn.ReLU()
        self.linear2 = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.linear2(self.relu3(self.linear1(torch.flatten(x, 1))))


def network():
    """Return a network for images (n, 2, 6, 6) whose predictions are of several classes."""
    model = seeded(Plain).eval()
    images = torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.linear2.bias -= model(images).mean(0)
        model.linear2.weight *= 20
        model.linear2.bias -= model(images).mean(0)
    return model


def bounded(model=None, **settings):
    model = network() if model is None else model
    return BoundsClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, **settings)


def trainable(model=None, lr=0.005, **settings):
    model = network() if model is None else model
    return bounded(model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), **settings)


def arts(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PyTorchIBPClassifier(
            copy.deepcopy(model), nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", **settings
        )


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]


@pytest.fixture
def right(x):
    return network()(torch.tensor(x)).argmax(1).numpy()


def test_the_public_name():
    assert rs_plugins.BoundsClassifier is BoundsClassifier


@pytest.mark.parametrize(("theirs", "ours"), [(2, "l2"), (np.inf, "linf"), ("inf", "linf")])
def test_norms_have_names_of_art_too(theirs, ours, x, y):
    classifier = bounded()
    assert np.array_equal(classifier.margins(x, y, EPS, norm=theirs), classifier.margins(x, y, EPS, norm=ours))
    assert [record.made_with.norm for record in classifier.certify_records(x, y, EPS, norm=theirs)] == [ours] * len(x)


# ---- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_margins_are_those_of_core(bound, norm, x, y):
    model = network()
    expected = RelaxedNetwork(model, SHAPE).margins(Region(torch.tensor(x), EPS, norm), torch.tensor(y), method=bound)
    for classifier, method in ((bounded(bound=bound), None), (bounded(bound="ibp"), bound)):
        found = classifier.margins(x, y, EPS, method, norm=norm, batch_size=2)
        assert found.shape == (5, CLASSES - 1)
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


def test_margins_are_below_those_of_images_in_the_ball(x, right):
    model = network()
    margins = bounded(model).margins(x, np.eye(CLASSES)[right], EPS)
    noise = torch.rand(500, *x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        logits = model((torch.tensor(x) + EPS * noise).clamp(0, 1).flatten(0, 1)).unflatten(0, (500, 5))
    for row, label in enumerate(right):
        others = [k for k in range(CLASSES) if k != label]
        least = (logits[:, row, label, None] - logits[:, row, others]).amin(0).numpy()
        assert (margins[row] <= least + 1e-5).all()
        assert (margins[row] > least - 1).all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_certificates_are_those_of_core(bound, x, right):
    classifier = bounded(bound=bound)
    labels = right.copy()
    labels[0] = (labels[0] + 1) % CLASSES
    cascade = BOUNDS[: BOUNDS.index(bound) + 1]
    settings = {"attack_steps": 3, "attack_restarts": 2, "seed": 4}
    for eps in (0.001, EPS, 0.3):
        images, classes = torch.tensor(x), torch.tensor(labels)
        records = certify_bounds(network(), images, classes, eps, cascade=cascade, **settings)
        expected = [record.status == "verified" for record in records]
        assert classifier.certify(x, labels, eps, **settings).tolist() == expected
        found = classifier.certify_records(x, np.eye(CLASSES)[labels], eps, batch_size=2, **settings)
        assert [(r.index, r.status, r.method) for r in found] == [(r.index, r.status, r.method) for r in records]
        assert found[0].status == "misclassified"
        assert found[0].made_with.cascade == ", ".join(cascade)
        assert found[0].made_with.seed == 4
    assert classifier.certify(x, right, 1e-4).all()


def test_options_of_certificates(x, right):
    classifier = bounded(seed=7)
    settings = {"cascade": ["ibp", "alpha-crown"], "norm": "l2", "alpha_steps": 2, "attack_steps": 0}
    first = classifier.certify_records(x[:2], right[:2], 0.1, **settings, indices=[4, 9], dtype=torch.float32)[1]
    assert first.index == 9
    made = first.made_with
    assert (made.norm, made.cascade, made.attack) == ("l2", "ibp, alpha-crown (2 steps)", "none")
    assert (made.dtype, made.seed) == ("float32", 7)


def test_a_tighter_bound_proves_more(x, right):
    proved = {bound: bounded(bound=bound).certify(x, right, 0.06).sum() for bound in BOUNDS}
    assert proved["ibp"] < proved["crown"]


# ---- beside ART's own class ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [[0.0, 1.0], None])
def test_intervals_equal_arts(limits, x, right):
    model = network()
    ours, art = bounded(model, bound="ibp"), arts(model)
    how = {"bounds": EPS, "limits": limits, "batch_size": 2}
    expected = art.predict_intervals(x, **how)
    found = ours.predict_intervals(x, **how)
    assert found.shape == expected.shape == (5, 2, CLASSES)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    boxes = art.concrete_to_interval(x, EPS, limits)
    np.testing.assert_allclose(ours.concrete_to_interval(x, EPS, limits), boxes, atol=1e-7)
    np.testing.assert_allclose(ours.predict_intervals(boxes, is_interval=True), expected, atol=1e-5)
    theirs = art.certify(preds=expected, labels=right)
    assert (ours.certify(preds=found, labels=right) == theirs).all()
    assert (ours.certify(found, np.eye(CLASSES)[right]) == theirs).all()
    assert (ours.certify(x, right, EPS) >= theirs).all()


def test_boxes_of_every_kind_equal_arts(x):
    model = network()
    ours, art = bounded(model, bound="ibp"), arts(model)
    below, above = np.full(SHAPE, 0.01, np.float32), np.linspace(0, 0.05, 72, dtype=np.float32).reshape(SHAPE)
    for bounds in ([0.01, 0.05], [below, above], np.stack([below, above])):
        expected = art.predict_intervals(x, bounds=bounds, limits=[0.1, 0.9])
        np.testing.assert_allclose(ours.predict_intervals(x, bounds=bounds, limits=[0.1, 0.9]), expected, atol=1e-5)


def stretched(x, bounds, limits):
    return np.stack([x - 2 * bounds, x + 2 * bounds], axis=1).clip(*limits)


def test_boxes_of_ones_own_kind(x):
    ours = bounded(concrete_to_interval=stretched)
    assert ours.provided_concrete_to_interval is stretched
    found = ours.predict_intervals(x, bounds=0.01, limits=[0, 1])
    np.testing.assert_allclose(found, bounded().predict_intervals(x, bounds=0.02, limits=[0, 1]), atol=1e-6)


@pytest.mark.parametrize("bound", BOUNDS[1:])
def test_intervals_by_linear_bounds_hold_the_logits_and_are_narrower(bound, x):
    narrow, wide = (bounded(bound=b).predict_intervals(x, bounds=EPS, limits=[0, 1]) for b in (bound, "ibp"))
    logits = bounded().predict(x)
    assert (narrow[:, 0] <= logits).all()
    assert (logits <= narrow[:, 1]).all()
    assert (narrow[:, 1] - narrow[:, 0]).mean() < (wide[:, 1] - wide[:, 0]).mean()


def test_intervals_prove_nothing_where_they_touch():
    intervals = np.array([[[1.0, 0.0], [2.0, 0.5]], [[1.0, 0.0], [2.0, 1.0]], [[1.0, 0.0], [2.0, 3.0]]])
    assert bounded().certify(preds=intervals, labels=[0, 0, 0]).tolist() == [True, False, False]
    assert bounded().certify(intervals, [1, 1, 1]).tolist() == [False] * 3


# ---- the module and its modes --------------------------------------------------------------------------------------


def test_the_network_is_shared_and_not_changed(x):
    model = network()
    before, classifier = copy.deepcopy(model.state_dict()), bounded(model)
    assert classifier.base_model is classifier.model.module is model
    assert isinstance(classifier.model, BoundedModel)
    assert {name.partition("module.")[2] for name in classifier.model.state_dict()} == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "set_forward_mode")
    with torch.no_grad():
        model.linear2.bias += torch.tensor([0.0, 5.0, 0.0, 0.0])
    assert (classifier.predict(x).argmax(1) == 1).all()
    assert (classifier.predict_intervals(x, bounds=0.01)[:, 0, 1] > 4).all()  # no conversion to be repeated


def test_every_mode_gives_the_same_answers(x, right):
    answers = []
    for mode in (None, *MODES):
        classifier = trainable()
        if mode is not None:
            classifier.model.set_forward_mode(mode)
            assert classifier.model.forward_mode == mode
        assert classifier.model.re_convert() is None
        assert classifier.re_convert() is None
        attack = ProjectedGradientDescent(classifier, eps=0.1, eps_step=0.05, max_iter=2, **QUIET)
        images = attack.generate(x, np.eye(CLASSES)[right])
        answers.append([classifier.predict(x), images, classifier.predict_intervals(x, bounds=EPS)])
        assert classifier.get_accuracy(classifier.predict(x), right) == 1
        assert classifier.get_accuracy(torch.tensor(classifier.predict(x)), right + np.array([1, 0, 0, 0, 0])) == 0.8
        classifier.fit(x, right, nb_epochs=1)
        answers[-1].append(classifier.predict(x))
    for other in answers[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(answers[0], other, strict=True))


def test_the_module_itself(x):
    classifier = bounded(bound="ibp")
    module, images = classifier.model, torch.tensor(x)
    logits = network()(images)
    boxes = classifier.concrete_to_interval(x, EPS, [0, 1])
    intervals = classifier.predict_intervals(x, bounds=EPS, limits=[0, 1])
    for mode in MODES:
        module.set_forward_mode(mode)
        for given in (x, x.astype(np.float64), images):
            torch.testing.assert_close(module(given), logits)
            torch.testing.assert_close(module.forward(given), logits)
    module.set_forward_mode("abstract")
    for given in (boxes, torch.tensor(boxes)):
        np.testing.assert_allclose(module.forward(given).detach().numpy(), intervals, atol=1e-6)
    assert module.forward(torch.tensor(boxes)).requires_grad
    module.set_forward_mode("concrete")
    with pytest.raises(RuntimeError):
        module(torch.tensor(boxes))
    with pytest.raises(InputError, match="mode: expected one of 'abstract', 'concrete', 'attack', got 'real'"):
        module.set_forward_mode("real")


def test_the_shape_may_be_learnt(x, right):
    classifier = BoundsClassifier(network())
    with pytest.raises(InputError, match="input_shape: not known before the first batch"):
        _ = classifier.input_shape
    with pytest.raises(InputError, match="input_shape: not known before the first batch"):
        _ = classifier.model.network
    assert classifier.model(torch.tensor(x)).shape == (5, CLASSES)
    assert np.array_equal(classifier.margins(x, right, EPS), bounded().margins(x, right, EPS))
    assert (classifier.input_shape, classifier.nb_classes) == (SHAPE, CLASSES)


class Odd(nn.Module):
    """Has a layer that nobody knows how to bound."""

    def __init__(self):
        super().__init__()
        self.strange = nn.Softshrink()
        self.last = nn.Linear(72, CLASSES)

    def forward(self, x):
        return self.last(self.strange(x).flatten(1))


def test_what_bounds_do_not_know_is_refused_by_name_before_any_work(x):
    with pytest.raises(ModelError, match="strange"):
        bounded(Odd())
    classifier = BoundsClassifier(Odd())
    for _ in range(2):
        with pytest.raises(ModelError, match="strange"):
            classifier.predict(x)


# ---- predictions and gradients -------------------------------------------------------------------------------------


def stock(model):
    return PyTorchClassifier(
        copy.deepcopy(model), nn.CrossEntropyLoss(), SHAPE, CLASSES, clip_values=(0, 1), device_type="cpu"
    )


def test_predictions_gradients_and_losses_are_those_of_arts_classifier(x, y):
    ours, art = bounded(), stock(network())
    rows = np.eye(CLASSES, dtype=np.float32)[y]
    np.testing.assert_allclose(ours.predict(x, batch_size=2), art.predict(x), atol=1e-6)
    assert ours.predict(x, y=y, logits=True).dtype == np.float32
    np.testing.assert_allclose(ours.loss_gradient(x, y), art.loss_gradient(x, rows), atol=1e-7)
    np.testing.assert_allclose(ours.class_gradient(x), art.class_gradient(x), atol=1e-6)
    np.testing.assert_allclose(ours.class_gradient(x, 2), art.class_gradient(x, 2), atol=1e-6)
    np.testing.assert_allclose(ours.class_gradient(x, list(y)), art.class_gradient(x, list(y)), atol=1e-6)
    for reduction in ("none", "mean", "sum"):
        np.testing.assert_allclose(ours.compute_loss(x, y, reduction), art.compute_loss(x, rows, reduction), rtol=1e-5)
    np.testing.assert_allclose(ours.compute_losses(x, y)["total"], art.compute_loss(x, rows), rtol=1e-5)
    activations = network().conv1(torch.tensor(x)).detach()
    np.testing.assert_allclose(ours.get_activations(x, "conv1", batch_size=2), activations, atol=1e-6)
    np.testing.assert_array_equal(ours.get_activations(x, 0), ours.get_activations(x, "conv1"))
    assert ours.layer_names[:2] == ["conv1", "relu1"]


def test_soft_labels_tensors_and_types(x, y):
    classifier = bounded()
    soft = np.full((5, CLASSES), 0.25)
    images = torch.tensor(x, requires_grad=True)
    loss = functional.cross_entropy(network()(images), torch.tensor(soft).float())
    (expected,) = torch.autograd.grad(loss, images)
    np.testing.assert_allclose(classifier.loss_gradient(x, soft), expected, atol=1e-7)
    found = classifier.loss_gradient(torch.tensor(x, dtype=torch.float64), torch.tensor(soft))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)
    assert classifier.compute_loss(images, y).requires_grad
    assert classifier._predict_framework(images)[0].requires_grad
    assert classifier.predict(x[:0]).shape == (0, CLASSES)
    assert classifier.loss_gradient(x[:0], y[:0]).shape == (0, *SHAPE)
    assert classifier.margins(x[:0], y[:0], EPS).shape == (0, CLASSES - 1)
    assert classifier.predict_intervals(x[:0], bounds=EPS).shape == (0, 2, CLASSES)
    assert classifier.certify(x[:0], y[:0], EPS).shape == (0,)
    with pytest.warns(RSPluginsWarning, match="images hold NaN"):
        assert np.isnan(classifier.predict(np.where(np.arange(5)[:, None, None, None] == 1, np.nan, x))[1]).all()


USES = {
    "predict": lambda c, x, y: c.predict(x),
    "certify": lambda c, x, y: c.certify(x, y, EPS, attack_steps=1),
    "margins": lambda c, x, y: c.margins(x, y, EPS),
    "predict_intervals": lambda c, x, y: c.predict_intervals(x, bounds=EPS),
    "loss_gradient": lambda c, x, y: c.loss_gradient(x, y),
    "class_gradient": lambda c, x, y: c.class_gradient(x),
    "compute_loss": lambda c, x, y: c.compute_loss(x, y),
    "get_activations": lambda c, x, y: c.get_activations(x, 0),
    "fit": lambda c, x, y: c.fit(x, y, nb_epochs=1),
}


@pytest.mark.parametrize("use", USES)
def test_the_model_is_left_as_it_was(use, x, y):
    model = network().train()
    model.relu1.eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    model.linear2.bias.requires_grad_(False)
    classifier, before, random = trainable(model), state(model), torch.random.get_rng_state()
    USES[use](classifier, x, y)
    after = state(model)
    assert after[0] == before[0]
    assert [p[0] for p in after[1]] == [p[0] for p in before[1]]
    assert all(one[1] is two[1] for one, two in zip(after[1], before[1], strict=True))
    assert torch.equal(torch.random.get_rng_state(), random)
    trained = any(not torch.equal(*pair) for pair in zip(model.parameters(), network().parameters(), strict=True))
    assert trained is (use == "fit")


def test_bounds_are_in_eval_mode(x, y):
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    )
    classifier = bounded(model.train())
    found = [classifier.margins(x, y, EPS), classifier.predict_intervals(x, bounds=EPS), classifier.predict(x)]
    model.eval()
    again = [classifier.margins(x, y, EPS), classifier.predict_intervals(x, bounds=EPS), classifier.predict(x)]
    assert all(np.array_equal(one, two) for one, two in zip(found, again, strict=True))


# ---- attacks -------------------------------------------------------------------------------------------------------

ATTACKS = {
    "FGM": lambda c: FastGradientMethod(c, eps=0.2),
    "PGD": lambda c: ProjectedGradientDescent(c, eps=0.2, eps_step=0.05, max_iter=8, **QUIET),
    "APGD": lambda c: AutoProjectedGradientDescent(c, eps=0.2, eps_step=0.1, max_iter=8, nb_random_init=1, **QUIET),
    "APGD rebuilt": lambda c: AutoProjectedGradientDescent(
        c, eps=0.2, eps_step=0.1, max_iter=8, nb_random_init=1, loss_type="cross_entropy", **QUIET
    ),
    "DeepFool": lambda c: DeepFool(c, max_iter=10, **QUIET),
    "HopSkipJump": lambda c: HopSkipJump(c, max_iter=1, max_eval=20, init_eval=5, init_size=20, **QUIET),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_arts_attacks_succeed_where_nothing_is_proved(name, x, right):
    np.random.seed(0)  # noqa: NPY002  ART's generator
    classifier = bounded()
    found = ATTACKS[name](classifier).generate(x, np.eye(CLASSES)[right])
    assert found.shape == x.shape
    fooled = classifier.predict(found).argmax(1) != right
    assert fooled.any()
    distance = float(np.abs(found - x).max())
    assert not classifier.certify(x, right, distance + 1e-6, attack_steps=0)[fooled].any()


@pytest.mark.parametrize("mode", MODES)
def test_torchattacks_runs_on_the_module(mode, x, right):
    classifier = bounded()
    classifier.model.set_forward_mode(mode)
    images, labels = torch.tensor(x), torch.tensor(right)
    found = torchattacks.PGD(classifier.model.eval(), eps=0.2, alpha=0.05, steps=8, random_start=False)(images, labels)
    assert (classifier.predict(found.numpy()).argmax(1) != right).any()


# ---- training ------------------------------------------------------------------------------------------------------


def test_fit_is_plain_training_that_can_be_repeated(x, right):
    one, two, other = trainable(seed=1), trainable(seed=1), trainable(seed=2)
    loss = one.compute_loss(x, right, "mean")
    for classifier in (one, two, other):
        classifier.fit(x, np.eye(CLASSES)[right], batch_size=2, nb_epochs=3)
    assert one.compute_loss(x, right, "mean") < loss
    assert np.array_equal(one.predict(x), two.predict(x))
    assert not np.array_equal(one.predict(x), other.predict(x))
    one.fit(x, right, batch_size=2, nb_epochs=1, drop_last=True, training_mode=False, first_epoch=3)
    two.fit_generator(NumpyDataGenerator(x, right, batch_size=5), nb_epochs=1)
    assert not np.array_equal(one.predict(x), two.predict(x))


class Steps:
    """Counts."""

    count = 0

    def step(self):
        self.count += 1


def test_fit_with_a_scheduler_and_what_it_refuses(x, y):
    scheduler, classifier = Steps(), trainable()
    classifier.fit(x, y, nb_epochs=2, scheduler=scheduler)
    classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=5), nb_epochs=3, scheduler=scheduler)
    assert scheduler.count == 5
    with pytest.raises(InputError, match="validation_data: expected None"):
        classifier.fit(x, y, validation_data=(x, y))
    with pytest.raises(InputError, match="optimizer: needed for training"):
        bounded().fit(x, y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nb_epoch'"):
        classifier.fit(x, y, nb_epoch=1)


# ---- settings, copies, files ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def art_folder(tmp_path, monkeypatch):
    folder = tmp_path / "art data"
    folder.mkdir()
    monkeypatch.setattr(config, "ART_DATA_PATH", str(folder))
    return folder


BAD_SETTINGS = {
    "bound": ({"bound": "deeppoly"}, "bound: expected one of 'ibp', 'crown-ibp', 'crown', got 'deeppoly'"),
    "seed": ({"seed": 1.5}, "seed: expected an integer or None, got 1.5"),
    "loss": ({"loss": nn.MSELoss()}, r"loss: expected torch.nn.CrossEntropyLoss\(\) .* got MSELoss"),
    "classes": ({"nb_classes": 3}, "nb_classes|expected 3 columns"),
    "shape": ({"input_shape": (2, 6)}, "model: it fails on an input|input_shape"),
    "preprocessing": ({"preprocessing": (0.5, 0.25)}, "preprocessing: expected the identity, None or"),
    "clip values": ({"clip_values": (0, 255)}, r"clip_values: expected \(0, 1\) or None, got"),
    "optimizer": ({"optimizer": "adam"}, "optimizer: expected a torch.optim.Optimizer or None, got str"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(case, x):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises((InputError, ModelError), match=message):
        BoundsClassifier(network(), **{"input_shape": SHAPE} | settings)
    classifier = bounded()
    rows = classifier.predict_intervals(x, bounds=EPS)
    with pytest.raises((InputError, ModelError), match=message):
        classifier.set_params(**{"bound": "ibp", **settings})
    assert classifier.bound == "crown"
    assert np.array_equal(classifier.predict_intervals(x, bounds=EPS), rows)


def test_words_of_arts_constructor():
    words = {"preprocessing_defences": None, "postprocessing_defences": None, "preprocessing": (0.0, 1.0)}
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    place = ("cpu", "gpu")[torch.cuda.is_available()]
    loss = nn.CrossEntropyLoss()
    classifier = BoundsClassifier(model, loss, SHAPE, CLASSES, optimizer, False, (0, 1), **words, device_type=place)
    assert (classifier.optimizer, classifier.channels_first, classifier.loss) == (optimizer, False, loss)
    with pytest.raises(TypeError, match=r"BoundsClassifier\(\) got an unexpected keyword argument 'bounds'"):
        bounded(bounds="ibp")
    with pytest.raises(InputError, match="noise would be added twice"):
        BoundsClassifier(SmoothedClassifier(cnn(), 0.25).model)
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, got"):
        BoundsClassifier(lambda x: x)


def test_params_round_trip(x):
    classifier = bounded(bound="ibp", seed=3, clip_values=None, channels_first=False)
    params = classifier.get_params()
    assert (params["bound"], params["seed"], params["input_shape"], params["nb_classes"]) == ("ibp", 3, SHAPE, CLASSES)
    assert (params["clip_values"], params["channels_first"]) == (None, False)
    classifier.set_params(**params)
    classifier.set_params(bound="crown", seed=4)
    assert (classifier.bound, classifier.model.bound, classifier.seed) == ("crown", "crown", 4)
    assert bounded(seed=None).seed != bounded(seed=None).seed
    for part in ("BoundsClassifier(Plain(", "bound='crown'", "seed=4", "input_shape=(2, 6, 6)"):
        assert part in repr(classifier)
    with pytest.raises(InputError, match="model: cannot be exchanged; make a new BoundsClassifier"):
        classifier.set_params(model=network())
    with pytest.raises(InputError, match=r"set_params: expected names among .*; got 'sigma'"):
        classifier.set_params(sigma=0.25)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda classifier: pickle.loads(pickle.dumps(classifier))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_complete_and_independent(how, x, y, art_folder):
    classifier = trainable(bound="crown-ibp", seed=5)
    classifier.fit(x, y, nb_epochs=2)
    classifier.model.set_forward_mode("attack")
    twin = COPIES[how](classifier)
    assert (twin.bound, twin.seed, twin.model.forward_mode) == ("crown-ibp", 5, "attack")
    for use in ("predict", "margins", "predict_intervals", "certify"):
        assert np.array_equal(USES[use](twin, x, y), USES[use](classifier, x, y))
    classifier.fit(x, y, nb_epochs=1)
    assert not np.array_equal(twin.margins(x, y, EPS), classifier.margins(x, y, EPS))
    twin.fit(x, y, nb_epochs=1)  # its optimiser and its bounds are of its own weights
    assert np.array_equal(twin.margins(x, y, EPS), classifier.margins(x, y, EPS))
    assert not list(art_folder.iterdir())


def test_clone_for_refitting(x, y):
    classifier = trainable(lr=0.0123, bound="ibp", seed=5)
    clone = classifier.clone_for_refitting()
    assert type(clone) is BoundsClassifier
    assert (clone.bound, clone.seed, clone.input_shape) == ("ibp", 5, SHAPE)
    assert clone.optimizer.defaults["lr"] == 0.0123
    assert not np.array_equal(clone.predict(x), classifier.predict(x))
    before = clone.margins(x, y, EPS)
    clone.fit(x, y, nb_epochs=1)
    assert not np.array_equal(clone.margins(x, y, EPS), before)


@pytest.mark.parametrize("clip_values", [None, (0, 1)])
def test_save_and_load(clip_values, x, y, tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    classifier = bounded(model, optimizer=optimizer, bound="crown-ibp", seed=5, clip_values=clip_values)
    classifier.fit(x, y, nb_epochs=2)
    classifier.save("model", str(tmp_path))
    fresh = seeded(Plain, 1)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.5)
    loaded = BoundsClassifier.load(
        "model", str(tmp_path), model=fresh, optimizer=optimizer, concrete_to_interval=stretched, device_type="cpu"
    )
    assert loaded.base_model is fresh
    assert loaded.provided_concrete_to_interval is stretched
    assert (loaded.bound, loaded.seed, loaded.clip_values is None) == ("crown-ibp", 5, clip_values is None)
    assert np.array_equal(loaded.margins(x, y, EPS), classifier.margins(x, y, EPS))
    for each in (loaded, classifier):
        each.fit(x, y, nb_epochs=1)
    assert np.array_equal(loaded.predict(x), classifier.predict(x))


def test_files_of_another_class_are_refused(tmp_path):
    SmoothedClassifier(cnn(), 0.25).save("smoothed", str(tmp_path))
    with pytest.raises(InputError, match="filename: expected a file of BoundsClassifier, got one of a smoothed"):
        BoundsClassifier.load("smoothed", str(tmp_path), model=cnn())
    bounded().save("bounds", str(tmp_path))
    with pytest.raises(InputError, match="filename: expected a file of SmoothedClassifier, got one of BoundsClass"):
        SmoothedClassifier.load("bounds", str(tmp_path), model=network())


# ---- what is refused -----------------------------------------------------------------------------------------------

IMAGES = {
    "NaN": (lambda x: np.where(x > 0.5, np.nan, x), "x: expected finite values, got NaN or infinity"),
    "integers": (lambda x: (x * 255).astype(np.uint8), "x: expected floating-point pixels .* divide 8-bit images by"),
    "shape": (lambda x: x[..., :5], r"x: expected a batch of images of shape \(2, 6, 6\), got shape \(5, 2, 6, 5\)$"),
    "one image": (lambda x: x[0], r"got shape \(2, 6, 6\); one image needs a batch axis, x\[None\]"),
    "outside": (lambda x: x * 1.5, r"x: expected pixels in \[0, 1\], got values from"),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("use", ["certify", "margins", "fit", "predict_intervals", "loss_gradient"])
def test_bad_images_are_refused(use, case, x, y):
    spoil, message = IMAGES[case]
    if case == "outside" and use in ("predict_intervals", "loss_gradient"):
        assert USES[use](trainable(), spoil(x), y).shape[0] == 5  # attacks leave the box, ART's boxes too
        return
    with pytest.raises(InputError, match=message):
        USES[use](trainable(), spoil(x), y)


@pytest.mark.parametrize("use", ["certify", "margins", "fit", "loss_gradient", "compute_loss"])
def test_bad_labels_are_refused(use, x, y):
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 4\), got values from 1 to 4"):
        USES[use](trainable(), x, y + 1)
    with pytest.raises(InputError, match="y: expected one label per image"):
        USES[use](trainable(), x, y[:3])


INTERVALS = np.stack([np.zeros((5, CLASSES)), np.ones((5, CLASSES))], axis=1)
MISTAKES = {
    "images without eps": (lambda c, x, y: c.certify(x, y), r"preds: expected intervals .* give the radius eps"),
    "both": (lambda c, x, y: c.certify(x, y, EPS, preds=INTERVALS), "eps: expected None with interval predictions"),
    "labels": (lambda c, x, y: c.certify(preds=INTERVALS, labels=y + 1), r"labels: expected labels in \[0, 4\)"),
    "negative eps": (lambda c, x, y: c.certify(x, y, -1.0), "eps: expected a finite number >= 0, got -1"),
    "negative": (lambda c, x, y: c.margins(x, y, -1.0), "eps: expected a finite number >= 0, got -1"),
    "norm": (lambda c, x, y: c.certify(x, y, EPS, norm="l1"), "norm: expected one of 'linf', 'l2', got 'l1'"),
    "norm of margins": (lambda c, x, y: c.margins(x, y, EPS, norm="l1"), "norm: expected one of 'linf', 'l2'"),
    "cascade": (lambda c, x, y: c.certify(x, y, EPS, cascade=["sdp"]), "cascade: expected bounds out of 'ibp'"),
    "method": (lambda c, x, y: c.margins(x, y, EPS, "sdp"), "bound: expected one of 'ibp', .*, got 'sdp'"),
    "no bounds": (lambda c, x, y: c.predict_intervals(x), "bounds: expected the radius of the boxes .* got None"),
    "no boxes": (
        lambda c, x, y: c.predict_intervals(x[:, :1], is_interval=True),
        r"x: expected boxes of shape \(n, 2, \*input\), got shape \(5, 1, 6, 6\)",
    ),
    "upside down": (
        lambda c, x, y: c.predict_intervals(np.stack([x + EPS, x], 1), is_interval=True),
        r"x: expected boxes whose lower ends, x\[:, 0\], are at most their upper ends",
    ),
    "training mode": (lambda c, x, y: c.predict(x, training_mode=True), "training_mode: expected False"),
    "intervals in training mode": (
        lambda c, x, y: c.predict_intervals(x, bounds=EPS, training_mode=True),
        "training_mode: expected False",
    ),
    "reduction": (lambda c, x, y: c.compute_loss(x, y, "max"), "reduction: expected 'none', 'mean' or 'sum', got 'max"),
    "layer": (lambda c, x, y: c.get_activations(x, "conv9"), "layer: expected a layer of the base model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, x, y):
    call, message = MISTAKES[case]
    with pytest.raises(InputError, match=message):
        call(bounded(), x, y)


def test_options_of_certificates_are_none_of_intervals(y):
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm' with interval predictions"):
        bounded().certify(preds=INTERVALS, labels=y, norm="l2")


@pytest.mark.parametrize("way", ["intervals", "margins"])
def test_bounds_are_computed_with_all_digits_of_their_type(way, x, y):
    """Whatever the caller has switched on: autocast to half precision, and TensorFloat-32."""
    seen = []
    model = cnn()
    ours = bounded(model)

    def bounds():
        return ours.predict_intervals(x, bounds=EPS) if way == "intervals" else ours.margins(x, y, EPS)

    expected = bounds()
    convolve = functional.conv2d
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(functional, "conv2d", lambda *how: seen.append(torch.backends.cudnn.allow_tf32) or convolve(*how))
        assert np.array_equal(bounds(), expected)
    assert set(seen) == {False}
