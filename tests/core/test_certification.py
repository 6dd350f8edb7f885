import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

import rs_plugins
from rs_plugins.core.certification import certify, majority
from rs_plugins.core.confidence import clopper_pearson_lower
from rs_plugins.core.identity import identity, numerics
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError, ModelError, ModelWarning

IMAGES = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))


class HalfSpace(nn.Module):
    """Class 1 where the first pixel exceeds the threshold: under noise its probability is Φ((x_1 - t) / sigma)."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        z = x[:, 0] - self.threshold
        return torch.stack([-z, z], dim=1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))


def figures(certificates):
    return [(c.index, c.prediction, c.guess, c.count, c.n, c.n0, c.p_lower, c.radius) for c in certificates]


def test_certify_to_the_letter():
    """CERTIFY of Cohen et al., recomputed from the votes."""
    plan = FixedBudget(n0=50, n=400, alpha=0.01)
    model = network()
    votes_n0 = Poll(model, IMAGES, 0.5).votes(50)
    votes_all = Poll(model, IMAGES, 0.5).votes(450)
    for certificate, first, everything in zip(certify(model, IMAGES, 0.5, plan=plan), votes_n0, votes_all, strict=True):
        guess = int(first.argmax())
        count = int((everything - first)[guess])  # estimation votes are fresh ones
        p_lower = clopper_pearson_lower(count, 400, 0.01)
        assert (certificate.guess, certificate.count, certificate.n, certificate.n0) == (guess, count, 400, 50)
        assert certificate.p_lower == p_lower
        if p_lower < 0.5:
            assert (certificate.prediction, certificate.radius) == (ABSTAIN, 0.0)
            assert certificate.abstained
        else:
            assert certificate.prediction == guess
            assert certificate.radius == pytest.approx(0.5 * norm.ppf(p_lower), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_identical_for_every_chunk_order_and_company(chunk):
    plan, model = FixedBudget(n0=20, n=300), network()
    expected = figures(certify(model, IMAGES, 0.5, plan=plan))
    assert figures(certify(model, IMAGES, 0.5, plan=plan, chunk=chunk)) == expected
    order = [4, 0, 5, 2, 1, 3]
    shuffled = figures(certify(model, IMAGES[order], 0.5, plan=plan, chunk=chunk, indices=order))
    assert sorted(shuffled) == expected
    for index in range(6):
        alone = certify(model, IMAGES[index : index + 1], 0.5, plan=plan, chunk=chunk, indices=[index])
        assert figures(alone) == expected[index : index + 1]


def test_a_convolutional_network_is_identical_for_every_chunk():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    runs = [figures(certify(model, images, 0.5, plan=FixedBudget(n0=30, n=500), chunk=c)) for c in (1, 7, 1000)]
    assert runs[0] == runs[1] == runs[2]


def test_coverage_on_a_half_space():
    """True radius known: how often the certified radius exceeds it must agree with alpha = .05 (exact binomial)."""
    sigma, alpha, trials, distance = 0.5, 0.05, 3000, 0.2
    images = torch.full((trials, 1), 0.5 + distance)
    plan = FixedBudget(n0=10, n=100, alpha=alpha)
    wrong = sum(
        c.prediction == 0 or c.radius > distance for c in certify(HalfSpace(), images, sigma, plan=plan, chunk=4096)
    )
    p = norm.cdf(distance / sigma)
    expected = sum(binom.pmf(k, 100, p) for k in range(101) if clopper_pearson_lower(k, 100, alpha) > p)
    assert expected <= alpha
    low, high = binom.ppf([1e-6, 1 - 1e-6], trials, expected)
    assert low <= wrong <= high


def test_votes_follow_the_known_probability():
    sigma = 0.25
    images = torch.linspace(0.2, 0.8, 7).unsqueeze(1)
    votes = Poll(HalfSpace(), images, sigma).votes(4000)
    for x, (_, ones) in zip(images[:, 0].tolist(), votes.tolist(), strict=True):
        low, high = binom.ppf([1e-7, 1 - 1e-7], 4000, norm.cdf((x - 0.5) / sigma))
        assert low <= ones <= high


def test_a_certificate_says_with_what_it_was_made():
    model = network()
    made_with = next(certify(model, IMAGES, 0.5, plan=FixedBudget(n=100, alpha=0.01), seed=3)).made_with
    assert dataclasses.asdict(made_with) | {"versions": None} == {
        "family": "gaussian",
        "norm": "l2",
        "sigma": 0.5,
        "noise": "GaussianNoise(sigma=0.5)",
        "plan": "FixedBudget(n0=100, n=100, alpha=0.01)",
        "alpha": 0.01,
        "bound": "clopper-pearson",
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "execution": "eager",
        "numerics": numerics(torch.device("cpu")),
        "model": identity(model),
        "versions": None,
    }
    for part in (f"rs-plugins {rs_plugins.__version__}", f"torch {torch.__version__}", f"numpy {np.__version__}"):
        assert part in made_with.versions
    unseeded = {next(certify(model, IMAGES, 0.5, plan=FixedBudget(n=100), seed=None)).made_with.seed for _ in range(2)}
    assert len(unseeded) == 2


def test_certificates_cannot_be_changed():
    certificate = next(certify(network(), IMAGES, 0.5, plan=FixedBudget(n=100)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.radius = 1e9


def test_another_noise_family():
    class Wide(GaussianNoise):
        name = "wide"

        def radius(self, p_lower):
            return 2.0

    certificate = next(certify(HalfSpace(), IMAGES[:1] * 0 + 1, 0.1, plan=FixedBudget(n=100), family=Wide))
    assert (certificate.radius, certificate.made_with.family) == (2.0, "wide")


def test_nan_votes_lower_the_bound_and_are_reported():
    class Broken(HalfSpace):
        def forward(self, x):
            return torch.where(x[:, 1:2] > 1, math.nan, super().forward(x))

    image = torch.tensor([[1.0, 0.5]])
    with pytest.warns(ModelWarning, match="image 0: .* NaN logits"):
        (certificate,) = certify(Broken(), image, 0.1 / 1.2816 * 5, plan=FixedBudget(n0=100, n=1000))
    assert certificate.invalid > 50
    assert certificate.count + certificate.invalid <= 1100
    assert certificate.p_lower < (1000 - 50) / 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n0": 0}, "n0: expected an integer >= 1, got 0"),
        ({"n": 0}, "n: expected an integer >= 1, got 0"),
        ({"n": 9}, "n: expected at least 10, got 9: with fewer votes nothing can be certified at alpha = 0.001"),
        ({"alpha": 0}, r"alpha: expected a number in \(0, 1\), got 0"),
        ({"alpha": 1.5}, r"alpha: expected a number in \(0, 1\), got 1.5"),
    ],
    ids=repr,
)
def test_plans_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        FixedBudget(**options)


@pytest.mark.parametrize("plan", [1000, FixedBudget, "fixed-budget"], ids=repr)
def test_plans_are_plans(plan):
    with pytest.raises(InputError, match=r"plan: expected a plan such as FixedBudget\(n=1000\), got"):
        certify(network(), IMAGES, 0.5, plan=plan)


def test_bad_input_is_refused_by_the_call_not_by_the_iteration():
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got -1"):
        certify(network(), IMAGES, -1)


def test_progress_is_shown_on_request(capsys):
    list(certify(network(), IMAGES, 0.5, plan=FixedBudget(n=100), progress=True))
    assert "certify: 100%" in capsys.readouterr().err
    list(certify(network(), IMAGES, 0.5, plan=FixedBudget(n=100)))
    assert capsys.readouterr().err == ""


def test_the_bar_counts_images_and_tells_what_was_saved_and_certified(capsys):
    class Sure(FixedBudget):
        """Stops after a quarter of its votes."""

        def procedure(self, case):
            return FixedBudget(n0=25, n=25).procedure(case)

    images = torch.tensor([[1.0, 0, 0]] * 3 + [[0.5, 0, 0]])  # the last is undecided
    certificates = list(certify(HalfSpace(), images, 0.1, plan=Sure(n0=100, n=100), progress=True))
    assert [c.abstained for c in certificates] == [False] * 3 + [True]
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert re.search(r"images/s|s/images", shown)
    assert re.search(r"[\d,]+ samples/s, 75\.0% saved, 3 certified", shown)


def test_how_the_model_is_run_reaches_the_votes_and_the_certificate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    images = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plan = FixedBudget(n=20)
    (certificate,) = certify(model, images, 0.5, plan=plan, dtype=torch.bfloat16, channels_last=True)
    made_with = certificate.made_with
    assert (made_with.dtype, made_with.execution) == ("bfloat16", "eager, channels last")
    assert made_with.model == identity(copy.deepcopy(model).bfloat16()) != identity(model)
    (certificate,) = certify(model, images, 0.5, plan=plan, dtype=torch.float64)
    assert (certificate.made_with.dtype, certificate.made_with.execution) == ("float64", "eager")


def test_compilation_is_asked_for_before_the_first_certificate(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    certificates = certify(network(), IMAGES, 0.5, plan=FixedBudget(n=20), compile=True)
    assert certificates.made_with.execution == "compiled"


def test_the_papers_budget_is_the_default():
    assert FixedBudget() == FixedBudget(n0=100, n=100_000, alpha=0.001)
    assert FixedBudget().most == 100_100


def test_device_and_classes_reach_the_votes():
    class NoParameters(nn.Module):
        def forward(self, x):
            return torch.cat([x, -x], dim=1)

    with pytest.raises(InputError, match="its device is unknown"):
        certify(NoParameters(), IMAGES, 0.5)
    (certificate,) = certify(NoParameters(), IMAGES[:1], 0.5, plan=FixedBudget(n=20), device="cpu", classes=6)
    assert certificate.seconds > 0
    with pytest.raises(ModelError, match="expected 5 columns of logits, got 6"):
        certify(NoParameters(), IMAGES, 0.5, device="cpu", classes=5)


def test_the_norm_is_that_of_the_family():
    class Taxi(GaussianNoise):
        norm = "l1"

    assert next(certify(network(), IMAGES, 0.5, plan=FixedBudget(n=20), family=Taxi)).made_with.norm == "l1"


def test_no_radius_is_infinite():
    certificate = next(certify(HalfSpace(), IMAGES * 0 + 1, 0.01, plan=FixedBudget(n=1000, alpha=1 - 1e-15)))
    assert certificate.count == 1000
    assert 8 * 0.01 < certificate.radius < 0.1


def test_a_run_goes_on_with_other_images():
    model, plan = network(), FixedBudget(n0=10, n=200)
    first = certify(model, IMAGES[:2], 0.5, plan=plan, seed=3)
    expected = figures(certify(model, IMAGES, 0.5, plan=plan, seed=3))
    assert figures(first) == expected[:2]
    second = first.go_on(IMAGES[4:], range(4, len(IMAGES)))
    assert second.made_with == first.made_with
    assert second.classes == first.classes
    assert figures(second) == expected[4:]
    assert figures(second.go_on(IMAGES[2:4], [2, 3])) == expected[2:4]


def test_a_run_goes_on_before_it_has_begun():
    """The trial of chunks is for all images that are to come."""
    model, plan, sizes = network(), FixedBudget(n0=10, n=2000), []
    expected = figures(certify(model, IMAGES, 0.5, plan=plan))
    model.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    begun = certify(model, IMAGES[:1], 0.5, plan=plan)
    certificates = begun.go_on(IMAGES, range(len(IMAGES)), ahead=10**5)
    del sizes[:]
    assert figures(certificates) == expected
    assert 2048 in sizes  # four times the rule of thumb


@pytest.mark.parametrize(
    ("images", "indices", "message"),
    [
        (torch.zeros(1, 4), [0], r"images: expected the shape \(n, 3\), got \(1, 4\)"),
        (torch.full((1, 3), 2.0), [0], r"images: expected pixels in \[0, 1\]"),
        (torch.zeros(1, 3), [0, 1], r"indices: expected one per image \(1\), got 2"),
    ],
    ids=["shape", "pixels", "indices"],
)
def test_what_a_run_cannot_go_on_with(images, indices, message):
    with pytest.raises(InputError, match=message):
        certify(network(), IMAGES, 0.5).go_on(images, indices)
    with pytest.raises(InputError, match="images: expected a run that was begun with images, got one without"):
        certify(network(), IMAGES[:0], 0.5).go_on(IMAGES, range(6))


def test_no_images_no_certificates():
    assert list(certify(network(), IMAGES[:0], 0.5)) == []


def test_majority_is_predict():
    votes = np.array([[90, 10, 0], [55, 45, 0], [10, 0, 90], [0, 0, 0], [33, 67, 0], [34, 66, 0]])
    assert majority(votes).tolist() == [0, -1, 2, -1, 1, -1]
    assert majority(np.array([[2, 0], [0, 2]]), alpha=0.5).tolist() == [0, 1]  # p-value exactly alpha
    assert majority(votes, alpha=0.5).tolist() == [0, 0, 2, -1, 1, 1]
    with pytest.raises(InputError, match="alpha: expected"):
        majority(votes, alpha=0)


@pytest.mark.parametrize("option", [{"dtype": torch.bfloat16}, {"channels_last": True}, {"compile": True}], ids=str)
def test_a_function_is_called_as_it_is(option):
    with pytest.raises(InputError, match="dtype, channels_last, compile: only for torch modules"):
        certify(lambda batch: batch[:, 0], IMAGES, 0.5, classes=2, **option)


@pytest.mark.parametrize("how", ["in place", "through another model", "replaced"])
def test_a_model_that_is_trained_meanwhile_gets_no_more_certificates(how):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    other = nn.Linear(16, 3)
    other.weight = nn.Parameter(model[1].weight.detach(), requires_grad=False)  # as a frozen copy has it
    certificates = certify(model, torch.rand(3, 1, 4, 4), 0.25, plan=FixedBudget(n0=10, n=20))
    next(certificates)
    with torch.no_grad():
        if how == "replaced":
            model[1].weight = nn.Parameter(torch.randn(3, 16))
        else:
            (model[1] if how == "in place" else other).weight.add_(1)
    with pytest.raises(ModelError, match=r"model: its weights \(1.weight\) were changed while it was in use"):
        next(certificates)


def test_a_copy_in_another_type_does_not_care_what_becomes_of_the_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    plan = FixedBudget(n0=10, n=20)
    certificates = certify(model, torch.rand(2, 1, 4, 4), 0.25, plan=plan, dtype=torch.float64)
    next(certificates)
    with torch.no_grad():
        model[1].weight.add_(1)
    assert next(certificates).n == 20
