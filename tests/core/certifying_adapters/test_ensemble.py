import copy
import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certification import Certificate, certify
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.ensemble import AdapterEnsemble, HeuristicRadius
from rs_plugins.core.certifying_adapters.features import FunctionExtractor
from rs_plugins.core.certifying_adapters.modules import FeatureCertifyingAdapter, ImageCertifyingAdapter
from rs_plugins.core.certifying_adapters.routing import NoiseLevelRouter
from rs_plugins.core.confidence import clopper_pearson_lower
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.identity import identity
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.table import Results
from rs_plugins.core.results.writer import ResultsWriter
from rs_plugins.errors import InputError, ModelError

SIGMAS = (0.25, 0.5, 1.0)
X = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
PLAN = FixedBudget(n0=10, n=100, alpha=0.03)


@pytest.fixture(autouse=True)
def _seeded():
    with global_randomness(0):
        yield


def extractor(activation=torch.relu):
    """Return a network whose batch normalisation has seen images."""

    class Activation(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = activation

        def forward(self, x):
            return self.of(x)

    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Activation(), nn.Flatten(), nn.Linear(16, 5))
    network(X)
    return network


def adapted(trunk, *, normalise=None, features=5, classes=3, image=False):
    if image:
        beside = ImageCertifyingAdapter(nn.Sequential(nn.Flatten(), nn.Linear(32, features)), features, zero_init=False)
    else:
        beside = FeatureCertifyingAdapter(features, zero_init=False)
    member = AdaptedClassifier(trunk, beside, nn.Linear(features, classes), normalise=normalise)
    if features == 5:
        member.head.weight.data *= 10
        member.head.bias.data -= member.eval()(X).mean(0)  # so that no class has all images
    return member


def members(count=3, normalise=None):
    trunk = extractor()
    return [adapted(trunk, normalise=normalise, image=number == 1) for number in range(count)]


def ensemble(**options):
    return AdapterEnsemble(list(zip(members(), SIGMAS, strict=True)), **options)


def places(module):
    """Return where in memory the weights are."""
    return [value.data_ptr() for value in module.state_dict().values()]


def figures(certificates):
    return [
        (c.index, c.prediction, c.guess, c.count, c.n, c.n0, c.p_lower, c.radius, c.made_with) for c in certificates
    ]


@pytest.mark.parametrize("given", ["pairs", "mapping", "iterator"])
def test_the_selected_member_is_the_single_classifier(given):
    built = members()
    pairs = list(zip(built, SIGMAS, strict=True))
    whole = AdapterEnsemble({"pairs": pairs, "mapping": {s: m for m, s in pairs}, "iterator": iter(pairs)}[given])
    assert whole.sigmas == SIGMAS
    for member, sigma in pairs:
        assert torch.equal(whole.at(sigma)(X), member(X))
        expected = figures(certify(member, X, sigma, plan=PLAN))
        assert figures(whole.certify(X, sigma=sigma, plan=PLAN)) == expected
        assert len({count for _, _, _, count, *_ in expected}) > 1


def test_twins_share_one_extractor_and_the_originals_stay_whole():
    normalise = Normalise((0.4, 0.5), (0.2, 0.3))
    trunk = extractor()
    single = [adapted(copy.deepcopy(trunk), normalise=copy.deepcopy(normalise)) for _ in SIGMAS]
    trunks, logits = [member.extractor for member in single], [member(X) for member in single]
    before = [identity(member) for member in single]
    whole = AdapterEnsemble(list(zip(single, SIGMAS, strict=True)))
    assert [member.extractor for member in single] == trunks  # modules are equal if they are the same
    assert len({member.extractor for member in whole.members} | {member.normalise for member in whole.members}) == 2
    assert places(whole.members[0].extractor) == places(trunks[0])
    for number, (member, sigma) in enumerate(zip(single, SIGMAS, strict=True)):
        assert torch.equal(whole.at(sigma)(X), logits[number])
        assert places(whole.at(sigma).adapter) == places(member.adapter)
        assert identity(whole.at(sigma)) == before[number] == identity(member)
        assert figures(whole.certify(X, sigma, plan=PLAN)) == figures(certify(member, X, sigma, plan=PLAN))
    for parameter in whole.members[2].extractor.parameters():
        parameter.data += 1
    assert torch.equal(single[2](X), logits[2])


@pytest.mark.parametrize("shared", [True, False])
def test_to_cast_an_ensemble_leaves_those_handed_in_as_they_were(shared):
    trunk = extractor()
    single = [adapted(trunk if shared else copy.deepcopy(trunk), image=image) for image in (False, True)]
    logits, before = [member(X) for member in single], [identity(member) for member in single]
    whole = AdapterEnsemble({0.25: single[0], 0.5: single[1]}).double()
    for member, sigma, expected, digits in zip(single, whole.sigmas, logits, before, strict=True):
        assert torch.equal(member(X), expected)
        assert identity(member) == digits
        torch.testing.assert_close(whole.at(sigma)(X.double()), expected.double(), rtol=1e-4, atol=1e-4)


def test_training_through_an_ensemble_trains_those_handed_in():
    single = members()
    single[2].head.requires_grad_(False)
    whole = AdapterEnsemble(list(zip(single, SIGMAS, strict=True)))
    asking = [[parameter.requires_grad for parameter in member.parameters()] for member in single]
    assert [[parameter.requires_grad for parameter in member.parameters()] for member in whole.members] == asking
    before = [member(X).detach() for member in single]
    optimizer = torch.optim.Adam((parameter for parameter in whole.parameters() if parameter.requires_grad), lr=0.1)
    torch.nn.functional.cross_entropy(whole.average()(X), torch.arange(5) % 3).backward()
    optimizer.step()
    for member, sigma, old in zip(single, SIGMAS, before, strict=True):
        assert torch.equal(member(X), whole.at(sigma)(X))
        assert not torch.allclose(member(X), old)


def test_members_that_cannot_be_copied():
    built = members(2)
    built[1].adapter.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"^members: a .*copy of it is needed, which failed \(TypeError: "):
        AdapterEnsemble({0.5: built[0], 0.25: built[1]})


def test_members_without_normalisation_and_with_gates():
    trunk = extractor()
    parts = [(FeatureCertifyingAdapter(5, zero_init=False), nn.Linear(5, 3)) for _ in range(2)]
    gated = [AdaptedClassifier(copy.deepcopy(trunk), *part, normalise=None, combine="gated").eval() for part in parts]
    nn.init.normal_(gated[1].gate)
    whole = AdapterEnsemble({0.5: gated[0], 0.25: gated[1]})
    assert torch.equal(whole.at(0.25)(X), gated[1](X))
    assert whole.at(0.25).gate.data_ptr() == gated[1].gate.data_ptr()


def other_weights(trunk):
    trunk = copy.deepcopy(trunk)
    trunk[-1].weight.data[0, 0] += 1e-6
    return trunk


def other_statistics(trunk):
    trunk = copy.deepcopy(trunk)
    trunk[1].running_mean[0] += 1e-6
    return trunk


def other_function(trunk):
    trunk = copy.deepcopy(trunk)
    trunk[2].of = torch.tanh  # of which neither weights nor the printed form tell
    return trunk


@pytest.mark.parametrize("change", [other_weights, other_statistics, other_function])
def test_other_extractors(change):
    built = members(2)
    built.append(adapted(change(built[0].extractor)))
    message = r"^members: expected the extractor of member 0 in all, got another in member 2 \(sigma 1\)$"
    with pytest.raises(InputError, match=message):
        AdapterEnsemble(list(zip(built, SIGMAS, strict=True)))


class Pool:
    """A feature function that is an object with a setting."""

    def __init__(self, mode):
        self.mode = mode

    def __call__(self, model, x):
        places = model(x).flatten(2)
        return places.mean(2) if self.mode == "mean" else places.amax(2)


def test_extractors_by_functions_with_settings():
    trunk = nn.Conv2d(2, 5, 3)
    mean, same, most = (adapted(FunctionExtractor(trunk, Pool(mode))) for mode in ("mean", "mean", "max"))
    assert not torch.equal(mean.extractor(X), most.extractor(X))
    assert torch.equal(AdapterEnsemble({0.25: mean, 0.5: same}).at(0.5)(X), same(X))
    message = r"^members: expected the extractor of member 0 in all, got another in member 1 "
    with pytest.raises(InputError, match=message):
        AdapterEnsemble({0.25: mean, 0.5: most})


@pytest.mark.parametrize("normalise", [None, Normalise((0.4, 0.5), (0.2, 0.31))])
def test_other_normalisation(normalise):
    built = members(1, Normalise((0.4, 0.5), (0.2, 0.3)))
    built.append(adapted(built[0].extractor, normalise=normalise))
    message = r"^members: expected the normalise of member 0 in all, got another in member 1 \(sigma 0.125\)$"
    with pytest.raises(InputError, match=message):
        AdapterEnsemble({0.5: built[0], 0.125: built[1]})


def test_other_features_and_classes():
    first = members(1)[0]
    with pytest.raises(
        InputError, match=r"^members: expected adapters for 5 features in all, got one for 6 in member 1"
    ):
        AdapterEnsemble({0.5: first, 0.25: adapted(first.extractor, features=6)})
    with pytest.raises(
        ModelError, match=r"^members: expected 3 logits of all heads, got 4 in member 1 \(sigma 0.25\)$"
    ):
        AdapterEnsemble({0.5: first, 0.25: adapted(first.extractor, classes=4)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda _m: [], r"^members: expected at least one adapted classifier, got none$"),
        (lambda m: m, r"^members: expected pairs of an AdaptedClassifier and its sigma, got AdaptedClassifier$"),
        (lambda m: [m], r"^members: expected pairs of an AdaptedClassifier and its sigma, got list$"),
        (lambda m: [(0.5, m)], r"^members: expected an AdaptedClassifier as member 0, got float$"),
        (lambda m: [(m, 0.5), (m.head, 0.5)], r"^members: expected an AdaptedClassifier as member 1, got Linear$"),
        (lambda m: [(m, 0.5), (m, 0)], r"^sigma of member 1: expected a finite number > 0, got 0$"),
        (lambda m: {None: m}, r"^sigma of member 0: expected a finite number > 0, got None$"),
    ],
)
def test_what_are_no_members(given, message):
    with pytest.raises(InputError, match=message):
        AdapterEnsemble(given(members(1)[0]))


@pytest.mark.parametrize("router", [NoiseLevelRouter, 3])
def test_what_is_no_router(router):
    with pytest.raises(InputError, match=r"^router: expected a function of noisy images or a module, got "):
        ensemble(router=router)


def test_unknown_levels():
    whole = ensemble()
    message = r"^sigma: expected the noise level of one member, of 0.25, 0.5, 1.0, got 0.12$"
    with pytest.raises(InputError, match=message):
        whole.at(0.12)
    with pytest.raises(InputError, match=r"^sigma: expected the noise level of one member, of .*, got 0.12$"):
        whole.certify(X, sigma=[0.5, 0.12], plan=PLAN)
    with pytest.raises(InputError, match=r"^sigma: expected a finite number > 0, got None$"):
        whole.at(None)
    message = r"^sigma: expected the noise level of one member, of 0.12, got 0.11999999731779099$"
    with pytest.raises(InputError, match=message):
        AdapterEnsemble({0.12: members(1)[0]}).at(np.float32(0.12))


def test_several_members_of_one_level():
    built = members()
    whole = AdapterEnsemble(list(zip(built, (0.5, 0.5, 1.0), strict=True)))
    torch.testing.assert_close(whole.average()(X), sum(member(X) for member in built) / 3)
    assert places(whole.at(1.0).adapter) == places(built[2].adapter)
    with pytest.raises(InputError, match=r"^sigma: expected the noise level of one member, of 0.5, 0.5, 1.0, got 0.5$"):
        whole.at(0.5)
    with pytest.raises(InputError, match=r"^router: expected one, as two members were trained at the same level, of "):
        whole.route()
    with pytest.raises(InputError, match=r"^router: expected one, "):
        whole.certify(X, sigma=0.5, mode="route", plan=PLAN)
    routed = AdapterEnsemble(list(zip(built, (0.5, 0.5, 1.0), strict=True)), router=lambda x: torch.tensor([1])).route()
    assert torch.equal(routed(X), built[1](X))


def test_the_classifiers():
    whole = ensemble()
    built = whole.adapted()
    each = torch.stack([member(X) for member in built])
    torch.testing.assert_close(whole.average()(X), each.mean(0))
    torch.testing.assert_close(whole.average(of="probabilities")(X).exp(), each.softmax(2).mean(0))
    levels = whole.router(X)
    torch.testing.assert_close(whole.route()(X), each[levels, torch.arange(5)])
    assert isinstance(whole.router, NoiseLevelRouter)
    assert whole.router.sigmas == SIGMAS


def test_it_is_no_classifier_by_itself():
    with pytest.raises(ModelError, match=r"ensemble: .*take its at\(sigma\), average\(\) or route\(\)$"):
        certify(ensemble(), X, 0.5, plan=PLAN)


def test_modes():
    whole = ensemble(router=nn.Sequential(nn.Dropout(), nn.Flatten()).train())
    assert not whole.training  # as its members were
    assert not any(module.training for module in whole.router)
    whole.train()
    assert all(member.head.training and not member.extractor[1].training for member in whole.members)
    assert not any(module.training for module in whole.router)
    assert whole.average().training
    assert not whole.eval().route().training
    assert not whole.members[0].adapter.training


def test_construction_leaves_modes_as_they_are():
    built = members(2)
    built[1].head.train()
    AdapterEnsemble({0.5: built[0], 0.25: built[1]})
    assert [member.head.training for member in built] == [False, True]


def test_state_copies_and_printed_form():
    whole = ensemble()
    expected = [model(X) for model in (whole.at(0.5), whole.average(), whole.route())]
    twin = copy.deepcopy(whole)
    for parameter in twin.parameters():
        parameter.data += 0.1
    assert not torch.equal(twin.average()(X), expected[1])
    twin.load_state_dict(whole.state_dict())
    assert {member.extractor for member in twin.members} == {twin.members[0].extractor}
    found = [model(X) for model in (twin.at(0.5), twin.average(), twin.route())]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert repr(whole).startswith("AdapterEnsemble(\n  sigmas=(0.25, 0.5, 1.0)\n")


@pytest.mark.parametrize("mode", ["select", "average", "route"])
def test_one_level(mode):
    whole = ensemble()
    model = {"select": whole.at(0.5), "average": whole.average(), "route": whole.route()}[mode]
    options = {"plan": PLAN, "seed": 7, "indices": [5, 4, 2, 8, 3]}
    found = figures(whole.certify(X, sigma=0.5, mode=mode, chunk=30, **options))
    assert found == figures(certify(model, X, 0.5, **options))
    (_, *_, made_with), *_ = found
    assert (made_with.alpha, made_with.sigma, made_with.model) == (0.03, 0.5, identity(model))


def test_at_one_level_the_router_nearly_always_picks_its_member():
    """With larger images than here; so `route` certifies like `select`."""
    x = torch.full((64, 2, 32, 32), 0.5) + 0.5 * torch.randn(64, 2, 32, 32)
    assert ensemble().router(x).tolist() == [1] * 64


@pytest.mark.parametrize("mode", ["select", "average", "route"])
def test_several_levels_share_alpha(mode):
    whole = ensemble()
    found = whole.certify(X, sigma=SIGMAS, mode=mode, plan=PLAN, seed=5)
    assert list(found) == list(SIGMAS)
    for sigma, certificates in found.items():
        model = {"select": whole.at(sigma), "average": whole.average(), "route": whole.route()}[mode]
        shared = FixedBudget(n0=10, n=100, alpha=0.01)
        assert figures(certificates) == figures(certify(model, X, sigma, plan=shared, seed=5))
        for certificate in certificates:
            assert isinstance(certificate, Certificate)
            assert certificate.made_with.alpha == pytest.approx(0.01, rel=1e-15)
            assert certificate.made_with.sigma == sigma
            assert certificate.p_lower == pytest.approx(clopper_pearson_lower(certificate.count, 100, 0.01), rel=1e-12)


@pytest.mark.parametrize("sigma", [(0.5,), [0.5], np.array([0.5]), torch.tensor([0.5])], ids=repr)
def test_a_list_of_one_level(sigma):
    (found,) = ensemble().certify(X, sigma=sigma, plan=PLAN).items()
    assert found[0] == 0.5
    assert found[1][0].made_with.alpha == 0.03


def test_the_plan_by_default_and_others():
    grid = OnGrid((0.1, 0.2), n0=10, n=300, alpha=0.02)
    found = ensemble().certify(X[:1], sigma=(0.25, 0.5), plan=grid)
    assert [c.made_with.plan for run in found.values() for c in run] == [
        repr(dataclasses.replace(grid, alpha=0.01))
    ] * 2
    single = ensemble().certify(X[:1], sigma=0.5)
    assert single.made_with.plan == repr(FixedBudget())


class Bare:
    alpha = 0.01


@pytest.mark.parametrize("plan", [Bare(), FixedBudget, 3, HeuristicRadius(0, 0.5, 1, 0.1)])
def test_plans_whose_alpha_cannot_be_shared_out(plan):
    with pytest.raises(
        InputError, match=r"^plan: expected a plan that is a dataclass with alpha, to share it out, got "
    ):
        ensemble().certify(X, sigma=SIGMAS, plan=plan)


def test_too_few_votes_for_the_share():
    plan = FixedBudget(n0=10, n=7, alpha=0.01)
    with pytest.raises(InputError, match=r"^n: expected at least 9, got 7: .* alpha = 0.0033"):
        ensemble().certify(X, sigma=SIGMAS, plan=plan)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (None, r"^sigma: expected the standard deviation of the noise, in pixels, got None$"),
        ((), r"^sigma: expected one or more different noise levels, got \[\]$"),
        ((0.5, 0.5), r"^sigma: expected one or more different noise levels, got \[0.5, 0.5\]$"),
        ((0.5, -1), r"^sigma: expected a finite number > 0, got -1$"),
        ("0.5", r"^sigma: expected a finite number > 0, got '0.5'$"),
        ({0.5}, r"^sigma: expected a finite number > 0, got \{0.5\}$"),
    ],
)
def test_impossible_levels(sigma, message):
    with pytest.raises(InputError, match=message):
        ensemble().certify(X, sigma=sigma, plan=PLAN)


def test_what_certify_has_to_be_told():
    whole = ensemble()
    with pytest.raises(TypeError, match="sigma"):
        whole.certify(X, plan=PLAN)
    with pytest.raises(InputError, match=r"^mode: expected one of 'select', 'average', 'route', got 'best'$"):
        whole.certify(X, sigma=0.5, mode="best")
    with pytest.raises(TypeError, match="chunks"):
        whole.certify(X, sigma=0.5, chunks=3)


def test_all_checks_come_before_the_first_vote():
    whole, calls = ensemble(), []
    whole.at(0.25).head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match=r"^sigma: "):
        whole.certify(X, sigma=(0.25, 0.12), plan=dataclasses.replace(PLAN, n=100_000))
    assert len(calls) < 50


@pytest.mark.parametrize(("mode", "sigmas"), [("select", None), ("average", (0.1, 0.4)), ("route", (0.5, 0.2, 0.3, 1))])
def test_the_largest_radius(mode, sigmas):
    whole = ensemble()
    found = whole.heuristic_best_radius(X, sigmas=sigmas, mode=mode, plan=PLAN, seed=2)
    runs = whole.certify(X, sigma=SIGMAS if sigmas is None else sigmas, mode=mode, plan=PLAN, seed=2)
    assert len(found) == len(X)
    for place, best in enumerate(found):
        radii = {sigma: run[place].radius for sigma, run in runs.items()}
        assert best.radius == max(radii.values()) == radii[best.sigma]
        assert best.prediction == runs[best.sigma][place].prediction
        assert (best.index, best.certified) == (place, False)
    assert len({run[place].radius for run in runs.values() for place in range(len(X))}) > 1


def test_the_largest_radius_of_abstentions(monkeypatch):
    whole = ensemble()
    base = next(iter(whole.certify(X[:1], sigma=0.5, plan=PLAN)))
    abstained = dataclasses.replace(base, prediction=-1, radius=0.0)
    barely = dataclasses.replace(base, prediction=2, radius=0.0)
    results = {0.25: [abstained, abstained], 0.5: [barely, abstained]}
    monkeypatch.setattr(whole, "certify", lambda *_, **__: results)
    first, second = whole.heuristic_best_radius(X)
    assert (first.sigma, first.prediction, first.radius) == (0.5, 2, 0.0)
    assert (second.sigma, second.prediction, second.radius) == (0.25, -1, 0.0)


def test_members_of_one_level_count_once():
    whole = AdapterEnsemble(list(zip(members(), (0.5, 0.5, 1.0), strict=True)))
    found = whole.heuristic_best_radius(X, mode="average", plan=PLAN)
    assert {best.sigma for best in found} <= {0.5, 1.0}
    with pytest.raises(InputError, match=r"^sigmas: expected several noise levels, got 0.5$"):
        whole.heuristic_best_radius(X, sigmas=0.5)


def test_a_heuristic_radius_is_no_certificate(tmp_path):
    best = ensemble().heuristic_best_radius(X[:1], plan=PLAN)[0]
    assert type(best) is HeuristicRadius
    assert best.certified is False
    assert not isinstance(best, Certificate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        best.certified = True
    with pytest.raises((TypeError, ValueError), match="certified"):
        dataclasses.replace(best, certified=True)
    with pytest.raises(TypeError):
        HeuristicRadius(0, 0.5, 1, 0.1, True)
    assert json.loads(json.dumps(dataclasses.asdict(best)))["certified"] is False
    with ResultsWriter(tmp_path / "log.tsv") as writer, pytest.raises(AttributeError, match="made_with"):
        writer.write(best, 1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AttributeError):
        Results.of([best], [1])
