"""ART's own attacks and metrics run unedited, and what they attack is the smoothed classifier."""

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    BasicIterativeMethod,
    BoundaryAttack,
    CarliniL2Method,
    CarliniLInfMethod,
    DeepFool,
    ElasticNet,
    FastGradientMethod,
    HopSkipJump,
    NewtonFool,
    ProjectedGradientDescent,
    ProjectedGradientDescentNumpy,
    ProjectedGradientDescentPyTorch,
    ShadowAttack,
    SimBA,
    SquareAttack,
    VirtualAdversarialMethod,
)
from art.estimators.classification import PyTorchClassifier
from art.evaluations.security_curve import SecurityCurve
from art.metrics import adversarial_accuracy, clever_u, empirical_robustness, loss_sensitivity
from art.utils import compute_success, random_sphere
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, seeded

SAMPLES = 8
QUIET = {"verbose": False}

WHITE_BOX = {
    "FGM": lambda c: FastGradientMethod(c, eps=0.1),
    "FGM l2": lambda c: FastGradientMethod(c, norm=2, eps=0.5),
    "FGM minimal": lambda c: FastGradientMethod(c, eps=0.2, eps_step=0.05, minimal=True),
    "PGD": lambda c: ProjectedGradientDescent(c, eps=0.1, eps_step=0.05, max_iter=3, **QUIET),
    "PGD torch l2": lambda c: ProjectedGradientDescentPyTorch(c, norm=2, eps=0.5, eps_step=0.2, max_iter=3, **QUIET),
    "PGD numpy l2": lambda c: ProjectedGradientDescentNumpy(c, norm=2, eps=0.5, eps_step=0.2, max_iter=3, **QUIET),
    "PGD random start": lambda c: ProjectedGradientDescent(c, eps=0.1, max_iter=2, num_random_init=1, **QUIET),
    "PGD targeted": lambda c: ProjectedGradientDescent(c, eps=0.1, max_iter=2, targeted=True, **QUIET),
    "BIM": lambda c: BasicIterativeMethod(c, eps=0.1, max_iter=2, **QUIET),
    "APGD": lambda c: AutoProjectedGradientDescent(c, norm=2, eps=0.5, max_iter=5, nb_random_init=1, **QUIET),
    "APGD ce": lambda c: AutoProjectedGradientDescent(
        c, norm=2, eps=0.5, max_iter=5, nb_random_init=1, loss_type="cross_entropy", **QUIET
    ),
    "APGD dlr": lambda c: AutoProjectedGradientDescent(
        c, norm=2, eps=0.5, max_iter=5, nb_random_init=1, loss_type="difference_logits_ratio", **QUIET
    ),
    "DeepFool": lambda c: DeepFool(c, max_iter=3, **QUIET),
    "DeepFool 2 gradients": lambda c: DeepFool(c, max_iter=3, nb_grads=2, **QUIET),
    "CarliniL2": lambda c: CarliniL2Method(c, max_iter=3, binary_search_steps=1, **QUIET),
    "CarliniLInf": lambda c: CarliniLInfMethod(c, max_iter=3, **QUIET),
    "ElasticNet": lambda c: ElasticNet(c, max_iter=3, binary_search_steps=1, **QUIET),
    "NewtonFool": lambda c: NewtonFool(c, max_iter=3, **QUIET),
    "SmoothAdvPGD": lambda c: SmoothAdvPGD(c, max_iter=3),
}
BLACK_BOX = {
    "HopSkipJump": lambda c: HopSkipJump(c, max_iter=1, max_eval=20, init_eval=5, init_size=5, **QUIET),
    "Boundary": lambda c: BoundaryAttack(c, targeted=False, max_iter=2, num_trial=2, init_size=5, **QUIET),
    "Square": lambda c: SquareAttack(c, norm=2, eps=0.5, max_iter=5, **QUIET),
}
ONLY_PROBABILITIES = {
    "SimBA": lambda c: SimBA(c, max_iter=5, **QUIET),
    "VirtualAdversarial": lambda c: VirtualAdversarialMethod(c, max_iter=2, **QUIET),
    "NewtonFool": lambda c: NewtonFool(c, max_iter=3, **QUIET),
}

# The hosts' own code, which is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:art"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:art"),
    pytest.mark.filterwarnings("ignore:x. .* images hold NaN:rs_plugins.errors.RSPluginsWarning"),  # Square: 0/0
]


def smoothed(model=None, sigma=0.25, **settings):
    return SmoothedClassifier(cnn(3) if model is None else model, sigma, samples=SAMPLES, **settings)


def labels_for(attack, classifier, x):
    return np.roll(rows_of(classifier, x), 1, axis=1) if attack.targeted else rows_of(classifier, x)


def rows_of(classifier, x):
    """What evaluation code passes as labels that the model gets right."""
    return np.eye(CLASSES)[classifier.predict(x).argmax(1)]


def recorded(make, x, **settings):
    """Run an attack and return what it made, and all that the base model was shown meanwhile, in eval mode or not."""
    model = Recorder(cnn(3))
    classifier = smoothed(model, input_shape=SHAPE, **settings)
    attack = make(classifier)
    y = labels_for(attack, classifier, x)
    model.batches = []
    np.random.seed(0)  # noqa: NPY002  ART's generator
    return attack.generate(x, y), model.batches


@pytest.mark.parametrize("name", WHITE_BOX | BLACK_BOX)
def test_an_attack_runs_unedited_and_shows_the_base_model_nothing_but_noisy_images(name, x):
    adv, batches = recorded((WHITE_BOX | BLACK_BOX)[name], x[:3])
    assert adv.shape == x[:3].shape
    assert np.isfinite(adv).all()
    assert (adv.min(), adv.max()) >= (-1e-6, 0)
    assert adv.max() <= 1 + 1e-6
    assert batches
    draws = SmoothedModel(cnn(), 0.25, samples=SAMPLES).fixed_draws(torch.zeros(1, *SHAPE))
    for batch in batches:
        # each pass holds whole images: m copies that differ by the draws, which lie far outside the box
        count = 16 if name == "SmoothAdvPGD" and len(batch) % 16 == 0 else SAMPLES
        assert len(batch) % count == 0
        copies = batch.unflatten(0, (-1, count))
        spread = copies[:, 1:] - copies[:, :1]
        if count == SAMPLES and name != "SmoothAdvPGD":
            torch.testing.assert_close(spread, (draws[1:] - draws[:1]).expand_as(spread), atol=1e-5, rtol=0)
        assert float(spread.std()) == pytest.approx(0.25 * 2**0.5, rel=0.5)


@pytest.mark.parametrize("name", ONLY_PROBABILITIES)
def test_attacks_that_want_probabilities_run_on_probabilities(name, x):
    adv, batches = recorded(ONLY_PROBABILITIES[name], x[:2], output="probs")
    assert adv.shape == x[:2].shape
    assert sum(map(len, batches)) >= 2 * SAMPLES


def test_shadow_attack(x):
    one_channel = x[:1, :1]
    classifier = smoothed(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))))
    target = np.roll(rows_of(classifier, one_channel), 1, axis=1)
    adv = ShadowAttack(classifier, nb_steps=2, batch_size=2, **QUIET).generate(one_channel, target)
    assert adv.shape == one_channel.shape


GRADIENT = ("FGM", "FGM l2", "PGD", "PGD torch l2", "PGD numpy l2", "BIM", "APGD", "APGD ce", "NewtonFool", "DeepFool")


@pytest.mark.parametrize("name", GRADIENT)
def test_a_gradient_attack_differs_from_the_one_on_the_base_model(name, x):
    base = PyTorchClassifier(
        cnn(3), nn.CrossEntropyLoss(), SHAPE, CLASSES, clip_values=(0, 1), device_type="cpu"
    )  # as evaluation code without smoothing makes it
    y = rows_of(smoothed(), x)
    made = []
    for classifier in (smoothed(input_shape=SHAPE), base):
        np.random.seed(0)  # noqa: NPY002  ART's generator
        made.append(WHITE_BOX[name](classifier).generate(x, y))
    assert np.abs(made[0] - made[1]).max() > 0.01


def test_the_step_of_fgm_is_along_the_smoothed_gradient(x, y):
    classifier = smoothed()
    gradient = classifier.loss_gradient(x, y)  # compared with an independent formula in test_gradients.py
    adv = FastGradientMethod(classifier, eps=0.05).generate(x, np.eye(CLASSES)[y])
    np.testing.assert_allclose(adv, np.clip(x + 0.05 * np.sign(gradient), 0, 1), atol=1e-6)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "difference_logits_ratio"])
def test_a_rebuilt_classifier_still_contains_the_smoothed_module(loss_type):
    classifier = smoothed(input_shape=SHAPE)
    attack = AutoProjectedGradientDescent(classifier, loss_type=loss_type, **QUIET)
    assert attack.estimator is not classifier
    assert attack.estimator.model is classifier.model


class Constant(nn.Module):
    """The same logits whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits + 0 * x.flatten(1)[:, : len(self.logits)]


@pytest.mark.parametrize("logits", [[0.0] * 4, [0.01, 0.0, 0.0, 0.0], [30.0, 0.0, 0.0, 0.0], [0.0, 0.0, -0.1, 0.2]])
@pytest.mark.parametrize("loss_type", [None, "cross_entropy", "difference_logits_ratio"])
def test_apgd_accepts_the_model_however_sure_it_is_of_the_all_ones_image(logits, loss_type):
    """It refuses estimators whose prediction of that image looks like probabilities, such as nearly uniform rows."""
    classifier = SmoothedClassifier(Constant(logits), 0.25, input_shape=SHAPE)
    AutoProjectedGradientDescent(classifier, loss_type=loss_type, **QUIET)


def test_autoattack_with_and_without_our_attack(x):
    classifier = smoothed()
    y = rows_of(classifier, x)
    for targeted in (False, True):
        members = [SmoothAdvPGD(classifier, eps=0.5, eps_step=0.2, max_iter=4), WHITE_BOX["APGD ce"](classifier)]
        attack = AutoAttack(classifier, norm=2, eps=0.5, eps_step=0.2, attacks=members, targeted=targeted)
        adv = attack.generate(x, y)
        assert np.linalg.norm((adv - x).reshape(5, -1), axis=1).max() <= 0.5 * (1 + 1e-4)
        assert compute_success(classifier, x, y, adv) > 0


def test_autoattack_with_its_own_attacks(x):
    classifier = smoothed(input_shape=SHAPE)
    adv = AutoAttack(classifier, norm=2, eps=0.5, eps_step=0.2).generate(x[:1], rows_of(classifier, x[:1]))
    assert adv.shape == x[:1].shape


@pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")  # scipy, in the fit of CLEVER
def test_metrics(x):
    classifier = smoothed()
    y = rows_of(classifier, x)
    attack = FastGradientMethod(classifier, eps=0.3)
    assert adversarial_accuracy(classifier, x, y, attack_crafter=attack) < 1
    assert adversarial_accuracy(classifier, x, y, "fgsm", {"eps": 0.3}) < 1
    assert np.isfinite(empirical_robustness(classifier, x, "fgsm", {"eps_step": 0.1, "eps": 1.0}))
    assert loss_sensitivity(classifier, x, y) > 0
    assert clever_u(classifier, x[0], 2, 3, 0.5, norm=2, pool_factor=1, verbose=False) > 0


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_security_curve(norm, x):
    classifier = smoothed()
    y = rows_of(classifier, x)
    eps, adversarial, benign = SecurityCurve(eps=[0.01, 0.5]).evaluate(
        classifier, x, y, norm=norm, eps_step=0.1, max_iter=2, verbose=False
    )
    assert benign == 1.0
    assert len(adversarial) == len(eps) == 2
    assert adversarial[1] < 1


def test_attacks_without_clip_values_may_leave_the_box(x):
    classifier = smoothed(clip_values=None)
    adv = FastGradientMethod(classifier, eps=0.5).generate(x, rows_of(classifier, x))
    assert adv.max() > 1
    assert classifier.predict(adv).shape == (5, CLASSES)


def test_arts_random_start_does_not_reach_our_draws(x):
    """ART draws from numpy's global generator; our predictions do not."""
    classifier = smoothed()
    rows = classifier.predict(x)
    random_sphere(2, 3, 0.1, np.inf)
    torch.randn(3)
    assert np.array_equal(classifier.predict(x), rows)
