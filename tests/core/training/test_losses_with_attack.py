"""SmoothAdv, SmoothMix and Consistency with an attack against formulas in float64, written image by image."""

import math

import numpy as np
import pytest
import torch

from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.inner_attacks import DDN, PGD, BallFirstPGD
from rs_plugins.core.training.objective import Batch
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.errors import InputError


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def gradient(f, image, label, draws):
    """Return that of -log of the mean probability of the label."""
    image = image.detach().clone().requires_grad_()
    loss = -mean(softmax(f(image + draw))[label] for draw in draws).log()
    return torch.autograd.grad(loss, image)[0]


def length(delta):
    return math.sqrt(sum(float(pixel) ** 2 for pixel in delta))


def into_ball(delta, eps):
    return delta * (eps / length(delta)) if length(delta) > eps else delta


def pgd(f, image, label, draws, eps, steps, step):
    delta = torch.zeros_like(image)
    for _ in range(steps):
        slope = gradient(f, image + delta, label, draws)
        delta = delta + step * slope / length(slope)
        delta = into_ball((image + delta).clamp(0, 1) - image, eps)
    return image + delta


def ball_first(f, image, label, draws, eps, steps, step):
    """Return the whole way of the attack."""
    way = [image]
    for _ in range(steps):
        slope = gradient(f, way[-1], label, draws)
        moved = way[-1] + step * slope / (length(slope) + 1e-8)
        way.append((image + (moved - image if eps is None else into_ball(moved - image, eps))).clamp(0, 1))
    return way


def ddn(f, image, label, draws, eps, steps, gamma, norm, levels):
    found, best = None, math.inf
    current = image
    for i in range(steps + 1):
        votes = torch.stack([f(current + draw).argmax() for draw in draws]).bincount(minlength=3)
        bad = bool(votes[[c for c in range(3) if c != label]].max() > votes[label])
        if bad and length(current - image) < best:
            found, best = current, length(current - image)
        if i < steps:
            slope = gradient(f, current, label, draws)
            rate = 0.01 + 0.99 * (1 + math.cos(math.pi * (i + 1) / steps)) / 2
            delta = current - image + rate * slope / length(slope)
            norm = min(eps, norm * (1 - gamma if bad else 1 + gamma))
            current = image + norm * delta / length(delta)
            if levels is not None:
                current = (current * (levels - 1)).round() / (levels - 1)
            current = image + into_ball(current.clamp(0, 1) - image, eps)
    return current if found is None else found


def smooth_adv(attack, multi_noise=True):
    def formula(f, x, y, e, u):
        losses = []
        for image, label, draws in zip(x, y.tolist(), e, strict=True):
            moved = attack(f, image, label, draws).detach()
            losses += [-softmax(f(moved + draw))[label].log() for draw in (draws if multi_noise else draws[:1])]
        return mean(losses)

    return formula


# ---- SmoothAdv -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"eps": 1.0, "steps": 10, "step": 0.2}),
        ({"eps": 0.3}, {"eps": 0.3, "steps": 10, "step": 0.06}),
        ({"steps": 2}, {"eps": 1.0, "steps": 2, "step": 1.0}),
        ({"eps": 0.5, "steps": 3, "step": 0.4}, {"eps": 0.5, "steps": 3, "step": 0.4}),
    ],
    ids=repr,
)
def test_smoothadv_by_pgd(problem, options, settings):
    formula = smooth_adv(lambda *known: pgd(*known, **settings))
    problem.agree(SmoothAdv(0.5, attack=PGD(**options), warmup=1), formula, samples=4)


def test_smoothadv_by_default_is_pgd_with_warm_up_over_ten_epochs(problem):
    for epoch, eps in ((0, 0.1), (4, 0.5), (9, 1.0), (30, 1.0)):
        formula = smooth_adv(lambda *known, eps=eps: pgd(*known, eps=eps, steps=10, step=2 * eps / 10))
        problem.agree(SmoothAdv(0.5), formula, samples=4, epoch=epoch)


def test_warm_up_shrinks_the_ball_but_not_a_given_step(problem):
    formula = smooth_adv(lambda *known: pgd(*known, eps=0.5, steps=3, step=0.4))
    objective = SmoothAdv(0.5, attack=PGD(eps=1.0, steps=3, step=0.4), warmup=4)
    problem.agree(objective, formula, samples=4, epoch=1)


@pytest.mark.parametrize("samples", [1, 3])
def test_smoothadv_with_one_noise_attacks_all_and_learns_from_the_first(problem, samples):
    formula = smooth_adv(lambda *known: pgd(*known, eps=1.0, steps=10, step=0.2), multi_noise=False)
    problem.agree(SmoothAdv(0.5, multi_noise=False, samples=samples, warmup=1), formula, samples=samples)


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ({}, 1),
        ({"eps": 0.3}, 1),
        ({"steps": 4, "gamma": 0.3}, 1),
        ({"init_norm": 0.2}, 1),
        ({"levels": None}, 1),
        ({"levels": 8, "steps": 5}, 1),
        ({"init_norm": 0.2, "eps": 0.6}, 2),
        ({"eps": 0.6}, 2),
    ],
    ids=repr,
)
def test_smoothadv_by_ddn(problem, options, warmup):
    settings = {"eps": 1.0, "steps": 10, "gamma": 0.05, "levels": 256} | options
    settings["eps"] /= warmup
    settings["norm"] = settings.pop("init_norm", settings["eps"])
    settings["norm"] = min(settings["norm"], settings["eps"])
    formula = smooth_adv(lambda *known: ddn(*known, **settings))
    problem.agree(SmoothAdv(0.5, attack=DDN(**options), warmup=warmup, samples=5), formula, samples=5)


# ---- Consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings", "epoch"),
    [
        ({}, {"eps": 2.0, "steps": 4, "step": 1.0}, 9),
        ({}, {"eps": 0.6, "steps": 4, "step": 0.3}, 2),
        ({"eps": 0.5, "steps": 3, "step": 0.4}, {"eps": 0.5, "steps": 3, "step": 0.4}, 20),
    ],
    ids=repr,
)
def test_consistency_with_an_attack(problem, options, settings, epoch):
    def formula(f, x, y, e, u):
        losses = []
        for image, label, draws in zip(x, y.tolist(), e, strict=True):
            moved = ball_first(f, image, label, draws, **settings)[-1].detach()
            copies = [softmax(f(moved + draw)) for draw in draws]
            average = mean(copies)
            spread = mean((average * (average.log() - copy.log())).sum() for copy in copies)
            fit = mean(-copy[label].log() for copy in copies)
            losses.append(fit + 3.0 * spread - 0.5 * (average * average.log()).sum())
        return mean(losses)

    objective = Consistency(0.5, lam=3.0, attack=BallFirstPGD(**options), samples=3)
    problem.agree(objective, formula, samples=3, epoch=epoch)


def test_box_first_and_ball_first_differ_where_the_box_is_near(problem):
    batch = Batch(problem.x, problem.y)
    losses = [
        SmoothAdv(0.5, attack=attack(eps=0.5, steps=3), warmup=1)(problem.model, batch, problem.known(4)).item()
        for attack in (PGD, BallFirstPGD)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


# ---- SmoothMix -------------------------------------------------------------------------------------------------------


def smooth_mix(step=1.0, steps=8, mix_step=0, max_norm=None, max_norm_s=None, w_mix=1.0, w=1.0):
    masked = []

    def formula(f, x, y, e, u):
        masked.clear()
        first, second = [], []
        for image, label, draws, number in zip(x, y.tolist(), e, u, strict=True):
            way = ball_first(f, image, label, draws, max_norm, steps, step)
            clean = way[mix_step] if mix_step < steps else image
            radius = step * mix_step if max_norm_s is None else max_norm_s
            clean = (image + into_ball(clean - image, w * radius)).clamp(0, 1).detach()
            copies = [f(clean + draw) for draw in draws]
            first += [-softmax(copy)[label].log() for copy in copies]
            average = mean(softmax(copy) for copy in copies)
            masked.append(int(average.argmax()) != label)
            share = number / 2
            aim = (1 - share) * average + share / 3
            mixed = (1 - share) * clean + share * way[-1].detach()
            for draw in draws:
                said = softmax(f(mixed + draw))
                second.append((aim * (aim.log() - said.log())).sum() * (not masked[-1]))
        return mean(first) + w_mix * w * mean(second)

    return formula, masked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step": 0.3, "steps": 3},
        {"mix_step": 1, "step": 0.3},
        {"mix_step": 2, "step": 0.2, "steps": 3},
        {"mix_step": 3, "step": 0.2, "steps": 3},
        {"mix_step": 9},
        {"w_mix": 5.0, "step": 0.3},
        {"w_mix": 0.0, "mix_step": 1},
        {"max_norm": 0.4, "step": 0.3, "steps": 4},
        {"max_norm_s": 0.1, "mix_step": 1, "step": 0.3},
        {"max_norm_s": 0.0, "mix_step": 1, "step": 0.3},
        {"max_norm_s": 0.7, "mix_step": 2, "step": 0.3, "steps": 4, "max_norm": 0.5, "w_mix": 2.0},
    ],
    ids=repr,
)
@pytest.mark.parametrize("samples", [1, 4])
def test_smoothmix(problem, options, samples):
    formula, masked = smooth_mix(**options)
    problem.agree(SmoothMix(0.5, warmup=1, samples=samples, **options), formula, samples=samples)
    assert any(masked)
    assert not all(masked)


def test_smoothmix_warms_up_the_weight_and_the_reach_of_the_clean_side(problem):
    for epoch, w in ((0, 0.1), (4, 0.5), (9, 1.0), (20, 1.0)):
        formula, _ = smooth_mix(w=w, mix_step=1, step=0.5, w_mix=5.0)
        problem.agree(SmoothMix(0.5, mix_step=1, step=0.5, w_mix=5.0), formula, samples=4, epoch=epoch)


def test_a_slope_far_below_the_guard_hardly_moves_an_image(problem):
    """Where PGD takes whole steps: an image of which the network is sure is mixed with itself."""
    with torch.no_grad():
        for parameter in problem.model[0].parameters():
            parameter.mul_(1e-12)
    moved = []
    problem.model.register_forward_hook(lambda model, inputs, _: moved.append(inputs[0]))
    for objective, expected in (
        (SmoothAdv(0.5, attack=PGD(eps=0.1), warmup=1), 0.1),
        (SmoothAdv(0.5, attack=BallFirstPGD(eps=0.1), warmup=1), 0.0),
        (SmoothMix(0.5, mix_step=1), 0.0),
    ):
        objective(problem.model, Batch(problem.x, problem.y), problem.known(4))
        shift = moved[-1].reshape(5, 4, 4) - problem.noise(4) - problem.x.unsqueeze(1)
        assert float(shift.norm(dim=2).max()) == pytest.approx(expected, abs=1e-2)


def test_probabilities_of_zero_have_finite_gradients(problem):
    """p is 0 for a class and u is 0 too: y_mix holds a 0, whose logarithm is not finite."""
    with torch.no_grad():
        problem.model[2].weight.mul_(5000)
    known = problem.known(2)
    known.u = torch.zeros(5, dtype=torch.float64)
    loss, slopes = problem.value_and_gradient(
        SmoothMix(0.5, samples=2)(problem.model, Batch(problem.x, problem.y), known)
    )
    assert bool(loss.isfinite())
    assert all(bool(slope.isfinite().all()) for slope in slopes)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (PGD, {"eps": 0}, "eps: expected a finite number > 0, got 0"),
        (PGD, {"steps": 0}, "steps: expected an integer >= 1, got 0"),
        (PGD, {"step": 0}, "step: expected a finite number > 0, got 0"),
        (BallFirstPGD, {"eps": -1}, "eps: expected a finite number > 0, got -1"),
        (BallFirstPGD, {"steps": 1.5}, r"steps: expected an integer >= 1, got 1\.5"),
        (BallFirstPGD, {"step": math.inf}, "step: expected a finite number > 0, got inf"),
        (DDN, {"eps": math.nan}, "eps: expected a finite number > 0, got nan"),
        (DDN, {"steps": 0}, "steps: expected an integer >= 1, got 0"),
        (DDN, {"gamma": 1}, r"gamma: expected a number in \(0, 1\), got 1"),
        (DDN, {"init_norm": 0}, "init_norm: expected a finite number > 0, got 0"),
        (DDN, {"levels": 1}, "levels: expected an integer >= 2, got 1"),
        (SmoothAdv, {"attack": "pgd"}, r"attack: expected an attack such as PGD\(eps=1.0, steps=10\), got 'pgd'"),
        (SmoothAdv, {"attack": PGD}, r"attack: expected an attack such as PGD\(eps=1.0, steps=10\), got <class"),
        (SmoothAdv, {"samples": 0}, "samples: expected an integer >= 1, got 0"),
        (SmoothAdv, {"multi_noise": 1}, "multi_noise: expected True or False, got 1"),
        (SmoothAdv, {"warmup": 0}, "warmup: expected an integer >= 1, got 0"),
        (Consistency, {"attack": 2.0}, r"attack: expected an attack such as PGD\(eps=1.0, steps=10\), got 2.0"),
        (SmoothMix, {"step": 0}, "step: expected a finite number > 0, got 0"),
        (SmoothMix, {"steps": 0}, "steps: expected an integer >= 1, got 0"),
        (SmoothMix, {"mix_step": -1}, "mix_step: expected an integer >= 0, got -1"),
        (SmoothMix, {"max_norm": 0}, "max_norm: expected a finite number > 0, got 0"),
        (SmoothMix, {"max_norm_s": -1}, "max_norm_s: expected a finite number >= 0, got -1"),
        (SmoothMix, {"w_mix": -1}, "w_mix: expected a finite number >= 0, got -1"),
        (SmoothMix, {"warmup": 0}, "warmup: expected an integer >= 1, got 0"),
        (SmoothMix, {"samples": 0}, "samples: expected an integer >= 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options) if make in (PGD, BallFirstPGD, DDN) else make(0.5, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PGD(eps=np.float32(0.5), steps=3.0, step=np.float64(0.25)), PGD(eps=0.5, steps=3, step=0.25)),
        (BallFirstPGD(eps=1, steps=np.int64(2), step=1), BallFirstPGD(eps=1.0, steps=2, step=1.0)),
        (
            DDN(eps=1, steps=2.0, gamma=np.float32(0.5), init_norm=1, levels=8.0),
            DDN(eps=1.0, steps=2, gamma=0.5, init_norm=1.0, levels=8),
        ),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_numbers_of_every_kind_are_kept_as_pythons(given, expected):
    """A record of a run says by ``repr`` what attack it was."""
    assert repr(given) == repr(expected)
