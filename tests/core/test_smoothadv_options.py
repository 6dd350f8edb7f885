"""Norms, objectives and random starts of `smooth_adv_pgd`; `test_smoothadv.py` has the attack of the paper."""

import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.smoothadv import smooth_adv_pgd
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import LOG_MEAN_SOFTMAX
from rs_plugins.core.smoothing import shared_draws
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1, 2, 2])
SIGMA = 0.25
OBJECTIVES = ["log-mean-softmax", "mean-cross-entropy", "mean-logits"]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= 3
    return model


def attack(model=None, x=X, y=Y, **how):
    how = {"sigma": SIGMA, "eps": 0.4, "step": 0.15, "samples": 6, "steps": 4} | how
    return smooth_adv_pgd(network() if model is None else model, x, y, **how)


def loss_of(name, output, y):
    if name == "log-mean-softmax":
        return -output.softmax(1)[:, y].mean().log()
    if name == "mean-cross-entropy":
        return -output.softmax(1)[:, y].log().mean()
    return -output.mean(0).softmax(0)[y].log()


def plain_formula(objective, norm, sets, eps, step, sign):
    """One image at a time in double precision, with the draws of each step given."""
    model, out = network().double(), []
    for image, label in zip(X.double(), Y, strict=True):
        delta = torch.zeros_like(image)
        for noise in sets:
            leaf = delta.clone().requires_grad_()
            (g,) = torch.autograd.grad(loss_of(objective, model(image + leaf + noise.double()), label), leaf)
            delta = delta + sign * step * (g / g.norm() if norm is L2 else g.sign())
            delta = (image + delta).clamp(0, 1) - image
            delta = delta * min(1.0, eps / delta.norm()) if norm is L2 else delta.clamp(-eps, eps)
        out.append(image + delta)
    return torch.stack(out)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(("noise", "targeted"), [("fixed", True), ("fresh", False)])
@pytest.mark.parametrize(("norm", "eps", "step"), [(L2, 0.4, 0.15), (LINF, 0.1, 0.04)], ids=["l2", "linf"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_equals_an_independent_formula(objective, norm, eps, step, noise, targeted, chunk):
    sets = [
        shared_draws(GaussianNoise(SIGMA), 6, X, stream(0, "attack", number if noise == "fresh" else 0))
        for number in range(4)
    ]
    expected = plain_formula(objective, norm, sets, eps, step, -1 if targeted else 1)
    how = {"objective": objective, "norm": norm, "noise": noise, "targeted": targeted, "chunk": chunk}
    found = attack(eps=eps, step=step, **how)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("norm", [L2, LINF], ids=["l2", "linf"])
def test_neighbours_and_order_change_nothing_with_random_starts(norm, noise):
    how = {"norm": norm, "noise": noise, "random_starts": 3, "eps": 0.2, "step": 0.05}
    whole = attack(**how)
    parts = torch.cat([attack(x=X[:2], y=Y[:2], **how), attack(x=X[2:], y=Y[2:], **how)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert not torch.equal(whole, attack(**how, seed=1))


@pytest.mark.parametrize("targeted", [False, True])
def test_more_starts_are_never_worse_by_the_judging_draws_and_some_images_gain(targeted):
    draws = shared_draws(GaussianNoise(SIGMA), 6, X, stream(0, "judge", 0))
    sign = -1 if targeted else 1
    # Short climbs, so that it matters where they start.
    how = {"steps": 1, "step": 0.05, "targeted": targeted, "noise": "fixed"}
    losses = [
        sign * LOG_MEAN_SOFTMAX.loss(network(), attack(random_starts=count, **how), Y, draws) for count in (1, 2, 6)
    ]
    assert (losses[1] >= losses[0] - 1e-6).all()
    assert (losses[2] >= losses[1] - 1e-6).all()
    assert (losses[2] > losses[0] + 0.01).any()


def test_fresh_noise_is_fresh_in_every_start():
    seen = []

    def spy(x):
        seen.append(x.detach().clone())
        return network()(x)

    gray = torch.full((1, 1, 4, 4), 0.5)
    attack(spy, x=gray, y=Y[:1], eps=0, steps=2, random_starts=2, noise="fresh", chunk=100)
    noises = torch.stack(seen) - 0.5  # of two steps, two more, and twice that of the judge
    assert len(noises) == 6
    assert torch.equal(noises[2], noises[5])
    assert all(not torch.equal(noises[i], noises[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "margin"}, "objective: expected one of 'log-mean-softmax', "),
        ({"random_starts": -1}, "random_starts: expected an integer >= 0, got -1"),
    ],
    ids=repr,
)
def test_impossible_values_are_refused_before_the_model_is_run(changed, message):
    with pytest.raises(InputError, match=message):
        attack(lambda _: pytest.fail("the model was run"), **changed)
