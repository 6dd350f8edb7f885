"""Images that stop early: what becomes of them, and how sure `smooth_adv_pgd` is that they are misclassified."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, multinomial
from torch import nn

from rs_plugins.core.attacks import noisy_loss
from rs_plugins.core.attacks.noisy_loss import CONFIRMING, NoisyLoss
from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.pgd import pgd
from rs_plugins.core.attacks.smoothadv import PUBLISHED, smooth_adv_pgd
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import LOG_MEAN_SOFTMAX
from rs_plugins.errors import InputError

SIGMA = 0.25
X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
RULES = ["projected", "dual-averaging"]


def network(scale=3.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= scale
    return model


Y = network()(X).argmax(1)  # some are easy to change, some hard


class Spy:
    """A model that remembers what it was given."""

    def __init__(self, model=None):
        self.model, self.seen = network() if model is None else model, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def attack(model=None, x=X, y=Y, **how):
    how = {"sigma": SIGMA, "eps": 0.8, "samples": 9, "steps": 8, "early_stop": 0.05} | how
    return smooth_adv_pgd(network() if model is None else model, x, y, **how)


class Log:
    """Which images moved in each step, and where they were."""

    def __init__(self):
        self.rows, self.images, self.last = [], [], {}

    def __call__(self, number, rows, at, slope):
        assert number == len(self.rows)
        self.rows.append(rows.tolist())
        self.images.append(dict(zip(rows.tolist(), at.clone(), strict=True)))
        self.last |= self.images[-1]

    def stopped(self, steps=8):
        """The images that were not looked at in the last of the ``steps``; one can also have stopped there."""
        return [index for index in self.last if len(self.rows) < steps or index not in self.rows[-1]]


# How sure a vote is.


def answers_to_all_outcomes(monkeypatch, n, level, targeted):
    """All outcomes (k, 3) of n votes on three classes, and whether the vote says that the attack is done; label 0."""
    outcomes = np.array([(a, b, n - a - b) for a, b in product(range(n + 1), repeat=2) if a + b <= n])
    monkeypatch.setattr(noisy_loss, "CONFIRMING", n)

    def table(noisy):
        classes = np.concatenate([np.repeat([0, 1, 2], counts) for counts in outcomes])
        return nn.functional.one_hot(torch.from_numpy(classes), 3).float()

    how = {"samples": 1, "mode": "fixed", "antithetic": False, "seed": 0, "chunk": 10**6}
    victim = NoisyLoss(table, GaussianNoise(SIGMA), LOG_MEAN_SOFTMAX, **how)
    zeros = torch.zeros(len(outcomes), dtype=torch.int64)
    done = victim.confirm(torch.zeros(len(outcomes), 1), zeros, zeros + 1, 0, level, targeted=targeted)
    return outcomes, done.numpy()


@pytest.mark.parametrize("level", [0.2, 0.01])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_vote_is_wrong_with_at_most_the_probability_it_is_asked_for(monkeypatch, targeted, level):
    """Exactly, over all outcomes: where class 0 is the smoothed classifier's, or for a target where it is not."""
    n = 40
    outcomes, done = answers_to_all_outcomes(monkeypatch, n, level, targeted)
    grid = [np.array([a, b, 40 - a - b]) / 40 for a, b in product(range(41), repeat=2) if a + b <= 40]
    grid += [np.full(3, 1 / 3), np.array([0.499, 0.499, 0.002])]
    wrong = 0.0
    for p in grid:
        probability = multinomial(n, p).pmf(outcomes)[done].sum()
        if (p[0] <= p[1:].max()) if targeted else (p[0] >= p[1:].max()):
            wrong = max(wrong, probability)
    assert level / 20 < wrong <= level
    sure = [0.95, 0.05, 0.0] if targeted else [0.0, 0.55, 0.45]  # two classes may share what the label has lost
    assert multinomial(n, sure).pmf(outcomes)[done].sum() > 0.99


def halfspace(noisy):
    """Class 1 above the plane ⟨w, x⟩ = 0.5 with w = (1, 0, 0, …)."""
    height = 20 * (noisy.flatten(1)[:, 0] - 0.5)
    return torch.stack([torch.zeros_like(height), height], dim=1)


def test_an_image_stops_as_often_as_the_binomial_distribution_says():
    """On the boundary of a half-space, where both classes are the classifier's; with a budget of 0 it stays there.

    Fixed draws are for class 1 in half of all cases; then each step is another vote at a fifth of 0.5. Of
    the last step's vote nothing is seen.
    """
    stops, x, y, seeds = 0, torch.full((1, 4), 0.5), torch.tensor([0]), 200
    for seed in range(seeds):
        log = Log()
        how = {"noise": "fixed", "antithetic": False, "samples": 3, "steps": 5, "seed": seed, "watch": log}
        smooth_adv_pgd(halfspace, x, y, SIGMA, eps=0.0, early_stop=0.5, **how)
        stops += len(log.rows) < 5
    least = next(k for k in range(51, 101) if binomtest(k, 100).pvalue <= 0.5 / 5)
    one = binom.sf(least - 1, CONFIRMING, 0.5)
    assert binomtest(stops, seeds, (1 - (1 - one) ** 4) / 2).pvalue > 1e-3
    assert stops / seeds < 0.5


@pytest.mark.parametrize("restarts", [1, 2])
def test_each_vote_gets_its_share_of_the_probability(monkeypatch, restarts):
    levels = []

    def never(votes, level):
        levels.append(level)
        return np.full(len(votes), -1)

    monkeypatch.setattr(noisy_loss, "majority", never)
    attack(y=(Y + 1) % 4, restarts=restarts, steps=5, early_stop=0.1, noise="fixed")
    assert len(levels) == 5 * restarts
    assert levels == [pytest.approx(0.1 / (5 * restarts))] * len(levels)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_votes_are_on_draws_that_no_step_has_seen(monkeypatch, noise):
    monkeypatch.setattr(noisy_loss, "majority", lambda votes, level: np.full(len(votes), -1))
    spy = Spy(lambda x: x.flatten(1)[:, :2] * 0 + torch.tensor([0.0, 1.0]))
    gray, label = torch.full((1, 4), 0.5), torch.tensor([0])
    how = {"noise": noise, "samples": 8, "antithetic": False, "steps": 3, "chunk": 1000, "early_stop": 0.1}
    smooth_adv_pgd(spy, gray, label, SIGMA, eps=0, **how)
    assert [len(seen) for seen in spy.seen] == [8, CONFIRMING] * 3
    votes = torch.cat(spy.seen[1::2])
    assert len(votes.unique(dim=0)) == 3 * CONFIRMING
    for seen in spy.seen[::2]:
        assert not (seen.unsqueeze(1) == votes).all(dim=2).any()
    assert abs((votes - 0.5).std() - SIGMA) < 0.02


# What becomes of an image that stops.


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", [L2, LINF], ids=["l2", "linf"])
@pytest.mark.parametrize("rule", RULES)
def test_images_that_stop_are_the_images_judged_and_the_others_do_not_notice(rule, norm, targeted):
    how = {"rule": rule, "norm": norm, "targeted": targeted, "eps": 0.8 if norm is L2 else 0.15}
    how |= {"y": (Y + 1) % 4} if targeted else {}
    log, path, spy = Log(), Log(), Spy()
    found = attack(spy, watch=log, **how)
    free = attack(watch=path, early_stop=None, **how)
    stopped = log.stopped()
    assert 0 < len(stopped) < len(X)
    for index in range(len(X)):
        steps = sum(index in rows for rows in log.rows)
        assert [index in rows for rows in log.rows] == [number < steps for number in range(8)]
        torch.testing.assert_close(log.last[index], path.images[steps - 1][index], atol=1e-5, rtol=0)
        if not torch.equal(found[index], log.last[index]):
            assert index not in stopped
            torch.testing.assert_close(found[index], free[index], atol=1e-5, rtol=0)
    looked, whole = sum(map(len, spy.seen)), sum(map(len, log.rows)) * 9
    votes, rest = divmod(looked - whole, CONFIRMING)
    assert rest == 0
    assert len(stopped) <= votes
    assert whole < len(X) * 8 * 9
    draws = SIGMA * torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    for index in stopped:
        said = network()(found[index] + draws).argmax(1).mode().values
        assert (said == (Y[index] + 1) % 4) if targeted else (said != Y[index])


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("restarts", [1, 3])
def test_neighbours_and_order_change_nothing(restarts, targeted, noise):
    how = {"restarts": restarts, "targeted": targeted, "noise": noise, "steps": 4}
    y = (Y + 1) % 4 if targeted else Y
    log = Log()
    whole = attack(y=y, watch=log, **how)
    assert len({len(rows) for rows in log.rows}) > 1
    for count in (1, 3):
        parts = [attack(x=xs, y=ys, **how) for xs, ys in zip(X.split(count), y.split(count), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
    order = torch.tensor([3, 7, 0, 4, 6, 2, 1, 5])
    torch.testing.assert_close(attack(x=X[order], y=y[order], **how), whole[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(attack(y=y, chunk=7, **how), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(8,), (8, 1, 1, 1)], ids=repr)
def test_budgets_steps_and_masks_stay_with_their_image(shape, rule):
    eps = torch.tensor([0.8, 0.0, 0.3, 0.5, 1.5, 0.7, 0.2, 0.9])
    mask = torch.rand(X.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    how = {"rule": rule, "random_start": True}
    log = Log()
    found = attack(eps=eps.reshape(shape), step=(eps / 3).reshape(shape), mask=mask, watch=log, **how)
    assert len({len(rows) for rows in log.rows}) > 1
    for i in range(len(X)):
        alone = attack(x=X[i : i + 1], y=Y[i : i + 1], eps=eps[i], step=eps[i] / 3, mask=mask[i], **how)
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=0)


def test_a_misclassified_image_comes_back_as_it_is():
    labels, log = Y.clone(), Log()
    labels[5] = network()(X[5:6]).argmin()
    found = attack(y=labels, eps=0.1, watch=log)
    assert torch.equal(found[5], X[5])
    assert sum(5 in rows for rows in log.rows) == 1
    assert (found != X).flatten(1).any(dim=1)[[0, 1, 2, 3, 4, 6, 7]].all()


def test_an_image_is_held_against_its_own_label_after_others_have_stopped():
    """The first stops at once; the second has to become what the first was said to be."""
    x, log = torch.tensor([[0.9, 0.5], [0.6, 0.5]]), Log()
    found = smooth_adv_pgd(halfspace, x, torch.tensor([0, 1]), 0.05, eps=0.4, steps=8, early_stop=0.01, watch=log)
    assert torch.equal(found[0], x[0])
    assert log.stopped() == [0, 1]
    assert log.rows[1] == [1]
    assert torch.equal(found[1], log.last[1])
    assert found[1, 0] < 0.5


def test_copies_without_an_answer_stop_no_image_and_do_not_touch_the_others():
    bright = X * 0.6
    bright[1] = 1.0

    def fragile(noisy):
        return torch.where(noisy.flatten(1).mean(1, keepdim=True) > 0.75, math.nan, network()(noisy))

    log = Log()
    found = attack(fragile, bright, sigma=0.1, eps=0.4, watch=log)
    assert found.isfinite().all()
    assert all(1 in rows for rows in log.rows)
    others = [0, 2, 3, 4, 5, 6, 7]
    alone = attack(x=bright[others], y=Y[others], sigma=0.1, eps=0.4)
    torch.testing.assert_close(found[others], alone, atol=1e-5, rtol=0)


def test_copies_without_an_answer_are_no_votes_and_the_others_decide():
    def half(noisy):  # for class 1 wherever there is an answer
        logits = torch.stack([noisy.flatten(1)[:, 0] * 0, noisy.flatten(1)[:, 1] * 0 + 9], dim=1)
        return torch.where(noisy.flatten(1)[:, :1] > 0.5, math.nan, logits)

    x = torch.full((2, 4), 0.5)
    assert torch.equal(smooth_adv_pgd(half, x, torch.tensor([0, 0]), SIGMA, early_stop=0.01), x)
    assert not torch.equal(smooth_adv_pgd(half, x, torch.tensor([0, 0]), SIGMA), x)


# `pgd`, whatever it is that an image arrives at.


def arriving(when, seen=None):
    """A view in which image ``row`` arrives at each step number in ``when[row]``."""

    def view(at, rows, number):
        if seen is not None:
            seen.append((number, rows.tolist(), at.clone()))
        there = torch.tensor([number in when.get(row, ()) for row in rows.tolist()], dtype=torch.bool)
        return there, torch.ones_like(at)

    return view


@pytest.mark.parametrize("rule", RULES)
def test_an_image_that_arrived_is_looked_at_and_judged_no_more(rule):
    x, seen, judged = torch.full((3, 4), 0.3), [], []

    def height(at, rows):
        judged.append(rows.tolist())
        return -at.flatten(1).sum(1)  # anything would be better

    how = {"eps": 0.4, "step": 0.1, "steps": 3, "rule": rule, "restarts": 3}
    found = pgd(arriving({1: [1], 2: [4]}, seen), x, height=height, **how)
    assert [(number, rows) for number, rows, _ in seen] == [
        (0, [0, 1, 2]),
        (1, [0, 1, 2]),
        (2, [0, 2]),
        (3, [0, 2]),
        (4, [0, 2]),
        (5, [0]),
        (6, [0]),
        (7, [0]),
        (8, [0]),
    ]
    assert judged == [[0, 2], [0], [0]]
    assert torch.equal(found[1], seen[1][2][1])
    assert torch.equal(found[2], seen[4][2][1])


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_looked_at_once_all_have_arrived(rule):
    seen, never = [], lambda *_: pytest.fail("it was judged")
    x = torch.full((2, 4), 0.3)
    pgd(arriving({0: [0], 1: [2]}, seen), x, eps=0.4, steps=5, rule=rule, restarts=4, height=never)
    assert [(number, rows) for number, rows, _ in seen] == [(0, [0, 1]), (1, [1]), (2, [1])]


@pytest.mark.parametrize("early_stop", [0, 1, -0.1, 1.5, math.nan, True, "often"], ids=repr)
def test_impossible_values_are_refused_before_the_model_is_run(early_stop):
    with pytest.raises(InputError, match=r"early_stop: expected a number in \(0, 1\), got"):
        attack(lambda _: pytest.fail("the model was run"), early_stop=early_stop)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_context_gives_the_same(context):
    model = network()
    with context():
        found = attack(model, X.clone(), Y.clone(), restarts=2)
    assert torch.equal(found, attack(restarts=2))
    assert not found.requires_grad


def test_no_budget_returns_the_input_and_no_images_none():
    assert torch.equal(attack(eps=0, restarts=2), X)
    assert attack(x=X[:0], y=Y[:0], restarts=2).shape == (0, 1, 4, 4)


def test_with_the_published_settings_too():
    log = Log()
    found = attack(watch=log, **PUBLISHED)
    assert 0 < len(log.stopped()) < len(X)
    assert all(torch.equal(found[index], log.last[index]) for index in log.stopped())
