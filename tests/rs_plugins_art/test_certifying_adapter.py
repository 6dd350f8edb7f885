"""A clean classifier with a certifying adapter as an ART estimator: what is trained, and what stays as it is."""

import copy
import functools
import inspect
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent, SquareAttack
from art.data_generators import NumpyDataGenerator
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import rs_plugins
from rs_plugins import registry
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.certifying_adapters.ensemble import AdapterEnsemble
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.loop import train
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.certifying_adapter import CertifyingAdapterClassifier
from rs_plugins_art.classifier import SmoothedClassifier
from rs_plugins_art.trainers import GaussianTrainer, SmoothMixTrainer

from .conftest import CLASSES, SHAPE, Sharp, cnn, mlp, seeded

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
TINY = AdapterDesign(size="tiny")


def adapted(model=None, sigma=0.25, **settings):
    if not {"design", "kind"} & settings.keys():
        settings["size"] = "tiny"
    return CertifyingAdapterClassifier(cnn(3) if model is None else model, sigma, input_shape=SHAPE, **settings)


def picture(module):
    return {
        "training": [part.training for part in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "state": {name: value.tolist() for name, value in module.state_dict().items()},
    }


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trained(classifier):
    """Everything of the base model but the extractor."""
    return {name: value for name, value in bits(classifier.base_model).items() if not name.startswith("extractor.")}


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "design", [{}, {"kind": "feature", "hidden": 3}, {"size": "copy", "combine": "gated"}], ids=str
)
def test_it_begins_as_the_smoothed_classifier_of_the_same_seed(design, x, y):
    bare = SmoothedClassifier(cnn(3), 0.25, samples=9, seed=4)
    classifier = CertifyingAdapterClassifier(cnn(3), 0.25, input_shape=SHAPE, samples=9, seed=4, **design)
    assert np.array_equal(classifier.predict(x), bare.predict(x))
    for ours, theirs in zip(classifier.certify(x, 100), bare.certify(x, 100), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.abs(bare.loss_gradient(x, y)).max() > 1e-3
    np.testing.assert_allclose(classifier.loss_gradient(x, y), bare.loss_gradient(x, y), atol=1e-6)
    np.testing.assert_allclose(classifier.class_gradient(x), bare.class_gradient(x), atol=1e-6)


def test_its_parts():
    model = cnn()
    classifier = adapted(model, kind="feature", hidden=3)
    assert isinstance(classifier, SmoothedClassifier)
    assert isinstance(classifier.base_model, AdaptedClassifier)
    assert (classifier.input_shape, classifier.nb_classes) == (SHAPE, CLASSES)
    assert classifier.design == AdapterDesign(kind="feature", hidden=3)
    assert classifier.adapter is classifier.base_model.adapter
    assert classifier.adapter.first.out_features == 3
    assert classifier.extractor is classifier.base_model.extractor
    shared = {value.data_ptr() for value in model.parameters()}
    assert {value.data_ptr() for value in classifier.extractor.parameters()} < shared
    for name in ("extractor", "adapter", "design"):
        with pytest.raises(AttributeError):
            setattr(classifier, name, None)
    text = repr(classifier)
    for part in ("CertifyingAdapterClassifier(AdaptedClassifier(", "sigma=0.25", "design=AdapterDesign(kind='feature'"):
        assert part in text


def test_a_design_as_one_and_setting_by_setting():
    assert adapted(design=TINY).design == adapted().design == TINY
    assert CertifyingAdapterClassifier(cnn(), 0.25, input_shape=SHAPE).design == AdapterDesign()
    fresh = adapted(head="fresh")
    assert not torch.equal(fresh.base_model.head.weight, cnn(3)[-1].weight)
    assert torch.equal(adapted().base_model.head.weight, cnn(3)[-1].weight)


def test_the_seed_is_that_of_the_initial_weights_too():
    one, two, other = (adapted(seed=seed).adapter for seed in (1, 1, 2))
    assert same(bits(one), bits(two))
    assert not same(bits(one), bits(other))
    assert not same(bits(adapted(seed=None).adapter), bits(adapted(seed=None).adapter))


def test_a_copied_extractor_does_not_follow_the_model(x):
    model = cnn(3)
    sharing, copied = adapted(model), adapted(model, copied=True)
    rows = copied.predict(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert np.array_equal(copied.predict(x), rows)
    assert not np.array_equal(sharing.predict(x), rows)


def test_an_adapted_classifier_is_taken_as_it_is(x, y):
    base = adapt(cnn(3), SHAPE, TINY)
    classifier = CertifyingAdapterClassifier(base, 0.25)
    assert classifier.base_model is base
    assert classifier.design is None
    assert np.array_equal(classifier.predict(x), adapted().predict(x))
    assert classifier.input_shape == SHAPE
    before = bits(base.adapter)
    copied = CertifyingAdapterClassifier(base, 0.25, copied=True)
    copied.fit(x, y, nb_epochs=1)
    assert same(bits(base.adapter), before)
    classifier.fit(x, y, nb_epochs=1)
    assert not same(bits(base.adapter), before)
    optimizer = torch.optim.SGD(base.trainable_parameters(), lr=0.1)
    assert CertifyingAdapterClassifier(base, 0.25, optimizer=optimizer).optimizer is optimizer


class Smoothed(SmoothedModel):
    pass


REFUSED = {
    "no shape": ({"input_shape": None}, r"input_shape: expected that of an image, such as \(3, 32, 32\)"),
    "shape": ({"input_shape": (2, 0, 6)}, "input_shape: expected an integer >= 1, got 0"),
    "sigma": ({"sigma": None}, "sigma: expected the standard deviation of the noise in pixels"),
    "design": ({"design": "image"}, "design: expected an AdapterDesign or None, got 'image'"),
    "twice": ({"design": TINY, "kind": "image"}, "kind: expected to be a part of the design, which is given, got it"),
    "kind": ({"kind": "images"}, "kind: expected one of 'image', 'feature', 'token', got 'images'"),
    "another": ({"model": adapt(cnn(), SHAPE, TINY), "kind": "feature"}, "design: expected None, as the model has a"),
    "function": (
        {"model": adapt(cnn(), SHAPE, TINY), "feature_fn": len},
        "feature_fn: expected None, as the model has a certifying adapter, got <built-in function len>",
    ),
    "smoothed": ({"model": SmoothedModel(cnn(), 0.25)}, "got a SmoothedModel; noise would be added twice"),
    "inside": ({"model": nn.Sequential(Smoothed(cnn(), 0.25))}, "a Sequential with a Smoothed inside; noise would be"),
    "estimator": ({"model": SmoothedClassifier(cnn(), 0.25)}, "got SmoothedClassifier; pass its base_model"),
    "no head": ({"model": Sharp(torch.ones(72), 36.0)}, r"model: expected a torch\.nn\.Linear whose output is the log"),
    "copied": ({"copied": "yes"}, "copied: expected True or False, got 'yes'"),
    "lr": ({"lr": -0.1}, "lr: expected a finite number > 0, got -0.1"),
    "lr beside": ({"lr": 0.1, "optimizer": SGD}, "lr: expected None, as the optimizer that is given has its own, got"),
    "optimizer": ({"optimizer": "adam"}, "optimizer: expected a torch.optim.Optimizer or None, got str"),
    "preprocessing": ({"preprocessing": (0.5, 0.25)}, "preprocessing: expected the identity, None or"),
    "clip values": ({"clip_values": (0, 255)}, r"clip_values: expected \(0, 1\) or None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        CertifyingAdapterClassifier(**{"model": cnn(), "sigma": 0.25, "input_shape": SHAPE, **settings})


def test_a_misspelt_keyword_is_refused_and_a_wrong_shape():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kinds'"):
        adapted(kinds="feature")
    with pytest.raises(ModelError, match="fails on"):
        CertifyingAdapterClassifier(cnn(), 0.25, input_shape=(3, 6, 6))


# ---- optimisers ------------------------------------------------------------------------------------------------------


def held(optimizer):
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def test_by_default_adam_trains_certifying_adapter_and_head():
    classifier = adapted()
    assert type(classifier.optimizer) is torch.optim.Adam
    assert classifier.optimizer.param_groups[0]["lr"] == 1e-3
    assert held(classifier.optimizer) == {id(p) for p in classifier.base_model.trainable_parameters()}
    assert held(classifier.optimizer) >= {id(p) for p in classifier.base_model.head.parameters()}
    assert adapted(lr=0.02).optimizer.param_groups[0]["lr"] == 0.02
    alone = adapted(head="frozen", combine="add")
    assert held(alone.optimizer) == {id(p) for p in alone.adapter.parameters()}


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW, lambda p: torch.optim.SGD(p[:2], lr=0.1)])
def test_a_function_makes_another_optimizer(make, x, y):
    classifier = adapted(optimizer=make)
    assert held(classifier.optimizer) <= {id(p) for p in classifier.base_model.trainable_parameters()}
    before = trained(classifier)
    classifier.fit(x, y, nb_epochs=3)
    assert not same(trained(classifier), before)


def test_an_optimizer_with_other_parameters_is_refused():
    message = "optimizer: expected one over parameters of the certifying adapter and the head alone"
    model = cnn()
    with pytest.raises(InputError, match=message):
        adapted(model, optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match=message):
        adapted(model, optimizer=lambda parameters: torch.optim.Adam([*parameters, *model.parameters()]))
    base = adapt(model, SHAPE, TINY)
    with pytest.raises(InputError, match=message):
        CertifyingAdapterClassifier(base, 0.25, optimizer=torch.optim.Adam(base.parameters()))
    classifier = adapted(model)
    before = classifier.optimizer
    with pytest.raises(InputError, match=message):
        classifier.set_params(samples=3, optimizer=SGD(classifier.base_model.parameters()))
    assert classifier.optimizer is before
    assert classifier.samples == 32
    head = SGD(classifier.base_model.head.parameters())
    classifier.set_params(optimizer=head)
    assert classifier.optimizer is head


def test_without_anything_to_train_there_is_no_optimizer(x, y):
    classifier = CertifyingAdapterClassifier(adapt(cnn(), SHAPE, TINY).requires_grad_(False), 0.25)
    assert classifier.optimizer is None
    assert classifier.certify(x, 50)[0].shape == (5,)
    with pytest.raises(InputError, match="optimizer: needed for training"):
        classifier.fit(x, y)


# ---- training --------------------------------------------------------------------------------------------------------

TRAININGS = {
    "fit": lambda c, x, y: c.fit(x, y, batch_size=2, nb_epochs=2),
    "eval mode": lambda c, x, y: c.fit(x, y, batch_size=2, nb_epochs=2, training_mode=False),
    "method": lambda c, x, y: c.fit(x, y, nb_epochs=2, method="consistency", samples=2),
    "generator": lambda c, x, y: c.fit_generator(NumpyDataGenerator(x, y, batch_size=2), nb_epochs=2),
    "GaussianTrainer": lambda c, x, y: GaussianTrainer(c, samples=2).fit(x, y, nb_epochs=2, validation_data=(x, y)),
    "SmoothMixTrainer": lambda c, x, y: SmoothMixTrainer(c, max_iter=1).fit(x, y, nb_epochs=1),
    "SmoothMixTrainer, generator": lambda c, x, y: SmoothMixTrainer(c, max_iter=1).fit_generator(
        NumpyDataGenerator(x, y, batch_size=2), nb_epochs=1
    ),
    "AdversarialTrainer": lambda c, x, y: AdversarialTrainer(
        c, SmoothAdvPGD(c, max_iter=1, samples=2, verbose=False), ratio=1.0
    ).fit(x, y, batch_size=3, nb_epochs=1),
}


@pytest.mark.parametrize("how", TRAININGS)
def test_training_changes_certifying_adapter_and_head_alone(how, x, y):
    """The model's batch normalisation and dropout would show in its buffers if the extractor were in train mode."""
    model = cnn(3).train()
    model[0].eval()
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = picture(model)
    classifier = adapted(model)
    classifier.model.train()
    extractor, others = bits(classifier.extractor), trained(classifier)
    TRAININGS[how](classifier, x, y)
    assert picture(model) == before
    assert same(bits(classifier.extractor), extractor)
    after = trained(classifier)
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], others[name])}
    assert moved - {"gate"} == {"adapter", "head"}
    assert [p.grad for p in classifier.base_model.parameters() if p.grad is not None] == []


@pytest.mark.parametrize(("lr", "rate"), [(None, 1e-3), (0.01, 0.01)])
def test_fit_is_cores_training_of_the_adapted_classifier(lr, rate, x, y):
    classifier = adapted(lr=lr, seed=3)
    classifier.fit(x, y, batch_size=2, nb_epochs=2)
    twin = adapt(cnn(3), SHAPE, TINY, seed=3)
    train(
        *(twin, torch.tensor(x), torch.tensor(y), Gaussian(0.25)),
        optimizer=torch.optim.Adam(twin.trainable_parameters(), lr=rate),
        epochs=2,
        batch_size=2,
        seed=stream(3, "fit", 1).initial_seed(),
    )
    assert same(bits(classifier.base_model), bits(twin))


class Worn(nn.Module):
    """Batches of another size than the two images of a probe leave a trace in it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("uses", torch.zeros(()))

    def forward(self, x):
        if len(x) > 2:
            self.uses += 1
        return x


def test_an_extractor_that_changes_itself_is_found_out(x, y):
    classifier = adapted(nn.Sequential(Worn(), cnn(3)), kind="feature")
    message = "model: the extractor is not what it was before training; a part of it changes its own weights or buffers"
    for how in ("fit", "generator", "fit"):
        data = (x, y) if how == "fit" else (NumpyDataGenerator(x, y, batch_size=5),)
        with pytest.raises(ModelError, match=message):
            (classifier.fit if how == "fit" else classifier.fit_generator)(*data, nb_epochs=1)
    classifier.fit(x, y, batch_size=1, nb_epochs=1)  # which leaves no trace


def test_the_extractor_is_looked_at_once_before_and_once_after(x, y, monkeypatch):
    looked = []
    true = AdaptedClassifier.extractor_fingerprint
    monkeypatch.setattr(AdaptedClassifier, "extractor_fingerprint", lambda self: looked.append(self) or true(self))
    classifier = adapted(kind="feature")
    classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=1), nb_epochs=2)
    assert looked == [classifier.base_model] * 2
    with pytest.raises(InputError, match="y: expected"):
        classifier.fit(x, y + 1)
    classifier.fit(x, y, nb_epochs=1)
    assert len(looked) == 5  # none after the error, which says enough


@pytest.mark.parametrize("method", ["fit", "certify"])
def test_images_outside_0_to_1_are_refused(method, x, y):
    with pytest.raises(InputError, match=r"expected pixels in \[0, 1\], got values from"):
        getattr(adapted(), method)(x * 1.5 - 0.2, y if method == "fit" else 20)


@pytest.mark.slow
def test_digits_become_certifiable_by_a_certifying_adapter():
    digits = load_digits()
    x, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
    )
    clean = PyTorchClassifier(
        *(model, nn.CrossEntropyLoss(), (1, 8, 8), 10),
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        device_type="cpu",
    )
    with global_randomness(0):
        clean.fit(x[:1400], y[:1400], batch_size=64, nb_epochs=10)
    assert (clean.predict(x[1400:]).argmax(1) == y[1400:]).mean() > 0.85
    before = picture(model)
    bare = SmoothedClassifier(model, 0.5)
    classifier = CertifyingAdapterClassifier(model, 0.5, input_shape=(1, 8, 8), size="tiny")
    classifier.fit(x[:1400], y[:1400], batch_size=64, nb_epochs=6)
    assert picture(model) == before

    def certified(smoothed):
        labels, _ = smoothed.certify(x[1400:1520], 150, alpha=0.01)
        return (labels == y[1400:1520]).mean()

    assert certified(classifier) > certified(bare) + 0.08


# ---- attacks ---------------------------------------------------------------------------------------------------------


def fitted(x, y, **settings):
    classifier = adapted(samples=8, **settings)
    classifier.fit(x, y, batch_size=5, nb_epochs=6)
    return classifier


@pytest.mark.parametrize(("kind", "combine"), [("image", "add"), ("feature", "gated")])
def test_gradients_flow_through_extractor_and_certifying_adapter(kind, combine, x, y):
    """Against the parts put together by hand."""
    classifier = fitted(
        x, y, design=AdapterDesign(kind=kind, size="tiny" if kind == "image" else None, combine=combine), lr=0.01
    )
    base, images = classifier.base_model.eval(), torch.tensor(x, requires_grad=True)

    def slope(features):
        draws = classifier.model.fixed_draws(images.detach())
        pairs = [(images + draw, features(images + draw)) for draw in draws]
        gate = 1 if base.gate is None else base.gate
        logits = [base.head(gate * z + base.adapter(noisy, z)) for noisy, z in pairs]
        vote = torch.stack([each.softmax(1) for each in logits]).mean(0)
        loss = cross_entropy(vote.log(), torch.tensor(y))
        return torch.autograd.grad(loss, images, allow_unused=True)[0]

    expected = slope(base.extractor)
    assert float(expected.abs().max()) > 1e-3
    np.testing.assert_allclose(classifier.loss_gradient(x, y), expected.numpy(), atol=1e-6)
    around = slope(lambda each: base.extractor(each).detach())  # past the extractor
    assert around is None if kind == "feature" else not torch.allclose(around, expected, atol=1e-4)


ATTACKS = {
    "PGD": lambda c: ProjectedGradientDescent(c, norm=2, eps=1.0, eps_step=0.4, max_iter=4, verbose=False),
    "APGD": lambda c: AutoProjectedGradientDescent(c, norm=2, eps=1.0, max_iter=5, nb_random_init=1, verbose=False),
    "Square": lambda c: SquareAttack(c, eps=0.1, max_iter=8, nb_restarts=1, verbose=False),
    "SmoothAdvPGD": lambda c: SmoothAdvPGD(c, eps=1.0, max_iter=4, samples=8),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:art")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_lower_the_smoothed_probability_and_leave_the_extractor(name, x, y):
    classifier = fitted(x, y)
    extractor, labels = bits(classifier.extractor), classifier.predict(x).argmax(1)
    adversarial = ATTACKS[name](classifier).generate(x, labels)
    assert adversarial.shape == x.shape
    assert 0 < np.abs(adversarial - x).max() <= 1 + 1e-5
    assert classifier.compute_loss(adversarial, labels).mean() > classifier.compute_loss(x, labels).mean() + 0.01
    assert same(bits(classifier.extractor), extractor)


# ---- settings, copies, files -----------------------------------------------------------------------------------------

SETTINGS = {"samples": 7, "noise": "fresh", "output": "probs", "alpha": 0.05, "seed": 9, "chunk": 11}


def alike(one, two, x):
    params, others = one.get_params(), two.get_params()
    for name in ("model", "optimizer", "loss", "clip_values"):
        params.pop(name), others.pop(name)
    return (
        params == others
        and one.design == two.design
        and np.array_equal(one.predict(x), two.predict(x))
        and np.array_equal(one.certify(x, 60)[1], two.certify(x, 60)[1])
    )


def test_settings_are_read_and_changed_as_those_of_a_smoothed_classifier(x):
    classifier = adapted(**SETTINGS, channels_first=False)
    params = classifier.get_params()
    assert SETTINGS.items() <= params.items()
    assert params["channels_first"] is False
    classifier.set_params(**params)
    classifier.set_params(sigma=0.5, samples=3)
    twin = adapted(sigma=0.5, **{**SETTINGS, "samples": 3}, channels_first=False)
    assert alike(classifier, twin, x)
    with pytest.raises(InputError, match=r"set_params: expected names among .* got 'design'"):
        classifier.set_params(design=TINY)
    with pytest.raises(InputError, match="preprocessing: expected the identity"):
        classifier.set_params(preprocessing=(0.5, 0.5))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda classifier: pickle.loads(pickle.dumps(classifier))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_complete_and_independent(how, x, y):
    classifier = fitted(x, y)
    twin = COPIES[how](classifier)
    assert alike(twin, classifier, x)
    classifier.fit(x, y, nb_epochs=1)
    assert not alike(twin, classifier, x)
    assert held(twin.optimizer) == {id(p) for p in twin.base_model.trainable_parameters()}
    twin.fit(x, y, nb_epochs=1)
    assert alike(twin, classifier, x)


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_a_clone_for_refitting_begins_where_the_classifier_began(optimizer, x, y):
    model = cnn(3)
    before = picture(model)
    settings = {"optimizer": optimizer, "combine": "gated", "samples": 8}
    classifier = adapted(model, **settings)
    classifier.fit(x, y, nb_epochs=4)
    clone = classifier.clone_for_refitting()
    assert type(clone) is CertifyingAdapterClassifier
    assert alike(clone, adapted(**settings), x)
    assert held(clone.optimizer) == {id(p) for p in clone.base_model.trainable_parameters()}
    assert clone.optimizer.defaults == classifier.optimizer.defaults
    assert not clone.optimizer.state
    clone.fit(x, y, nb_epochs=4)
    assert alike(clone, classifier, x)  # the same training from the same beginning
    assert picture(model) == before


def test_reset_leaves_the_extractor(x, y):
    """The host's own would give every layer new weights, those of the model that shares them as well."""
    model = cnn(3)
    before = picture(model)
    classifier = adapted(model, samples=8)
    first = trained(classifier)
    classifier.fit(x, y, nb_epochs=2)
    assert not same(trained(classifier), first)
    classifier.reset()
    assert same(trained(classifier), first)
    assert picture(model) == before


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("clip_values", [None, (0, 1)])
def test_save_and_load_give_the_same_classifier_and_go_on_training_alike(optimizer, clip_values, x, y, tmp_path):
    lr = 0.02 if optimizer is None else None
    settings = {"kind": "feature", "hidden": 3, "lr": lr, "optimizer": optimizer, "clip_values": clip_values}
    classifier = adapted(sigma=0.5, **SETTINGS, **settings)
    classifier.fit(x, y, nb_epochs=2)
    classifier.save("model", str(tmp_path / "new"))
    model = cnn(1).train()  # other weights
    before = picture(model)
    loaded = CertifyingAdapterClassifier.load("model", str(tmp_path / "new"), model=model, optimizer=optimizer)
    assert alike(loaded, classifier, x)
    assert (loaded.clip_values is None) is (clip_values is None)
    for each in (loaded, classifier):
        each.fit(x, y, nb_epochs=2)
    assert alike(loaded, classifier, x)
    assert same(bits(loaded.base_model), bits(classifier.base_model))
    assert picture(model) == before


def test_without_the_optimizer_that_was_a_loaded_classifier_has_none(x, y, tmp_path):
    classifier = adapted(optimizer=SGD)
    classifier.save("model", str(tmp_path))
    loaded = CertifyingAdapterClassifier.load("model", str(tmp_path), model=cnn(3))
    assert loaded.optimizer is None
    assert alike(loaded, classifier, x)
    with pytest.raises(InputError, match="optimizer: needed for training"):
        loaded.fit(x, y)
    half = adapted(optimizer=lambda parameters: torch.optim.Adam(parameters[:1]))
    half.save("half", str(tmp_path))
    assert CertifyingAdapterClassifier.load("half", str(tmp_path), model=cnn(3)).optimizer is None


def test_an_adapted_classifier_is_saved_and_loaded_into_a_copy(x, y, tmp_path):
    classifier = CertifyingAdapterClassifier(adapt(cnn(3), SHAPE, TINY), 0.25)
    classifier.fit(x, y, nb_epochs=3)
    classifier.save("model", str(tmp_path))
    base = adapt(cnn(1), SHAPE, TINY, seed=1)
    before = picture(base)
    loaded = CertifyingAdapterClassifier.load("model", str(tmp_path), model=base)
    assert alike(loaded, classifier, x)
    assert picture(base) == before


def pooled(model, x):
    return model[2](model[1](model[0](x))).mean(dim=(2, 3))


def test_features_by_a_function(x, y, tmp_path):
    """For a model that does something to its logits."""
    model = nn.Sequential(*cnn(3), nn.Tanh())
    with pytest.raises(InputError, match=r"pass \(in Python\) feature_fn"):
        adapted(model)
    classifier = adapted(model, feature_fn=pooled)
    assert classifier.adapter.feature_dim == classifier.base_model.head.in_features == 4
    extractor = bits(classifier.extractor)
    classifier.fit(x, y, nb_epochs=2)
    assert same(bits(classifier.extractor), extractor)
    classifier.save("model", str(tmp_path))
    loaded = CertifyingAdapterClassifier.load("model", str(tmp_path), model=model, feature_fn=pooled)
    assert alike(loaded, classifier, x)


class Laplace(GaussianNoise):
    name = "laplace"


def test_files_that_do_not_fit_are_refused(tmp_path):
    folder = str(tmp_path)
    load = CertifyingAdapterClassifier.load
    adapted(family=Laplace).save("model", folder)
    assert load("model", folder, model=cnn(), family=Laplace).family is Laplace
    with pytest.raises(InputError, match="family: expected the noise family 'laplace' that was saved, got 'gaussian'"):
        load("model", folder, model=cnn())
    other = cnn()
    other[2] = nn.ReLU()
    with pytest.raises(ModelError, match="its weights fit, but it is not the architecture that was saved"):
        load("model", folder, model=other, family=Laplace)
    with pytest.raises(ModelError, match="model: "):
        load("model", folder, model=mlp(), family=Laplace)
    SmoothedClassifier(cnn(), 0.25).save("bare", folder)
    with pytest.raises(
        InputError, match="expected a file of CertifyingAdapterClassifier, got one of SmoothedClassifier"
    ):
        load("bare", folder, model=cnn())
    with pytest.raises(InputError, match="expected a file of SmoothedClassifier, got one of CertifyingAdapterClass"):
        SmoothedClassifier.load("model", folder, model=cnn(), family=Laplace)


def test_it_is_found_by_name():
    assert rs_plugins.CertifyingAdapterClassifier is CertifyingAdapterClassifier
    core = {"AdaptedClassifier": AdaptedClassifier, "AdapterDesign": AdapterDesign, "AdapterEnsemble": AdapterEnsemble}
    assert {name: getattr(rs_plugins, name) for name in core} == core
    assert rs_plugins.adapt is adapt
    found = registry.component("estimator", "art.CertifyingAdapterClassifier")
    assert found is CertifyingAdapterClassifier
    assert "input_shape" in inspect.signature(found).parameters
