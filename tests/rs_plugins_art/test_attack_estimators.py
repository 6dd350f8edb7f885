"""What the attacks accept: ART's own smoothed classifiers, plain ones, black boxes, models without a gradient."""

import copy
import pickle

import numpy as np
import pytest
import torch
from art.defences.preprocessor import GaussianAugmentation
from art.estimators.certification.randomized_smoothing import (
    NumpyRandomizedSmoothing,
    PyTorchMACER,
    PyTorchRandomizedSmoothing,
    PyTorchSmoothAdv,
    PyTorchSmoothMix,
)
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, seeded

ATTACKS = (SmoothAdvPGD, SmoothAdvLinfPGD, SmoothAdvDDN)
OF_ART = (PyTorchRandomizedSmoothing, PyTorchSmoothAdv, PyTorchSmoothMix, PyTorchMACER)
each_attack = pytest.mark.parametrize("attack", ATTACKS)
each_of_art = pytest.mark.parametrize("make", OF_ART)


def of_art(make=PyTorchRandomizedSmoothing, model=None, scale=0.25, **more):
    model = cnn(3) if model is None else model
    return make(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", scale=scale, **more)


def plain(model=None, **more):
    model = cnn(3) if model is None else model
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", **more)


# ---- ART's smoothed classifiers --------------------------------------------------------------------------------------


@each_of_art
@each_attack
def test_arts_smoothed_classifiers_are_attacked_like_ours_of_the_same_scale(attack, make, x, y):
    estimator = of_art(make)
    made = attack(estimator, max_iter=3)
    assert made.estimator is estimator
    expected = attack(SmoothedClassifier(cnn(3), 0.25), max_iter=3).generate(x, y)
    assert np.array_equal(made.generate(x, y), expected)
    assert np.array_equal(attack(estimator, max_iter=3, sigma=0.25).generate(x, y), expected)
    assert not np.array_equal(attack(of_art(make, scale=0.5), max_iter=3).generate(x, y), expected)


@each_of_art
def test_their_noise_is_added_once(make, x, y):
    model = Recorder(cnn(3))
    SmoothAdvPGD(of_art(make, model), eps=0, max_iter=3, samples=64, antithetic=False).generate(x, y)
    noise = model.seen().reshape(3, 5, 64, *SHAPE) - torch.tensor(x).unsqueeze(1)
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


def test_without_labels_arts_abstention_is_no_label():
    """Its `predict` returns rows of zeros for images that it is not sure about, which an arg max calls class 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES))
    slope = seeded(lambda: torch.randn(72), 3)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([0 * slope, slope, 0 * slope, -slope]))
        model[1].bias.copy_(torch.tensor([-5.0, -slope.sum() / 2, -5.0, slope.sum() / 2 + 0.3]))
    estimator, x = of_art(model=model, sample_size=32), np.full((3, *SHAPE), 0.5, np.float32)
    assert not estimator.predict(x).any()
    labels = SmoothedClassifier(model, 0.25).predict(x).argmax(axis=1)
    assert (labels != 0).all()
    for attack in (SmoothAdvPGD(estimator, max_iter=3), SmoothAdvPGD(plain(model), sigma=0.25, max_iter=3)):
        assert np.array_equal(attack.generate(x), attack.generate(x, labels))
        assert not np.array_equal(attack.generate(x), attack.generate(x, 0 * labels))


class Band(nn.Module):
    """Says 1 only of images whose mean is almost exactly one half, which under noise it nearly never is."""

    def forward(self, x):
        margin = 200 * (0.005 - (x.flatten(1).mean(dim=1) - 0.5).abs())
        return torch.stack([0 * margin, margin, 0 * margin - 9, 0 * margin - 9], dim=1)


@pytest.mark.parametrize("kind", ["ours", "art's", "plain"])
@each_attack
def test_without_labels_they_are_those_of_the_smoothed_classifier_not_of_the_base_model(attack, kind):
    make = {"ours": lambda m: SmoothedClassifier(m, 0.25, device_type="cpu"), "art's": lambda m: of_art(model=m)}
    x = np.full((3, *SHAPE), 0.5, np.float32)
    assert Band()(torch.tensor(x)).argmax(dim=1).tolist() == [1, 1, 1]
    made = attack(make.get(kind, plain)(Band()), sigma=0.25, max_iter=3, eps=0.5)
    assert np.array_equal(made.generate(x), made.generate(x, [0, 0, 0]))
    assert not np.array_equal(made.generate(x), made.generate(x, [1, 1, 1]))


@each_attack
def test_their_scale_is_read_when_it_is_needed_and_no_other_sigma_is_taken(attack, x, y):
    estimator = of_art()
    made, pinned = attack(estimator, max_iter=2), attack(estimator, max_iter=2, sigma=0.25)
    estimator.set_params(scale=0.5)
    expected = attack(SmoothedClassifier(cnn(3), 0.5), max_iter=2).generate(x, y)
    assert np.array_equal(made.generate(x, y), expected)
    with pytest.raises(InputError, match=r"sigma: expected 0\.5, which the smoothed classifier brings, got 0.25"):
        pinned.generate(x, y)
    estimator.set_params(scale=0.0)
    with pytest.raises(InputError, match=r"scale: expected a finite number > 0, got 0\.0"):
        made.generate(x, y)


@pytest.mark.filterwarnings("ignore:(?s)\\s*With the current backend:UserWarning")
@each_attack
def test_what_would_change_images_or_add_noise_twice_is_refused(attack):
    with pytest.raises(InputError, match="preprocessing: expected the identity"):
        attack(of_art(preprocessing=(0.5, 0.25)))
    with pytest.raises(InputError, match="preprocessing_defences: expected None"):
        attack(of_art(preprocessing_defences=GaussianAugmentation(augmentation=False)))
    with pytest.raises(InputError, match="base: expected a base classifier, got a SmoothedModel; noise would be added"):
        attack(of_art(model=SmoothedModel(cnn(3), 0.25)))
    inside = nn.Sequential(nn.Identity(), SmoothedModel(cnn(3), 0.25))
    with pytest.raises(InputError, match="got a Sequential with a SmoothedModel inside; noise would be added twice"):
        attack(plain(inside), sigma=0.25)
    with pytest.raises(EstimatorError):
        attack(NumpyRandomizedSmoothing(plain(), sample_size=8, scale=0.25, alpha=0.001))


# ---- models without a gradient ---------------------------------------------------------------------------------------


class Steps(nn.Module):
    """A network whose outputs come in steps, so that no gradient flows through it."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(72, CLASSES)))
        with torch.no_grad():
            self.network[1].weight.mul_(4)

    def forward(self, x):
        return (4 * self.network(x)).round() / 4


class Detached(Steps):
    def forward(self, x):
        return super().forward(x).detach()


def ask(model):
    return lambda x: model(torch.from_numpy(x)).detach().numpy()


def black_box(model, sigma=0.25, **more):
    return SmoothedBlackBox(BlackBoxClassifier(ask(model), SHAPE, CLASSES, clip_values=(0, 1)), sigma, **more)


WITHOUT_GRADIENT = {
    "of the model": lambda: SmoothedClassifier(Detached(), 0.25),
    "of ART's classifier": lambda: of_art(model=Detached()),
    "of a plain classifier": lambda: plain(Detached()),
    "of a black box": lambda: black_box(Steps()),
}


@pytest.mark.parametrize("gradient", ["stein", "centred-stein"])
@pytest.mark.parametrize("kind", WITHOUT_GRADIENT)
def test_an_attack_without_a_gradient(kind, gradient):
    """By Stein's identity the smoothed classifier is fooled, which steps along random directions do not achieve."""
    estimator = WITHOUT_GRADIENT[kind]()
    x = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(3)).numpy()
    judge = SmoothedClassifier(Steps(), 0.25, samples=500)
    settings = {"sigma": 0.25, "samples": 100, "gradient": gradient, "eps": 0.5}
    y = judge.predict(x).argmax(axis=1)
    adv = SmoothAdvPGD(estimator, **settings).generate(x, y)
    direction = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    direction *= 0.5 / np.linalg.norm(direction.reshape(20, -1), axis=1).reshape(-1, 1, 1, 1)
    moved = np.clip(x + direction, 0, 1)
    confidence = [np.exp(judge.predict(images))[range(20), y].mean() for images in (x, moved, adv)]
    assert confidence[2] < 0.5 * min(confidence[:2])
    assert np.linalg.norm((adv - x).reshape(20, -1), axis=1).max() <= 0.5 * (1 + 1e-6)
    ddn = SmoothAdvDDN(estimator, **settings | {"eps": 1.0}, max_iter=10)
    assert (judge.predict(ddn.generate(x, y)).argmax(axis=1) != y).mean() > 0.5
    assert ddn.success.mean() > 0.5


def test_backpropagation_without_a_gradient_is_refused(x, y):
    with pytest.raises(ModelError, match="no gradient flows from its logits to its input"):
        SmoothAdvPGD(SmoothedClassifier(Detached(), 0.25)).generate(x, y)
    message = (
        "gradient: expected 'stein' or 'centred-stein' for a SmoothedBlackBox, which has no gradient, got 'backprop'"
    )
    with pytest.raises(InputError, match=message):
        SmoothAdvPGD(black_box(Steps()))
    attack = SmoothAdvPGD(black_box(Steps()), gradient="stein")
    with pytest.raises(InputError, match=message):
        attack.set_params(gradient="backprop")
    assert attack.gradient == "stein"


def test_a_black_box_without_labels_loses_what_it_predicts(x):
    estimator = black_box(Steps(), samples=64)
    attack = SmoothAdvPGD(estimator, gradient="stein", max_iter=2)
    assert np.array_equal(attack.generate(x), attack.generate(x, estimator.predict(x).argmax(axis=1)))
    with pytest.raises(
        InputError, match=r"x: expected a batch of images of shape \(2, 6, 6\), got shape \(5, 2, 6, 5\)"
    ):
        attack.generate(x[..., :5])


class Loud(nn.Module):
    """Is a little for 0 on most noisy copies, and loudly for 1 on the others, which a vote by probabilities follows."""

    def forward(self, x):
        loud = (x.flatten(1).mean(dim=1) > 0.51).float()  # of four copies in ten
        return torch.stack([0.3 * (1 - loud), 9 * loud, -9 + 0 * loud, -9 + 0 * loud], dim=1)


def test_the_vote_of_a_black_box_is_a_hard_one():
    x = np.full((3, *SHAPE), 0.5, np.float32)
    hard, soft = black_box(Loud(), samples=200), SmoothedClassifier(Loud(), 0.25, samples=200, device_type="cpu")
    assert (hard.predict(x).argmax(axis=1) == 0).all()
    assert (soft.predict(x).argmax(axis=1) == 1).all()
    for estimator, label in ((hard, 0), (soft, 1)):
        attack = SmoothAdvPGD(estimator, gradient="stein", max_iter=2)
        assert np.array_equal(attack.generate(x), attack.generate(x, [label] * 3))
        assert not np.array_equal(attack.generate(x), attack.generate(x, [1 - label] * 3))


# ---- models in other types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["ours", "plain"])
@each_attack
def test_budget_box_and_mask_hold_whatever_the_model_computes_in(attack, kind, dtype):
    """The perturbed pixels are no numbers of bfloat16: only the model is in that type."""
    model = cnn(3).to(dtype)
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(5)).numpy()
    x[:, :, 0] = x[:, :, 0].round()
    estimator = SmoothedClassifier(model, 0.25) if kind == "ours" else plain(model)
    mask = np.arange(6) < 4
    made = attack(estimator, sigma=0.25, eps=0.05, max_iter=4)
    adv = made.generate(x, mask=mask)
    delta = (adv.astype(np.float64) - x).reshape(5, -1)
    assert adv.dtype == np.float32
    assert np.linalg.norm(delta, ord=getattr(made, "norm", 2), axis=1).max() <= 0.05 * (1 + 1e-6)
    assert 0 <= adv.min() <= adv.max() <= 1
    assert np.array_equal(adv[..., 4:], x[..., 4:])
    already = np.zeros(5, bool) if made.success is None else made.success
    assert ((np.abs(delta).max(axis=1) > 1e-3) | already).all()


def test_a_result_in_double_precision_is_rounded_towards_the_image():
    """To the nearest float32 number, many equal pixels would all be rounded out of the ball."""
    model = nn.Linear(100_000, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-5], [-1e-5]]))
    x, eps = np.full((8, 100_000), 0.5, np.float32), np.linspace(0.5, 1, 8)
    classifier = SmoothedClassifier(model, 0.25)
    adv = SmoothAdvPGD(classifier, eps=eps, max_iter=1, samples=2).generate(x, np.zeros(8, int))
    spent = np.linalg.norm(adv.astype(np.float64) - x, axis=1)
    assert (spent <= eps * (1 + 1e-6)).all()
    assert (spent > eps * (1 - 1e-4)).all()


# ---- the rest of the contract, for each attack -----------------------------------------------------------------------

EPS = np.array([0.1, 0.2, 0.3, 0.05, 0.0])


@pytest.mark.parametrize(
    "form", [lambda e: e, lambda e: e.reshape(5, 1, 1, 1), torch.tensor], ids=["n", "n111", "tensor"]
)
@each_attack
def test_a_budget_for_each_image(attack, form, x):
    made = attack(SmoothedClassifier(cnn(3), 0.25), eps=form(EPS), batch_size=2, max_iter=10)
    adv = made.generate(x)  # of wrong labels DDN would have nothing to do
    spent = np.linalg.norm((adv.astype(np.float64) - x).reshape(5, -1), ord=getattr(made, "norm", 2), axis=1)
    assert (spent <= EPS * (1 + 1e-6)).all()
    assert (spent[:4] > EPS[:4] / 2).all()
    with pytest.raises(InputError, match="eps: expected one value for all pixels of an image, got one per pixel"):
        attack(SmoothedClassifier(cnn(3), 0.25), eps=np.linspace(0, 1, 72).reshape(SHAPE)).generate(x)


@each_attack
def test_images_and_labels_of_every_form(attack, x, y):
    made = attack(SmoothedClassifier(cnn(3), 0.25), max_iter=2, targeted=True)
    expected = made.generate(x, y)
    read_only = np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)
    for images in (x.astype(np.float64), read_only, torch.tensor(x, requires_grad=True)):
        for labels in (y.reshape(-1, 1), np.eye(CLASSES)[y], y.tolist()):
            adv = made.generate(images, labels)
            np.testing.assert_allclose(adv, expected, atol=1e-6)
            assert (type(adv), adv.dtype) == (np.ndarray, np.float32)
    with pytest.raises(ValueError, match="y: needed for a targeted attack"):
        made.generate(x)


@each_attack
def test_an_empty_batch(attack):
    for estimator in (SmoothedClassifier(cnn(3), 0.25), of_art(), plain()):
        made = attack(estimator, sigma=0.25)
        for y in (np.zeros(0, int), None):
            adv = made.generate(np.zeros((0, *SHAPE), np.float32), y)
            assert (adv.shape, adv.dtype) == ((0, *SHAPE), np.float32)
        assert made.success is None or made.success.shape == (0,)


@each_attack
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_attack_alike(attack, how, x, y):
    made = attack(SmoothedClassifier(cnn(3), 0.25), eps=0.3, max_iter=2)
    adv = made.generate(x, y)
    twin = how(made)
    assert np.array_equal(twin.generate(x, y), adv)
    assert repr(twin) == repr(made)
    twin.set_params(eps=0.1)
    assert made.eps == 0.3


@pytest.mark.parametrize("kind", ["ours", "art's", "plain"])
@each_attack
def test_a_model_in_train_mode_is_attacked_in_eval_mode(attack, kind, x):
    """And chunk bounds the passes of the vote that stands in for labels, too."""
    make = {"ours": lambda m: SmoothedClassifier(m, 0.25, input_shape=SHAPE), "art's": lambda m: of_art(model=m)}
    model = Recorder(cnn(3))
    made = attack(make.get(kind, plain)(model), sigma=0.25, max_iter=3, eps=0.5, chunk=3)
    expected = made.generate(x)
    model.batches = []
    made.estimator.model.train()
    assert np.array_equal(made.generate(x), expected)
    assert all(module.training for module in made.estimator.model.modules())
    assert max(map(len, model.batches)) == 3


@each_attack
def test_repr_reads(attack):
    made = attack(SmoothedClassifier(cnn(3), 0.25), eps=np.full((5, 1, 1, 1), 0.3), seed=7)
    text = repr(made)
    assert text.startswith(f"{attack.__name__}(")
    assert text.endswith("summary_writer=None)")
    assert "eps=array(5, 1, 1, 1), " in text
    assert "seed=7, " in text


@each_attack
def test_global_generators_are_left_alone(attack, x, y):
    made = attack(plain(), sigma=0.5, samples=4, max_iter=3, seed=None, eps=0.5)  # little noise ends in one corner
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = made.generate(x)
    drawn = float(torch.rand(())), float(np.random.rand())  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert drawn == (float(torch.rand(())), float(np.random.rand()))  # noqa: NPY002
    assert not np.array_equal(made.generate(x), first)


BAD_DDN = {
    "eps": ({"eps": -1}, "eps: expected finite values >= 0, got -1"),
    "gamma": ({"gamma": 1}, r"gamma: expected a number in \(0, 1\), got 1"),
    "init_norm": ({"init_norm": [0.1, 0]}, r"init_norm: expected finite values > 0, got \[0.1, 0\]"),
    "levels": ({"levels": 1}, "levels: expected an integer >= 2, got 1"),
    "max_iter": ({"max_iter": 0}, "max_iter: expected an integer >= 1, got 0"),
    "confirm": ({"confirm": 1}, r"confirm: expected a number in \(0, 1\), got 1"),
    "confirm too sure": ({"confirm": 1e-29}, "confirm: expected at least 1.59e-28, the surest that 101 votes of 100 d"),
}


@pytest.mark.parametrize("case", BAD_DDN)
def test_settings_of_ddn_that_are_refused(case):
    options, message = BAD_DDN[case]
    with pytest.raises(InputError, match=message):
        SmoothAdvDDN(SmoothedClassifier(cnn(3), 0.25), **options)
    made = SmoothAdvDDN(SmoothedClassifier(cnn(3), 0.25))
    before = repr(made)
    with pytest.raises(InputError, match=message):
        made.set_params(**{"samples": 3, **options})
    assert repr(made) == before
    for name in made.attack_params:
        made.set_params(**{name: getattr(made, name)})
