"""SmoothAdvPGD as an ART EvasionAttack: it translates; the arithmetic is core's, and tested there."""

import copy
import pickle

import numpy as np
import pytest
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError
from art.metrics import adversarial_accuracy
from art.summary_writer import SummaryWriter, SummaryWriterDefault
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, mlp
from .test_gradients import FORMS, forms


def smoothed(model=None, sigma=0.25, **more):
    return SmoothedClassifier(cnn(3) if model is None else model, sigma, **more)


def plain(model=None, shape=SHAPE, **more):
    return PyTorchClassifier(
        cnn(3) if model is None else model, nn.CrossEntropyLoss(), shape, CLASSES, device_type="cpu", **more
    )


def norms(delta):
    return np.linalg.norm(delta.reshape(len(delta), -1), axis=1)


def core(x, y, **options):
    adv = smooth_adv_pgd(cnn(3), torch.tensor(x), torch.tensor(y), 0.25, **options)
    return adv.numpy()


OPTIONS = {
    "defaults": ({}, {}),
    "eps": ({"eps": 0.3}, {"eps": 0.3}),
    "eps_step": ({"eps_step": 0.05}, {"step": 0.05}),
    "max_iter": ({"max_iter": 2}, {"steps": 2}),
    "samples": ({"samples": 3}, {"samples": 3}),
    "noise": ({"noise": "fixed"}, {"noise": "fixed"}),
    "seed": ({"seed": 4}, {"seed": 4}),
    "targeted": ({"targeted": True}, {"targeted": True}),
    "sigma": ({"sigma": 0.25}, {}),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("make", [smoothed, plain])
def test_it_is_cores_attack_on_the_smoothed_and_on_the_plain_classifier(make, case, x, y):
    given_options, expected_options = OPTIONS[case]
    if make is plain:
        given_options = {**given_options, "sigma": 0.25}
    adv = SmoothAdvPGD(make(), **given_options).generate(x, y)
    expected = core(x, y, **expected_options)
    assert adv.dtype == np.float32
    np.testing.assert_allclose(adv, expected, atol=2e-6)
    if case not in ("defaults", "sigma"):
        assert np.abs(expected - core(x, y)).max() > 1e-3  # the option makes a difference


def test_set_params_changes_the_next_call(x, y):
    attack = SmoothAdvPGD(smoothed())
    attack.set_params(eps=0.3, eps_step=0.1, max_iter=3, samples=2, seed=5, noise="fixed", targeted=True)
    expected = core(x, y, eps=0.3, step=0.1, steps=3, samples=2, seed=5, noise="fixed", targeted=True)
    np.testing.assert_allclose(attack.generate(x, y), expected, atol=2e-6)
    attack.eps = 0.1
    assert norms(attack.generate(x, y) - x).max() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 32), (7, 2), (None, 1), (1000, 3)])
def test_batches_and_chunks_change_no_result(chunk, batch_size, x, y):
    expected = SmoothAdvPGD(smoothed(), max_iter=4).generate(x, y)
    attack = SmoothAdvPGD(smoothed(), max_iter=4, chunk=chunk, batch_size=batch_size)
    np.testing.assert_allclose(attack.generate(x, y), expected, atol=1e-5)


def test_chunk_and_batch_size_bound_the_passes(x, y):
    model = Recorder(cnn(3))
    classifier = smoothed(model, input_shape=SHAPE)
    for options, largest in (({"chunk": 7}, 5), ({"batch_size": 2}, 32), ({}, 80)):
        model.batches = []
        SmoothAdvPGD(classifier, max_iter=2, **options).generate(x, y)
        assert max(map(len, model.batches)) == largest
        assert model.inputs == 2 * 5 * 16


def test_it_beats_the_classifier_within_the_budget(x):
    classifier = smoothed()
    y = np.eye(CLASSES)[classifier.predict(x).argmax(1)]
    attack = SmoothAdvPGD(classifier, eps=1.0)
    assert adversarial_accuracy(classifier, x, y, attack_crafter=attack) < 0.5
    targets = np.roll(y, 1, axis=1)
    hit = SmoothAdvPGD(classifier, eps=3.0, eps_step=0.5, max_iter=20, targeted=True).generate(x, targets)
    assert (classifier.predict(hit).argmax(1) == targets.argmax(1)).mean() > 0.5


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    st.floats(0, 4),
    st.floats(0, 4),
    st.integers(0, 2**16),
)
def test_ball_and_box_for_any_shape(shape, eps, step, seed):
    size = int(np.prod(shape))
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((3, *shape)) < 0.3, rng.integers(0, 2, (3, *shape)), rng.random((3, *shape)))
    attack = SmoothAdvPGD(SmoothedClassifier(model, 0.25), eps=eps, eps_step=step, max_iter=3, samples=2)
    adv = attack.generate(x.astype(np.float32), [0, 1, 2])
    assert (adv.min(), adv.max()) >= (0.0, 0.0)
    assert adv.max() <= 1
    assert norms(adv.astype(np.float64) - x.astype(np.float32)).max() <= eps * (1 + 1e-6) + 1e-7


@pytest.mark.parametrize("form", forms(np.zeros(5, int)))
@pytest.mark.parametrize("targeted", [False, True])
def test_labels_of_every_form(targeted, form, x, y):
    attack = SmoothAdvPGD(smoothed(), max_iter=2, targeted=targeted)
    assert np.array_equal(attack.generate(x, forms(y)[form]), attack.generate(x, y))


@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form(form, x, y):
    attack, before = SmoothAdvPGD(smoothed(), max_iter=2), x.copy()
    adv = attack.generate(FORMS[form](x), y)
    assert (type(adv), adv.dtype) == (np.ndarray, np.float32)
    np.testing.assert_allclose(adv, attack.generate(x, y), atol=1e-6)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("make", [smoothed, plain])
def test_without_labels_the_smoothed_predictions_are_the_labels(make, x):
    attack = SmoothAdvPGD(make(), sigma=0.25, max_iter=3, samples=64)
    labels = SmoothedClassifier(cnn(3), 0.25, samples=64).predict(x).argmax(1)
    assert np.array_equal(attack.generate(x), attack.generate(x, labels))


@pytest.mark.parametrize("make", [smoothed, plain])
def test_an_empty_batch_and_vectors(make):
    empty = SmoothAdvPGD(make(), sigma=0.25).generate(np.zeros((0, *SHAPE), np.float32), np.zeros(0, int))
    assert (empty.shape, empty.dtype) == ((0, *SHAPE), np.float32)
    x = np.random.default_rng(0).random((3, 7), dtype=np.float32)
    classifier = smoothed(mlp()) if make is smoothed else plain(mlp(), (7,))
    assert SmoothAdvPGD(classifier, sigma=0.25).generate(x, [0, 1, 2]).shape == (3, 7)


EPS = [0.1, 0.2, 0.3, 0.4, 0.0]
BUDGETS = {
    "list": EPS,
    "per image": np.array(EPS),
    "column": np.array(EPS).reshape(5, 1, 1, 1),
    "like x": np.array(EPS).reshape(5, 1, 1, 1) * np.ones((5, *SHAPE)),
    "tensor": torch.tensor(EPS),
}


@pytest.mark.parametrize("form", BUDGETS)
def test_a_budget_for_each_image(form, x, y):
    attack = SmoothAdvPGD(smoothed(), eps=BUDGETS[form], eps_step=0.2, batch_size=2)
    np.testing.assert_allclose(norms(attack.generate(x, y) - x), EPS, rtol=1e-4, atol=1e-7)
    attack = SmoothAdvPGD(smoothed(), eps=1.0, eps_step=BUDGETS[form], max_iter=1)
    assert norms(attack.generate(x, y) - x)[4] == 0
    assert (norms(attack.generate(x, y) - x)[:4] > 0.05).all()


def test_one_number_as_an_array_and_budgets_that_do_not_fit(x, y):
    for eps in (np.array(0.3), np.array([0.3]), np.full((1, 1, 1, 1), 0.3), np.float32(0.3)):
        assert norms(SmoothAdvPGD(smoothed(), eps=eps).generate(x, y) - x).max() == pytest.approx(0.3, rel=1e-4)
    with pytest.raises(InputError, match=r"eps: expected a shape that broadcasts to \(5, 2, 6, 6\), got \(4,\)"):
        SmoothAdvPGD(smoothed(), eps=np.full(4, 0.3)).generate(x, y)
    with pytest.raises(InputError, match="eps: expected one value for all pixels of an image, got one per pixel"):
        SmoothAdvPGD(smoothed(), eps=np.linspace(0, 1, 6)).generate(x, y)


MASKS = {
    "like x": lambda x: (np.indices(x.shape)[3] < 3).astype(np.float32),
    "row": lambda x: np.array([1, 1, 1, 0, 0, 0]),
    "boolean": lambda x: np.array([True, True, True, False, False, False]),
    "per image": lambda x: np.array([1, 0, 1, 0, 1]).reshape(5, 1, 1, 1),
    "nothing": lambda x: np.zeros(1),
}


@pytest.mark.parametrize("form", MASKS)
def test_a_mask_keeps_pixels_exactly(form, x, y):
    mask = MASKS[form](x)
    free = np.broadcast_to(mask, x.shape) != 0
    adv = SmoothAdvPGD(smoothed(), eps=0.5, batch_size=2).generate(x, y, mask=mask)
    assert np.array_equal(adv[~free], x[~free])
    spent = norms(adv - x)
    touched = free.reshape(5, -1).any(axis=1)
    np.testing.assert_allclose(spent, np.where(touched, 0.5, 0.0), rtol=1e-4)


def test_a_mask_that_does_not_fit_and_other_keywords(x, y):
    with pytest.raises(InputError, match=r"mask: expected a shape that broadcasts to \(5, 2, 6, 6\), got \(4,\)"):
        SmoothAdvPGD(smoothed()).generate(x, y, mask=np.ones(4))
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        SmoothAdvPGD(smoothed()).generate(x, y, masks=np.ones(6))


BAD = {
    "norm": ({"norm": 1}, "norm: expected 2 or inf, got 1"),
    "norm word": ({"norm": "l2"}, "norm: expected 2 or inf, got 'l2'"),
    "norm None": ({"norm": None}, "norm: expected 2 or inf, got None"),
    "norm minus": ({"norm": -np.inf}, "norm: expected 2 or inf, got -inf"),
    "starts": ({"num_random_init": -1}, "num_random_init: expected an integer >= 0, got -1"),
    "minimal": ({"minimal": 1}, "minimal: expected True or False, got 1"),
    "minimal linf": ({"minimal": True, "norm": np.inf}, "minimal: expected False for norm=inf; smallest perturbations"),
    "minimal starts": ({"minimal": True, "num_random_init": 2}, "num_random_init: expected 0 with minimal=True, .* 2"),
    "minimal stop": ({"minimal": True, "early_stop": 0.1}, "early_stop: expected None with minimal=True, .* got 0.1"),
    "rule": ({"rule": "momentum"}, "rule: expected one of 'dual-averaging', 'projected', got 'momentum'"),
    "objective": ({"objective": "margin"}, "objective: expected one of 'log-mean-softmax', .*, got 'margin'"),
    "gradient": ({"gradient": "none"}, "gradient: expected one of 'backprop', 'stein', 'centred-stein', got 'none'"),
    "stein of another": ({"gradient": "stein", "objective": "mean-logits"}, "objective: expected 'log-mean-softmax'"),
    "stein of one": ({"gradient": "stein", "samples": 1}, "samples: expected an integer >= 2, got 1"),
    "antithetic": ({"antithetic": 1}, "antithetic: expected True or False, got 1"),
    "early_stop": ({"early_stop": 0}, r"early_stop: expected a number in \(0, 1\), got 0"),
    "summary_writer": ({"summary_writer": 1}, "summary_writer: expected a bool, a path or a SummaryWriter, got 1"),
    "eps": ({"eps": -0.1}, "eps: expected finite values >= 0, got -0.1"),
    "eps NaN": ({"eps": float("nan")}, "eps: expected finite values >= 0, got nan"),
    "eps word": ({"eps": "8/255"}, "eps: expected an array or tensor of numbers, got str"),
    "eps_step": ({"eps_step": -1}, "eps_step: expected finite values >= 0, got -1"),
    "max_iter": ({"max_iter": 0}, "max_iter: expected an integer >= 1, got 0"),
    "targeted": ({"targeted": "yes"}, "targeted: expected True or False, got 'yes'"),
    "batch_size": ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
    "sigma": ({"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
    "other sigma": ({"sigma": 0.5}, "sigma: expected 0.25, which the smoothed classifier brings, got 0.5"),
    "samples": ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
    "chunk": ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
    "seed": ({"seed": "1"}, "seed: expected an integer or None, got '1'"),
    "noise": ({"noise": "none"}, "noise: expected 'fixed' or 'fresh', got 'none'"),
    "verbose": ({"verbose": 1}, "verbose: expected True or False, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_by_the_constructor_and_by_set_params(case):
    options, message = BAD[case]
    if "summary_writer" not in options:  # there the host's own message comes first
        with pytest.raises(InputError, match=message):
            SmoothAdvPGD(smoothed(), **options)
    attack = SmoothAdvPGD(smoothed())
    before = repr(attack)
    with pytest.raises(InputError, match=message):
        attack.set_params(**{"max_iter": 3, "samples": 3, **options})
    assert repr(attack) == before


def test_set_params_knows_its_names():
    attack = SmoothAdvPGD(smoothed())
    with pytest.raises(ValueError, match='The attribute "epsilon" cannot be set for this attack'):
        attack.set_params(epsilon=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        SmoothAdvPGD(smoothed(), epsilon=1)
    for name in SmoothAdvPGD.attack_params:
        attack.set_params(**{name: getattr(attack, name)})
        assert f"{name}=" in repr(attack)
    assert {"norm", "eps", "eps_step", "max_iter", "targeted", "batch_size", "verbose"} <= set(attack.attack_params)


BAD_CALLS = {
    "NaN": (lambda x, y: (np.full_like(x, np.nan), y), "x: expected finite values, got NaN or infinity"),
    "range": (lambda x, y: (x * 255, y), r"x: expected pixels in \[0, 1\], got values from"),
    "integers": (lambda x, y: ((x * 255).astype(np.uint8), y), "x: expected floating-point pixels"),
    "shape": (lambda x, y: (x[:, :, :5], y), r"x: expected a batch of images of shape \(2, 6, 6\), got"),
    "labels": (lambda x, y: (x, y + 1), r"y: expected labels in \[0, 4\), got values from 1 to 4"),
    "number": (lambda x, y: (x, y[:4]), r"y: expected one label per image, shape \(5,\), got shape \(4,\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("make", [smoothed, plain])
def test_bad_inputs_are_refused(make, case, x, y):
    spoil, message = BAD_CALLS[case]
    classifier = make(input_shape=SHAPE) if make is smoothed else make()
    with pytest.raises(InputError, match=message):
        SmoothAdvPGD(classifier, sigma=0.25).generate(*spoil(x, y))


def test_a_targeted_attack_needs_targets(x):
    with pytest.raises(InputError, match="y: needed for a targeted attack"):
        SmoothAdvPGD(smoothed(), targeted=True).generate(x)


@pytest.mark.parametrize("word", ["estimator", "classifier"])
def test_the_estimator_by_each_of_its_names_is_kept_as_it_is(word):
    classifier = smoothed()
    attack = SmoothAdvPGD(**{word: classifier})
    assert isinstance(attack, EvasionAttack)
    assert attack.estimator is classifier


def test_estimators_that_cannot_be_attacked():
    with pytest.raises(InputError, match="estimator: expected one classifier, as `estimator` or as `classifier`"):
        SmoothAdvPGD()
    with pytest.raises(InputError, match="estimator: expected one classifier, as `estimator` or as `classifier`"):
        SmoothAdvPGD(smoothed(), classifier=smoothed())
    with pytest.raises(EstimatorError):
        SmoothAdvPGD(BlackBoxClassifier(lambda x: x, SHAPE, CLASSES))
    with pytest.raises(InputError, match="sigma: needed, in pixels, because the estimator is not smoothed"):
        SmoothAdvPGD(plain())
    with pytest.raises(InputError, match="preprocessing: expected the identity"):
        SmoothAdvPGD(plain(preprocessing=(0.5, 0.25)), sigma=0.25)
    with pytest.raises(InputError, match=r"clip_values: expected \(0, 1\) or None"):
        SmoothAdvPGD(plain(clip_values=(0, 255)), sigma=0.25)


def test_noise_is_never_added_twice(x, y):
    """A classifier that ART rebuilds around our module is smoothed already."""
    rebuilt = plain(SmoothedModel(cnn(3), 0.25).eval())
    assert np.array_equal(SmoothAdvPGD(rebuilt).generate(x, y), SmoothAdvPGD(smoothed()).generate(x, y))
    with pytest.raises(InputError, match=r"sigma: expected 0\.25, which the smoothed classifier brings, got 0.3"):
        SmoothAdvPGD(rebuilt, sigma=0.3)


def test_sigma_is_read_when_it_is_needed(x, y):
    classifier = smoothed()
    attack = SmoothAdvPGD(classifier)
    before = attack.generate(x, y)
    classifier.set_params(sigma=0.5)
    assert np.array_equal(attack.generate(x, y), SmoothAdvPGD(smoothed(sigma=0.5)).generate(x, y))
    assert not np.array_equal(attack.generate(x, y), before)
    pinned = SmoothAdvPGD(classifier, sigma=0.5)
    classifier.set_params(sigma=0.25)
    with pytest.raises(InputError, match=r"sigma: expected 0\.25, which the smoothed classifier brings, got 0.5"):
        pinned.generate(x, y)


class Doubled(GaussianNoise):
    name = "doubled"

    def draw_(self, out, generator):
        return super().draw_(out, generator).mul_(2)


def test_the_noise_family_is_the_classifiers(x, y):
    adv = SmoothAdvPGD(smoothed(family=Doubled)).generate(x, y)
    assert np.array_equal(adv, SmoothAdvPGD(smoothed(sigma=0.5)).generate(x, y))


def test_seeds(x, y):
    def adv(seed):
        return SmoothAdvPGD(smoothed(), seed=seed, samples=2).generate(x, y)

    assert np.array_equal(adv(0), adv(0))
    assert not np.array_equal(adv(0), adv(1))
    assert not np.array_equal(adv(None), adv(None))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack))])
def test_copies_attack_alike(how, x, y):
    attack = SmoothAdvPGD(smoothed(), eps=0.3, max_iter=2)
    twin = how(attack)
    assert np.array_equal(twin.generate(x, y), attack.generate(x, y))
    twin.set_params(eps=0.1)
    assert attack.eps == 0.3


def test_verbose_shows_a_progress_bar(x, y, capsys):
    SmoothAdvPGD(smoothed(), max_iter=1).generate(x, y)
    assert capsys.readouterr().err == ""
    SmoothAdvPGD(smoothed(), max_iter=1, verbose=True).generate(x, y)
    assert "SmoothAdvPGD" in capsys.readouterr().err


class Listener(SummaryWriter):
    def __init__(self):
        self.updates, self.resets = [], 0

    @property
    def summary_writer(self):
        return self

    def update(self, **what):
        self.updates.append(what)

    def reset(self):
        self.resets += 1


@pytest.mark.parametrize("make", [smoothed, plain])
def test_a_summary_writer_hears_of_every_step(make, x, y):
    writer, classifier = Listener(), make()
    attack = SmoothAdvPGD(classifier, sigma=0.25, max_iter=3, batch_size=2, summary_writer=writer)
    adv = attack.generate(x, y)
    assert np.array_equal(adv, SmoothAdvPGD(classifier, sigma=0.25, max_iter=3, batch_size=2).generate(x, y))
    assert [(u["batch_id"], u["global_step"]) for u in writer.updates] == [(b, s) for b in range(3) for s in (1, 2, 3)]
    assert writer.resets == 1
    first = writer.updates[0]
    assert first["estimator"] is classifier
    assert np.array_equal(first["x"], x[:2])
    assert np.array_equal(first["y"], np.eye(CLASSES)[y[:2]])
    assert (first["grad"].shape, first["targeted"], first["patch"]) == (x[:2].shape, False, None)


@pytest.mark.parametrize("kind", ["path", "indicators"])
def test_arts_summary_writer_writes_numbers(kind, x, y, tmp_path, monkeypatch):
    import tensorboardX

    written = []
    add = tensorboardX.SummaryWriter.add_scalars

    def listening(self, tag, values, *args, **kwargs):
        written.append((tag, list(values.values())))
        return add(self, tag, values, *args, **kwargs)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalars", listening)
    folder = str(tmp_path / "runs")
    writer = folder if kind == "path" else SummaryWriterDefault(folder, ind_1=True, ind_2=True, ind_3=True, ind_4=True)
    attack = SmoothAdvPGD(smoothed(), max_iter=3, summary_writer=writer)
    attack.generate(x, y)
    attack.summary_writer.summary_writer.close()
    tags = {tag.split("/")[0] for tag, _ in written}
    assert {"gradients", "loss"} <= tags
    assert any("Failure Indicator 4" in tag for tag in tags) == (kind == "indicators")
    assert all(np.isfinite(np.asarray(values, dtype=float)).all() for _, values in written)
    assert list((tmp_path / "runs").rglob("*tfevents*"))
