"""Gaussian, Stability, Consistency and MACER against formulas in float64, written image by image and draw by draw."""

import math
from statistics import NormalDist

import pytest
import torch
from torch.nn.functional import one_hot

from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.objective import Batch
from rs_plugins.core.training.stability import Stability, StabilityConfSeq, StabilityRs4a
from rs_plugins.errors import InputError


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def total(values):
    return sum(values)


def over_images(formula):
    """Return the mean over the images of ``formula`` of F at the image, its label, F at its copies."""

    def whole(f, x, y, e, u):
        return mean(
            formula(softmax(f(image)), int(label), [softmax(f(image + draw)) for draw in draws])
            for image, label, draws in zip(x, y, e, strict=True)
        )

    return whole


def divergence(p, q):
    return total(p[c] * (p[c].log() - q[c].log()) for c in range(len(p)))


def entropy(p):
    return -total(p[c] * p[c].log() for c in range(len(p)))


# ---- Gaussian --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_gaussian(problem, samples):
    formula = over_images(lambda clean, y, copies: mean(-copy[y].log() for copy in copies))
    problem.agree(Gaussian(0.5, samples=samples), formula, samples=samples)


def test_gaussian_with_probabilities_as_labels(problem):
    soft = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = problem.known(2)
    found = Gaussian(0.5, samples=2)(problem.model, Batch(problem.x, soft), draws)
    log_f = problem.model(problem.x.unsqueeze(1) + draws.e).log_softmax(dim=2)
    torch.testing.assert_close(found, -(soft.unsqueeze(1) * log_f).sum(dim=2).mean())
    hard = Gaussian(0.5, samples=2)(problem.model, Batch(problem.x, one_hot(problem.y, 3).double()), draws)
    torch.testing.assert_close(hard, Gaussian(0.5, samples=2)(problem.model, Batch(problem.x, problem.y), draws))


# ---- Stability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "lam"), [(1, 2.0), (3, 0.7)])
def test_stability(problem, samples, lam):
    def formula(clean, y, copies):
        return -clean[y].log() + lam * mean(-total(clean[c] * copy[c].log() for c in range(3)) for copy in copies)

    objective = Stability(0.5, samples=samples, lam=lam) if lam != 2 else Stability(0.5)
    problem.agree(objective, over_images(formula), samples=samples)


@pytest.mark.parametrize("lam", [6.0, 0.7])
def test_stability_of_rs4a(problem, lam):
    def formula(clean, y, copies):
        return -copies[0][y].log() + lam * divergence(copies[0], copies[1])

    problem.agree(StabilityRs4a(0.5, lam=lam) if lam != 6 else StabilityRs4a(0.5), over_images(formula), samples=2)


@pytest.mark.parametrize("lam", [12.0, 0.7])
def test_stability_of_confidence_sequences(problem, lam):
    def formula(clean, y, copies):
        return -copies[0][y].log() - copies[1][y].log() + lam * divergence(copies[0], copies[1])

    objective = StabilityConfSeq(0.5, lam=lam) if lam != 12 else StabilityConfSeq(0.5)
    problem.agree(objective, over_images(formula), samples=2)


def test_the_three_losses_differ(problem):
    batch = Batch(problem.x, problem.y)
    losses = [
        float(method(0.5, lam=1.0)(problem.model, batch, problem.known(1 if method is Stability else 2)).detach())
        for method in (Stability, StabilityRs4a, StabilityConfSeq)
    ]
    assert len({round(loss, 6) for loss in losses}) == 3


# ---- Consistency -----------------------------------------------------------------------------------------------------


def consistency(lam, w_ent, form):
    def formula(clean, y, copies):
        average = mean(copies)
        spread = mean(divergence(average, copy) for copy in copies)
        fit = mean(-copy[y].log() for copy in copies)
        extra = {
            "default": lam * spread + w_ent * entropy(average),
            "xent": lam * (spread + entropy(average)),
            "kl": lam * spread,
            "mse": lam * total((copies[1][c] - copies[0][c]) ** 2 for c in range(3)),
        }
        return fit + extra[form]

    return over_images(formula)


@pytest.mark.parametrize("form", ["default", "xent", "kl", "mse"])
@pytest.mark.parametrize("samples", [2, 4])
def test_consistency(problem, form, samples):
    objective = Consistency(0.5, lam=3.0, form=form, samples=samples)
    problem.agree(objective, consistency(3.0, 0.5, form), samples=samples)


def test_consistency_with_its_defaults_and_another_entropy(problem):
    problem.agree(Consistency(0.5), consistency(10.0, 0.5, "default"), samples=2)
    problem.agree(Consistency(0.5, w_ent=0.1), consistency(10.0, 0.1, "default"), samples=2)
    problem.agree(Consistency(0.5, w_ent=0), consistency(10.0, 0.0, "kl"), samples=2)


def test_xent_is_the_default_form_with_equal_weights(problem):
    batch = Batch(problem.x, problem.y)
    first = Consistency(0.5, lam=3.0, form="xent")(problem.model, batch, problem.known(2))
    torch.testing.assert_close(
        first, Consistency(0.5, lam=3.0, w_ent=3.0)(problem.model, batch, problem.known(2)), rtol=1e-12, atol=0
    )


def test_probabilities_that_underflow_have_finite_losses_and_gradients(problem):
    with torch.no_grad():
        problem.model[2].weight.mul_(2000)
    batch = Batch(problem.x, problem.y)
    for objective in (Consistency(0.5), Stability(0.5, samples=2), StabilityRs4a(0.5), Macer(0.5, samples=2)):
        loss, slopes = problem.value_and_gradient(objective(problem.model, batch, problem.known(2)))
        assert bool(loss.isfinite())
        assert all(bool(slope.isfinite().all()) for slope in slopes)


# ---- MACER -----------------------------------------------------------------------------------------------------------


def quantile(p):
    """Return Φ⁻¹(p) with the gradient 1/φ(Φ⁻¹(p))."""
    z = NormalDist().inv_cdf(p.item())
    return z + (p - p.detach()) / NormalDist().pdf(z)


def macer(lam, margin, inv_temp, sigma=0.5):
    counted = []

    def formula(f, x, y, e, u):
        counted.clear()
        loss = 0
        for image, label, draws in zip(x, y.tolist(), e, strict=True):
            logits = [f(image + draw) for draw in draws]
            loss = loss - (mean(softmax(each)[label] for each in logits) + 1e-10).log()
            sharp = mean(softmax(inv_temp * each) for each in logits)
            first, second = sorted(range(3), key=lambda c: -sharp[c].item())[:2]
            gap = quantile(sharp[first]) - quantile(sharp[second])
            counted.append(first == label and gap.item() <= margin)
            if counted[-1]:
                loss = loss + lam * (margin - gap) * sigma / 2
        return loss / len(x)

    return formula, counted


@pytest.mark.parametrize(
    ("options", "some"),
    [
        ({}, True),
        ({"lam": 3.0}, True),
        ({"margin": 0.9}, True),
        ({"margin": 0.01}, False),
        ({"inv_temp": 2.0}, True),
        ({"lam": 0.0}, True),
    ],
    ids=repr,
)
def test_macer(problem, options, some):
    settings = {"lam": 16.0, "margin": 8.0, "inv_temp": 16.0} | options
    formula, counted = macer(**settings)
    problem.agree(Macer(0.5, **options), formula, samples=16)
    assert any(counted) == some
    assert not all(counted)


def test_macer_defers_the_robustness_term(problem):
    with_term, without = (macer(lam, 8.0, 16.0)[0] for lam in (16.0, 0.0))
    objective = Macer(0.5, deferred=3, samples=5)
    for epoch, formula in ((0, without), (3, without), (4, with_term)):
        problem.agree(objective, formula, samples=5, epoch=epoch)


def test_macer_bounds_the_loss_of_a_copy_that_is_surely_wrong(problem):
    with torch.no_grad():
        problem.model[2].weight.mul_(2000)
        wrong = problem.model(problem.x + problem.noise(1)[:, 0]).argmin(dim=1)
    loss = Macer(0.5, samples=1)(problem.model, Batch(problem.x, wrong), problem.known(1))
    assert float(loss.detach()) == pytest.approx(-math.log(1e-10), rel=1e-6)


def test_macer_leaves_out_probabilities_that_round_to_one(problem):
    """Φ⁻¹(1) is infinite, and its gradient times 0 would be NaN."""
    model = problem.model.float()
    with torch.no_grad():
        model[2].weight.mul_(20)
        x, e = problem.x.float(), 0.01 * problem.noise(16).float()
        y = model(x.unsqueeze(1) + e).softmax(dim=2).mean(dim=1).argmax(dim=1)
        sharp = (16 * model(x.unsqueeze(1) + e)).softmax(dim=2).mean(dim=1)
    assert bool((sharp.amax(dim=1) == 1).any())
    known = problem.known(16)
    known.e = e
    loss, slopes = problem.value_and_gradient(Macer(0.5)(model, Batch(x, y), known))
    assert bool(loss.isfinite())
    assert all(bool(slope.isfinite().all()) for slope in slopes)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Gaussian, {"samples": 0}, "samples: expected an integer >= 1, got 0"),
        (Stability, {"samples": 0.5}, r"samples: expected an integer >= 1, got 0\.5"),
        (Stability, {"lam": -1}, "lam: expected a finite number >= 0, got -1"),
        (StabilityRs4a, {"lam": math.nan}, "lam: expected a finite number >= 0, got nan"),
        (StabilityConfSeq, {"lam": "2"}, "lam: expected a finite number >= 0, got '2'"),
        (Consistency, {"lam": math.inf}, "lam: expected a finite number >= 0, got inf"),
        (Consistency, {"w_ent": -0.5}, r"w_ent: expected a finite number >= 0, got -0\.5"),
        (Consistency, {"w_ent": 0.5, "form": "kl"}, "w_ent: expected None with form='kl', which does not use it"),
        (Consistency, {"form": "js"}, "form: expected one of 'default', 'xent', 'kl', 'mse', got 'js'"),
        (Consistency, {"samples": 1}, "samples: expected an integer >= 2, got 1"),
        (Consistency, {"warmup": 0}, "warmup: expected an integer >= 1, got 0"),
        (Macer, {"lam": -1}, "lam: expected a finite number >= 0, got -1"),
        (Macer, {"margin": 0}, "margin: expected a finite number > 0, got 0"),
        (Macer, {"inv_temp": 0}, "inv_temp: expected a finite number > 0, got 0"),
        (Macer, {"deferred": -1}, "deferred: expected an integer >= 0, got -1"),
        (Macer, {"samples": 0}, "samples: expected an integer >= 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method(0.5, **options)
