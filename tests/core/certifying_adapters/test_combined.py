import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.certification import certify
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.combined import AveragedClassifier, RoutedClassifier
from rs_plugins.core.certifying_adapters.modules import (
    CertifyingAdapter,
    FeatureCertifyingAdapter,
    ImageCertifyingAdapter,
    TokenCertifyingAdapter,
)
from rs_plugins.core.certifying_adapters.routing import NoiseLevelRouter
from rs_plugins.core.decisions import Decider
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.identity import identity
from rs_plugins.core.models import evaluating, whole_batches
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError

READING = ("image", "feature", "image")
MIXED = ("token", "feature", "token", "image")
X = torch.rand(12, 2, 4, 4, generator=torch.Generator().manual_seed(3))


class Tokens(nn.Module):
    """16 tokens of an image, through a block, and their mean."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.block(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).relu().mean(1)


def adapter(kind):
    if kind == "feature":
        return FeatureCertifyingAdapter(5, zero_init=False)
    if kind == "token":
        return TokenCertifyingAdapter(["block"], 5, 5, hidden=3, zero_init=False)
    backbone = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ImageCertifyingAdapter(backbone, 5, backbone_dim=4, zero_init=False)


def members(kinds=READING, **options):
    """Return adapted classifiers with one extractor, whose batch normalisation has seen images."""
    with global_randomness(0):
        extractor = Tokens()
        extractor(X)
        normalise = Normalise((0.4, 0.5), (0.2, 0.3))
        built = [
            AdaptedClassifier(extractor, adapter(k), nn.Linear(5, 3), normalise=normalise, **options) for k in kinds
        ]
        for member in built:
            member.train()(X)  # of the certifying adapters, too
            if member.gate is not None:
                nn.init.normal_(member.gate)
            member.head.weight.data *= 10
            member.head.bias.data -= member.eval()(X).mean(0)  # so that no class has all images
        return built


def passes(extractor):
    """Return a list to which the size of each batch that goes through ``extractor`` is added."""
    sizes = []
    extractor.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    return sizes


class ByFirstPixel(nn.Module):
    """The member is told by the first pixel alone."""

    def __init__(self, members, row_wise=True):
        super().__init__()
        self.members, self.row_wise = members, row_wise

    def forward(self, x):
        return (x[:, 0, 0, 0] * 1000).long() % self.members


CHOICE = {number: ByFirstPixel(number)(X).tolist() for number in (3, 4)}


def test_the_images_choose_all_members():
    assert [set(chosen) for chosen in CHOICE.values()] == [set(range(3)), set(range(4))]


@pytest.mark.parametrize("options", [{}, {"combine": "gated"}], ids=["add", "gated"])
def test_the_mean_of_logits_to_the_letter(options):
    """Mean of H_k(γ_k ⊙ z + A_k(ν(x), z)), member by member."""
    built = members(**options)
    x = (X - torch.tensor([0.4, 0.5]).view(2, 1, 1)) / torch.tensor([0.2, 0.3]).view(2, 1, 1)
    with torch.no_grad():
        z = built[0].extractor(x)
        gates = [1 if member.gate is None else member.gate for member in built]
        each = [m.head(gate * z + m.adapter(x, z)) for m, gate in zip(built, gates, strict=True)]
        found = AveragedClassifier(built)(X)
    assert not torch.allclose(each[0], each[1], atol=0.01)
    torch.testing.assert_close(found, sum(each) / 3, rtol=1e-5, atol=1e-6)


def test_the_mean_of_probabilities():
    built = members()
    with torch.no_grad():
        expected = sum(member(X).softmax(1) for member in built) / 3
        found = AveragedClassifier(built, of="probabilities")(X)
    torch.testing.assert_close(found.exp(), expected)
    assert not torch.allclose(found, AveragedClassifier(built)(X).log_softmax(1), atol=1e-3)


@pytest.mark.parametrize("kinds", [MIXED, ("token", "token")])
def test_the_mean_where_members_work_inside_the_extractor(kinds):
    built = members(kinds)
    expected = sum(member(X) for member in built) / len(built)
    torch.testing.assert_close(AveragedClassifier(built)(X), expected)


@pytest.mark.parametrize(("kinds", "expected"), [(READING, 1), (MIXED, 3), (("token", "token"), 2), (("image",), 1)])
def test_passes_through_the_extractor_for_the_mean(kinds, expected):
    built = members(kinds)
    sizes = passes(built[0].extractor)
    AveragedClassifier(built)(X)
    assert sizes == [len(X)] * expected


@pytest.mark.parametrize("kinds", [READING, MIXED])
@pytest.mark.parametrize("row_wise", [True, False])
def test_each_row_is_of_the_member_that_it_chose(kinds, row_wise):
    built = members(kinds)
    routed = RoutedClassifier(built, ByFirstPixel(len(kinds), row_wise))
    expected = torch.cat([built[k](x[None]) for k, x in zip(CHOICE[len(kinds)], X, strict=True)])
    torch.testing.assert_close(routed(X), expected)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(routed(X[order]), expected[order])
    torch.testing.assert_close(torch.cat([routed(part) for part in X.split(5)]), expected)
    torch.testing.assert_close(routed(torch.cat([1 - X, X]))[12:], expected)


@pytest.mark.parametrize("kinds", [READING, MIXED])
def test_passes_through_the_extractor_for_the_choice(kinds):
    built, chosen = members(kinds), CHOICE[len(kinds)]
    sizes = passes(built[0].extractor)
    heads = [passes(member.head) for member in built]
    RoutedClassifier(built, ByFirstPixel(len(kinds)))(X)
    counts = [chosen.count(number) for number in range(len(kinds))]
    inside = [count for count, kind in zip(counts, kinds, strict=True) if kind == "token"]
    assert sizes == [12 - sum(inside), *inside]
    assert heads == [[count] for count in counts]


@pytest.mark.parametrize("number", range(4))
def test_all_choose_the_same(number):
    built = members(MIXED)
    sizes = passes(built[0].extractor)
    expected = built[number](X)
    routed = RoutedClassifier(built, lambda x: torch.full((len(x),), number))
    assert torch.equal(routed(X), expected)
    assert sizes == [12, 12]


@pytest.mark.parametrize("kinds", [READING, MIXED])
def test_a_compiler_is_shown_shapes_that_stay(kinds, monkeypatch):
    built = members(kinds)
    routed = RoutedClassifier(built, ByFirstPixel(len(kinds)))
    expected = routed(X)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    heads = [passes(member.head) for member in built]
    torch.testing.assert_close(routed(X), expected)
    assert heads == [[12]] * len(kinds)


@pytest.mark.parametrize("kinds", [READING, MIXED])
def test_in_whole_batches_all_members_see_all_images(kinds):
    built = members(kinds)
    routed = RoutedClassifier(built, ByFirstPixel(len(kinds)))
    expected = routed(X)
    heads = [passes(member.head) for member in built]
    with whole_batches(routed):
        torch.testing.assert_close(routed(X), expected)
    assert heads == [[12]] * len(kinds)


@pytest.mark.slow
def test_torch_compiles_the_choice():
    routed, plan = RoutedClassifier(members(), NoiseLevelRouter((0.2, 0.4, 0.8))), FixedBudget(n0=10, n=200)
    counts = [
        [c.count for c in certify(routed, X[:2], 0.55, plan=plan, chunk=16, compile=compiled)]
        for compiled in (False, True)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("combined", [AveragedClassifier, lambda m: RoutedClassifier(m, ByFirstPixel(3))])
def test_no_images(combined):
    assert combined(members())(X[:0]).shape == (0, 3)


def both(kinds=READING):
    return [AveragedClassifier(members(kinds)), RoutedClassifier(members(kinds), ByFirstPixel(len(kinds)))]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kinds", [READING, MIXED])
def test_gradients_in_the_image(which, kinds):
    """Through extractor and certifying adapters, against differences in double precision."""
    combined = both(kinds)[which].double()
    x = X.double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    direction[:, 0, 0, 0] = 0  # the choice stays
    y = torch.arange(12) % 3
    (gradient,) = torch.autograd.grad(cross_entropy(combined(x), y), x)
    with torch.no_grad():
        high, low = (cross_entropy(combined(x + step * direction), y) for step in (1e-8, -1e-8))
    assert float((gradient * direction).sum()) == pytest.approx(float(high - low) / 2e-8, rel=1e-4)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_the_parts(which):
    combined = both()[which]
    z = []
    combined.members[0].extractor.register_forward_hook(lambda _module, _inputs, output: z.append(output))
    cross_entropy(combined(X), torch.arange(12) % 3).backward()
    assert not z[0].requires_grad  # no graph is kept for the frozen part
    for member in combined.adapted():
        assert all(p.grad is None for p in member.extractor.parameters())
        assert float(member.adapter.last.weight.grad.norm()) > 0
        assert float(member.head.weight.grad.norm()) > 0


@pytest.mark.parametrize("which", [0, 1])
def test_modes(which):
    combined = both()[which]
    assert not combined.training
    assert not combined.members.training  # as its members were
    moved = [combined.members[0].adapter, *combined.members[0].adapter.modules(), combined.members[1].head]
    still = [combined.members[0].extractor.norm, combined.members[2].normalise]
    still += [combined.router] if which else []
    combined.train()
    assert all(module.training for module in moved)
    assert not any(module.training for module in still)
    with evaluating(combined):
        assert not any(module.training for module in combined.modules())
    assert all(module.training for module in moved)
    assert not any(module.training for module in still)
    combined.eval()
    assert not any(module.training for module in moved)


def test_put_together_in_train_mode():
    built = [member.train() for member in members()]
    assert AveragedClassifier(built).training
    assert not built[0].extractor.training


def test_a_router_is_put_into_eval_mode():
    router = nn.Sequential(nn.Dropout(0.9), nn.Flatten(), ByFirstPixel(3)).train()
    RoutedClassifier(members(), router)
    assert not any(module.training for module in router.modules())


@pytest.mark.parametrize("which", [0, 1])
def test_state_and_copies(which):
    combined = both(MIXED)[which]
    expected = combined(X)
    twin = copy.deepcopy(combined)
    assert torch.equal(twin(X), expected)
    assert all(member.extractor is twin.members[0].extractor for member in twin.members)
    assert identity(twin) == identity(combined)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.allclose(twin(X), expected)
    assert torch.equal(combined(X), expected)
    assert identity(twin) != identity(combined)
    twin.load_state_dict(combined.state_dict())
    assert torch.equal(twin(X), expected)


def test_modes_have_identities_of_their_own():
    built = members()
    models = [
        *built,
        *(AveragedClassifier(built), AveragedClassifier(built, of="probabilities"), AveragedClassifier(built[:2])),
        *(RoutedClassifier(built, ByFirstPixel(3)), RoutedClassifier(built, NoiseLevelRouter((0.1, 0.2, 0.3)))),
        RoutedClassifier(built, NoiseLevelRouter((0.1, 0.2, 0.4))),
        *(RoutedClassifier(built, lambda x: 0 * x), RoutedClassifier(built, lambda x: 1 * x)),
    ]
    assert len({identity(model) for model in models}) == len(models)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kinds", [READING, MIXED])
def test_certificates_do_not_depend_on_the_passes(which, kinds):
    combined, plan = both(kinds)[which], FixedBudget(n0=10, n=60, alpha=0.01)
    options = {"sigma": 0.3, "plan": plan}
    expected = [(c.guess, c.count) for c in certify(combined, X[:4], **options, chunk=64)]
    assert [(c.guess, c.count) for c in certify(combined, X[:4], **options, chunk=7)] == expected
    apart = [certify(combined, X[i : i + 1], **options, indices=[i], chunk=64) for i in range(4)]
    assert [(c.guess, c.count) for run in apart for c in run] == expected
    assert len({count for _, count in expected}) > 1


@pytest.mark.parametrize("which", [0, 1])
def test_the_soft_vote(which):
    combined = both()[which]
    smoothed = SmoothedModel(combined, 0.25, samples=4)
    draws = smoothed.fixed_draws(X)
    expected = sum(combined(X + draw).softmax(1) for draw in draws) / 4
    torch.testing.assert_close(smoothed.eval()(X).exp(), expected)


def test_a_router_that_looks_at_the_batch_is_refused():
    def by_rank(x):
        return torch.arange(len(x)) % 3

    by_rank.row_wise = True
    heads = members()
    with torch.no_grad():
        for number, member in enumerate(heads):
            member.head.bias[number] += 100
    copies = torch.rand(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=r"change by .* with the batch it is in"):
        Decider.measured(RoutedClassifier(heads, by_rank), copies, 3)


class Spoiling(CertifyingAdapter):
    """Changes what it was given."""

    kind = "spoiling"

    def __init__(self, place):
        super().__init__(5)
        self.place = place

    def forward(self, x, z):
        (x, z)[self.place].mul_(2)
        return torch.zeros_like(z)


@pytest.mark.parametrize("place", [0, 1], ids=["images", "features"])
def test_what_the_next_member_reads_is_not_changed(place):
    built = members()
    spoiling = AdaptedClassifier(built[0].extractor, Spoiling(place), nn.Linear(5, 3), normalise=built[0].normalise)
    with pytest.raises(ModelError, match="changes its input in place"):
        AveragedClassifier([spoiling, *built])(X)


def test_no_logits_of_one_member_are_none_at_all():
    built = members()
    built[1].head.bias.data[2] = math.nan
    assert bool(AveragedClassifier(built)(X).isnan()[:, 2].all())


def test_what_can_be_averaged():
    assert repr(AveragedClassifier(members(), of="probabilities")).startswith("AveragedClassifier(\n  of='probabilit")
    with pytest.raises(InputError, match=r"^of: expected one of 'logits', 'probabilities', got 'votes'$"):
        AveragedClassifier(members(), of="votes")
