import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import rs_plugins
from rs_plugins.core.attacks.evaluation import evaluate_attack
from rs_plugins.core.black_box import BlackBox
from rs_plugins.core.certification import majority
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError, ModelError, ModelWarning

SIGMA = 0.25
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(8, 1, 2, 2, generator=GENERATOR)
Y = torch.arange(8) % 3


class HalfSpace(nn.Module):
    """Class 1 where the first pixel exceeds one half: under noise its probability is Φ((x_1 - 1/2) / sigma)."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        z = x.flatten(1)[:, 0] - self.threshold
        return torch.stack([-z, z], dim=1)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3), nn.Dropout(0.5)).train()


@pytest.fixture
def smoothed(network):
    return SmoothedModel(network, SIGMA)


def grey(*values):
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def test_each_figure_of_a_known_classifier():
    """Of a half space all probabilities are known; the attack moves the four pixels, of which one counts."""
    x, x_adv = grey(0.9, 0.9, 0.9, 0.1, 0.5), grey(0.1, 0.9, 0.5, 0.2, 0.5)
    found = evaluate_attack(SmoothedModel(HalfSpace(), SIGMA), x, x_adv, torch.tensor([1, 1, 1, 1, 1]), n=4000)
    assert found.before.prediction.tolist() == [1, 1, 1, 0, -1]
    assert found.after.prediction.tolist() == [0, 1, -1, 0, -1]
    assert found.success.tolist() == [True, False, False, False, False]
    assert (found.success_rate.count, found.abstention_rate.count, found.success_rate.total) == (1, 1, 3)
    for predictions, images in ((found.before, x), (found.after, x_adv)):
        truth = norm.cdf((images[:, 0, 0, 0].numpy() - 0.5) / SIGMA)
        assert predictions.share == pytest.approx(truth, abs=5 * math.sqrt(0.25 / 4000))
        assert predictions.counts.sum(1).tolist() == [4000] * 5
    assert found.l2 == pytest.approx([1.6, 0, 0.8, 0.2, 0], abs=1e-6)
    assert found.linf == pytest.approx([0.8, 0, 0.4, 0.1, 0], abs=1e-6)
    assert (found.sigma, found.alpha, found.confidence, found.seed) == (SIGMA, 0.001, 0.95, 0)


def test_the_level_of_the_test_decides_about_abstentions():
    x = grey(0.52)
    strict, loose = (
        evaluate_attack(SmoothedModel(HalfSpace(), SIGMA), x, x, [1], n=1000, alpha=alpha) for alpha in (1e-9, 0.5)
    )
    assert (strict.alpha, loose.alpha) == (1e-9, 0.5)
    assert (strict.before.prediction.tolist(), loose.before.prediction.tolist()) == ([-1], [1])
    assert strict.before.counts.tolist() == loose.before.counts.tolist()


def test_votes_are_predicts_and_depend_on_nothing_but_seed_and_index(smoothed):
    whole = evaluate_attack(smoothed, X, X, Y, n=500, seed=4)
    again = evaluate_attack(smoothed, X, X, Y, n=500, seed=4, chunk=7)
    part = evaluate_attack(smoothed, X[2:5], X[2:5], Y[2:5], n=500, seed=4, indices=[2, 3, 4])
    for when in ("before", "after"):
        counts = getattr(whole, when).counts
        assert np.array_equal(counts, getattr(again, when).counts)
        assert np.array_equal(counts[2:5], getattr(part, when).counts)
    assert part.indices.tolist() == [2, 3, 4]


def test_before_after_and_certificates_are_judged_by_different_draws(smoothed):
    """Of an image that did not change, equal draws would give equal votes."""
    found = evaluate_attack(smoothed, X, X, Y, n=2000)
    other = evaluate_attack(smoothed, X, X, Y, n=2000, seed=1)
    fresh = evaluate_attack(smoothed, X, X, Y, n=2000, seed=None)
    certified = Poll(smoothed.base, X, SIGMA).votes(2000)
    votes = [found.before.counts, found.after.counts, other.before.counts, fresh.before.counts, certified]
    for place, one in enumerate(votes):
        for another in votes[:place]:
            assert not np.array_equal(one, another)
            assert np.abs(one - another).max() < 6 * math.sqrt(2000 / 2)
    assert (other.seed, found.seed) == (1, 0)
    assert fresh.seed not in (0, 1)


def test_family_and_chunk_are_the_smoothed_models(network):
    class Ones(GaussianNoise):
        def draw_(self, out, generator):
            return out.fill_(self.sigma)

    sizes = []
    hook = network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        found = evaluate_attack(SmoothedModel(network, 0.3, family=Ones, chunk=50), X, X, Y, n=100)
    finally:
        hook.remove()
    with torch.no_grad():
        answers = network.eval()(X + 0.3).argmax(1)
    network.train()
    assert found.before.prediction.tolist() == answers.tolist()
    assert max(sizes[-16:]) == 50


def test_arrays_tensors_lists_and_one_hot_rows(smoothed):
    expected = evaluate_attack(smoothed, X, X, Y, n=50).before
    rows = nn.functional.one_hot(Y, 3)
    for x, y in [
        (X.numpy(), Y.numpy()),
        (X.double(), Y.tolist()),
        (X.clone().requires_grad_(), rows.numpy().astype(np.float32)),
        (X, rows),
        (X, Y.numpy()[:, None].astype(np.uint8)),
    ]:
        found = evaluate_attack(smoothed, x, x, y, n=50).before
        assert np.array_equal(found.label, expected.label)
        assert np.array_equal(found.counts, expected.counts)


def test_the_model_is_left_as_it_was(smoothed):
    evaluate_attack(smoothed, X, X, Y, n=50)
    assert smoothed.training
    assert all(module.training for module in smoothed.base.modules())


def test_a_wrapper_is_asked_for_its_model(smoothed):
    class Wrapper:
        model = smoothed

    found = evaluate_attack(Wrapper(), X, X, Y, n=50)
    assert np.array_equal(found.after.counts, evaluate_attack(smoothed, X, X, Y, n=50).after.counts)


def test_the_device_of_a_model_without_parameters():
    bare = SmoothedModel(nn.Flatten(), SIGMA)
    with pytest.raises(InputError, match="its device is unknown; pass device='cpu'"):
        evaluate_attack(bare, X, X, Y, n=50)
    found = evaluate_attack(bare, X, X, X.flatten(1).argmax(1), n=2000, device="cpu")
    assert found.before.share.min() > 0.25


def test_a_black_box(smoothed):
    box = BlackBox(lambda x: smoothed.base.eval()(torch.from_numpy(x)).detach().numpy(), 3)
    found = evaluate_attack(SmoothedModel(box, SIGMA), X, X, Y, n=50)
    assert np.array_equal(found.before.counts, evaluate_attack(smoothed, X, X, Y, n=50).before.counts)
    smoothed.base.train()


def test_nan_votes_are_votes_for_no_class():
    class Fails(HalfSpace):
        def forward(self, x):
            return super().forward(x).masked_fill(x.flatten(1)[:, 1:2] > 0.75, math.nan)

    x = grey(0.7)
    with pytest.warns(ModelWarning, match=r"image 0: \d+ noisy copies gave NaN logits"):
        found = evaluate_attack(SmoothedModel(Fails(), SIGMA), x, x, [1], n=1000)
    assert 500 < found.before.counts.sum() < 700  # Φ((0.75 - 0.7) / 0.25) = 0.579
    assert found.before.share[0] == found.before.counts[0, 1] / 1000


def test_a_progress_bar_of_all_images(smoothed, capsys):
    evaluate_attack(smoothed, X, X, Y, n=50)
    assert capsys.readouterr().err == ""
    evaluate_attack(smoothed, X, X, Y, n=50, progress=True)
    assert "evaluate: 100%" in (text := capsys.readouterr().err)
    assert "16/16" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X * math.nan}, "x: expected finite values, got NaN or infinity"),
        ({"x_adv": X / 0}, "x_adv: expected finite values, got NaN or infinity"),
        ({"x": (X * 255).byte()}, r"x: expected floating-point pixels in \[0, 1\], got torch.uint8"),
        (
            {"x_adv": torch.ones(8, 1, 2, 2).int()},
            r"x_adv: expected floating-point pixels in \[0, 1\], got torch.int32",
        ),
        ({"x": X + 1}, r"x: expected pixels in \[0, 1\], got values from"),
        ({"x_adv": X.clamp(max=0) - 2e-6}, r"x_adv: expected pixels in \[0, 1\], got values from"),
        ({"x_adv": X[1:]}, r"x_adv: expected the shape of x, \(8, 1, 2, 2\), got shape \(7, 1, 2, 2\)"),
        ({"x": X[:0], "x_adv": X[:0], "y": Y[:0]}, "x: expected at least one image, got none"),
        ({"x": "images"}, "x: expected an array or tensor of numbers, got str"),
        ({"y": Y[1:]}, r"y: expected one label per image, shape \(8,\), got shape \(7,\)"),
        ({"y": Y + 1}, r"y: expected labels in \[0, 3\), got values from 1 to 3"),
        ({"y": Y.float()}, "y: expected a tensor of integer labels, got torch.float32"),
        ({"y": torch.eye(8)}, r"y: expected labels of shape \(8,\), \(8, 1\) or \(8, 3\), got shape \(8, 8\)"),
        ({"y": torch.full((8, 3), 1 / 3)}, "y: expected one-hot rows, got others; of class probabilities"),
        ({"n": 0}, "n: expected an integer >= 1, got 0"),
        ({"n": 10}, "n: 10 votes are too few at alpha = 0.001: all images would abstain"),
        ({"alpha": 0}, r"alpha: expected a number in \(0, 1\), got 0"),
        ({"seed": 1.5}, r"seed: expected an integer or None, got 1.5"),
        ({"confidence": 1}, r"confidence: expected a number in \(0, 1\), got 1"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"indices": [0]}, r"indices: expected one per image \(8\), got 1"),
        ({"device": "abacus"}, "device: expected a device of this machine, got 'abacus'"),
    ],
)
def test_mistakes_are_found_before_the_first_vote(smoothed, monkeypatch, change, message):
    monkeypatch.setattr(Poll, "votes", lambda *_, **__: pytest.fail("the work has begun"))
    call = {"x": X, "x_adv": X, "y": Y, "n": 100, **change}
    with pytest.raises(InputError, match=message):
        evaluate_attack(smoothed, call.pop("x"), call.pop("x_adv"), call.pop("y"), **call)


def test_images_that_the_model_does_not_take(smoothed):
    wide = torch.rand(8, 1, 3, 3)
    with pytest.raises(ModelError, match=r"model: it fails on an input of shape \(1, 1, 3, 3\)"):
        evaluate_attack(smoothed, wide, wide, Y)


@pytest.mark.parametrize(("n", "fewest"), [(11, 11), (100, 67), (1000, 553), (10_000, 5166)])
def test_how_many_votes_predict_goes_by(n, fewest):
    """The numbers of PREDICT at alpha = 0.001, all other votes on one class."""
    votes = np.array([[0, fewest, n - fewest], [0, fewest - 1, n - fewest + 1], [n - fewest, 0, fewest]])
    assert majority(votes, 0.001).tolist() == [1, -1, 2]


def test_eleven_votes_can_predict(smoothed):
    assert evaluate_attack(smoothed, X, X, Y, n=11).before.votes == 11


def test_a_rounding_error_outside_the_box_is_none(smoothed):
    assert len(evaluate_attack(smoothed, X, X.clamp(max=0) - 5e-7, Y, n=50)) == 8


@pytest.mark.parametrize("wrap", [False, True])
def test_a_model_without_noise_is_refused_with_advice(network, wrap):
    class Wrapper:
        model = network

    message = (
        "smoothed: expected a SmoothedModel, or what holds one as its model such as a SmoothedClassifier, got "
        f"{'Wrapper around a Sequential' if wrap else 'Sequential'}; wrap the base classifier: "
        r"SmoothedModel\(model, sigma\)"
    )
    with pytest.raises(InputError, match=message):
        evaluate_attack(Wrapper() if wrap else network, X, X, Y)


def test_it_is_public():
    assert rs_plugins.evaluate_attack is evaluate_attack
