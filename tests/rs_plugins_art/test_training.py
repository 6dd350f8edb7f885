"""fit and fit_generator: Gaussian training of the base model, in place."""

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.trainer import AdversarialTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rs_plugins.errors import InputError
from rs_plugins_art.attacks import SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, seeded
from .test_gradients import SOFT, forms


def trainable(model, sigma=0.25, lr=0.1, **settings):
    return SmoothedClassifier(model, sigma, optimizer=torch.optim.SGD(model.parameters(), lr=lr), **settings)


def weights(classifier):
    return torch.cat([p.detach().reshape(-1) for p in classifier.base_model.parameters()])


def half(n=20):
    return np.full((n, *SHAPE), 0.5, np.float32), np.arange(n) % CLASSES


def noise_seen(classifier, train):
    """The noise of each training batch: the images are 1/2 everywhere. Probes have no noise and are left out."""
    classifier.base_model.batches = []
    train()
    return [batch - 0.5 for batch in classifier.base_model.batches if bool((batch != 0.5).any())]


def test_fit_minimises_the_cross_entropy_under_gaussian_noise():
    """One step on one batch, against the gradient written down by hand."""
    x, y = half(8)
    classifier = trainable(Recorder(nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(72, CLASSES)))))
    before = weights(classifier)
    (noise,) = noise_seen(classifier, lambda: classifier.fit(x, y, batch_size=8, nb_epochs=1))
    twin = nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(72, CLASSES)))
    # in which order fit took the images is not known from outside
    labels = recovered_labels(twin, 0.5 + noise, y, before - weights(classifier))
    loss = nn.functional.cross_entropy(twin(0.5 + noise), labels)
    loss.backward()
    expected = 0.1 * torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(before - weights(classifier), expected, atol=1e-6, rtol=1e-4)
    assert float(noise.std()) == pytest.approx(0.25, rel=0.1)


def recovered_labels(twin, noisy, y, step):
    """Solve for the one-hot labels: for a linear model the step is (softmax - one-hot)ᵀ noisy / n times the rate."""
    with torch.no_grad():
        rows = noisy.flatten(1)
        slope = step[:-CLASSES].reshape(CLASSES, -1) / 0.1 * len(rows)
        residual = torch.linalg.lstsq(rows.T.double(), slope.T.double()).solution
        labels = (twin(noisy).softmax(1).double() - residual).argmax(1)
    assert sorted(labels.tolist()) == sorted(y.tolist())
    return labels


def test_one_fresh_draw_per_image_and_step_also_in_the_next_call():
    classifier = trainable(Recorder(cnn()))
    x, y = half()
    noise = noise_seen(classifier, lambda: classifier.fit(x, y, batch_size=20, nb_epochs=2))
    noise += noise_seen(classifier, lambda: classifier.fit(x, y, batch_size=20, nb_epochs=1))
    assert [len(batch) for batch in noise] == [20, 20, 20]
    draws = torch.cat(noise).flatten(1)
    assert len(draws.unique(dim=0)) == 60
    again = trainable(Recorder(cnn()))
    repeated = noise_seen(again, lambda: again.fit(x, y, batch_size=20, nb_epochs=2))
    assert torch.equal(repeated[0], noise[0])
    clone = classifier.clone_for_refitting()
    assert torch.equal(noise_seen(clone, lambda: clone.fit(x, y, batch_size=20, nb_epochs=1))[0], noise[0])
    other = trainable(Recorder(cnn()), seed=1)
    assert not torch.equal(noise_seen(other, lambda: other.fit(x, y, batch_size=20, nb_epochs=1))[0], noise[0])


@pytest.mark.parametrize("form", forms(np.zeros(5, int)))
def test_labels_of_every_form_train_the_same(form, x, y):
    expected, classifier = trainable(cnn()), trainable(cnn())
    expected.fit(x, y, nb_epochs=2, training_mode=False)  # dropout would draw from the global generator
    labels = forms(y)[form]
    classifier.fit(
        x, labels if not isinstance(labels, torch.Tensor) else labels.numpy(), nb_epochs=2, training_mode=False
    )
    assert torch.equal(weights(classifier), weights(expected))


def test_float64_images_and_soft_labels_train(x):
    classifier = trainable(cnn())
    before = weights(classifier)
    classifier.fit(x.astype(np.float64), SOFT.astype(np.float64), nb_epochs=1)
    assert not torch.equal(weights(classifier), before)


def test_batches_epochs_and_the_remainder():
    x, y = half(20)
    classifier = trainable(Recorder(cnn()))
    sizes = [len(b) for b in noise_seen(classifier, lambda: classifier.fit(x, y, batch_size=8, nb_epochs=2))]
    assert sizes == [8, 8, 4, 8, 8, 4]
    sizes = [
        len(b) for b in noise_seen(classifier, lambda: classifier.fit(x, y, batch_size=8, nb_epochs=1, drop_last=True))
    ]
    assert sizes == [8, 8]


class Steps:
    """Anything with a method step."""

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1


def test_any_scheduler_is_stepped_after_each_epoch(x, y):
    classifier, scheduler = trainable(cnn()), Steps()
    classifier.fit(x, y, batch_size=2, nb_epochs=3, scheduler=scheduler)
    assert scheduler.count == 3
    rates = torch.optim.lr_scheduler.StepLR(classifier.optimizer, 1, gamma=0.5)
    classifier.fit(x, y, nb_epochs=2, scheduler=rates)
    assert classifier.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    scheduler = Steps()
    classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=1), nb_epochs=2, scheduler=scheduler)
    assert scheduler.count == 2


def test_training_mode_decides_whether_batch_statistics_move(x, y):
    for training_mode, moved in ((True, True), (False, False)):
        classifier = trainable(cnn())
        before = classifier.base_model[1].running_mean.clone()
        classifier.fit(x, y, nb_epochs=1, training_mode=training_mode)
        assert torch.equal(classifier.base_model[1].running_mean, before) is not moved


def test_what_trainers_pass_is_accepted_and_a_misspelt_keyword_is_not(x, y):
    classifier = trainable(cnn())
    classifier.fit(x, y, nb_epochs=1, batch_size=5, verbose=False, validation_data=None)
    for call in (classifier.fit, lambda x, y, **more: classifier.fit_generator(NumpyDataGenerator(x, y), **more)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
            call(x, y, epochs=1)
    with pytest.raises(InputError, match="validation_data: expected None"):
        classifier.fit(x, y, validation_data=(x, y))
    with pytest.raises(InputError, match="epochs: expected an integer >= 0, got -1"):
        classifier.fit(x, y, nb_epochs=-1)
    with pytest.raises(InputError, match="optimizer: needed for training; pass one to the constructor"):
        SmoothedClassifier(cnn(), 0.25).fit(x, y)
    with pytest.raises(InputError, match=r"generator\.size: expected an integer >= 1, got None"):
        classifier.fit_generator(object())


def loader(x, y):
    return PyTorchDataGenerator(DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=8), len(x), 8)


GENERATORS = {
    "numpy": (lambda x, y: NumpyDataGenerator(x, y, batch_size=8, drop_remainder=False), [8, 8, 4] * 2),
    "numpy, full batches": (lambda x, y: NumpyDataGenerator(x, y, batch_size=8), [8, 8, 8] * 2),
    "torch": (loader, [8, 8, 4] * 2),
}


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_fit_generator_trains_with_fresh_noise_on_every_batch(kind, one_hot):
    """ART's own shortcut for PyTorch generators trains without any."""
    make, sizes = GENERATORS[kind]
    x, y = half(20)
    classifier = trainable(Recorder(cnn()), sigma=0.5)
    generator = make(x, np.eye(CLASSES)[y] if one_hot else y)
    noise = noise_seen(classifier, lambda: classifier.fit_generator(generator, nb_epochs=2))
    assert [len(batch) for batch in noise] == sizes
    draws = torch.cat(noise).flatten(1)
    assert len(draws.unique(dim=0)) == sum(sizes)
    assert float(draws.std()) == pytest.approx(0.5, rel=0.05)


def test_arts_adversarial_trainer_sees_new_noise_in_every_batch():
    classifier = trainable(Recorder(cnn()))
    x, y = half(20)
    attack = SmoothAdvPGD(classifier, eps=1e-6, eps_step=1e-6, max_iter=1, samples=1)
    classifier.predict(x)
    trainer = AdversarialTrainer(classifier, attack, ratio=1.0)
    seen = noise_seen(classifier, lambda: trainer.fit(x, np.eye(CLASSES)[y], batch_size=10, nb_epochs=1))
    shared = {0: "attack", 1: "training"}
    kinds = [shared[int(len(batch.mul(1e3).round().unique(dim=0)) > 1)] for batch in seen]
    assert kinds == ["attack", "training"] * 2
    assert float((seen[1] - seen[3]).abs().max()) > 0.1


def test_training_with_noise_makes_digits_certifiable():
    digits = load_digits()
    x, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    classifier = SmoothedClassifier(model, 0.25, optimizer=optimizer)
    classifier.fit(x[:1400], y[:1400], batch_size=64, nb_epochs=12)
    labels, radii = classifier.certify(x[1400:1440], 200, alpha=0.01)
    assert (classifier.predict(x[1400:]).argmax(1) == y[1400:]).mean() > 0.85
    assert (labels == y[1400:1440]).mean() > 0.7
    assert radii.mean() > 0.2
