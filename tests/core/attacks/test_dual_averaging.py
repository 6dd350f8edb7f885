"""The rule "dual-averaging" of `pgd`, against the same in NumPy and double precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.pgd import pgd
from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import shared_draws
from rs_plugins.core.streams import stream

X = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
X[0] = X[0].round()
SLOPE = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.7
RADII = torch.tensor([0.1, 0.4, 0.8, 5.0])
both = pytest.mark.parametrize("norm", [L2, LINF], ids=["l2", "linf"])


def saddle(at, rows):
    """Directions that change from step to step, of either sign."""
    return SLOPE[rows] - 4 * (at - 0.5)


def climb(x=X, ascent=saddle, **how):
    """What `pgd` looks at step by step, and what it returns."""
    seen = []

    def view(at, rows, number):
        seen.append(at.clone())
        return torch.zeros_like(rows, dtype=torch.bool), ascent(at, rows)

    found = pgd(view, x, rule="dual-averaging", **how)
    return [*seen, found]


def highest(norm, total, image, radius):
    """argmax <total, delta> in ball and box; in the l2 ball by bisection over how far to go along ``total``."""
    if norm is LINF:
        return np.clip(radius * np.sign(total), -image, 1 - image)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        inside = np.linalg.norm(np.clip(middle * total, -image, 1 - image)) <= radius
        low, high = (middle, high) if inside else (low, middle)
    return np.clip(low * total, -image, 1 - image)


def plain_numpy(norm, starts, radii, lengths, steps, free):
    out = [starts.double()]
    totals = np.zeros(X.shape)
    for count in range(1, steps + 1):
        images = []
        for index, image in enumerate(X.double().numpy()):
            at = out[-1][index].numpy()
            slope = (SLOPE[index].double().numpy() - 4 * (at - 0.5)) * free[index].numpy()
            totals[index] += slope / np.linalg.norm(slope)
            reach = min(radii[index], count * lengths[index])
            images.append(image + highest(norm, totals[index], image, reach))
        out.append(torch.from_numpy(np.stack(images)))
    return out


@both
@pytest.mark.parametrize(
    ("eps", "how"),
    [
        (0.4, {}),
        (0.4, {"step": 0.15}),
        (RADII, {}),
        (RADII.reshape(4, 1, 1, 1), {"step": torch.tensor([0.3, 0.1, 0.2, 0.5])}),
        (0.4, {"mask": MASK}),
        (0.4, {"random_start": True}),
        (RADII, {"random_start": True, "mask": MASK, "step": 0.3, "seed": 4}),
    ],
    ids=repr,
)
def test_it_follows_the_formula_step_by_step(norm, eps, how):
    seen = climb(norm=norm, eps=eps, steps=6, **how)
    radii = torch.as_tensor(eps, dtype=torch.float64).flatten().expand(4).tolist()
    lengths = torch.as_tensor(how.get("step", radii), dtype=torch.float64).flatten().expand(4).tolist()
    expected = plain_numpy(norm, seen[0], radii, lengths, 6, how.get("mask", torch.ones_like(MASK)))
    assert torch.equal(seen[0], X) != how.get("random_start", False)
    assert len(seen) == 7
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


@both
def test_the_highest_point_is_in_ball_and_box(norm):
    eps = torch.tensor([0.1, 0.4, 0.8, 5.0]).reshape(4, 1, 1, 1)
    delta = norm.highest(SLOPE * 1e-30, X, eps, otherwise=torch.zeros(()))
    for index in range(4):
        expected = highest(norm, SLOPE[index].double().numpy(), X[index].double().numpy(), float(eps[index]))
        torch.testing.assert_close(delta[index].double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert (X + delta).aminmax() == (0, 1)


@both
def test_a_gradient_that_does_not_change_is_followed_to_the_highest_point_at_once(norm):
    seen = climb(ascent=lambda at, rows: SLOPE[rows], norm=norm, eps=0.4, steps=4)
    expected = highest(norm, SLOPE[1].double().numpy(), X[1].double().numpy(), 0.4)
    for at in seen[1:]:
        torch.testing.assert_close((at - X)[1].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


@both
def test_steps_count_alike_however_long_their_gradients_are(norm):
    short = climb(norm=norm, eps=0.4, steps=4)
    lengths = iter([1e-20, 1.0, 1e10, 1e-3])
    scaled = climb(ascent=lambda at, rows: next(lengths) * saddle(at, rows), norm=norm, eps=0.4, steps=4)
    torch.testing.assert_close(scaled[-1], short[-1], atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize("useless", [0.0, math.nan, math.inf], ids=repr)
def test_an_image_without_a_usable_gradient_moves_to_the_edge_and_the_others_do_not_notice(norm, useless):
    inside = X * 0.2 + 0.4

    def ascent(at, rows):
        slope = saddle(at, rows).clone()
        slope[rows == 1] = useless
        return slope

    found = climb(inside, ascent, norm=norm, eps=0.3, steps=5)[-1]
    size = (found - inside)[1].flatten().abs()
    torch.testing.assert_close(size.norm() if norm is L2 else size.max(), torch.tensor(0.3), atol=1e-6, rtol=0)
    others = [0, 2, 3]
    assert torch.equal(found[others], climb(inside, norm=norm, eps=0.3, steps=5)[-1][others])
    assert not torch.equal(found[1], climb(inside, ascent, norm=norm, eps=0.3, steps=5, seed=1)[-1][1])


@both
def test_slopes_that_cancel_leave_no_image_stuck(norm):
    signs = iter([1.0, -1.0])
    found = climb(0.4 + 0.2 * X, lambda at, rows: next(signs) * SLOPE[rows], norm=norm, eps=0.1, steps=2)[-1]
    assert ((found - 0.4 - 0.2 * X).flatten(1).norm(dim=1) >= 0.1 * (1 - 1e-5)).all()


@both
def test_pixels_without_slope_stay_also_in_a_ball_larger_than_the_box(norm):
    slope = SLOPE.clone()
    slope[:, 0] = 0
    seen = climb(ascent=lambda at, rows: slope[rows], norm=norm, eps=50.0, steps=2)
    assert torch.equal(seen[-1][:, 0], X[:, 0])
    assert torch.equal(seen[-1][:, 1], (slope[:, 1] > 0).float())


@both
def test_no_budget_returns_the_input(norm):
    assert torch.equal(climb(norm=norm, eps=0, steps=3)[-1], X)
    found = climb(norm=norm, eps=torch.tensor([0.0, 0.5, 0.0, 0.5]), steps=3)[-1]
    assert torch.equal(found[::2], X[::2])
    assert ((found - X).flatten(1).norm(dim=1)[1::2] > 0.2).all()


@both
@pytest.mark.parametrize(("targeted", "noise"), [(False, "fresh"), (True, "fixed")])
def test_the_attack_on_a_smoothed_classifier_equals_an_independent_formula(norm, targeted, noise):
    """With the draws of each step given: a linear softmax, of which NumPy knows the gradient."""
    weight = np.random.default_rng(0).normal(size=(3, 18))
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3, bias=False))
    model[1].weight.data = torch.from_numpy(weight).float()
    y, eps, seen = np.array([0, 1, 2, 1]), 0.3, []
    how = {"norm": norm, "eps": eps, "steps": 5, "samples": 6, "noise": noise, "targeted": targeted, "seed": 3}
    smooth_adv_pgd(model, X, torch.from_numpy(y), 0.25, watch=lambda *what: seen.append(what[2].clone()), **how)
    delta, totals = np.zeros((4, 18)), np.zeros((4, 18))
    clean = X.double().numpy().reshape(4, 18)
    for number, found in enumerate(seen):
        torch.testing.assert_close(found.double().flatten(1), torch.from_numpy(clean + delta), atol=1e-5, rtol=0)
        half = shared_draws(GaussianNoise(0.25), 3, X, stream(3, "attack", 0 if noise == "fixed" else number))
        draws = torch.cat([half, -half]).double().numpy().reshape(6, 18)
        for index, label in enumerate(y):
            z = (clean[index] + delta[index] + draws) @ weight.T
            F = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            slope = F[:, label] / F[:, label].sum() @ (F - np.eye(3)[label]) @ weight
            totals[index] += (-1 if targeted else 1) * slope / np.linalg.norm(slope)
            delta[index] = highest(norm, totals[index], clean[index], eps)
    assert len(seen) == 5
