"""A classifier with a certifying adapter is a model like any other: torchattacks' attacks, and ours, take it."""

import pytest
import torch
import torchattacks
from torch.nn.functional import cross_entropy

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.models import evaluating
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.loop import train
from rs_plugins_torchattacks.attacks import SmoothAdvPGD

SHAPE = (2, 6, 6)
SIGMA = 0.25
DESIGNS = {"image": AdapterDesign(size="tiny"), "feature": AdapterDesign(kind="feature", hidden=8)}


@pytest.fixture
def images():
    return torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(2))


def classifier(cnn, images, design, normalised):
    """Return a classifier whose certifying adapter and head have learnt, in train mode, and what it says of images."""
    model = torch.nn.Sequential(Normalise((0.4, 0.5), (0.2, 0.25)), cnn) if normalised else cnn
    adapted = adapt(model, SHAPE, DESIGNS[design])
    labels = (images.mean(dim=(1, 2, 3)) > 0.5).long() + 2 * (images[:, 0].mean(dim=(1, 2)) > 0.5).long()
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.02)
    train(adapted, images, labels, Gaussian(SIGMA), optimizer=optimizer, epochs=10, batch_size=20)
    adapted.train()
    adapted.head.weight.grad = torch.ones_like(adapted.head.weight)
    with evaluating(adapted), torch.no_grad():
        return adapted, adapted(images).argmax(1)


ATTACKS = {
    "PGDL2": (lambda model: torchattacks.PGDL2(model, eps=1.0, alpha=0.3, steps=8), 2),
    "FGSM": (lambda model: torchattacks.FGSM(model, eps=0.1), float("inf")),
    "SmoothAdvPGD": (lambda model: SmoothAdvPGD(model, sigma=SIGMA, eps=1.0, steps=8, samples=8), 2),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("design", "normalised"), [("image", True), ("feature", False)])
def test_an_attack_lowers_its_accuracy_and_leaves_it_as_it_was(name, design, normalised, cnn, images, undisturbed):
    adapted, labels = classifier(cnn, images, design, normalised)
    make, norm = ATTACKS[name]
    extractor = adapted.extractor_fingerprint()
    with undisturbed(adapted), undisturbed(cnn):
        adversarial = make(adapted)(images, labels)
    assert adapted.extractor_fingerprint() == extractor
    distance = (adversarial - images).flatten(1).norm(norm, dim=1)
    assert 0 < distance.max() <= (1 if norm == 2 else 0.1) + 1e-5
    with torch.no_grad():
        adapted.eval()
        assert (adapted(images).argmax(1) == labels).all()
        assert (adapted(adversarial).argmax(1) == labels).float().mean() < 0.7


def test_an_attack_sees_the_certifying_adapter(cnn, images):
    """One FGSM step goes along the sign of the gradient of the whole, which is not that of the old classifier."""
    adapted, labels = classifier(cnn, images, "image", True)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(adapted.eval()(leaf), labels), leaf)
    expected = (images + 0.05 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(torchattacks.FGSM(adapted, eps=0.05)(images, labels), expected)
    before = torchattacks.FGSM(adapt(cnn, SHAPE, DESIGNS["image"]), eps=0.05)(images, labels)
    assert float((before - expected).abs().max()) > 0.05


def test_smoothed_it_is_attacked_under_its_own_noise(cnn, images):
    adapted, labels = classifier(cnn, images, "image", False)
    smoothed = SmoothedModel(adapted, SIGMA, samples=64, seed=5).eval()
    adversarial = SmoothAdvPGD(smoothed, eps=1.0, steps=5)(images, labels)
    assert torch.equal(adversarial, SmoothAdvPGD(adapted, sigma=SIGMA, eps=1.0, steps=5)(images, labels))
    with torch.no_grad():
        before, after = (smoothed(each)[range(40), labels].exp().mean() for each in (images, adversarial))
    assert after < before - 0.1
