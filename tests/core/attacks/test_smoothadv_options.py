"""Options of `smooth_adv_pgd`: norms, objectives, draws, runs; `test_smoothadv.py` has the attack of the paper."""

import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.smoothadv import PUBLISHED, smooth_adv_ddn, smooth_adv_pgd
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
    how = {"objective": objective, "norm": norm, "targeted": targeted, "chunk": chunk}
    found = attack(eps=eps, step=step, **how, **(PUBLISHED | {"noise": noise}))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("norm", [L2, LINF], ids=["l2", "linf"])
def test_neighbours_and_order_change_nothing_with_several_runs(norm, noise, rule):
    how = {"norm": norm, "noise": noise, "random_start": True, "restarts": 3, "eps": 0.2, "step": 0.05, "rule": rule}
    whole = attack(**how)
    parts = torch.cat([attack(x=X[:2], y=Y[:2], **how), attack(x=X[2:], y=Y[2:], **how)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(attack(x=X[order], y=Y[order], **how), whole[order], atol=1e-5, rtol=0)
    if rule == "projected" or norm is L2:  # else all seeds can come to the same corner
        assert not torch.equal(whole, attack(**how, seed=1))


@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
@pytest.mark.parametrize("targeted", [False, True])
def test_more_runs_are_never_worse_by_the_judging_draws_and_some_images_gain(targeted, rule):
    draws = shared_draws(GaussianNoise(SIGMA), 6, X, stream(0, "judge", 0))
    sign = -1 if targeted else 1
    # Short climbs, so that it matters where they start.
    how = {"steps": 1, "step": 0.05, "targeted": targeted, **PUBLISHED, "rule": "projected"}
    if rule == "dual-averaging":  # goes where the gradient at the start points, in the whole ball
        how |= {"step": None, "eps": 3.0, "rule": rule}
    runs = {count: attack(restarts=count, **how) for count in (1, 2, 6)}
    losses = {count: sign * LOG_MEAN_SOFTMAX.loss(network(), found, Y, draws) for count, found in runs.items()}
    assert torch.equal(runs[1], attack(**how))
    assert (losses[2] >= losses[1] - 1e-6).all()
    assert (losses[6] >= losses[2] - 1e-6).all()
    assert (losses[6] > losses[1] + (0.01 if rule == "projected" else 1e-4)).any()


class Spy:
    """A model that counts the images that it was given, and remembers them."""

    def __init__(self, model=None):
        self.model, self.seen = network() if model is None else model, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)

    @property
    def images(self):
        return sum(map(len, self.seen))


@pytest.mark.parametrize(("restarts", "judged"), [(1, 0), (2, 2), (3, 3)])
def test_one_run_costs_its_steps_and_several_a_pass_of_the_judge_each(restarts, judged):
    spy = Spy()
    attack(spy, restarts=restarts, samples=7, steps=3)
    assert spy.images == len(X) * 7 * (3 * restarts + judged)


def test_fresh_noise_is_fresh_in_every_run():
    spy = Spy()
    gray = torch.full((1, 1, 4, 4), 0.5)
    attack(spy, x=gray, y=Y[:1], eps=0, steps=2, restarts=2, noise="fresh", chunk=100)
    noises = torch.stack(spy.seen) - 0.5  # of two steps, and the judge, twice
    assert len(noises) == 6
    assert torch.equal(noises[2], noises[5])
    assert all(not torch.equal(noises[i], noises[j]) for i in range(5) for j in range(i))


def noise_of(samples, attacked=smooth_adv_pgd, **how):
    """The noise (passes, samples, *input) that an attack adds to a gray image that may not move."""
    spy, gray = Spy(), torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    spy.model = spy.model.double()
    still = torch.zeros(1, 4, 4, dtype=torch.bool)
    attacked(spy, gray, Y[:1], SIGMA, samples=samples, steps=3, mask=still, chunk=1000, **how)
    return torch.stack(spy.seen) - gray


@pytest.mark.parametrize("attacked", [smooth_adv_pgd, smooth_adv_ddn], ids=["pgd", "ddn"])
def test_antithetic_draws_are_draws_and_their_negatives(attacked):
    with_pairs = {count: noise_of(count, attacked, antithetic=True, noise="fresh") for count in (1, 6, 7)}
    alone = {count: noise_of(count, attacked, antithetic=False, noise="fresh") for count in (1, 3, 4, 7)}
    atol = {"atol": 1e-14, "rtol": 0}
    torch.testing.assert_close(with_pairs[6], torch.cat([alone[3], -alone[3]], dim=1), **atol)
    torch.testing.assert_close(with_pairs[7], torch.cat([alone[4], -alone[4][:, :3]], dim=1), **atol)
    torch.testing.assert_close(with_pairs[1], alone[1], **atol)
    assert alone[7].sum(dim=1).abs().max() > 0.1
    assert not torch.equal(with_pairs[6][0], with_pairs[6][1])


def test_antithetic_noise_is_the_default_fresh_for_pgd_with_dual_averaging_and_fixed_for_ddn():
    torch.testing.assert_close(noise_of(6), noise_of(6, noise="fresh", antithetic=True))
    torch.testing.assert_close(noise_of(6, smooth_adv_ddn), noise_of(6, smooth_adv_ddn, noise="fixed", antithetic=True))
    found = smooth_adv_pgd(network(), X, Y, SIGMA)
    assert torch.equal(found, attack(eps=1.0, step=1.0, samples=16, steps=10, rule="dual-averaging"))
    assert not torch.equal(found, attack(eps=1.0, step=1.0, samples=16, steps=10, rule="projected"))


def test_antithetic_draws_make_the_gradient_less_noisy():
    """At equal numbers of draws, over many sets of them."""

    def spread(antithetic):
        slopes = []
        how = {"samples": 8, "steps": 1, "antithetic": antithetic, "watch": lambda *what: slopes.append(what[3])}
        for seed in range(60):
            smooth_adv_pgd(network(), X, Y, SIGMA, seed=seed, **how)
        return torch.stack(slopes).var(dim=0).sum()

    assert spread(True) < 0.7 * spread(False)


def test_of_a_quadratic_loss_the_gradient_of_antithetic_draws_is_exact():
    """The mean slope of Σ a (x + e)²/2 is a (x + mean of e): its direction is right where the draws add up to zero."""
    a = torch.linspace(-1, 1, 16, dtype=torch.float64)
    seen = {}

    def quadratic(x):
        height = (a * x.flatten(1).square()).sum(dim=1) / 2
        return torch.stack([torch.zeros_like(height), height], dim=1)

    def direction(antithetic, samples):
        how = {"samples": samples, "steps": 1, "objective": "mean-logits", "antithetic": antithetic}
        smooth_adv_pgd(quadratic, X.double(), 0 * Y, SIGMA, watch=lambda *what: seen.update(slope=what[3]), **how)
        return nn.functional.normalize(seen["slope"].flatten(1))

    exact = nn.functional.normalize(a * X.double().flatten(1))
    torch.testing.assert_close(direction(True, 2), exact)
    assert (direction(False, 2) - exact).abs().max() > 0.01
    assert (direction(True, 3) - exact).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "margin"}, "objective: expected one of 'log-mean-softmax', "),
        ({"restarts": 0}, "restarts: expected an integer >= 1, got 0"),
        ({"steps": 0, "early_stop": 0.1}, "steps: expected an integer >= 1, got 0"),
        ({"antithetic": 1}, "antithetic: expected True or False, got 1"),
        ({"random_start": "yes"}, "random_start: expected True or False, got 'yes'"),
        ({"rule": "momentum"}, "rule: expected one of 'dual-averaging', 'projected', got 'momentum'"),
    ],
    ids=repr,
)
def test_impossible_values_are_refused_before_the_model_is_run(changed, message):
    with pytest.raises(InputError, match=message):
        attack(lambda _: pytest.fail("the model was run"), **changed)
