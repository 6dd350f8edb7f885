"""`smooth_adv_ddn` with `confirm`: how often an image that it says is adversarial is not, and what else changes."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from rs_plugins.core.attacks import noisy_loss
from rs_plugins.core.attacks.noisy_loss import CONFIRMING
from rs_plugins.core.attacks.smoothadv import PUBLISHED_DDN, smooth_adv_ddn, smooth_adv_pgd
from rs_plugins.errors import InputError

SIGMA = 0.25
DISTANCES = torch.tensor([0.0, 0.02, 0.1])  # of images to the plane


def halfspace(noisy):
    """Class 1 above the plane ⟨w, x⟩ = 0.5 with w = (1, 0, 0, …); smoothed it is the same, whatever the noise."""
    height = 20 * (noisy.flatten(1)[:, 0] - 0.5)
    return torch.stack([torch.zeros_like(height), height], dim=1)


X = torch.full((3, 4), 0.5, dtype=torch.float64)
X[:, 0] -= DISTANCES
Y = torch.zeros(3, dtype=torch.int64)


def attack(model=halfspace, x=X, y=Y, **how):
    how = {"sigma": SIGMA, "samples": 9, "steps": 20, "init_norm": 0.1, "levels": None} | how
    return smooth_adv_ddn(model, x, y, **how)


def really(found, targeted=False):
    """Which of the images ``found`` the smoothed classifier gives to class 1, not to 0, exactly.

    On the plane itself it gives it to both. There no attack has won.
    """
    return (found[:, 0] < 0.5 - 1e-12) if targeted else (found[:, 0] > 0.5 + 1e-12)


def mistakes(seeds, level, **how):
    """In how many runs an image was said to be adversarial, and in how many by mistake, for each of the images."""
    claimed = wrong = torch.zeros(len(X), dtype=torch.int64)
    for seed in range(seeds):
        found, success = attack(seed=seed, confirm=level, **how)
        claimed, wrong = claimed + success, wrong + (success & ~really(found, how.get("targeted", False)))
    return claimed, wrong


# ---- how often it is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "antithetic", "targeted"),
    [
        *(("fixed", False, False), pytest.param("fixed", True, True, marks=pytest.mark.slow)),
        *(pytest.param("fresh", False, True, marks=pytest.mark.slow), ("fresh", True, False)),
    ],
)
def test_what_is_found_fools_the_smoothed_classifier_but_for_the_probability(noise, antithetic, targeted):
    """Judged by the half-space itself; without `confirm` the search ends at a boundary that the draws have moved."""
    how = {"noise": noise, "antithetic": antithetic, "gamma": 0.1}
    if targeted:  # the plane from the other side
        how |= {"targeted": True, "x": 1 - X}
    seeds, level = 40, 0.05
    claimed, wrong = mistakes(seeds, level, **how)
    assert (claimed > 0.9 * seeds).all()
    assert all(binomtest(k, seeds, level, alternative="greater").pvalue > 1e-3 for k in wrong.tolist())
    claimed, wrong = mistakes(seeds, None, **how)
    assert (claimed == seeds).all()
    least = 0.1 if antithetic else 0.3
    assert (wrong > least * seeds).all()


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_where_nothing_can_be_found_something_is_as_rarely_as_was_asked_for(noise):
    """The budget ends at the plane, where every step is a chance to be wrong."""
    how = {"noise": noise, "antithetic": False, "max_norm": DISTANCES, "samples": 3}
    seeds, level = 40, 0.1
    claimed, wrong = mistakes(seeds, level, **how)
    assert torch.equal(claimed, wrong)
    assert all(binomtest(k, seeds, level, alternative="greater").pvalue > 1e-3 for k in wrong.tolist())
    assert (mistakes(seeds, None, **how)[1] > 0.3 * seeds).all()


def test_an_image_is_found_as_often_as_the_binomial_distribution_says():
    """On the plane, with no budget to leave it. Fixed draws are for class 1 in half of all cases; then each look, of
    which there is one more than steps, is another vote at a fifth of 0.5."""
    seeds = 200
    how = {"x": X[:1], "y": Y[:1], "noise": "fixed", "antithetic": False, "samples": 3, "steps": 4, "max_norm": 0.0}
    found = sum(bool(attack(seed=seed, confirm=0.5, **how)[1]) for seed in range(seeds))
    least = next(k for k in range(51, 101) if binomtest(k, 100).pvalue <= 0.5 / 5)
    one = binom.sf(least - 1, CONFIRMING, 0.5)
    assert binomtest(found, seeds, (1 - (1 - one) ** 5) / 2).pvalue > 1e-3
    assert 0 < found / seeds < 0.5


def test_each_vote_gets_its_share_of_the_probability(monkeypatch):
    levels = []

    def never(votes, level):
        levels.append(level)
        return np.full(len(votes), -1)

    monkeypatch.setattr(noisy_loss, "majority", never)
    found, success = attack(y=1 - Y, steps=6, confirm=0.1, max_norm=0.0)
    assert levels == [pytest.approx(0.1 / 7)] * 7
    assert torch.equal(found, X)
    assert not success.any()


# ---- what it does ----------------------------------------------------------------------------------------------------


class Spy:
    def __init__(self, model=halfspace):
        self.model, self.seen = model, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_votes_are_on_draws_that_no_step_has_seen_and_are_asked_only_where_the_step_says_yes(noise):
    yes = Spy(lambda x: x[:, :2] * 0 + torch.tensor([0.0, 1.0]))
    how = {"noise": noise, "antithetic": False, "steps": 2, "max_norm": 0.0, "confirm": 0.1, "chunk": 1000}
    attack(yes, X[:1], Y[:1], **how)
    assert [len(seen) for seen in yes.seen] == [9, CONFIRMING] * 3
    votes = torch.cat(yes.seen[1::2])
    assert len(votes.unique(dim=0)) == 3 * CONFIRMING
    for seen in yes.seen[::2]:
        assert not (seen.unsqueeze(1) == votes).all(dim=2).any()
    assert abs((votes - X[:1]).std() - SIGMA) < 0.02
    no = Spy(lambda x: x[:, :2] * 0 + torch.tensor([1.0, 0.0]))
    attack(no, X[:1], Y[:1], **how)
    assert [len(seen) for seen in no.seen] == [9] * 3
    alone = Spy(yes.model)
    attack(alone, X[:1], Y[:1], **how | {"confirm": None})
    assert [len(seen) for seen in alone.seen] == [9] * 3


def test_the_norm_shrinks_only_from_images_that_are_confirmed(monkeypatch):
    path = []
    how = {"x": X[2:], "y": Y[2:], "steps": 4, "gamma": 0.2, "init_norm": 0.2, "watch": lambda *what: path.append(what)}
    attack(confirm=0.1, **how)
    lengths = [float((at - X[2:]).norm()) for _, _, at, _ in path]
    assert lengths[3] < lengths[2]
    monkeypatch.setattr(noisy_loss, "majority", lambda votes, level: np.full(len(votes), -1))
    path.clear()
    _, success = attack(confirm=0.1, **how)
    lengths = [float((at - X[2:]).norm()) for _, _, at, _ in path]
    assert lengths == pytest.approx([0.0, 0.2 * 1.2, 0.2 * 1.2**2, 0.2 * 1.2**3])
    assert not success


def test_an_image_that_is_clearly_misclassified_comes_back_as_it_is():
    x = X.clone()
    x[1, 0] = 0.9
    found, success = attack(x=x, confirm=0.01, steps=30)
    assert torch.equal(found[1], x[1])
    assert success.all()
    assert really(found).all()


def test_what_is_confirmed_is_further_away():
    near, _ = attack(x=X[2:], y=Y[2:], steps=60)
    far, success = attack(x=X[2:], y=Y[2:], steps=60, confirm=0.05)
    assert success
    assert (far - X[2:]).norm() > (near - X[2:]).norm() + 0.02


def test_no_images_give_none():
    found, success = attack(x=X[:0], y=Y[:0], confirm=0.1)
    assert (found.shape, success.shape, success.dtype) == ((0, 4), (0,), torch.bool)


# ---- what the draws that confirm can say at all ----------------------------------------------------------------------

UNANIMOUS = 2 * 0.5**CONFIRMING  # that all agree where both classes are equally likely


@pytest.mark.parametrize(
    ("run", "name", "votes"),
    [
        (attack, "confirm", 21),
        (lambda model, **how: smooth_adv_pgd(model, X, Y, SIGMA, steps=7, restarts=3, **how), "early_stop", 21),
    ],
    ids=["ddn", "pgd"],
)
def test_a_probability_that_no_vote_can_reach_is_refused_before_the_model_is_run(run, name, votes):
    message = f"{name}: expected at least 3.31e-29, the surest that 21 votes of 100 draws can be, got 2e-29"
    with pytest.raises(InputError, match=message):
        run(lambda _: pytest.fail("the model was run"), **{name: 2e-29})
    spy = Spy()
    run(spy, **{name: 1.001 * votes * UNANIMOUS})
    assert spy.seen


def test_all_draws_that_agree_are_enough_for_the_smallest_probability_that_is_taken(monkeypatch):
    monkeypatch.setattr(noisy_loss, "CONFIRMING", 4)
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    x[0, 0] = 0.9
    how = {"x": x, "y": Y[:1], "sigma": 0.01, "steps": 1}
    _, success = attack(confirm=2 * 0.125, **how)
    assert success
    with pytest.raises(
        InputError, match=r"confirm: expected at least 0\.25, the surest that 2 votes of 4 draws can be"
    ):
        attack(confirm=0.249, **how)


def test_the_papers_attack_is_confirmed_by_nothing():
    assert attack(**PUBLISHED_DDN)[0].equal(attack(noise="fixed", antithetic=False)[0])
    assert PUBLISHED_DDN["confirm"] is None
