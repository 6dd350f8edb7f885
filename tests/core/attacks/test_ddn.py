import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.attacks.ddn import ddn
from rs_plugins.core.attacks.noisy_loss import fooled
from rs_plugins.core.attacks.smoothadv import PUBLISHED_DDN, smooth_adv_ddn
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.objectives import count_votes, noisy_logits
from rs_plugins.core.smoothing import shared_draws
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError

SIGMA = 0.25
X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = (X * 255).round() / 255


def network(scale=3.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= scale
    return model.double()


def lengths(delta):
    return delta.double().flatten(1).norm(dim=1)


def draws_at(step, samples=9, noise="fixed", dtype=torch.float64):
    source = stream(0, "attack", step if noise == "fresh" else 0)
    return shared_draws(GaussianNoise(SIGMA), samples, X.to(dtype), source)


Y = torch.stack([network()(image + draws_at(0)).argmax(1).mode().values for image in X])  # what the smoothed one says
Y[5] = network()(X[5] + draws_at(0)).mean(0).argmin()  # misclassified already
TARGETS = (Y + 2) % 4


def attack(model=None, x=X, y=Y, **how):
    how = {**PUBLISHED_DDN, "sigma": SIGMA, "samples": 9, "steps": 12} | how
    return smooth_adv_ddn(network() if model is None else model, x, y, **how)


class Paper:
    """Section 3 of Salman et al. and algorithm 1 of Rony et al., one image at a time, in NumPy."""

    def __init__(self, targeted, levels, gamma=0.05, init_norm=1.0):
        parts = [p.detach().numpy() for p in network().parameters()]
        self.B, self.c, self.A, self.d = parts
        self.targeted, self.levels, self.gamma, self.init_norm = targeted, levels, gamma, init_norm

    def look(self, image, label, draws):
        """Whether the vote goes wrong, and the gradient of -log mean softmax."""
        h = np.tanh((image + draws) @ self.B.T + self.c)
        z = h @ self.A.T + self.d
        F = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        w = F[:, label] / F[:, label].sum()
        slopes = ((F - np.eye(4)[label]) @ self.A * (1 - h**2)) @ self.B
        votes = np.bincount(z.argmax(1), minlength=4)
        mine, others = votes[label], np.delete(votes, label).max()  # the paper leaves ties open
        bad = mine > others if self.targeted else others > mine
        return bad, w @ slopes

    def run(self, image, label, sets):
        """All images looked at, and the nearest that was adversarial, else None."""
        T = len(sets) - 1
        delta, nu = np.zeros_like(image), self.init_norm
        worst = np.linalg.norm(np.maximum(image, 1 - image))
        best, seen = None, []
        for i in range(1, T + 2):
            seen.append(image + delta)
            bad, G = self.look(image + delta, label, sets[i - 1])
            if bad and (best is None or np.linalg.norm(delta) < np.linalg.norm(best)):
                best = delta
            lr = 0.01 + 0.99 * (1 + np.cos(np.pi * i / T)) / 2
            delta = delta + (-lr if self.targeted else lr) * G / np.linalg.norm(G)
            nu = min(worst, nu * (1 - self.gamma) if bad else nu * (1 + self.gamma))
            delta = delta * nu / np.linalg.norm(delta)
            if self.levels is not None:
                delta = np.round((image + delta) * (self.levels - 1)) / (self.levels - 1) - image
            delta = np.clip(image + delta, 0, 1) - image
        return np.stack(seen), None if best is None else image + best


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("levels", "dtype"),
    [(None, torch.float64), (256, torch.float64), (16, torch.float64), (None, torch.float32)],
    ids=repr,
)
def test_it_follows_the_paper_step_by_step(levels, dtype, targeted, noise):
    labels, steps = TARGETS if targeted else Y, 12
    seen = []
    found, success = attack(
        network().to(dtype),
        X.to(dtype),
        labels,
        targeted=targeted,
        noise=noise,
        levels=levels,
        gamma=0.1,
        init_norm=0.5,
        chunk=7,
        watch=lambda number, rows, at, slope: seen.append(at.clone()),
    )
    sets = [draws_at(number, noise=noise, dtype=dtype).double().numpy().reshape(9, 16) for number in range(steps + 1)]
    paper = Paper(targeted, levels, gamma=0.1, init_norm=0.5)
    assert len(seen) == steps
    for index in range(len(X)):
        images, best = paper.run(X[index].numpy().ravel(), int(labels[index]), sets)
        mine = torch.stack([at[index].double().flatten() for at in seen])
        torch.testing.assert_close(mine, torch.from_numpy(images[:steps]), atol=1e-5, rtol=0)
        assert bool(success[index]) == (best is not None)
        expected = images[-1] if best is None else best  # if nothing is found, where the search ended
        torch.testing.assert_close(found[index].double().flatten(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert success.any()


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    max_norm=st.floats(0, 2),
    init_norm=st.floats(0.01, 3),
    levels=st.sampled_from([None, 2, 16, 256]),
    steps=st.integers(1, 5),
    on_grid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ball_and_box_hold_and_what_is_returned_was_judged(shape, max_norm, init_norm, levels, steps, on_grid, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(4, *shape, generator=source)
    x = (x * 255).round() / 255 if on_grid else x
    judged = []

    def view(current, number):
        bad = torch.rand(4, generator=source) < 0.3
        judged.append((current.clone(), bad))
        return bad, torch.randn(current.shape, generator=source)

    found, success = ddn(view, x, steps=steps, init_norm=init_norm, max_norm=max_norm, levels=levels)
    assert len(judged) == steps + 1
    for index in range(4):
        wins = [images[index] for images, bad in judged if bad[index]]
        assert bool(success[index]) == bool(wins)
        nearest = min(wins, key=lambda at: float((at - x[index]).double().norm()), default=judged[-1][0][index])
        assert abs(lengths(found - x)[index] - (nearest - x[index]).double().norm()) < 1e-6
        assert any(torch.equal(found[index], at) for at in (wins or [judged[-1][0][index]]))
    for images, _ in judged:
        assert images.min() >= 0
        assert images.max() <= 1
        assert (lengths(images - x) <= max_norm + 1e-6).all()


def judge(x, y, targeted=False):
    """Whether the vote of the attack's own draws goes wrong, counted in one pass per image."""
    votes = torch.stack([network()(image + draws_at(0)).argmax(1).bincount(minlength=4) for image in x])
    top = votes.topk(2).values
    clear = top[:, 0] > top[:, 1]
    return (votes.argmax(1) == y) & clear if targeted else votes.max(1).values > votes[torch.arange(len(y)), y]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("max_norm", [0.15, 0.6, None], ids=repr)
def test_the_mask_is_true_of_the_images_that_are_returned(max_norm, targeted):
    labels = TARGETS if targeted else Y
    found, success = attack(x=GRID, y=labels, max_norm=max_norm, targeted=targeted, steps=30)
    assert torch.equal(success, judge(found, labels, targeted))
    if max_norm is None:
        assert success.all()
        torch.testing.assert_close((found * 255).round() / 255, found)
    if max_norm == 0.15:
        assert not success.all()


def test_a_misclassified_image_comes_back_as_it_is():
    found, success = attack()
    assert success[5]
    assert torch.equal(found[5], X[5])
    assert (lengths(found - X)[:5] > 0.01).all()


@pytest.mark.parametrize("levels", [None, 256], ids=repr)
def test_where_nothing_is_found_the_search_ends_at_the_largest_norm_and_not_at_zero(levels):
    found, success = attack(x=GRID[:5], y=Y[:5], max_norm=0.02, levels=levels, steps=5)
    assert not success.any()
    assert (lengths(found - GRID[:5]) > 0.015).all()


def test_nine_tenths_of_the_way_are_not_enough():
    found, success = attack(steps=60, levels=None)
    assert success.all()
    closer = X + 0.9 * (found - X)
    assert not judge(closer, Y)[:5].any()


@pytest.mark.parametrize("useless", [0.0, math.nan, math.inf], ids=repr)
def test_an_image_without_a_usable_gradient_still_moves_and_the_others_do_not_notice(useless):
    def view(current, number):
        slope = 0.2 + current.square()
        slope[1] = useless * torch.ones_like(slope[1])
        return current.flatten(1).sum(1) > 1e9, slope

    found, success = ddn(view, X.clone(), steps=3, init_norm=0.1)
    assert not success.any()
    assert lengths(found - X)[1] > 0.1
    others = [0, 2, 3, 4, 5]
    same, _ = ddn(lambda at, _: (at.flatten(1).sum(1) > 1e9, 0.2 + at.square()), X[others], steps=3, init_norm=0.1)
    assert torch.equal(found[others], same)


def test_a_step_that_ends_at_the_image_is_not_stuck_there():
    """The last step has length 0.01, and here it goes back from a perturbation of length 0.01."""
    there = torch.zeros(1, 8, dtype=torch.float64)
    there[0, 0] = 1.0
    judged = []

    def view(current, number):
        judged.append(current)
        return torch.tensor([False]), -there if number else there

    found, _ = ddn(view, torch.zeros_like(there), steps=2, max_norm=0.01, levels=None)
    assert torch.equal(judged[1], 0.01 * there)
    assert found.norm() > 0.003


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
def test_other_floating_types_are_kept(dtype):
    found, success = attack(network().to(dtype), X.to(dtype), max_norm=0.4)
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (lengths(found.double() - X.to(dtype).double()) <= 0.4 * (1 + 1e-6)).all()
    assert success.any()


@pytest.mark.parametrize("levels", [None, 16, 256], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
@settings(max_examples=25)
@given(max_norm=st.floats(0, 2), init_norm=st.floats(0.01, 3), masked=st.booleans(), seed=st.integers(0, 99))
def test_in_half_precision_ball_and_box_hold_at_every_step(dtype, levels, max_norm, init_norm, masked, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 2, 5, 5, generator=source).to(dtype)
    mask = torch.rand(5, 5, generator=source) < 0.7 if masked else None
    seen = []

    def view(at, number):
        seen.append(at)
        return torch.rand(4, generator=source) < 0.3, torch.randn(at.shape, generator=source).to(dtype)

    how = {"init_norm": init_norm, "max_norm": max_norm, "levels": levels, "mask": mask}
    seen.append(ddn(view, x, steps=4, **how)[0])
    for at in seen:
        assert at.dtype == dtype
        assert at.min() >= 0
        assert at.max() <= 1
        assert (lengths(at.double() - x.double()) <= max_norm * (1 + 1e-6)).all()
        assert mask is None or torch.equal(at[..., ~mask], x[..., ~mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=repr)
def test_in_half_precision_pixels_are_the_numbers_nearest_to_the_levels(dtype):
    found, success = attack(network().to(dtype), X.to(dtype), levels=256)
    assert success.any()
    found = found[~(found == X.to(dtype)).flatten(1).all(1)].double()
    assert torch.equal(((found * 255).round() / 255).to(dtype).double(), found)


def test_a_mask_keeps_the_pixels_it_hides():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    found, success = attack(mask=mask, steps=30)
    assert torch.equal(found[:, :, 2:], X[:, :, 2:])
    assert torch.equal(success, judge(found, Y))
    assert not torch.equal(found, X)
    still, none = attack(mask=torch.zeros(1, 4, 4, dtype=torch.bool))
    assert torch.equal(still, X)
    assert none.tolist() == [False] * 5 + [True]


def test_bounds_per_image():
    bounds = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    found, _ = attack(max_norm=bounds, levels=None)
    assert (lengths(found - X) <= bounds + 1e-6).all()
    assert torch.equal(found[0], X[0])


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"antithetic": True},
        {"gradient": "centred-stein", "samples": 30},
        {"objective": "mean-logits"},
        {"confirm": 0.1, "steps": 30},
    ],
    ids=repr,
)
def test_neighbours_order_and_chunk_change_nothing(how, noise):
    whole, success = attack(noise=noise, **how)
    parts = [attack(x=X[i : i + 1], y=Y[i : i + 1], noise=noise, chunk=4, **how) for i in range(6)]
    torch.testing.assert_close(torch.cat([found for found, _ in parts]), whole, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([mask for _, mask in parts]), success)
    assert torch.equal(attack(noise=noise, **how)[0], whole)
    assert success.any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_context_gives_the_same_and_leaves_input_and_model_alone(context):
    model = network()
    with context():
        x = X.clone()
        found, success = attack(model, x, Y.clone())
    assert torch.equal(x, X)
    assert torch.equal(found, attack()[0])
    assert not found.requires_grad
    assert success.dtype == torch.bool
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_empty_batch():
    found, success = attack(x=X[:0], y=Y[:0])
    assert (found.shape, success.shape) == ((0, 1, 4, 4), (0,))


def test_votes_decide_and_a_tie_is_no_success():
    votes = torch.tensor([[3, 2, 0], [2, 3, 0], [2, 2, 1], [0, 0, 0]])
    y = torch.zeros(4, dtype=torch.int64)
    assert fooled(votes, y, targeted=False).tolist() == [False, True, False, False]
    assert fooled(votes, y, targeted=True).tolist() == [True, False, False, False]
    output = noisy_logits(network(), X, draws_at(0))
    assert torch.equal(fooled(count_votes(output), Y, targeted=False), judge(X, Y))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"gamma": 0}, r"gamma: expected a number in \(0, 1\), got 0"),
        ({"gamma": 1.0}, r"gamma: expected a number in \(0, 1\), got 1\.0"),
        ({"init_norm": 0}, "init_norm: expected finite values > 0, got 0"),
        ({"init_norm": math.nan}, "init_norm: expected finite values >= 0, got nan"),
        ({"max_norm": -1}, "max_norm: expected finite values >= 0, got -1"),
        ({"levels": 1}, "levels: expected an integer >= 2, got 1"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"noise": "pink"}, "noise: expected 'fixed' or 'fresh', got 'pink'"),
        ({"objective": "margin"}, "objective: expected one of"),
        ({"mask": torch.ones(1, 4, 4)}, "mask: expected a boolean tensor, got torch.float32"),
        ({"y": Y[:2]}, r"y: expected one label per image, shape \(6,\), got shape \(2,\)"),
        ({"x": X * 255}, r"x: expected pixels in \[0, 1\], got values from"),
        ({"confirm": 0}, r"confirm: expected a number in \(0, 1\), got 0"),
        ({"confirm": 1.0}, r"confirm: expected a number in \(0, 1\), got 1\.0"),
        ({"confirm": math.nan}, r"confirm: expected a number in \(0, 1\), got nan"),
        ({"confirm": True}, r"confirm: expected a number in \(0, 1\), got True"),
        ({"confirm": "often"}, r"confirm: expected a number in \(0, 1\), got 'often'"),
        ({"seed": "x"}, "seed: expected an integer or None, got 'x'"),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_impossible_values_are_refused_before_the_model_is_run(changed, message):
    with pytest.raises(InputError, match=message):
        attack(lambda _: pytest.fail("the model was run"), **changed)


def test_labels_out_of_range_and_models_without_gradient_are_refused():
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 4\), got values from"):
        attack(y=Y + 4)
    with pytest.raises(ModelError, match="model: no gradient flows from its logits to its input"):
        attack(lambda x: network()(x).detach())
