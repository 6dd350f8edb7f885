"""The options of FixedBudget; CERTIFY to the letter is in tests/core/test_certification.py."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import multinomial, norm
from torch import nn

from rs_plugins import FixedBudget, GaussianNoise, certify
from rs_plugins.core.confidence import clopper_pearson_lower, clopper_pearson_upper, randomised_lower
from rs_plugins.core.plans.protocol import ABSTAIN, Case
from rs_plugins.errors import InputError

NOISE = GaussianNoise(0.25)


def verdict_on(plan, votes, *, draw=0.5):
    procedure = plan.procedure(Case(NOISE, draw, lambda: 0.0, lambda _: False))
    next(procedure)
    procedure.send(np.eye(len(votes), dtype=np.int64)[0])
    with pytest.raises(StopIteration) as stop:
        procedure.send(np.array(votes))
    return stop.value.value


def test_the_runner_up_is_bounded_at_half_alpha_on_either_side():
    verdict = verdict_on(FixedBudget(n0=1, n=1000, alpha=0.01, runner_up=True), [450, 300, 250])
    assert verdict.p_lower == clopper_pearson_lower(450, 1000, 0.005)
    assert verdict.runner_up == clopper_pearson_upper(300, 1000, 0.005)
    expected = 0.125 * (norm.ppf(verdict.p_lower) - norm.ppf(verdict.runner_up))
    assert (verdict.prediction, verdict.radius) == (0, pytest.approx(expected, rel=1e-12))


def test_the_rest_bounds_the_runner_up_where_it_is_less():
    verdict = verdict_on(FixedBudget(n0=1, n=1000, runner_up=True), [990, 10, 0])
    assert verdict.radius == pytest.approx(0.25 * norm.ppf(clopper_pearson_lower(990, 1000, 0.0005)), rel=1e-9)


def test_a_runner_up_that_is_too_close_makes_it_abstain():
    verdict = verdict_on(FixedBudget(n0=1, n=1000, runner_up=True), [400, 390, 210])
    assert (verdict.prediction, verdict.radius) == (ABSTAIN, 0.0)
    assert verdict.runner_up > verdict.p_lower


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.1), (0.4, 0.3, 0.3), (0.8, 0.1, 0.1), (0.1, 0.5, 0.4)])
def test_the_runner_up_radius_is_wrong_at_most_with_probability_alpha(shares):
    """Over all outcomes of 60 votes for three classes."""
    plan = FixedBudget(n0=1, n=60, alpha=0.1, runner_up=True)
    true_radius = 0.125 * (norm.ppf(shares[0]) - norm.ppf(max(shares[1:])))
    wrong = 0.0
    for a, b in itertools.product(range(61), repeat=2):
        if a + b <= 60:
            verdict = verdict_on(plan, [a, b, 60 - a - b])
            if verdict.prediction == 0 and verdict.radius > true_radius:
                wrong += multinomial.pmf([a, b, 60 - a - b], 60, shares)
    assert wrong <= 0.1


def test_the_draw_of_the_randomised_bound_is_recorded():
    verdict = verdict_on(FixedBudget(n0=1, n=1000, randomised=True), [990, 10], draw=0.1)
    assert verdict.p_lower == randomised_lower(990, 1000, 0.001, 0.1) == pytest.approx(0.9772843570, abs=1e-10)
    assert verdict.draw == 0.1
    both = verdict_on(FixedBudget(n0=1, n=1000, randomised=True, runner_up=True), [990, 10], draw=0.1)
    assert both.p_lower == randomised_lower(990, 1000, 0.0005, 0.1)
    assert verdict_on(FixedBudget(n0=1, n=1000), [990, 10]).draw is None


class Agree(nn.Linear):
    """Always class 0."""

    def __init__(self):
        super().__init__(2, 2)
        nn.init.zeros_(self.weight)
        self.bias.data = torch.tensor([1.0, 0.0])


def test_each_image_has_a_draw_of_its_own_that_the_seed_fixes():
    plan, images = FixedBudget(n0=1, n=100, randomised=True), torch.rand(40, 2)
    first, again, other = (list(certify(Agree(), images, 0.25, plan=plan, seed=seed)) for seed in (0, 0, 1))
    draws = np.array([c.draw for c in first])
    assert draws.tolist() == [c.draw for c in again]
    assert not set(draws) & {c.draw for c in other}
    assert len(set(draws)) == 40
    assert 0 < draws.min() < 0.2 < 0.8 < draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 0.2
    assert [c.p_lower for c in first] == [randomised_lower(100, 100, 0.001, draw) for draw in draws]
    (alone,) = certify(Agree(), images[7:8], 0.25, plan=plan, indices=[7])
    assert alone.draw == draws[7]


def test_names_say_which_options_are_on():
    assert repr(FixedBudget()) == "FixedBudget(n0=100, n=100000, alpha=0.001)"
    plan = FixedBudget(n=50, runner_up=True, randomised=True)
    assert repr(plan) == "FixedBudget(n0=100, n=50, alpha=0.001, runner_up=True, randomised=True)"
    assert plan.bound == "randomised clopper-pearson with runner-up"
    assert FixedBudget(randomised=True).bound == "randomised clopper-pearson"
    assert FixedBudget(runner_up=True).bound == "clopper-pearson with runner-up"


def test_noise_without_a_formula_for_two_bounds_is_refused():
    class OneBound:
        name, norm, sigma = "one-bound", "l2", 0.25

        def draw_(self, out, generator):
            return out.normal_(generator=generator)

        def radius(self, p_lower):
            return p_lower

    with pytest.raises(InputError, match="runner_up: expected False for one-bound noise, which has no radius_between"):
        certify(Agree(), torch.zeros(1, 2), 0.25, plan=FixedBudget(runner_up=True), family=lambda sigma: OneBound())


@pytest.mark.parametrize("name", ["runner_up", "randomised"])
def test_flags_are_true_or_false(name):
    for value in (1, "no", None):
        with pytest.raises(InputError, match=f"{name}: expected True or False, got {value!r}"):
            FixedBudget(**{name: value})


def test_a_plan_made_of_it_is_printed_under_its_own_name_with_its_own_options():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Mine(FixedBudget):
        secret: int = 0

    assert repr(Mine(n=50)) == "Mine(n0=100, n=50, alpha=0.001)"
    assert repr(Mine(n=50, runner_up=True, secret=3)) == ("Mine(n0=100, n=50, alpha=0.001, runner_up=True, secret=3)")
