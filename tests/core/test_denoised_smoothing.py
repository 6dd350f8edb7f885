import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import batch_norm, conv2d

from rs_plugins.core.attacks.pgd import pgd_l2
from rs_plugins.core.black_box import BlackBox
from rs_plugins.core.certification import certify
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.denoised_smoothing import (
    DENOISING,
    DenoisedClassifier,
    DenoisingMSE,
    DenoisingStability,
    DnCNN,
    denoising_objective,
)
from rs_plugins.core.models import digest
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import Gaussian, plain
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.objective import Batch, StreamDraws, weighted
from rs_plugins.errors import InputError, ModelError

SIDE, CLASSES = 5, 3


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scattered(model):
    """``model`` in float64, without a parameter or statistic that is 0 or 1."""
    source = torch.Generator().manual_seed(1)
    model.double()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            value.copy_(low + torch.rand(value.shape, generator=source, dtype=torch.float64))
    return model


def classifier(*, statistics=True):
    """Return a small network with layers that behave otherwise in train mode, and statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if statistics else nn.Identity(), nn.Tanh()),
        *(nn.Flatten(), nn.Dropout(0.3 if statistics else 0.0), nn.Linear(4 * (SIDE - 2) ** 2, CLASSES)),
    )
    model(3 * images(8, 1, SIDE, SIDE))
    return model


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the denoiser ----------------------------------------------------------------------------------------------------


def by_hand(weights, x, depth, training):
    """Zhang et al. (2017) on a state_dict: after the first, each convolution but the last has two layers behind it."""
    hidden = conv2d(x, weights["dncnn.0.weight"], weights["dncnn.0.bias"], padding=1).clamp(min=0)
    for place in range(2, 3 * (depth - 2) + 2, 3):
        hidden = conv2d(hidden, weights[f"dncnn.{place}.weight"], padding=1)
        kinds = ("running_mean", "running_var", "weight", "bias")
        numbers = [weights[f"dncnn.{place + 1}.{kind}"].clone() for kind in kinds]
        hidden = batch_norm(hidden, *numbers, training=training, eps=1e-4).clamp(min=0)
    return x - conv2d(hidden, weights[f"dncnn.{3 * (depth - 2) + 2}.weight"], padding=1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("channels", "depth", "width", "size"),
    [(3, 17, 8, (6, 6)), (1, 5, 4, (7, 5)), (2, 3, 3, (1, 9)), (1, 2, 4, (1, 1))],
)
def test_it_is_the_papers_denoiser(channels, depth, width, size, training):
    model = scattered(DnCNN(channels, depth=depth, width=width)).train(training)
    x = 3 * images(2, channels, *size, dtype=torch.float64) - 1
    expected = by_hand(tensors(model), x, depth, training)
    assert expected.shape == x.shape
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert float((expected - x).abs().max()) > 0.1


def test_the_default_is_that_of_the_code_for_cifar10():
    model = DnCNN()
    between = 15 * (64 * 64 * 9 + 2 * 64)
    assert sum(p.numel() for p in model.parameters()) == (3 * 64 * 9 + 64) + between + 64 * 3 * 9
    assert sum(isinstance(part, nn.Conv2d) for part in model.modules()) == 17


def test_a_published_checkpoint_has_these_names(tmp_path):
    normalised = [f"3.{kind}" for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names = ["0.weight", "0.bias", "2.weight", *normalised, "5.weight"]
    model = scattered(DnCNN(1, depth=3, width=4)).float()
    assert list(model.state_dict()) == [f"dncnn.{name}" for name in names]
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 90, "arch": "imagenet_dncnn", "state_dict": state}, tmp_path / "checkpoint.pth.tar")
    other = DnCNN(1, depth=3, width=4, seed=1)
    load_weights(other, tmp_path / "checkpoint.pth.tar")
    assert equal(tensors(other), tensors(model))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "size"), [(3, (8, 8)), (1, (7, 5)), (2, (1, 2))])
def test_it_begins_as_the_identity(channels, size, mode):
    x = 5 * images(3, channels, *size) - 2  # a noisy image leaves [0, 1]
    assert torch.equal(DnCNN(channels, depth=4, width=6).train(mode)(x), x)
    assert not torch.equal(DnCNN(channels, depth=4, width=6, zero_init=False).train(mode)(x), x)


def test_initial_weights_are_those_of_he():
    layers = [part for part in DnCNN(2, depth=4, width=64, zero_init=False).modules() if isinstance(part, nn.Conv2d)]
    for layer in layers:
        expected = (2 / (9 * layer.in_channels)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.1)
    assert not layers[0].bias.any()
    zero = [part for part in DnCNN(2, depth=4, width=64).modules() if isinstance(part, nn.Conv2d)]
    assert not zero[-1].weight.any()
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(layers[:-1], zero[:-1], strict=True))


def test_initial_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (tensors(DnCNN(1, depth=3, width=4, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one, same)
    assert not torch.equal(one["dncnn.0.weight"], other["dncnn.0.weight"])
    assert not torch.equal(one["dncnn.2.weight"], other["dncnn.2.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels: expected an integer >= 1, got 0"),
        ({"depth": 1}, "depth: expected an integer >= 2, got 1"),
        ({"width": 0.5}, r"width: expected an integer >= 1, got 0\.5"),
        ({"zero_init": 1}, "zero_init: expected True or False, got 1"),
        ({"seed": 0.5}, r"seed: expected an integer or None, got 0\.5"),
    ],
)
def test_impossible_denoisers_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DnCNN(**options)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4), (2, 48)])
def test_other_images_are_refused(shape):
    with pytest.raises(InputError, match=r"x: expected images of shape \(n, 3, height, width\) to denoise, got shape"):
        DnCNN(3, depth=2, width=2)(images(*shape))


# ---- the whole -------------------------------------------------------------------------------------------------------


def denoised(*, zero_init=True, **options):
    return DenoisedClassifier(DnCNN(1, depth=3, width=4, zero_init=zero_init), classifier(**options))


def test_it_classifies_what_the_denoiser_returns():
    base, x = classifier(), images(4, 1, SIDE, SIDE)
    model = DenoisedClassifier(scattered(DnCNN(1, depth=4, width=3)).float(), base).eval()
    expected = base.eval()(model.denoiser(x))
    assert torch.equal(model(x), expected)
    assert torch.equal(model.denoise(x), model.denoiser(x))
    assert not torch.allclose(expected, base(x))


def test_step_0_is_the_classifier():
    x = 5 * images(4, 1, SIDE, SIDE) - 2
    expected = classifier().eval()(x)
    assert torch.equal(denoised().eval()(x), expected)
    assert torch.equal(denoised().train()(x), expected)
    assert not torch.allclose(denoised(zero_init=False).eval()(x), expected)


def test_the_modes():
    base = classifier()
    model = DenoisedClassifier(DnCNN(1, depth=4, width=3), base)
    assert not any(part.training for part in model.classifier.modules())
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training is mode
        assert all(part.training is mode for part in model.denoiser.modules())
        assert not any(part.training for part in model.classifier.modules())
    assert not any(part.training for part in model.eval().modules())


def test_the_module_that_was_handed_in_is_left_alone():
    base = classifier()
    base[5].weight.grad = torch.full_like(base[5].weight, 0.25)
    base[0].weight.requires_grad_(False)
    base[1].eval()
    before = tensors(base)
    modes = [part.training for part in base.modules()]
    model = DenoisedClassifier(DnCNN(1, depth=3, width=4), base)
    assert model.classifier_fingerprint() == digest(base)
    model.train()(images(2, 1, SIDE, SIDE)).sum().backward()
    assert [part.training for part in base.modules()] == modes == [True, True, False, True, True, True, True]
    assert [p.requires_grad for p in base.parameters()] == [False, True, True, True, True, True]
    assert base[5].weight.grad.eq(0.25).all()
    assert all(p.grad is None and not p.requires_grad for p in model.classifier.parameters())
    assert equal(tensors(base), before)
    with torch.no_grad():
        base[5].weight.add_(1)  # as by training it later
    assert model.classifier_fingerprint() != digest(base)
    assert equal(tensors(model.classifier), before)


def test_only_the_denoiser_is_to_be_trained():
    model = denoised()
    model.denoiser.dncnn[0].bias.requires_grad_(False)
    trainable = {id(p) for p in model.trainable_parameters()}
    assert trainable == {id(p) for p in model.denoiser.parameters()} - {id(model.denoiser.dncnn[0].bias)}
    assert trainable == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_fingerprint_sees_parameters_and_buffers_of_the_classifier_alone():
    model = denoised()
    fingerprint = model.classifier_fingerprint()
    with torch.no_grad():
        model.denoiser.dncnn[0].weight.add_(1)
    assert model.classifier_fingerprint() == fingerprint
    model.classifier[1].running_mean.add_(1)
    changed = model.classifier_fingerprint()
    assert changed != fingerprint
    with torch.no_grad():
        model.classifier[5].bias.add_(1)
    assert model.classifier_fingerprint() not in (fingerprint, changed)


def test_a_state_dict_holds_both():
    model = scattered(denoised()).eval()
    other = denoised().double().eval()
    x = images(3, 1, SIDE, SIDE, dtype=torch.float64)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(x), model(x))
    assert other.classifier_fingerprint() == model.classifier_fingerprint()


def test_gradients_reach_the_image_through_both():
    model = scattered(DenoisedClassifier(DnCNN(1, depth=3, width=2), classifier())).eval()
    x = images(2, 1, SIDE, SIDE, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(model, x)
    (whole,) = torch.autograd.grad(model(x).sum(), x)
    (alone,) = torch.autograd.grad(model.classifier(x).sum(), x)
    assert not torch.allclose(whole, alone)


def test_an_attack_on_it_succeeds():
    """Against the smoothed classifier: the gradient of its loss leads to images at which it is higher."""
    model = scattered(denoised()).eval()
    smoothed = SmoothedModel(model, 0.25, samples=8).eval()
    x = images(4, 1, SIDE, SIDE, dtype=torch.float64)
    y = smoothed(x).argmax(dim=1)

    def ascent(x, _):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(smoothed(x), y, reduction="sum"), x)[0]

    moved = pgd_l2(ascent, x, eps=1.0, steps=5)
    before, after = (nn.functional.cross_entropy(smoothed(z), y, reduction="none") for z in (x, moved))
    assert bool((after > before).all())


class Odd(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "got"),
    [(lambda x: x[:, :, 1:], r"shape \(2, 1, 4, 5\)"), (lambda x: (x,), "tuple")],
    ids=["cut", "tuple"],
)
def test_a_denoiser_returns_images_of_the_same_shape(answer, got):
    model = DenoisedClassifier(Odd(answer), classifier())
    message = r"denoiser: expected it to return images of shape \(2, 1, 5, 5\), got " + got
    with pytest.raises(ModelError, match=message):
        model(images(2, 1, SIDE, SIDE))
    with pytest.raises(ModelError, match=message):
        DenoisingMSE(0.5)(model, Batch(images(2, 1, SIDE, SIDE), torch.tensor([0, 1])), StreamDraws(stream(0, "test")))


def test_what_is_no_denoiser_or_classifier_is_refused():
    base, denoiser = classifier(), DnCNN(1, depth=2, width=2)
    with pytest.raises(InputError, match=r"denoiser: expected a torch\.nn\.Module, got function"):
        DenoisedClassifier(lambda x: x, base)
    with pytest.raises(InputError, match=r"classifier: expected a torch\.nn\.Module, got str"):
        DenoisedClassifier(denoiser, "lenet")
    with pytest.raises(InputError, match="classifier: expected a base classifier, got a SmoothedModel"):
        DenoisedClassifier(denoiser, SmoothedModel(base, 0.5))
    base.lock = threading.Lock()
    with pytest.raises(
        ModelError, match=r"classifier: a frozen copy of it is needed, which failed \(TypeError: cannot"
    ):
        DenoisedClassifier(denoiser, base)


# ---- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniformNoise:
    """Uniform noise, to see that objectives ask for the family they were given."""

    name = "uniform"
    norm = "l1"
    sigma: float

    def draw_(self, out, generator):
        half = 3**0.5 * self.sigma
        return out.uniform_(-half, half, generator=generator)

    def radius(self, p_lower):
        raise NotImplementedError


class Known:
    """Hands out given noise, and remembers what was asked for."""

    def __init__(self, e):
        self.e, self.asked = e, []

    def noise(self, noise, x, samples):
        self.asked.append((noise, samples))
        return self.e


def problem():
    """Return a model without batch statistics in what is trained, images, labels that it does not give, and noise."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))
    model = DenoisedClassifier(hidden, classifier()).double().train()
    x = images(5, 1, SIDE, SIDE, dtype=torch.float64)
    y = (model.classifier(x).argmax(dim=1) + 1) % CLASSES
    return model, x, y


def mse(model, x, y, e):
    total = 0
    for image, draws in zip(x, e, strict=True):
        for draw in draws:
            difference = model.denoiser((image + draw).unsqueeze(0))[0] - image
            total = total + sum(number**2 for number in difference.flatten()) / image.numel()
    return total / (e.shape[0] * e.shape[1])


def cross_entropy(target):
    def formula(model, x, y, e):
        total = 0
        for image, label, draws in zip(x, y, e, strict=True):
            for draw in draws:
                logits = model.classifier(model.denoiser((image + draw).unsqueeze(0)))[0]
                total = total + logits.exp().sum().log() - logits[target(model, image, int(label))]
        return total / (e.shape[0] * e.shape[1])

    return formula


def said(model, image, _):
    logits = model.classifier(image.unsqueeze(0))[0].tolist()
    return logits.index(max(logits))


FORMULAS = {"mse": mse, "stability": cross_entropy(said), "classification": cross_entropy(lambda _m, _x, label: label)}


@pytest.mark.parametrize("options", [{}, {"samples": 3, "family": UniformNoise}], ids=["defaults", "options"])
@pytest.mark.parametrize("name", FORMULAS)
def test_objectives_are_their_formulas(name, options):
    model, x, y = problem()
    objective = denoising_objective(name, 0.5, **options)
    samples, family = options.get("samples", 1), options.get("family", GaussianNoise)
    draws = Known(family(0.5).draw_(torch.empty(5, samples, 1, SIDE, SIDE).double(), stream(0, "test")))
    found, expected = (
        (loss.detach(), torch.autograd.grad(loss, model.trainable_parameters()))
        for loss in (objective(model, Batch(x, y), draws), FORMULAS[name](model, x, y, draws.e))
    )
    assert found[0].shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(float(part.abs().max()) > 1e-4 for part in expected[1])
    assert draws.asked == [(family(0.5), samples)]


def test_the_three_differ():
    model, x, y = problem()
    e = stream(0, "test")
    losses = [denoising_objective(name, 0.5)(model, Batch(x, y), StreamDraws(e)) for name in DENOISING]
    assert len({round(loss.item(), 3) for loss in losses}) == 3


def test_weighted_by_the_number_of_pixels_it_is_the_papers_squared_norm():
    model, x, y = problem()
    e = 0.5 * torch.randn(5, 1, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (model.denoiser(x + e[:, 0]) - x).flatten(1).norm(dim=1).square().mean()
    found = weighted(DenoisingMSE(0.5), SIDE**2)(model, Batch(x, y), Known(e))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("objective", [DenoisingMSE(0.5), DenoisingStability(0.5)], ids=["mse", "stability"])
def test_labels_are_not_used(objective):
    model, x, y = problem()
    losses = [
        objective(model, Batch(x, labels), StreamDraws(stream(0, "test"))).item()
        for labels in (y, torch.full((5,), -7))
    ]
    assert losses[0] == losses[1]


def test_the_mean_squared_error_does_without_the_classifier():
    model, x, y = problem()
    calls = []
    model.classifier.register_forward_hook(lambda *_: calls.append(1))
    DenoisingMSE(0.5)(model, Batch(x, y), StreamDraws(stream(0, "test")))
    assert not calls
    DenoisingStability(0.5)(model, Batch(x, y), StreamDraws(stream(0, "test")))
    assert len(calls) == 2


def test_what_the_classifier_says_is_asked_without_a_graph_and_of_the_clean_image():
    model, x, y = problem()
    seen = []
    model.classifier.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.requires_grad)))
    DenoisingStability(0.5)(model, Batch(x.requires_grad_(), y), StreamDraws(stream(0, "test")))
    assert [graph for _, graph in seen] == [False, True]
    assert torch.equal(seen[0][0], x)


def test_the_error_is_averaged_in_single_precision():
    model, x, y = problem()
    loss = DenoisingMSE(0.5)(model.bfloat16(), Batch(x.bfloat16(), y), StreamDraws(stream(0, "test")))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("objective", [DenoisingMSE(0.5), DenoisingStability(0.5)], ids=["mse", "stability"])
def test_other_models_are_refused(objective):
    with pytest.raises(InputError, match="model: expected a DenoisedClassifier, got Sequential"):
        objective(classifier(), Batch(images(2, 1, SIDE, SIDE), torch.tensor([0, 1])), StreamDraws(stream(0, "test")))


def test_objectives_by_name():
    assert denoising_objective("mse", 0.5, samples=2) == DenoisingMSE(0.5, samples=2)
    assert denoising_objective("stability", 0.25) == DenoisingStability(0.25)
    assert denoising_objective("classification", 0.5, samples=3) == Gaussian(0.5, samples=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l2", {}, "name: expected one of 'classification', 'mse', 'stability', got 'l2'"),
        ("mse", {"lam": 1}, "lam: 'mse' has no such option, expected one of family, samples"),
        ("mse", {"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ("stability", {"samples": 1.5}, r"samples: expected an integer >= 1, got 1\.5"),
        ("stability", {"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
    ],
)
def test_impossible_settings_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        denoising_objective(name, **({"sigma": 0.5} | options))


# ---- training and certification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENOISING)
def test_training_changes_the_denoiser_and_not_a_bit_of_the_classifier(name):
    model = DenoisedClassifier(DnCNN(1, depth=4, width=3), classifier())
    fingerprint, before, trained = model.classifier_fingerprint(), tensors(model.classifier), tensors(model.denoiser)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    x, y = images(12, 1, SIDE, SIDE), torch.arange(12) % CLASSES
    train(model, x, y, denoising_objective(name, 0.5), optimizer=optimizer, epochs=2, batch_size=4)
    assert model.classifier_fingerprint() == fingerprint
    assert equal(tensors(model.classifier), before)
    after = tensors(model.denoiser)
    assert [key for key in after if torch.equal(after[key], trained[key])] == []
    assert int(after["dncnn.3.num_batches_tracked"]) == 6


def test_certificates_of_step_0_are_those_of_the_classifier():
    base, model = classifier().eval(), denoised()
    x = images(3, 1, SIDE, SIDE)
    one, other = (list(certify(each, x, 0.25, plan=FixedBudget(n0=20, n=200))) for each in (base, model))
    assert [(c.prediction, c.radius, c.count) for c in one] == [(c.prediction, c.radius, c.count) for c in other]
    assert one[0].made_with.model != other[0].made_with.model


class Service:
    """Stands in for a remote classifier; a lock cannot be copied."""

    def __init__(self):
        self.lock, self.base = threading.Lock(), classifier().eval()

    def predict(self, batch):
        with self.lock, torch.no_grad():
            return self.base(torch.from_numpy(batch)).argmax(dim=1).numpy()


def test_a_denoiser_before_a_black_box():
    service = Service()
    box = BlackBox(service.predict, CLASSES, name="service").train()
    model = DenoisedClassifier(DnCNN(1, depth=3, width=4), box)
    assert model.classifier.predict.__self__ is service
    assert model.classifier.place is not box.place
    assert box.training
    assert model.classifier_fingerprint().startswith("black box service, ")
    x, y = images(12, 1, SIDE, SIDE), torch.zeros(12, dtype=torch.long)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train(model, x, y, DenoisingMSE(0.5), optimizer=optimizer, epochs=4, batch_size=4)
    assert losses[-1] < losses[0]
    certificates = list(certify(model, x[:2], 0.25, plan=FixedBudget(n0=20, n=200), chunk=64))
    assert [c.n for c in certificates] == [200, 200]


@pytest.fixture(scope="module")
def digits():
    """Digits, and a classifier that was trained on clean ones."""
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))
    train(model, x[:1000], y[:1000], plain, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2), epochs=8)
    return model, x, y


def noisy(x, sigma):
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def accuracy(model, x, y):
    return float((model.eval()(x).argmax(dim=1) == y).float().mean())


@pytest.mark.parametrize("name", DENOISING)
def test_a_denoiser_helps_a_classifier_of_clean_digits(name, digits):
    base, x, y = digits
    model = DenoisedClassifier(DnCNN(1, depth=4, width=16), base)
    rest, labels = x[1000:].repeat(4, 1, 1, 1), y[1000:].repeat(4)
    copies = noisy(rest, 0.5)
    before = accuracy(model, copies, labels)
    assert before == accuracy(copy.deepcopy(base), copies, labels)
    assert accuracy(model, rest, labels) > 0.85
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    objective = denoising_objective(name, 0.5)
    losses = train(model, x[:1000], y[:1000], objective, optimizer=optimizer, epochs=8, batch_size=64)
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy(model, copies, labels) > before + 0.04
    if name == "mse":
        with torch.no_grad():
            assert float((model.denoise(copies) - rest).square().mean()) < 0.5**2 / 3
