import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import SmoothedModel, soft_vote_gradient
from rs_plugins.errors import InputError, ModelError

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1, 2, 2])


def network(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[3].weight *= scale
        model[3].bias *= scale
    return model


class Shift(GaussianNoise):
    """Adds sigma to every pixel."""

    def draw_(self, out, generator):
        return out.fill_(self.sigma)


def mean_softmax(model, x, draws):
    return torch.stack([model(x + draw).softmax(1) for draw in draws]).mean(0)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 1000])
def test_the_output_is_the_log_of_the_mean_softmax(chunk):
    model = SmoothedModel(network(5), 0.5, samples=9, chunk=chunk).eval()
    torch.testing.assert_close(model(X), mean_softmax(model.base, X, model.draws(X)).log(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 1000])
def test_the_gradient_is_that_of_the_smoothadv_objective(chunk):
    model = SmoothedModel(network(5), 0.5, samples=9).eval()
    draws = model.draws(X)
    loss, gradient = soft_vote_gradient(model.base, X, Y, draws, chunk=chunk)
    leaf = X.clone().requires_grad_()
    expected = -mean_softmax(model.base, leaf, draws)[torch.arange(5), Y].log()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0], atol=1e-6, rtol=1e-5)
    through_module = torch.autograd.grad(cross_entropy(model(leaf), Y, reduction="sum"), leaf)[0]
    torch.testing.assert_close(gradient, through_module, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_confident_networks_do_not_underflow(chunk):
    """log(clamp(mean softmax)) has gradient 0 here; the true gradient is large."""
    model = network(5000)
    draws = SmoothedModel(model, 0.1, samples=8).eval().draws(X)
    wrong = (model(X).argmax(1) + 1) % 4
    loss, gradient = soft_vote_gradient(model, X, wrong, draws, chunk=chunk)
    assert loss.isfinite().all()
    assert (loss > 100).all()
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 1).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_in_any_context_leave_parameters_alone(context):
    model = network()
    with context():
        x = X.clone()
        loss, gradient = soft_vote_gradient(model, x, Y.clone(), torch.zeros(2, 1, 4, 4))
    assert not loss.requires_grad
    assert not gradient.requires_grad
    assert gradient.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("chunk", [2, 1000])
def test_classes_that_are_ruled_out_do_not_spoil_the_gradient(chunk):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return torch.cat([self.inner(x), torch.full((len(x), 1), -math.inf)], dim=1)

    plain, masked = (SmoothedModel(m, 0.5, samples=5, chunk=chunk).eval() for m in (network(), Masked()))
    leaf = X.clone().requires_grad_()
    output = masked(leaf)
    assert (output[:, 4] == -math.inf).all()
    torch.testing.assert_close(output[:, :4], plain(leaf))
    gradients = [torch.autograd.grad(cross_entropy(model(leaf), Y), leaf)[0] for model in (plain, masked)]
    torch.testing.assert_close(*gradients)
    draws = plain.draws(X)
    loss, gradient = soft_vote_gradient(masked.base, X, Y, draws, chunk=chunk)
    torch.testing.assert_close((loss, gradient), soft_vote_gradient(plain.base, X, Y, draws, chunk=chunk))
    assert soft_vote_gradient(masked.base, X, Y * 0 + 4, draws, chunk=chunk)[1].abs().max() == 0


def test_sigma_can_be_set_and_keeps_the_family():
    model = SmoothedModel(nn.Flatten(), 0.25, family=Shift).eval()
    model.sigma = 0.5
    torch.testing.assert_close(model(X), (X.flatten(1) + 0.5).log_softmax(1))
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got 0"):
        model.sigma = 0


def test_hard_votes_know_family_and_chunk():
    sizes = []
    base = network()
    base.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    votes = SmoothedModel(base, 0.25, family=Shift, chunk=6).votes(X, 12)
    expected = torch.nn.functional.one_hot(base(X + 0.25).argmax(1), 4) * 12
    assert votes.tolist() == expected.tolist()
    assert sizes[-11:-1] == [6] * 10


def test_a_model_without_gradient_is_refused():
    with pytest.raises(ModelError, match="model: no gradient flows from its logits to its input"):
        soft_vote_gradient(lambda x: network()(x).detach(), X, Y, torch.zeros(2, 1, 4, 4))


def test_fixed_draws_repeat_and_fresh_draws_do_not():
    fixed, fresh = SmoothedModel(network(), 0.5).eval(), SmoothedModel(network(), 0.5, noise="fresh").eval()
    assert torch.equal(fixed(X), fixed(X))
    assert not torch.equal(fresh(X), fresh(X))
    assert not torch.equal(fixed(X), SmoothedModel(network(), 0.5, seed=1).eval()(X))
    assert SmoothedModel(network(), 0.5, seed=None).seed != SmoothedModel(network(), 0.5, seed=None).seed


def test_the_answer_for_an_image_does_not_depend_on_the_batch():
    model = SmoothedModel(network(), 0.5).eval()
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(model(X[order]), model(X)[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([model(image) for image in X.split(1)]), model(X), atol=1e-6, rtol=0)


def test_draws_have_the_standard_deviation_asked_for():
    draws = SmoothedModel(network(), 0.3, samples=4000).draws(X)
    assert draws.shape == (4000, 1, 4, 4)
    assert float(draws.std()) == pytest.approx(0.3, rel=0.02)


def test_train_mode_adds_one_fresh_draw_to_each_image():
    model = SmoothedModel(nn.Flatten(), 0.5, samples=3).train()
    same = torch.full((2, 16), 0.5)
    first, second = model(same), model(same)
    assert first.shape == (2, 16)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    noise = (first - first.mean()).std()
    assert float(noise) == pytest.approx(0.5, rel=0.5)


def test_hard_votes_use_streams_of_their_own():
    model = SmoothedModel(network(), 0.5, samples=3)
    votes = model.votes(X, 200)
    assert votes.sum(axis=1).tolist() == [200] * 5
    assert model.votes(X[2:3], 200, indices=[2]).tolist() == votes[2:3].tolist()
    assert model.votes(X, 200, seed=1).tolist() != votes.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_floating_point_types(dtype):
    output = SmoothedModel(network().to(dtype), 0.5).eval()(X.to(dtype))
    assert output.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(5, dtype=output.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, 16), (3, 1, 4, 4), (0, 1, 4, 4)], ids=repr)
def test_any_rank_and_the_empty_batch(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    model = SmoothedModel(network(), 0.5).eval()
    assert model(x).shape == (shape[0], 4)
    loss, gradient = soft_vote_gradient(model.base, x, torch.zeros(shape[0], dtype=torch.int64), model.draws(x))
    assert loss.shape == (shape[0],)
    assert gradient.shape == shape


def test_copies_and_pickles_say_the_same():
    model = SmoothedModel(network(), 0.5, samples=4, seed=9).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
    assert "GaussianNoise(sigma=0.5), samples=4, noise='fixed', seed=9" in repr(model)
    assert list(model.state_dict()) == [f"base.{key}" for key in model.base.state_dict()]


def test_another_family_is_used():
    model = SmoothedModel(nn.Flatten(), 0.25, family=Shift).eval()
    torch.testing.assert_close(model(X), (X.flatten(1) + 0.25).log_softmax(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1}, "sigma: expected a finite number > 0, got -1"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"noise": "frozen"}, "noise: expected 'fixed' or 'fresh', got 'frozen'"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"seed": "x"}, "seed: expected an integer or None, got 'x'"),
        ({"base": print}, "base: expected a torch.nn.Module, got builtin_function_or_method"),
        ({"base": SmoothedModel(nn.Flatten(), 1)}, "base: expected a base classifier, got a SmoothedModel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SmoothedModel(**({"base": nn.Flatten(), "sigma": 0.5} | options))


def test_many_draws_of_a_linear_model_approach_the_probit_formula():
    """For a hard two-class linear model the soft vote at large scale tends to Φ of the margin over sigma."""
    linear = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, 0.0]]))
    x = torch.tensor([[0.2, 0.0, 0.0]])
    p = SmoothedModel(linear, 0.5, samples=20_000).eval()(x)[0, 1].exp().detach()
    expected = 0.5 * (1 + math.erf(0.2 / 0.5 / math.sqrt(2)))
    assert float(p) == pytest.approx(expected, abs=0.02)


def test_sigma_can_be_changed_and_the_fixed_draws_follow_whatever_the_mode():
    model = SmoothedModel(nn.Linear(3, 2), 0.5, samples=4, noise="fresh", seed=3)
    x = torch.zeros(1, 3)
    before = model.fixed_draws(x)
    assert torch.equal(before, SmoothedModel(nn.Linear(3, 2), 0.5, samples=4, seed=3).draws(x))
    assert not torch.equal(model.draws(x), before)
    model.sigma = 1.0
    torch.testing.assert_close(model.fixed_draws(x), 2 * before)
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got -1"):
        model.sigma = -1
