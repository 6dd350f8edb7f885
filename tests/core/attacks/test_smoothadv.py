import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.attacks.smoothadv import PUBLISHED, smooth_adv_pgd
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.errors import InputError, ModelError

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1, 2, 2])
SIGMA = 0.25


def network(inputs=16, scale=3.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= scale
    return model


class Spy:
    """A model that remembers what it was given."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def draws_of(samples=6, steps=4, **settings):
    """The noise (steps, samples, *input) that the attack adds, found from what the model sees of a gray image.

    No budget, so that the image stays where it is.
    """
    spy = Spy(network())
    gray = torch.full((1, 1, 4, 4), 0.5)
    settings = {**PUBLISHED, "sigma": SIGMA, "samples": samples, "steps": steps} | settings
    smooth_adv_pgd(spy, gray, torch.tensor([0]), eps=0, chunk=1000, **settings)
    return torch.stack(spy.seen) - 0.5


def plain_formula(model, x, y, draws, eps, step, targeted):
    """-log mean softmax, climbed one image at a time with the draws of each step given."""
    out = []
    for image, label, radius in zip(x, y, torch.as_tensor(eps).flatten().expand(len(x)), strict=True):
        delta = torch.zeros_like(image)
        for noise in draws:
            leaf = delta.clone().requires_grad_()
            loss = -model(image + leaf + noise).softmax(1)[:, label].mean().log()
            (g,) = torch.autograd.grad(loss, leaf)
            delta = delta + (-step if targeted else step) * g / g.norm()
            delta = (image + delta).clamp(0, 1) - image
            delta = delta * min(1.0, radius / delta.norm())
        out.append(image + delta)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("eps", "settings"),
    [
        (0.5, {}),
        (0.5, {"noise": "fresh"}),
        (0.5, {"targeted": True}),
        (3.0, {"noise": "fresh", "targeted": True}),
        (torch.tensor([0.1, 0.2, 0.3, 0.4, 2.0]).reshape(5, 1, 1, 1), {}),
        (0.5, {"chunk": 4}),
        (0.5, {"seed": 12}),
        (0.5, {"samples": 1}),
        (0.5, {"step": None}),
    ],
    ids=repr,
)
def test_it_equals_an_independent_formula(eps, settings):
    model = network()
    drawn = {key: settings[key] for key in ("noise", "seed", "samples") if key in settings}
    step = 0.2 if settings.get("step", 0.2) else 2 * 0.5 / 4
    expected = plain_formula(model, X, Y, draws_of(**drawn), eps, step, settings.get("targeted", False))
    settings = {**PUBLISHED, "samples": 6, "step": 0.2} | settings
    found = smooth_adv_pgd(model, X, Y, SIGMA, eps=eps, steps=4, **settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_noise_is_that_of_the_family_and_the_seed():
    fixed, fresh = draws_of(samples=500), draws_of(samples=500, noise="fresh")
    assert all(torch.equal(fixed[0], other) for other in fixed)
    assert not any(torch.equal(fresh[0], other) for other in fresh[1:])
    assert abs(fixed[0].std() - SIGMA) < 0.02
    assert not torch.equal(fixed, draws_of(samples=500, seed=1))
    assert not torch.equal(draws_of(seed=None), draws_of(seed=None))

    class HalfNormal(GaussianNoise):
        def draw_(self, out, generator):
            return super().draw_(out, generator).abs_()

    assert draws_of(family=HalfNormal).min() >= -1e-7


def attack(model=None, x=X, y=Y, **settings):
    settings = {"sigma": SIGMA, "eps": 0.5, "samples": 5, "steps": 3} | settings
    return smooth_adv_pgd(network() if model is None else model, x, y, **settings)


def test_equal_seeds_give_equal_results_and_no_seed_gives_others():
    first = attack(seed=5)
    torch.rand(1)
    assert torch.equal(first, attack(seed=5))
    assert not torch.equal(first, attack(seed=6))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = attack(seed=None)
        torch.manual_seed(0)
        assert not torch.equal(first, attack(seed=None))


def test_the_global_generator_is_left_alone():
    model = network()
    before = torch.get_rng_state()
    attack(model, noise="fresh", seed=None)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_chunk_changes_nothing(chunk, noise):
    spy = Spy(network())
    torch.testing.assert_close(attack(spy, noise=noise, chunk=chunk), attack(noise=noise), atol=1e-5, rtol=0)
    assert max(len(seen) for seen in spy.seen) == {1: 1, 3: 3, 7: 5, 1000: 25}[chunk]


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_neighbours_and_order_change_nothing(noise):
    whole = attack(noise=noise)
    parts = torch.cat([attack(x=X[:2], y=Y[:2], noise=noise), attack(x=X[2:], y=Y[2:], noise=noise)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(attack(x=X[order], y=Y[order], noise=noise), whole[order], atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), eps=st.floats(0, 2), binary=st.booleans())
def test_ball_and_box_hold_for_any_shape(shape, eps, binary):
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(len(shape)))
    x = x.round() if binary else x
    found = attack(network(x[0].numel()), x, Y[:2], eps=eps, samples=2)
    assert found.shape == x.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - x).flatten(1).norm(dim=1) <= eps + 1e-6).all()


def test_binary_images_move_at_both_ends():
    """Differentiating through clamp(0, 1) would leave every pixel where it is on some versions of torch."""
    x = X.round()
    moved = attack(x=x, eps=1.0) != x
    assert (moved & (x == 0)).flatten(1).any(dim=1).all()
    assert (moved & (x == 1)).flatten(1).any(dim=1).all()


def test_no_budget_returns_the_input():
    assert torch.equal(attack(eps=0), X)


def test_an_image_without_gradient_moves_to_the_sphere():
    inside = X * 0.2 + 0.4
    found, other = (attack(lambda x: x.flatten(1)[:, :4] * 0, inside, eps=0.5, seed=seed) for seed in (0, 1))
    assert not torch.equal(found, other)
    torch.testing.assert_close((found - inside).flatten(1).norm(dim=1), torch.full((5,), 0.5), atol=1e-6, rtol=0)


def test_the_smoothed_classifier_is_made_wrong_or_made_to_say_the_target():
    def probability(x):
        noise = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * SIGMA
        return torch.stack([network()(x + e).softmax(1) for e in noise]).mean(0)[torch.arange(5), Y]

    assert (probability(attack(steps=10)) < probability(X) - 0.02).all()
    assert (probability(attack(steps=10, targeted=True)) > probability(X) + 0.02).all()


def test_nan_logits_on_one_image_do_not_touch_the_others():
    x = X * 0.8
    x[1] = 1.0
    model = network()

    def fragile(noisy):
        return torch.where(noisy.flatten(1).mean(1, keepdim=True) > 0.8, math.nan, model(noisy))

    found = attack(fragile, x, sigma=0.01)
    assert found.isfinite().all()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(found[others], attack(model, x, sigma=0.01)[others], atol=1e-6, rtol=0)
    assert ((found - x)[1]).norm() > 0.1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_context_gives_the_same_and_leaves_the_model_alone(context):
    model = network()
    with context():
        found = attack(model, X.clone(), Y.clone())
    assert torch.equal(found, attack())
    assert not found.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-3)], ids=repr)
def test_other_floating_types_are_kept(dtype, slack):
    x = X.to(dtype)
    found = attack(network().to(dtype), x, eps=0.5)
    assert found.dtype == dtype
    lengths = (found.double() - x.double()).flatten(1).norm(dim=1)
    assert (lengths <= 0.5 + slack).all()
    assert (lengths > 0.2).all()


def only_parameters(x, weight=nn.Parameter(torch.ones(1, 4))):  # noqa: B008
    return weight.expand(len(x), 4) * 1.0


@pytest.mark.parametrize(
    "model",
    [
        lambda x: network()(x).detach(),
        only_parameters,
        torch.inference_mode()(lambda x: network()(x)),
        lambda x: nn.functional.one_hot(network()(x).argmax(1), 4).float(),
    ],
    ids=["detached", "parameters only", "inference mode", "hard votes"],
)
def test_a_model_without_gradient_is_refused(model):
    with pytest.raises(ModelError, match="model: no gradient flows from its logits to its input"):
        attack(model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
        ({"sigma": math.nan}, "sigma: expected a finite number > 0, got nan"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"noise": "pink"}, "noise: expected 'fixed' or 'fresh', got 'pink'"),
        ({"family": lambda sigma: sigma}, "family: expected a noise family, got"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"eps": -1}, "eps: expected finite values >= 0, got -1"),
        ({"x": X * 2}, r"x: expected pixels in \[0, 1\], got values from"),
        ({"x": X.int()}, "x: expected floating-point pixels"),
        ({"y": Y[:3]}, r"y: expected one label per image, shape \(5,\), got shape \(3,\)"),
        ({"seed": "x"}, "seed: expected an integer or None, got 'x'"),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_impossible_values_are_refused_before_the_model_is_run(changed, message):
    spy = Spy(network())
    with pytest.raises(InputError, match=message):
        attack(spy, **changed)
    assert not spy.seen


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: network()(x)[:, :1], "model: expected at least 2 columns of logits, got 1"),
        (lambda x: network()(x)[:1], r"model: expected logits of shape \(25, classes\), got shape \(1, 4\)"),
        (lambda x: network()(x).argmax(1), "model: expected it to return floating-point logits"),
    ],
    ids=["one column", "one row", "labels"],
)
def test_a_model_that_is_no_classifier_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        attack(model)


def test_watch_sees_every_step_the_images_and_the_gradient_of_the_loss():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(6, 3), torch.rand(2, 6), torch.tensor([0, 1])
    seen = []
    smooth_adv_pgd(model, x, y, 0.25, steps=3, targeted=True, watch=lambda *what: seen.append(what))
    assert [(number, rows.tolist()) for number, rows, _, _ in seen] == [(0, [0, 1]), (1, [0, 1]), (2, [0, 1])]
    assert torch.equal(seen[0][2], x)
    climb = smooth_adv_pgd(model, x, y, 0.25, eps=0.01, step=0.01, steps=1)
    assert bool((((climb - x) * seen[0][3]).flatten(1).sum(1) > 0).all())  # of the loss itself, also if targeted


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label):
    labels = Y.clone()
    labels[2] = label
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 4\), got values from"):
        smooth_adv_pgd(network(), X, labels, SIGMA)
