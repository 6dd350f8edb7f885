"""SmoothAdvPGD itself: what it computes, what it is built from, what it refuses."""

import copy
import inspect
import math
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
import torchattacks
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError
from rs_plugins_torchattacks.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD


def noise_of(attack, x, seen):
    """The draws (samples, *input) that a ``noise="fixed"`` attack adds, read off its first step on one image."""
    with seen(attack.model) as inputs:
        attack(x[:1], torch.tensor([0]))
    return inputs[1] - x[:1]  # inputs[0] is the look at the number of classes


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("eps", "alpha", "steps"), [(0.3, 0.1, 5), (0.4, 0.2, 10), (0.05, 0.1, 1)])
def test_fixed_noise_equals_pgdl2_on_the_smoothed_model(cnn, x, y, seen, targeted, eps, alpha, steps):
    inside = 0.3 + 0.4 * x  # away from the box, where the two project in another order
    attack = SmoothAdvPGD.published(cnn, eps, alpha, steps, sigma=0.25, samples=6)
    smoothed = SmoothedModel(cnn, 0.25, samples=6).eval()
    draws = noise_of(attack, inside, seen)
    smoothed.draws = lambda x: draws
    peer = torchattacks.PGDL2(smoothed, eps=eps, alpha=alpha, steps=steps, random_start=False)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
        peer.set_mode_targeted_by_label(quiet=True)
    torch.testing.assert_close(attack(inside, y), peer(inside, y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("eps", "alpha", "steps"), [(0.05, 0.02, 5), (0.03, 0.005, 10)])
def test_fixed_noise_equals_pgd_on_the_smoothed_model_in_linf(cnn, x, y, seen, targeted, eps, alpha, steps):
    attack = SmoothAdvLinfPGD.published(cnn, eps, alpha, steps, sigma=0.25, samples=6)
    smoothed = SmoothedModel(cnn, 0.25, samples=6).eval()
    draws = noise_of(attack, x, seen)
    smoothed.draws = lambda x: draws
    peer = torchattacks.PGD(smoothed, eps=eps, alpha=alpha, steps=steps, random_start=False)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
        peer.set_mode_targeted_by_label(quiet=True)
    torch.testing.assert_close(attack(x, y), peer(x, y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [SmoothAdvPGD, SmoothAdvLinfPGD])
def test_the_published_settings(cnn, x, y, kind):
    attack = kind.published(cnn, eps=0.3, steps=4, samples=3, sigma=0.4)
    assert type(attack) is kind
    assert (attack.noise, attack.antithetic, attack.rule, attack.random_start) == ("fixed", False, "projected", False)
    by_hand = kind(cnn, 0.3, 2 * 0.3 / 4, 4, noise="fixed", antithetic=False, rule="projected", samples=3, sigma=0.4)
    assert torch.equal(attack(x, y), by_hand(x, y))
    assert kind.published(cnn, noise="fresh").noise == "fresh"
    assert kind.published(cnn).eps == kind(cnn).eps


def test_the_published_settings_of_ddn(cnn, x, y):
    attack = SmoothAdvDDN.published(cnn, 4, 0.1, samples=4, sigma=0.4)
    assert type(attack) is SmoothAdvDDN
    assert (attack.noise, attack.antithetic, attack.confirm) == ("fixed", False, None)
    by_hand = SmoothAdvDDN(cnn, 4, 0.1, noise="fixed", antithetic=False, samples=4, sigma=0.4)
    assert torch.equal(attack(x, y), by_hand(x, y))
    assert not torch.equal(attack(x, y), SmoothAdvDDN(cnn, 4, 0.1, samples=4, sigma=0.4)(x, y))
    assert SmoothAdvDDN.published(cnn, confirm=0.1).confirm == 0.1


def test_the_two_norms_have_one_code_and_the_same_settings_but_eps():
    l2, linf = (dict(inspect.signature(kind).parameters) for kind in (SmoothAdvPGD, SmoothAdvLinfPGD))
    assert (l2.pop("eps").default, linf.pop("eps").default) == (1.0, 8 / 255)
    assert l2 == linf
    assert get_type_hints(SmoothAdvLinfPGD.__init__) == get_type_hints(SmoothAdvPGD.__init__)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_it_equals_a_plain_formula(cnn, x, y, seen, noise):
    eps, alpha, steps, samples = 1.5, 0.4, 4, 5
    attack = SmoothAdvPGD.published(cnn, eps, alpha, steps, sigma=0.5, samples=samples, noise=noise, seed=8)
    attack.eps = 0.0
    with seen(cnn) as inputs:
        attack(x[:1], y[:1])
    per_step = [noisy - x[:1] for noisy in inputs[1:]]
    attack.eps = eps

    delta = torch.zeros_like(x)
    for draws in per_step:
        leaf = delta.clone().requires_grad_()
        mean = torch.stack([cnn(x + leaf + e).softmax(1) for e in draws]).mean(0)
        (g,) = torch.autograd.grad(-mean[range(4), y].log().sum(), leaf)
        delta = delta + alpha * g / g.flatten(1).norm(dim=1)[:, None, None, None]
        delta = (x + delta).clamp(0, 1) - x
        delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]

    assert len(per_step) == steps
    torch.testing.assert_close(attack(x, y), x + delta, atol=1e-5, rtol=0)


def test_the_noise_has_the_given_sigma_and_the_default_is_a_quarter(cnn, x, seen):
    for sigma, expected in [(None, 0.25), (0.6, 0.6)]:
        draws = noise_of(SmoothAdvPGD(cnn, sigma=sigma, samples=300, chunk=300), x, seen)
        assert abs(draws.std() - expected) < 0.02 * expected


def test_settings_are_read_at_call_time(cnn, x, y):
    attack = SmoothAdvPGD(cnn)
    wanted = {
        "eps": 0.4,
        "alpha": 0.05,
        "steps": 3,
        "sigma": 0.4,
        "samples": 4,
        "noise": "fixed",
        "chunk": 5,
        "seed": 7,
    }
    for name, value in wanted.items():
        before = attack(x, y)
        setattr(attack, name, value)
        if name != "chunk":
            assert not torch.equal(before, attack(x, y)), name
    assert torch.equal(attack(x, y), SmoothAdvPGD(cnn, **wanted)(x, y))


def test_the_chunk_bounds_the_batch_and_changes_nothing(cnn, x, y, seen):
    with seen(cnn) as inputs:
        small = SmoothAdvPGD(cnn, samples=4, chunk=3)(x, y)
    assert max(len(batch) for batch in inputs) == 3
    torch.testing.assert_close(small, SmoothAdvPGD(cnn, samples=4)(x, y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [SmoothAdvPGD, SmoothAdvLinfPGD, SmoothAdvDDN])
def test_what_the_host_asks_of_a_class(kind):
    parameters = inspect.signature(kind).parameters
    assert next(iter(parameters)) == "model"
    assert all(p.default is not p.empty for name, p in parameters.items() if name != "model")
    assert issubclass(kind, torchattacks.attack.Attack)


def test_the_model_is_the_one_that_was_given_and_may_be_replaced(cnn, x, y):
    attack = SmoothAdvPGD(model=cnn)
    assert attack.model is cnn
    other = copy.deepcopy(cnn)
    with torch.no_grad():
        other[5].weight.mul_(-1)
    attack.set_model(other)
    assert attack.model is other
    assert torch.equal(attack(x, y), SmoothAdvPGD(other)(x, y))


def test_repr_shows_hyper_parameters_only(cnn, x, y):
    attack = SmoothAdvPGD(cnn, eps=torch.rand(4, 1, 1, 1), alpha=0.1, samples=4, seed=None)
    attack.set_mode_targeted_random(quiet=True)
    attack(x, y)
    assert repr(attack) == (
        "SmoothAdvPGD(eps=tensor(4, 1, 1, 1), alpha=0.1, steps=10, sigma=0.25, samples=4, noise='fresh', "
        "antithetic=True, rule='dual-averaging', objective='log-mean-softmax', gradient='backprop', "
        "random_start=False, restarts=1, early_stop=None, chunk=None, seed=None, attack_mode='targeted(random)', "
        "normalization_used=False)"
    )
    assert "sigma=0.5," in repr(SmoothAdvPGD(cnn, sigma=0.5))
    assert "sigma=0.7," in repr(SmoothAdvPGD(SmoothedModel(cnn, 0.7)))
    held = [value for name, value in vars(attack).items() if name not in ("model", "eps")]
    assert not any(isinstance(value, (nn.Module, torch.Tensor, torch.Generator)) for value in held)


@pytest.mark.parametrize("wrapped", [nn.DataParallel, lambda model: model])
def test_wrapped_models_and_other_types(cnn, x, y, wrapped):
    model = wrapped(cnn.double())
    adversarial = SmoothAdvPGD(model, eps=0.5)(x.double(), y.to(torch.uint8))
    assert adversarial.dtype == torch.float64
    lengths = (adversarial - x.double()).flatten(1).norm(dim=1)
    assert (lengths <= 0.5 + 1e-12).all()
    assert (lengths > 0.4).all()


class Sum(nn.Module):
    """Two classes, no parameters."""

    def forward(self, x):
        total = x.flatten(1).sum(1)
        return torch.stack([total, -total], dim=1)


def test_a_model_without_parameters_uses_the_inputs_device(x, y, capsys):
    attack = SmoothAdvPGD(Sum(), eps=0.5)
    assert "Failed to set device automatically" in capsys.readouterr().out  # the host's
    assert attack.device is None
    inside = 0.4 + 0.2 * x
    adversarial = attack(inside, torch.tensor([0, 1, 0, 1]))
    moved = (adversarial - inside).flatten(1).sum(1).sign()
    assert moved.tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"model": lambda x: x}, "model: expected a torch.nn.Module, got function"),
        ({"model": SimpleNamespace(model=nn.Flatten())}, "model: expected .*, got SimpleNamespace; pass its model"),
        ({"sigma": 0.0}, r"sigma: expected a finite number > 0, got 0\.0"),
        ({"sigma": "big"}, "sigma: expected a finite number > 0, got 'big'"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"noise": "pink"}, "noise: expected 'fixed' or 'fresh', got 'pink'"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"seed": 1.5}, r"seed: expected an integer or None, got 1\.5"),
        ({"sigma": 0.5, "model": SmoothedModel(nn.Linear(2, 2), 0.25)}, r"sigma: expected 0\.25, which the SmoothedM"),
        ({"model": nn.Sequential(SmoothedModel(nn.Linear(2, 2), 0.25))}, "got a Sequential with a SmoothedModel insid"),
    ],
    ids=lambda case: case if isinstance(case, str) else " ".join(case),
)
def test_impossible_settings_are_refused_at_once(cnn, bad, message):
    with pytest.raises(InputError, match=message):
        SmoothAdvPGD(**({"model": cnn} | bad))


def test_unknown_settings_are_refused(cnn):
    with pytest.raises(TypeError, match="iters"):
        SmoothAdvPGD(cnn, iters=5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eps", -0.5, r"eps: expected finite values >= 0, got -0\.5"),
        ("eps", "cpu", "eps: expected a number or one per image, got 'cpu'"),
        ("eps", torch.rand(3, 1, 1, 1), r"eps: expected a number or one per image \(4\), got a tensor of shape \(3, 1"),
        ("alpha", math.nan, "alpha: expected finite values >= 0, got nan"),
        ("steps", 0, "steps: expected an integer >= 1, got 0"),
        ("sigma", -1, "sigma: expected a finite number > 0, got -1"),
        ("samples", 2.5, r"samples: expected an integer >= 1, got 2\.5"),
        ("noise", None, "noise: expected 'fixed' or 'fresh', got None"),
        ("device", "meta", "inputs: expected them on the model's device cpu, got meta; the attack moves them"),
        ("device", "cuda:77", "device: expected a device of this machine, got 'cuda:77'"),
    ],
)
def test_impossible_settings_assigned_later_are_refused_at_the_call(cnn, x, y, name, value, message):
    attack = SmoothAdvPGD(cnn)
    setattr(attack, name, value)
    with pytest.raises(InputError, match=message):
        attack(x, y)


X, Y = torch.rand(4, 2, 6, 6), torch.tensor([0, 4, 2, 1])


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (X * 2 - 1, Y, r"inputs: expected pixels in \[0, 1\], got values from -"),
        (X * math.nan, Y, "inputs: expected finite values, got NaN or infinity"),
        ((X * 255).to(torch.uint8), Y, "inputs: expected the model's dtype torch.float32, got torch.uint8"),
        (X.double(), Y, "inputs: expected the model's dtype torch.float32, got torch.float64"),
        (X.numpy(), Y, "inputs: expected a torch.Tensor, got ndarray"),
        (X[0, 0, 0], Y, r"inputs: expected a batch of shape \(n, \*input\), got shape \(6,\)"),
        (X, None, "labels: expected one integer label per image, got None"),
        (X, Y.float(), "labels: expected a tensor of integer labels, got torch.float32"),
        (X, Y.tolist(), "labels: expected a tensor of integer labels, got list"),
        (X, Y[:3], r"labels: expected one label per image, shape \(4,\), got shape \(3,\)"),
        (X, Y + 1, r"labels: expected labels in \[0, 5\), got values from 1 to 5"),
        (X, Y - 1, r"labels: expected labels in \[0, 5\), got values from -1 to 3"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_impossible_inputs_are_refused_after_at_most_one_image(cnn, seen, inputs, labels, message):
    with seen(cnn) as batches, pytest.raises(InputError, match=message):
        SmoothAdvPGD(cnn)(inputs, labels)
    assert sum(len(batch) for batch in batches) <= 1


def test_pixels_off_by_a_rounding_error_are_accepted_and_brought_back(cnn, x, y):
    adversarial = SmoothAdvPGD(cnn)(x.round() * (1 + 6e-7) - 3e-8, y)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


class Bad(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil
        self.linear = nn.Linear(72, 5)

    def forward(self, x):
        return self.spoil(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bad(lambda z: z[:, :1]), "model: expected at least 2 columns of logits, got 1"),
        (Bad(lambda z: z.argmax(1)), "model: expected it to return floating-point logits"),
        (Bad(lambda z: z * math.nan), "model: it returns NaN logits on a clean image"),
        (Bad(lambda z: z.detach()), "model: no gradient flows from its logits to its input"),
        (Bad(lambda z: nn.functional.one_hot(z.argmax(1), 5).float()), "model: no gradient flows from its logits"),
        (Sum(), r"labels: expected labels in \[0, 2\), got values from 0 to 4"),
        (nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(72, 5)), "model: it changes its input in place"),
        (nn.Linear(72, 5), r"model: it fails on an input of shape \(1, 2, 6, 6\)"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_models_that_cannot_be_attacked_are_refused(x, y, model, message):
    x[0, 0, 0, 0] = -5e-7  # so that a ReLU in place changes something
    copy = x.clone()
    with pytest.raises((ModelError, InputError), match=message):
        SmoothAdvPGD(model)(x, y)
    assert torch.equal(x, copy)
