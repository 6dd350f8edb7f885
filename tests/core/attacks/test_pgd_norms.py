"""What `pgd` does in both balls, and from random starts; `test_pgd.py` has the l2 attack of the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.pgd import pgd, pgd_l2, pgd_linf
from rs_plugins.errors import InputError

X = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
SLOPE = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
NORMS = {"l2": L2, "linf": LINF}
both = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def length(norm, delta):
    flat = delta.double().flatten(1)
    return flat.norm(dim=1) if norm is L2 else flat.abs().amax(dim=1)


def bowl(x, number):
    return SLOPE[: len(x)].to(x.dtype) + 3 * x.square()


def no_slope(x, number):
    return torch.zeros_like(x)


def climb(ascent, x, **how):
    """Run `pgd` on directions that depend on the images and the number of the step alone; no image arrives."""
    return pgd(lambda at, rows, number: (torch.zeros_like(rows, dtype=torch.bool), ascent(at, number)), x, **how)


def total(at, rows):
    return at.flatten(1).sum(1)


@pytest.mark.parametrize("eps", [0.05, torch.tensor([0.01, 0.02, 0.3, 2.0])], ids=repr)
def test_linf_follows_the_paper(eps):
    radii = torch.as_tensor(eps, dtype=torch.float64).expand(4).tolist()
    expected = []
    for image, slope, radius in zip(X.double().numpy(), SLOPE.double().numpy(), radii, strict=True):
        at = image
        for _ in range(5):
            at = at + 0.02 * np.sign(slope + 3 * at**2)
            at = np.clip(np.clip(at, image - radius, image + radius), 0, 1)
        expected.append(at)
    found = pgd_linf(bowl, X, eps=eps, step=0.02, steps=5)
    torch.testing.assert_close(found.double(), torch.from_numpy(np.stack(expected)), atol=1e-6, rtol=0)


@both
@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    eps=st.floats(0, 2),
    step=st.floats(0, 3),
    rule=st.sampled_from(["projected", "dual-averaging"]),
    random_start=st.booleans(),
    restarts=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_ball_and_box_hold_for_any_shape(norm, shape, eps, step, rule, random_start, restarts, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(3, *shape, generator=source)
    x[0] = x[0].round()
    found = climb(
        lambda current, _: torch.randn(current.shape, generator=source),
        x,
        norm=norm,
        eps=eps,
        step=step,
        steps=2,
        rule=rule,
        random_start=random_start,
        restarts=restarts,
        height=total,
        seed=seed,
    )
    assert found.min() >= 0
    assert found.max() <= 1
    assert (length(norm, found - x) <= eps + 1e-6).all()


@both
@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
@pytest.mark.parametrize("level", [0.3, 0.51, 0.7], ids=repr)
def test_rounding_does_not_add_up_over_many_equal_pixels(norm, level, rule):
    x = torch.full((1, 3, 224, 224), level)
    how = {"norm": norm, "eps": 1.0 if norm is L2 else 0.1, "step": 0.5, "steps": 3, "rule": rule}
    found = climb(lambda at, _: torch.ones_like(at), x, **how)
    assert length(norm, found.double() - x.double()) <= (1 + 1e-6) * (1.0 if norm is L2 else 0.1)


def test_linf_leaves_pixels_without_slope_unless_there_is_no_other():
    x = torch.full((2, 3), 0.5)
    slope = torch.tensor([[1e-20, 0.0, -5.0], [0.0, 0.0, 0.0]])
    moved = pgd_linf(lambda *_: slope, x, eps=0.25, step=0.25, steps=1) - x
    assert moved[0].tolist() == [0.25, 0.0, -0.25]
    assert moved[1].abs().tolist() == [0.25] * 3


@pytest.mark.parametrize("useless", [0.0, math.nan, math.inf], ids=repr)
def test_linf_without_a_usable_gradient_moves_to_the_edge_and_the_others_do_not_notice(useless):
    inside = X * 0.2 + 0.4

    def ascent(current, number):
        gradient = bowl(current, number).clone()
        gradient[1] = useless
        return gradient

    found = pgd_linf(ascent, inside, eps=0.1, step=0.03, steps=5)
    torch.testing.assert_close((found - inside)[1].abs(), torch.full((2, 3, 3), 0.1), atol=1e-6, rtol=0)
    others = [0, 2, 3]
    assert torch.equal(found[others], pgd_linf(bowl, inside, eps=0.1, step=0.03, steps=5)[others])
    assert not torch.equal(found[1], pgd_linf(ascent, inside, eps=0.1, step=0.03, steps=5, seed=1)[1])


def starts_of(norm, count, x=None, mask=None, eps=0.25):
    """The points (count, *input) at which an attack on one image starts."""
    x = torch.full((1, 3), 0.5) if x is None else x
    seen = []

    def ascent(at, number):
        seen.append(at[0].clone())
        return torch.zeros_like(at)

    how = {"norm": norm, "eps": eps, "mask": mask, "random_start": True, "restarts": count}
    climb(ascent, x, step=0, steps=1, height=lambda at, rows: at[:, 0], **how)
    return torch.stack(seen)


def test_random_starts_are_uniform_in_the_l2_ball():
    moved = (starts_of(L2, 600) - 0.5).double() / 0.25
    radius = moved.norm(dim=1)
    assert kstest(radius**3, "uniform").pvalue > 1e-3
    assert kstest((moved[:, 0] / radius + 1) / 2, "uniform").pvalue > 1e-3  # Archimedes: a coordinate of a sphere


def test_random_starts_are_uniform_in_the_linf_ball():
    moved = (starts_of(LINF, 600) - 0.5).double() / 0.25
    for pixel in moved.T:
        assert kstest((pixel + 1) / 2, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(moved.T.numpy()) - np.eye(3)).max() < 0.15


def test_a_masked_start_is_uniform_in_the_ball_of_the_free_pixels():
    mask = torch.tensor([[True, False, True]])
    moved = (starts_of(L2, 600, mask=mask) - 0.5).double() / 0.25
    assert (moved[:, 1] == 0).all()
    assert kstest(moved.norm(dim=1) ** 2, "uniform").pvalue > 1e-3
    assert (starts_of(LINF, 2, mask=mask)[:, 1] == 0.5).all()
    assert (starts_of(L2, 2, mask=torch.zeros(1, 3, dtype=torch.bool)) == 0.5).all()


@both
def test_starts_are_in_the_box_and_scale_with_the_budget_of_the_image(norm):
    found = starts_of(norm, 20, x=torch.tensor([[0.0, 1.0, 0.5]]), eps=2.0)
    assert found.min() >= 0
    assert found.max() <= 1
    pair = climb(no_slope, X, norm=norm, eps=torch.tensor([0.0, 0.1, 0.2, 0.0]), step=0, steps=1, random_start=True)
    assert torch.equal(pair[[0, 3]], X[[0, 3]])
    assert not torch.equal(pair[1], X[1])


@both
def test_no_start_means_the_image_and_seeds_mean_other_starts(norm):
    settings = {"norm": norm, "eps": 0.3, "step": 0, "steps": 1}
    assert torch.equal(climb(no_slope, X, **settings), X)
    first = climb(no_slope, X, random_start=True, **settings)
    assert torch.equal(first, climb(no_slope, X, random_start=True, **settings))
    assert not torch.equal(first, climb(no_slope, X, random_start=True, seed=1, **settings))


@both
@pytest.mark.parametrize("random_start", [False, True])
def test_the_first_of_several_runs_starts_at_the_image_unless_told_otherwise_and_the_others_never_do(
    norm, random_start
):
    starts = []

    def ascent(at, number):
        starts.append(at.clone())
        return no_slope(at, number)

    how = {"random_start": random_start, "restarts": 3, "height": total}
    climb(ascent, X, norm=norm, eps=0.3, step=0, steps=1, **how)
    assert [torch.equal(start, X) for start in starts] == [not random_start, False, False]
    assert not torch.equal(starts[1], starts[2])


@both
@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
def test_how_images_are_batched_changes_nothing(norm, rule):
    def ascent(at, _):
        return at.square() - 0.3

    how = {"norm": norm, "eps": 0.3, "step": 0.1, "steps": 3, "random_start": True, "restarts": 3, "rule": rule}
    how["height"] = lambda at, rows: (at**3 / 3 - 0.3 * at).flatten(1).sum(1)
    whole = climb(ascent, X, **how)
    assert torch.equal(torch.cat([climb(ascent, image, **how) for image in X.split(1)]), whole)
    assert torch.equal(climb(ascent, X[[2, 0, 3, 1]], **how), whole[[2, 0, 3, 1]])


@both
@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=repr)
def test_other_floating_types_are_kept(norm, dtype, rule):
    x = X.to(dtype)
    how = {"random_start": True, "restarts": 2, "height": total}
    found = climb(bowl, x, norm=norm, eps=0.25, step=0.1, steps=3, rule=rule, **how)
    assert found.dtype == dtype
    assert (length(norm, found.double() - x.double()) <= 0.25 * (1 + 1e-6)).all()
    assert (length(norm, found.double() - x.double()) >= 0.15).all()


@both
@pytest.mark.parametrize("rule", ["projected", "dual-averaging"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
@settings(max_examples=25)
@given(
    eps=st.floats(1e-3, 2),
    share=st.floats(0.1, 2),
    random_start=st.booleans(),
    restarts=st.integers(1, 2),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_in_half_precision_ball_and_box_hold_at_every_step(
    norm, rule, dtype, eps, share, random_start, restarts, masked, seed
):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 5, 5, generator=source).to(dtype)
    x[0] = x[0].round()
    mask = torch.rand(5, 5, generator=source) < 0.7 if masked else None
    seen = []

    def ascent(at, number):
        seen.append(at)
        return torch.randn(at.shape, generator=source).to(dtype)

    how = {"random_start": random_start, "restarts": restarts, "mask": mask, "seed": seed}
    seen.append(climb(ascent, x, norm=norm, eps=eps, step=share * eps, steps=3, rule=rule, height=total, **how))
    for at in seen:
        assert at.dtype == dtype
        assert at.min() >= 0
        assert at.max() <= 1
        assert (length(norm, at.double() - x.double()) <= eps * (1 + 1e-6)).all()
        assert mask is None or torch.equal(at[..., ~mask], x[..., ~mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
def test_in_half_precision_steps_smaller_than_its_numbers_add_up(dtype):
    """Where pixels are 0.5 to 1, and the next number up to 0.004 away."""
    x = (0.5 + 0.4 * X).to(dtype)
    found = pgd_linf(lambda at, _: torch.ones_like(at), x, eps=0.03, step=0.03 / 64, steps=64)
    moved = found.double() - x.double()
    assert (moved <= 0.03 * (1 + 1e-6)).all()
    assert (moved > 0.03 * (1 - 1e-6) - torch.finfo(dtype).eps / 2).all()


def test_of_several_runs_each_image_keeps_its_own_highest():
    ends = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.1]])  # how high two images come in three runs
    heights = iter(ends)
    seen = []

    def height(at, rows):
        seen.append(at.clone())
        return next(heights)

    x = torch.full((2, 3), 0.5)
    found = climb(no_slope, x, eps=0.3, step=0, steps=1, restarts=3, height=height)
    assert torch.equal(found, torch.stack([seen[2][0], seen[0][1]]))


def test_a_height_that_is_not_a_number_is_never_kept_over_one_that_is():
    heights = iter(torch.tensor([[math.nan, 0.0, math.nan], [-5.0, math.nan, math.nan]]))
    seen = []

    def height(at, rows):
        seen.append(at.clone())
        return next(heights)

    how = {"eps": 0.3, "step": 0, "steps": 1, "random_start": True, "restarts": 2}
    found = climb(no_slope, torch.full((3, 3), 0.5), height=height, **how)
    assert torch.equal(found, torch.stack([seen[1][0], seen[0][1], seen[0][2]]))


def test_one_run_alone_is_not_judged():
    found = climb(bowl, X, eps=0.3, steps=3, height=lambda *_: pytest.fail("it was judged"))
    assert torch.equal(found, climb(bowl, X, eps=0.3, steps=3))


def test_the_numbers_of_the_steps_go_on_from_run_to_run():
    numbers = []
    how = {"eps": 0.3, "step": 0.1, "steps": 3, "restarts": 2, "height": total}
    pgd_l2(lambda at, number: (numbers.append(number), torch.ones_like(at))[1], X, **how)
    assert numbers == list(range(6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"restarts": 0}, "restarts: expected an integer >= 1, got 0"),
        ({"restarts": 1.5}, r"restarts: expected an integer >= 1, got 1\.5"),
        ({"restarts": 2}, "height: needed to choose between the results of 2 runs"),
        ({"random_start": "yes"}, "random_start: expected True or False, got 'yes'"),
        ({"rule": "momentum"}, "rule: expected one of 'dual-averaging', 'projected', got 'momentum'"),
        ({"rule": []}, r"rule: expected one of 'dual-averaging', 'projected', got \[\]"),
        ({"eps": -1}, "eps: expected finite values >= 0, got -1"),
    ],
    ids=repr,
)
def test_impossible_values_are_refused_before_the_first_gradient(changed, message):
    with pytest.raises(InputError, match=message):
        pgd_linf(lambda *_: pytest.fail("the loop was entered"), X, **({"eps": 0.3, "step": 0.1, "steps": 2} | changed))
