"""Batches, draws, and what all methods share."""

import dataclasses
import math

import pytest
import torch

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import Gaussian, gaussian, plain
from rs_plugins.core.training.inner_attacks import DDN, BallFirstPGD
from rs_plugins.core.training.methods import METHODS, takes_noise
from rs_plugins.core.training.objective import Batch, StreamDraws, warm_up, weighted
from rs_plugins.errors import InputError, ModelError

NOISY = {name: method for name, method in METHODS.items() if takes_noise(name)}
X = torch.rand(2000, 2, 3, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Noise that is uniform in ± sigma·√3."""

    sigma: float
    name = "uniform"
    norm = "l1"

    def draw_(self, out, generator):
        return out.uniform_(-self.sigma * math.sqrt(3), self.sigma * math.sqrt(3), generator=generator)

    def radius(self, p_lower):
        return 2 * self.sigma * math.sqrt(3) * (p_lower - 0.5)


def test_noise_is_independent_per_image_and_sample():
    e = StreamDraws(stream(0, "test")).noise(GaussianNoise(0.5), X, 3)
    assert e.shape == (2000, 3, 2, 3)
    correlations = torch.corrcoef(e.transpose(0, 1).flatten(2).movedim(1, 2).reshape(18, 2000))
    assert float((correlations - torch.eye(18)).abs().max()) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([e[1:].flatten(), e[:-1].flatten()]))[0, 1])) < 0.03
    assert float(e.std()) == pytest.approx(0.5, rel=0.02)


def test_uniform_numbers_are_one_per_image_in_the_images_type():
    u = StreamDraws(stream(0, "test")).uniform(X.double())
    assert u.shape == (2000,)
    assert u.dtype == torch.float64
    assert 0 <= float(u.min()) < 0.01
    assert 0.99 < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.03)


def test_the_stream_decides_and_goes_on():
    first, again = (StreamDraws(stream(0, "test")) for _ in range(2))
    noise = GaussianNoise(0.5)
    e = first.noise(noise, X, 2)
    assert torch.equal(e, again.noise(noise, X, 2))
    assert not torch.equal(e, first.noise(noise, X, 2))
    assert not torch.equal(first.uniform(X), again.uniform(X))


@pytest.mark.parametrize("name", NOISY)
def test_a_method_is_data(name):
    method = METHODS[name](0.5)
    assert method == METHODS[name](0.5)
    assert method != METHODS[name](0.25)
    assert "sigma=0.5" in repr(method)
    assert dataclasses.replace(method, sigma=0.25).noise == GaussianNoise(0.25)
    assert isinstance(METHODS[name](sigma=1).sigma, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.sigma = 1.0


@pytest.mark.parametrize("name", NOISY)
def test_options_are_keywords_and_sigma_and_family_are_checked(name):
    with pytest.raises(TypeError, match="positional argument"):
        METHODS[name](0.5, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lambda_'"):
        METHODS[name](0.5, lambda_=1)
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got -1"):
        METHODS[name](-1)
    with pytest.raises(InputError, match="family: expected a noise family such as GaussianNoise, got 'gaussian'"):
        METHODS[name](0.5, family="gaussian")


@pytest.mark.parametrize("name", NOISY)
def test_the_family_is_what_is_drawn_from(name, problem):
    asked = []

    class Watching(StreamDraws):
        def noise(self, noise, x, samples):
            asked.append(noise)
            return super().noise(noise, x, samples)

    objective = METHODS[name](0.5, family=Uniform)
    loss = objective(problem.model, Batch(problem.x, problem.y), Watching(stream(0, "test")))
    assert asked == [Uniform(0.5)]
    assert bool(loss.isfinite())


@pytest.mark.parametrize("name", sorted(NOISY.keys() - {"gaussian"}))
def test_soft_labels_are_refused_where_a_label_is_needed(name, problem):
    soft = torch.full((5, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"y: expected a tensor of integer labels, got torch\.float64"):
        METHODS[name](0.5)(problem.model, Batch(problem.x, soft), StreamDraws(stream(0, "test")))


@pytest.mark.parametrize("name", NOISY)
def test_labels_of_any_integer_type_are_taken(name, problem):
    losses = [
        METHODS[name](0.5)(problem.model, Batch(problem.x, problem.y.to(dtype)), StreamDraws(stream(0, "test")))
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert len({loss.item() for loss in losses}) == 1


OBJECTIVES = {name: method(0.5) for name, method in NOISY.items()} | {
    "plain": plain,
    "smoothadv, ddn": METHODS["smoothadv"](0.5, attack=DDN()),
    "consistency with attack": METHODS["consistency"](0.5, attack=BallFirstPGD()),
}


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1, 2, 0, 3], r"y: expected labels in \[0, 3\), got values from 0 to 3"),
        ([0, 1, 2, 0, -100], r"y: expected labels in \[0, 3\), got values from -100 to 2"),
        ([[0, 0, 1]] * 5, r"y: expected one label per image, shape \(5,\), got shape \(5, 3\)"),
        ([0, 1, 2, 0], r"y: expected one label per image, shape \(5,\), got shape \(4,\)"),
        ([0.0, 1.0, 2.0, 0.0, 1.0], r"y: expected a tensor of integer labels, got torch\.float32"),
    ],
    ids=["too great", "cross-entropy leaves it out", "one-hot", "too few", "floating"],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_that_the_model_does_not_know_are_refused(name, y, message, problem):
    with pytest.raises(InputError, match=message):
        OBJECTIVES[name](problem.model, Batch(problem.x, torch.tensor(y)), StreamDraws(stream(0, "test")))


@pytest.mark.parametrize("name", ["gaussian", "plain"])
def test_class_probabilities_have_the_shape_of_the_logits_and_any_precision(name, problem):
    soft = torch.full((5, 3), 0.25) + torch.eye(5, 3) / 4
    draws = [StreamDraws(stream(0, "test")) for _ in range(2)]
    losses = [
        OBJECTIVES[name](problem.model, Batch(problem.x, soft.to(dtype)), each)
        for dtype, each in zip((torch.float32, torch.float64), draws, strict=True)
    ]
    assert torch.equal(*losses)
    with pytest.raises(InputError, match=r"y: expected class probabilities of shape \(5, 3\), got shape \(5, 2\)"):
        OBJECTIVES[name](problem.model, Batch(problem.x, soft[:, :2]), StreamDraws(stream(0, "test")))


def test_plain_training_wants_logits(problem):
    with pytest.raises(ModelError, match=r"model: expected logits of shape \(5, classes\), got shape \(5,\)"):
        plain(lambda x: x[:, 0], Batch(problem.x, problem.y), None)


def test_the_weight_multiplies_value_and_gradient(problem):
    batch, draws = Batch(problem.x, problem.y), problem.known(1)
    loss, slope = problem.value_and_gradient(gaussian(0.5)(problem.model, batch, draws))
    times, slopes = problem.value_and_gradient(weighted(gaussian(0.5), 0.25)(problem.model, batch, draws))
    torch.testing.assert_close(times, 0.25 * loss)
    torch.testing.assert_close(slopes, tuple(0.25 * each for each in slope))
    assert weighted(plain, 0)(problem.model, batch, draws).item() == 0
    with pytest.raises(InputError, match="weight: expected a finite number >= 0, got -1"):
        weighted(plain, -1)


def test_warm_up_is_linear_and_ends():
    assert [warm_up(epoch, 4) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 1) == 1.0


def test_gaussian_is_short_for_its_class():
    assert gaussian(0.5, Uniform) == Gaussian(0.5, family=Uniform, samples=1)
