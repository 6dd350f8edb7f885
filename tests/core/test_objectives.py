import math
import weakref

import pytest
import torch
from torch import nn

from rs_plugins.core.objectives import (
    LOG_MEAN_SOFTMAX,
    MEAN_CROSS_ENTROPY,
    MEAN_LOGITS,
    noisy_logits,
    objective_named,
)
from rs_plugins.errors import InputError, ModelError

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1, 2, 2])
DRAWS = 0.5 * torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(1))
OBJECTIVES = [LOG_MEAN_SOFTMAX, MEAN_CROSS_ENTROPY, MEAN_LOGITS]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=[o.name for o in OBJECTIVES])


def network(scale=5.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= scale
    return model


def formula(objective, output, y):
    """The loss of logits (m, classes) of one image, as the papers write it."""
    if objective is LOG_MEAN_SOFTMAX:
        return -output.softmax(1)[:, y].mean().log()
    if objective is MEAN_CROSS_ENTROPY:
        return -output.softmax(1)[:, y].log().mean()
    return -output.mean(0).softmax(0)[y].log()


def expected(objective, model=None, x=X, y=Y, draws=DRAWS):
    """Loss and gradient, one image at a time, all draws at once, in double precision."""
    model = (model or network()).double()
    losses, gradients = [], []
    for image, label in zip(x.double(), y, strict=True):
        leaf = image.clone().requires_grad_()
        loss = formula(objective, model(leaf + draws.double()), label)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    return torch.stack(losses).float(), torch.stack(gradients).float()


@every
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 9, 1000])
def test_loss_and_gradient_are_those_of_the_formula_however_many_passes_it_takes(objective, chunk):
    model = network()
    loss, gradient, votes = objective.look(model, X, Y, DRAWS, chunk=chunk)
    true_loss, true_gradient = expected(objective)
    torch.testing.assert_close(loss, true_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, true_gradient, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.loss(model, X, Y, DRAWS, chunk=chunk), true_loss, atol=1e-5, rtol=1e-5)
    assert true_gradient.flatten(1).norm(dim=1).min() > 0.01
    winners = torch.stack([model(image + DRAWS).argmax(1) for image in X])
    assert votes.tolist() == [row.bincount(minlength=4).tolist() for row in winners]


def test_the_three_are_different_and_one_draw_makes_them_the_same():
    losses = torch.stack([o.loss(network(), X, Y, DRAWS) for o in OBJECTIVES])
    assert ((losses[0] - losses[1]).abs() > 0.01).any()
    assert ((losses[0] - losses[2]).abs() > 0.01).any()
    assert ((losses[1] - losses[2]).abs() > 0.01).any()
    first, *others = (o.look(network(), X, Y, DRAWS[:1]) for o in OBJECTIVES)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


class Spy:
    def __init__(self):
        self.model, self.sizes, self.with_gradient = network(), [], 0

    def __call__(self, x):
        self.sizes.append(len(x))
        self.with_gradient += x.requires_grad * len(x)
        return self.model(x)


@every
@pytest.mark.parametrize("samples", [4, 64])
def test_the_largest_pass_does_not_grow_with_the_draws(objective, samples):
    draws = torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    spy = Spy()
    objective.look(spy, X[:2], Y[:2], draws, chunk=4)
    assert max(spy.sizes) == 4
    assert spy.with_gradient == 2 * samples  # each noisy image goes through once with a gradient
    again = 2 * samples if objective is MEAN_LOGITS else 0  # and for the mean of the logits, once without
    assert sum(spy.sizes) == 2 * samples + again


def test_the_mean_of_the_logits_takes_one_pass_where_all_draws_fit_into_it():
    spy = Spy()
    MEAN_LOGITS.look(spy, X, Y, DRAWS, chunk=45)
    assert spy.sizes == [45]


class Box:
    """Holds a tensor that autograd keeps for the way back."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_kept(objective, samples):
    """The largest number of tensors that autograd holds at any time."""
    boxes, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        box = Box(tensor)
        boxes.add(box)
        most = max(most, len(boxes))
        return box

    draws = torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        objective.look(network(), X[:1], Y[:1], draws, chunk=4)
    return most


@every
def test_what_a_pass_keeps_is_gone_before_the_next(objective):
    assert 0 < most_kept(objective, 40) <= most_kept(objective, 8)


@every
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_context_gives_the_same_and_leaves_parameters_alone(objective, context):
    model = network()
    with context():
        look = objective.look(model, X.clone(), Y.clone(), DRAWS.clone(), chunk=3)
        loss = objective.loss(model, X.clone(), Y.clone(), DRAWS.clone(), chunk=3)
    torch.testing.assert_close(look, objective.look(model, X, Y, DRAWS, chunk=3))
    assert not any(part.requires_grad for part in (*look, loss))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@every
@pytest.mark.parametrize("chunk", [2, 1000])
def test_confident_networks_do_not_underflow(objective, chunk):
    model = network(5000)
    loss, gradient, _ = objective.look(model, X, model(X).argmin(1), DRAWS * 0.01, chunk=chunk)
    assert loss.isfinite().all()
    assert (loss > 100).all()
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 1).all()


@every
@pytest.mark.parametrize("chunk", [2, 1000])
def test_classes_that_are_ruled_out_do_not_spoil_the_gradient(objective, chunk):
    model = network()

    def with_a_fifth(x):
        return torch.cat([model(x), torch.full((len(x), 1), -math.inf)], dim=1)

    loss, gradient, votes = objective.look(with_a_fifth, X, Y, DRAWS, chunk=chunk)
    true_loss, true_gradient = expected(objective)
    torch.testing.assert_close((loss, gradient), (true_loss, true_gradient), atol=1e-5, rtol=1e-5)
    assert votes[:, 4].eq(0).all()


@every
def test_nan_logits_are_no_vote_and_spoil_one_image_only(objective):
    model = network()

    def fragile(x):
        return torch.where(x.flatten(1)[:, :1] > 50, math.nan, model(x))

    x = X.clone()
    x[1] = 100
    loss, gradient, votes = objective.look(fragile, x, Y, DRAWS)
    assert votes.sum(1).tolist() == [9, 0, 9, 9, 9]
    others = [0, 2, 3, 4]
    assert loss[others].isfinite().all()
    assert gradient[others].isfinite().all()
    assert loss[1].isnan()


@every
def test_other_types_and_the_empty_batch(objective):
    loss, gradient, votes = objective.look(network(), X[:0], Y[:0], DRAWS)
    assert (loss.shape, gradient.shape, len(votes)) == ((0,), (0, 1, 4, 4), 0)
    assert objective.loss(network(), X[:0], Y[:0], DRAWS).shape == (0,)
    half = objective.look(network().bfloat16(), X.bfloat16(), Y.int(), DRAWS.bfloat16(), chunk=2)
    assert half.gradient.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, expected(objective)[0], atol=0.2, rtol=0.05)


@every
def test_a_model_without_gradient_is_refused_but_has_a_loss(objective):
    def detached(x):
        return network()(x).detach()

    with pytest.raises(ModelError, match="model: no gradient flows from its logits to its input"):
        objective.look(detached, X, Y, DRAWS)
    torch.testing.assert_close(objective.loss(detached, X, Y, DRAWS), expected(objective)[0], atol=1e-5, rtol=1e-5)


def test_objectives_have_names():
    assert [objective_named(o.name) for o in OBJECTIVES] == OBJECTIVES
    message = "objective: expected one of 'log-mean-softmax', 'mean-cross-entropy', 'mean-logits', got 'margin'"
    with pytest.raises(InputError, match=message):
        objective_named("margin")


def test_draws_are_shared_by_all_images_or_each_image_has_its_own():
    model, own = network(), torch.stack([DRAWS[:3] * (1 + i) for i in range(len(X))])
    shared, apart = noisy_logits(model, X, DRAWS), noisy_logits(model, X, own)
    for i, image in enumerate(X):
        torch.testing.assert_close(shared[i], model(image + DRAWS))
        torch.testing.assert_close(apart[i], model(image + own[i]))
