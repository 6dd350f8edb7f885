import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.certification import certify
from rs_plugins.core.decisions import Decider
from rs_plugins.core.ensembles import ConsensusEnsemble, SoftEnsemble
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.identity import identity
from rs_plugins.core.models import SelectiveModule, evaluating, whole_batches
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError, ModelError

IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
NOISY = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
CHUNKS = (5, 64, 500)
ROUNDED = (("bfloat16", 1e-2), ("float32", 4e-4))


def network(seed=0, classes=5):
    with global_randomness(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, classes))


def networks(count=4, **options):
    """Return networks that never saw a label: the first two agree on a third of noisy images."""
    return [network(seed, **options).eval() for seed in range(count)]


def answers(models, x):
    with torch.no_grad():
        return [model(x) for model in models]


def rows_seen(models):
    """Return the number of images that each of ``models`` has been asked about, which goes on counting."""
    seen = [0] * len(models)

    def count(number):
        def hook(_module, inputs, _output):
            seen[number] += len(inputs[0])

        return hook

    for number, model in enumerate(models):
        model.register_forward_hook(count(number))
    return seen


def one_by_one(models, k, x):
    """Return the decisions of K-consensus as the paper has it, an image after the other, with sums of logits."""
    decisions = []
    for image in x.split(1):
        total, choices = torch.zeros(1), []
        for number, model in enumerate(models):
            if number == k and len(set(choices)) == 1:
                break
            logits = model(image)[0]
            total = total + logits
            choices.append(int(logits.argmax()))
        decisions.append(choices[0] if len(choices) == k else int(total.argmax()))
    return torch.tensor(decisions)


class Reference(nn.Module):
    """K-consensus image by image; what it decides is never close."""

    def __init__(self, models, k):
        super().__init__()
        self.models, self.k = nn.ModuleList(models), k

    def forward(self, x):
        return nn.functional.one_hot(one_by_one(self.models, self.k, x), 5).to(x)


class Careless(ConsensusEnsemble):
    """The same decisions, but nobody sees which are close."""

    def forward(self, x):
        return nn.functional.one_hot(super().forward(x).argmax(1), 5).to(x)


class Shaken(nn.Module):
    """The number of images in a batch moves the logits of the network, as rounding does, but further."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("signs", torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))

    def forward(self, x):
        return self.model(x) + self.size * math.cos(len(x)) * self.signs.to(x)


def test_a_soft_ensemble_decides_by_the_sum_of_logits():
    models = networks(3)
    a, b, c = answers(models, NOISY)
    with torch.no_grad():
        logits = SoftEnsemble(models)(NOISY)
    assert torch.allclose(logits, (a + b + c) / 3, atol=1e-6)
    assert torch.equal(logits.argmax(1), (a + b + c).argmax(1))
    assert not torch.equal(logits.argmax(1), a.argmax(1))


def test_a_soft_ensemble_of_probabilities_returns_their_logarithms():
    models = networks(3)
    a, b, c = (logits.softmax(1) for logits in answers(models, NOISY))
    with torch.no_grad():
        assert torch.allclose(SoftEnsemble(models, average="probabilities")(NOISY).exp(), (a + b + c) / 3, atol=1e-6)


def test_weights_count_by_their_ratios():
    models = networks(3)
    a, b, c = answers(models, NOISY)
    p, q, r = (logits.softmax(1) for logits in (a, b, c))
    with torch.no_grad():
        ensemble = SoftEnsemble(models, weights=[2, 1, 5])
        assert torch.allclose(ensemble(NOISY), (2 * a + b + 5 * c) / 8, atol=1e-6)
        probable = SoftEnsemble(models, average="probabilities", weights=(0.2, 0.1, 0.5))
        assert torch.allclose(probable(NOISY).exp(), (2 * p + q + 5 * r) / 8, atol=1e-6)
    assert ensemble.weights == (0.25, 0.125, 0.625)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_gradient_of_a_soft_ensemble_is_that_of_its_formula(average):
    models = [network(seed).eval().double() for seed in range(3)]
    x = NOISY[:4].double().requires_grad_()
    y = torch.tensor([0, 1, 2, 3])
    (gradient,) = torch.autograd.grad(cross_entropy(SoftEnsemble(models, average=average)(x), y), x)
    together = torch.stack([model(x) for model in models])
    log_p = together.mean(0).log_softmax(1) if average == "logits" else together.softmax(2).mean(0).log()
    (expected,) = torch.autograd.grad(-log_p[torch.arange(4), y].mean(), x)
    assert torch.allclose(gradient, expected)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("k", [2, 3])
def test_consensus_decides_as_the_paper_does_image_by_image(k):
    models = networks(4)
    with torch.no_grad():
        models[3][4].weight *= 5  # so that its word counts where it is asked
        decisions = ConsensusEnsemble(models, k)(NOISY).argmax(1)
        assert torch.equal(decisions, one_by_one(models, k, NOISY))
        assert not torch.equal(decisions, SoftEnsemble(models)(NOISY).argmax(1))


def test_consensus_with_other_averages_asks_the_soft_ensemble_where_the_first_disagree():
    models = networks(4)
    choices = torch.stack([logits.argmax(1) for logits in answers(models[:2], NOISY)])
    agreed = choices[0] == choices[1]
    plain = SoftEnsemble(models)(NOISY).argmax(1)
    for options in ({"average": "probabilities"}, {"weights": [1, 1, 30, 1]}):
        soft = SoftEnsemble(models, **options)(NOISY).argmax(1)
        with torch.no_grad():
            decisions = ConsensusEnsemble(models, 2, **options)(NOISY).argmax(1)
        assert torch.equal(decisions, torch.where(agreed, choices[0], soft))
        assert not torch.equal(soft[~agreed], plain[~agreed])


def test_the_others_are_asked_about_undecided_images_alone():
    models = networks(4)
    choices = torch.stack([logits.argmax(1) for logits in answers(models[:2], NOISY)])
    undecided = int((choices[0] != choices[1]).sum())
    assert 10 < undecided < 54
    seen, ensemble = rows_seen(models), ConsensusEnsemble(models, 2)
    with torch.no_grad():
        ensemble(NOISY)
        assert seen == [64, 64, undecided, undecided]
        ensemble(NOISY[(choices[0] == choices[1])])
        assert seen == [128 - undecided, 128 - undecided, undecided, undecided]


def test_all_are_asked_about_a_single_image_in_whole_batches_and_for_a_gradient():
    models = networks(3)
    ensemble = ConsensusEnsemble(models, 2)
    (agreed,) = [(a.argmax(1) == b.argmax(1)).nonzero()[0] for a, b in [answers(models[:2], NOISY)]]
    seen, before = rows_seen(models), identity(ensemble)
    with torch.no_grad():
        ensemble(NOISY[agreed])
        assert seen == [1, 1, 1]
        with whole_batches(nn.Sequential(ensemble)):
            ensemble(NOISY)
        assert seen == [65, 65, 65]
        ensemble(NOISY)
        assert seen[2] < 129
    assert identity(ensemble) == before
    asked = seen[2]
    ensemble.requires_grad_(False)(NOISY.clone().requires_grad_())
    assert seen[2] == asked + 64


def test_whole_batches_end_after_an_error():
    part = SelectiveModule()

    def fail():
        with whole_batches(nn.Sequential(part)):
            assert not part.selective
            raise ValueError("an error")

    with pytest.raises(ValueError, match="an error"):
        fail()
    assert part.selective
    assert "selective" not in vars(part)


def lead_by_hand(first, soft):
    """Return the smallest change of a lead that could turn the decision, for one image."""
    leads = [float(logits.topk(2).values.diff().abs()) for logits in first]
    if len({int(logits.argmax()) for logits in first}) == 1:
        return min(leads)
    to_agree = min(max(float(logits.max() - logits[c]) for logits in first) for c in range(len(soft)))
    return min(to_agree, float(soft.topk(2).values.diff().abs()))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_lead_is_the_smallest_on_which_the_decision_hangs(average):
    models = networks(4)
    ensemble = ConsensusEnsemble(models, 2, average=average)
    with torch.no_grad():
        logits, first, soft = ensemble(NOISY), answers(models[:2], NOISY), SoftEnsemble(models, average=average)(NOISY)
    best = logits.topk(2, dim=1).values
    expected = [lead_by_hand(rows, row) for *rows, row in zip(*first, soft, strict=True)]
    assert torch.allclose(best[:, 0] - best[:, 1], torch.tensor(expected), atol=1e-5)
    agreed = first[0].argmax(1) == first[1].argmax(1)
    asked = [torch.stack(rows).abs().amax(2).amax(0) for rows in (first, answers(models, NOISY))]
    assert torch.allclose(-logits.amin(1), torch.where(agreed, *asked))
    assert not torch.allclose(*asked)
    assert int((logits == logits.amin(1, keepdim=True)).sum()) == 4 * 64


def test_a_lead_is_measured_against_the_logits_of_all_who_decide():
    """The first two disagree by little things, the others have logits of a million, which nearly cancel."""
    rows = [[1.0, 0.0], [0.0, 1.0], [1e6, 1e6 + 1], [0.0, 0.0]]
    models = [Fixed(row, [1.0, 0.0]) for row in rows]
    ensemble, x = ConsensusEnsemble(models, 2), torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        logits = ensemble(x)
        with whole_batches(ensemble):
            assert torch.equal(ensemble(x), logits)
        _, close = Decider(ensemble, 2, 0.0).look(x)
    assert logits.argmax(1).tolist() == [1, 0]
    assert close.tolist() == [True, False]  # a float32 of a million is off by up to 0.03
    assert logits[1].tolist() == [0.0, -1.0]  # where the first agree the others have no weight


class Fixed(nn.Module):
    """Says one of several things: an image is the number of what it is about."""

    def __init__(self, *rows):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x):
        return self.rows[x[:, 0].long()]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_decision_is_the_largest_logit_also_after_a_tie(kind):
    tied = [[0.0, 0.0, 0.0], [1.0, 3.0, 3.0], [100.0, 1.0, 100.0], [1e-7, 2e-7, 0.0]]
    first = [Fixed(*tied), Fixed(*tied), Fixed(*reversed(tied))]
    with torch.no_grad():
        logits = ConsensusEnsemble(first, 2).to(kind)(torch.arange(4)[:, None])
    assert logits.dtype == kind
    assert logits.argmax(1).tolist() == [0, 1, 0, 1]
    lead = logits.topk(2, dim=1).values.diff().abs().flatten()
    assert (lead[1:3] > 0).all()
    assert (lead <= torch.finfo(kind).eps * torch.tensor([1, 4, 128, 1e9])).all()


def test_infinite_logits_mean_never_and_nan_means_nobody():
    never = -math.inf
    first = [[never, 2.0, 1.0], [never, never, 0.0], [math.nan, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    second = [[never, 2.5, 2.0], [never, never, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    third = [[never, 2.0, 4.0], [1.0, math.nan, 0.0], [0.0, 1.0, 0.0], [math.nan, 0.0, 0.0], [never, 0.0, 9.0]]
    ensemble = ConsensusEnsemble([Fixed(*rows) for rows in (first, second, third)], 2)
    with torch.no_grad():
        logits = ensemble(torch.arange(5.0)[:, None])
    assert logits[0].tolist() == [-2.5, -2.0, -2.5]
    assert logits[1].argmax() == 2
    assert logits[[0, 1, 4]].isfinite().all()
    assert logits[2:4].isnan().all()
    assert Decider(ensemble, 3, 0.0)(torch.arange(5.0)[:, None]).tolist() == [1, 2, 3, 3, 2]


def test_certificates_are_those_of_the_reference_count_for_count():
    models, plan = networks(4), FixedBudget(n0=20, n=300)
    ensemble = ConsensusEnsemble(models, 2)
    found = [list(certify(model, IMAGES, 0.8, plan=plan)) for model in (ensemble, Reference(models, 2))]
    first, second = ([(c.prediction, c.radius, c.guess, c.count) for c in one] for one in found)
    assert first == second
    votes = [Poll(model, IMAGES, 0.8).votes(500).tolist() for model in (ensemble, SoftEnsemble(models))]
    assert votes[0] != votes[1]


@pytest.mark.parametrize(("kind", "size"), ROUNDED)
@pytest.mark.parametrize("k", [2, 3])
def test_votes_do_not_depend_on_batches(k, kind, size):
    models = [Shaken(model, size) for model in networks(5)]
    options = {"dtype": getattr(torch, kind)}

    def votes(ensemble):
        return [Poll(ensemble, IMAGES, 0.8, chunk=chunk, **options).votes(400).tolist() for chunk in CHUNKS]

    same = votes(ConsensusEnsemble(models, k))
    assert same == same[:1] * len(CHUNKS)
    careless = votes(Careless(models, k))
    assert careless != careless[:1] * len(CHUNKS)  # this is what the leads prevent


def test_the_gradient_of_consensus_is_that_of_the_soft_ensemble():
    models = [network(seed).eval().double() for seed in range(4)]
    x = NOISY[:8].double().requires_grad_()
    ensemble, soft = ConsensusEnsemble(models, 2), SoftEnsemble(models)
    logits, weights = ensemble(x), torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(logits, ensemble(x))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
    (expected,) = torch.autograd.grad((soft(x) * weights).sum(), x)
    assert torch.allclose(gradient, expected)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("make", [SoftEnsemble, lambda models: ConsensusEnsemble(models, 2)], ids=["soft", "consensus"])
def test_a_smoothed_ensemble_has_a_gradient_and_leaves_modes_alone(make):
    models = networks(3)
    models[1].train()
    ensemble = make(models)
    modes = [module.training for module in ensemble.modules()]
    view = SmoothedModel(ensemble, 0.5, samples=4)
    x = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view(x)[:, 0].sum(), x)
    assert gradient.abs().max() > 0
    with evaluating(ensemble):
        assert not any(model.training for model in models)
    assert [module.training for module in ensemble.modules()] == modes
    assert [model.training for model in models] == [False, True, False]


def test_identity_covers_members_their_order_and_the_settings():
    models = networks(4)
    other = copy.deepcopy(models)
    with torch.no_grad():
        other[3][1].bias[0] += 1
    made = [
        SoftEnsemble(models),
        SoftEnsemble(models, average="probabilities"),
        SoftEnsemble(models, weights=[1, 2, 3, 4]),
        SoftEnsemble(models[::-1]),
        SoftEnsemble(other),
        ConsensusEnsemble(models, 2),
        ConsensusEnsemble(models, 3),
        ConsensusEnsemble(models, 2, weights=[1, 2, 3, 4]),
        ConsensusEnsemble(other, 2),
    ]
    assert len(set(map(identity, made))) == len(made)
    asked = ConsensusEnsemble(copy.deepcopy(models), 2)
    asked(NOISY)
    assert identity(asked) == identity(made[5])
    assert repr(made[7]).startswith("ConsensusEnsemble(\n  k=2, average='logits', weights=(0.1, 0.2, 0.3, 0.4)\n")


def test_ensembles_of_ensembles_are_ensembles():
    models = networks(5)
    nested = ConsensusEnsemble([SoftEnsemble(models[:2]), models[2], SoftEnsemble(models[3:])], 2)
    with torch.no_grad():
        assert torch.equal(nested(NOISY).argmax(1), one_by_one(nested.members, 2, NOISY))


SAME = network()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftEnsemble(SAME[1]), "models: expected several models, got one Linear"),
        (lambda: SoftEnsemble([SAME]), "models: expected at least 2, got 1"),
        (lambda: SoftEnsemble([SAME, SAME]), "models: expected different ones, got the same Sequential twice"),
        (lambda: SoftEnsemble(nn.Sequential(*networks(2))), "models: expected several models, got one Sequential"),
        (lambda: SoftEnsemble([SAME, len]), r"models\[1\]: expected a torch.nn.Module, got builtin"),
        (
            lambda: SoftEnsemble([SAME, SmoothedModel(network(), 0.5)]),
            r"models\[1\]: expected a base classifier, got a SmoothedModel; noise would be added twice",
        ),
        (
            lambda: SoftEnsemble([SAME, network().double()]),
            "models: expected all on cpu in torch.float32, got model 1 on cpu in torch.float64",
        ),
        (
            lambda: SoftEnsemble(networks(2), average="votes"),
            "average: expected one of 'logits', 'probab.*, got 'votes'",
        ),
        (lambda: SoftEnsemble(networks(2), weights=[1]), "weights: expected one for each of 2 models, got 1"),
        (lambda: SoftEnsemble(networks(2), weights=[1, 0]), "weights: expected a finite number > 0, got 0"),
        (lambda: ConsensusEnsemble(networks(2), 2), "models: expected at least 3, as 2 agree without the third, got 2"),
        (lambda: ConsensusEnsemble(networks(3), 1), "k: expected .*2.*, got 1"),
        (
            lambda: ConsensusEnsemble(networks(3), 3),
            "k: expected an integer >= 2 and fewer than the number of models, 3, got 3",
        ),
    ],
    ids=[
        "one",
        "too few",
        "same",
        "layers",
        "function",
        "noisy",
        "types",
        "average",
        "weights",
        "weight",
        "two",
        "one k",
        "all k",
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_models_of_other_classes_are_refused_before_the_first_vote():
    ensemble = ConsensusEnsemble([*networks(2), network(classes=4)], 2)
    with pytest.raises(ModelError, match="models: expected 5 logits from each, got 4 from model 2"):
        Poll(ensemble, IMAGES, 0.5)


def test_a_model_that_changes_its_input_is_found():
    class Clamping(nn.Module):
        def forward(self, x):
            return x.flatten(1).clamp_(0, 0.5)

    with pytest.raises(ModelError, match="model: it changes its input in place"):
        SoftEnsemble([nn.Flatten(), Clamping()])(NOISY.clone())


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # of Python 3.13.0
def test_a_compiler_is_shown_all_models_and_shapes_that_stay():
    models = networks(4)
    ensemble = ConsensusEnsemble(models, 2)
    with torch.no_grad():
        expected = ensemble(NOISY)
        seen, graphs = rows_seen(models), []

        def backend(graph, _example):
            graphs.append(graph)
            return graph

        compiled = torch.compile(ensemble, backend=backend, dynamic=False)
        assert torch.allclose(compiled(NOISY), expected, atol=1e-5)
        made = len(graphs)
        assert torch.allclose(compiled(NOISY.flip(0)), expected.flip(0), atol=1e-5)
    assert 0 < made == len(graphs)
    assert seen == [128] * 4
