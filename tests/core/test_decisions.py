import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from rs_plugins.core.decisions import PROBES, Decider, probes
from rs_plugins.core.models import SelectiveModule
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.streams import stream
from rs_plugins.core.votes import Poll
from rs_plugins.errors import ModelError, ModelWarning

IMAGES = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
COPIES = torch.randn(PROBES, 1, 4, 4, generator=torch.Generator().manual_seed(1))


class Logits(nn.Module):
    """What it says of an image is its pixels; it counts its batches."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.weight, self.change, self.batches = nn.Parameter(torch.ones(1)), change, 0

    def forward(self, x):
        self.batches += 1
        return self.change(x.flatten(1))


def turn(size):
    """The batch size moves logits by rounding only."""
    return lambda x: x + size * (-1) ** len(x) * torch.tensor([1.0, -1.0]).repeat(8).to(x.dtype)


def tied(x):
    return torch.stack([torch.ones(len(x)), torch.full((len(x),), 1 + 1e-6 * (-1) ** len(x))], dim=1)


def tied_by_cancellation(x):
    """Two large numbers cancel, so the error is large beside the logits (-z, z) that are left."""
    z = x[:, 0] * 0.1 + 1e-5 * (-1) ** len(x)
    return torch.stack([-z, z], dim=1)


@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 1000])
def test_a_tie_within_rounding_is_decided_on_the_image_alone(chunk):
    assert Poll(Logits(tied), IMAGES, 0.5, chunk=chunk).votes(20).tolist() == [[20, 0], [20, 0]]


def test_ties_after_cancellation_are_found_by_measuring():
    images = IMAGES * 0
    votes = [Poll(Logits(tied_by_cancellation), images, 0.05, chunk=c).votes(3000).tolist() for c in (1, 2, 7, 8, 1000)]
    assert all(other == votes[0] for other in votes)
    careless = [Decider(Logits(tied_by_cancellation), 2, 0.0)(torch.zeros(c, 1, 4, 4)).tolist()[0] for c in (1, 2)]
    assert careless[0] != careless[1]  # this is what measuring prevents


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_only_close_decisions_are_taken_again(dtype):
    model, eps = Logits(), torch.finfo(dtype).eps
    decide = Decider(model, 3, 0.0)
    clear = torch.tensor([[8.0, 4.0, 1.0], [-math.inf, 0.0, -9.0]], dtype=dtype)
    assert decide(clear).tolist() == [0, 1]
    assert model.batches == 1
    close = torch.tensor([[8.0, 8.0 - 8 * eps, 1.0], [8.0, 4.0, 1.0]], dtype=dtype)
    assert decide(close).tolist() == [0, 0]
    assert model.batches == 3
    assert decide(torch.tensor([[math.inf, 0.0, 1.0]] * 2, dtype=dtype)).tolist() == [0, 0]


class Selective(Logits, SelectiveModule):
    """It writes down how large its batches are, and whether it may leave images out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.selective))
        return super().forward(x)


def test_in_a_panel_a_model_leaves_no_image_out():
    model, tie = Selective(), torch.zeros(3, 2)
    Decider(model, 2, 0.0, panel=8)(tie)
    Decider(model, 2, 0.0)(tie[:2])
    assert model.calls == [(3, True), (8, False), (2, True), (1, True), (1, True)]
    assert model.selective


def test_what_is_close_follows_the_rounding_that_was_measured():
    batch = torch.tensor([[0.0, 0.01, -1.0], [0.0, 0.3, -1.0]])
    for rounding, batches in [(0.0, 1), (0.01 / 16 * 1.1, 2), (0.3 / 16 * 1.1, 3)]:
        model = Logits()
        assert Decider(model, 3, rounding)(batch).tolist() == [1, 1]
        assert model.batches == batches


def test_the_rounding_is_the_largest_change_by_the_batch():
    assert Decider.measured(Logits(), COPIES, 16).rounding == 0
    assert Decider.measured(Logits(turn(1e-3)), COPIES, 16).rounding == pytest.approx(2e-3, rel=0.01)


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_of_equal_logits_the_first_wins(classes):
    assert Decider(Logits(), classes, 0.0)(torch.zeros(3, classes)).tolist() == [0, 0, 0]


def test_nan_is_nobody():
    batch = torch.tensor([[math.nan, 1.0, 0.0], [0.0, math.nan, math.inf], [0.0, 1.0, 2.0]])
    assert Decider(Logits(), 3, 0.0)(batch).tolist() == [3, 3, 2]


BATCH_STATISTICS = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BATCH_STATISTICS, "model: the logits of an image change by .* with the batch it is in, or from call to call"),
        (Logits(lambda x: dropout(x, 0.5)), "batch statistics or dropout that stay on in eval mode"),
        (Logits(lambda x: x * math.nan), "model: it returns NaN logits on every noisy copy"),
        (Logits(lambda x: x.clamp_(-0.5, 1.5)), "model: it changes its input in place; let it work on a copy"),
    ],
    ids=["batch statistics", "dropout", "nan", "in place"],
)
def test_models_whose_decisions_mean_nothing_are_refused(model, message):
    with torch.random.fork_rng(), pytest.raises(ModelError, match=message):
        Decider.measured(model, COPIES, 16)


def test_a_change_of_the_input_is_seen_while_voting_too():
    rarely = Logits(lambda x: x.clamp_(-3, 4) if len(x) > 100 else x)
    with pytest.raises(ModelError, match="model: it changes its input in place"):
        Poll(rarely, IMAGES, 0.5, chunk=200).votes(200)


def test_in_place_layers_further_in_are_welcome():
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(inplace=i)) for i in (True, False))
    second.load_state_dict(first.state_dict())
    votes = [Poll(model, IMAGES, 0.5).votes(100).tolist() for model in (first, second)]
    assert votes[0] == votes[1]


def test_half_precision_has_room_to_round():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).bfloat16()
    decider = Decider.measured(model, COPIES.bfloat16(), 4)
    assert decider.rounding < 0.1
    coarse = Logits(turn(0.02)).bfloat16()  # a few units in the last place of a bfloat16
    assert 0.01 < Decider.measured(coarse, COPIES.bfloat16(), 16).rounding < 0.1


def by_place(x):
    """The second half of a batch is moved by one unit in the last place, or so."""
    return x + 1e-6 * (torch.arange(len(x)) >= 8)[:, None]


def by_neighbours(x):
    return x + 1e-6 * x.amax()


@pytest.mark.parametrize(
    ("change", "panel", "kept"),
    [
        (lambda x: x, 8, 8),
        (lambda x: x, 24, 24),
        (turn(1e-4), 24, 24),  # only the size of a batch matters
        (by_place, 24, 1),
        (by_place, 8, 8),
        (by_neighbours, 24, 1),
    ],
    ids=["plain", "large", "size", "place", "place that is not there", "neighbours"],
)
def test_a_panel_in_which_something_else_moves_logits_is_given_up(change, panel, kept):
    decider = Decider.measured(Logits(change), COPIES, 16, panel=panel)
    assert decider.panel == kept


def test_panels_have_one_size_and_zeros_fill_them():
    seen = []
    model = Logits(lambda x: (seen.append(x.clone()), x)[1])
    decide = Decider(model, 16, 0.0, panel=8)
    assert torch.equal(decide.again(COPIES[:11].flatten(1)), COPIES[:11].flatten(1).argmax(1))
    assert [len(batch) for batch in seen] == [8, 8]
    assert torch.equal(torch.cat(seen)[:11], COPIES[:11].flatten(1))
    assert not torch.cat(seen)[11:].any()


def test_a_quick_way_decides_first_and_the_model_in_case_of_doubt():
    model = Logits()
    decide = Decider(model, 3, 0.0, quick=lambda x: x.flip(1))
    batch = torch.tensor([[0.0, 1.0, 4.0], [5.0, 2.0, 5.0]])
    winners, close = decide.look(batch)
    assert (winners.tolist(), close.tolist(), model.batches) == ([0, 0], [False, True], 0)
    assert decide(batch).tolist() == [0, 0]
    batch[1, 2] += 1e-6  # close, and the model says the third
    assert decide(batch).tolist() == [0, 2]
    assert model.batches == 2


def test_a_glance_is_enough_where_nothing_can_be_close():
    decide = Decider(Logits(), 3, 1e-3)
    assert decide.look(torch.tensor([[8.0, 4.0, 1.0], [0.0, 0.02, -9.0]]))[1] is None  # 16 times the rounding is .016
    assert decide.look(torch.tensor([[8.0, 4.0, 1.0], [0.0, 0.01, -9.0]]))[1].tolist() == [False, True]
    assert decide.look(torch.tensor([[8.0, 4.0, 1.0], [math.nan, 0.01, -9.0]]))[1].tolist() == [False, False]
    assert decide.look(torch.tensor([[8.0, 4.0, 1.0], [-math.inf, 0.0, 9.0]]))[1].tolist() == [False, False]


def test_the_rounding_includes_that_of_the_quick_way():
    decider = Decider.measured(Logits(), COPIES, 16, quick=lambda x: x.flatten(1) + 1e-3)
    assert decider.rounding == pytest.approx(1e-3, rel=0.01)


def test_probes_are_grey_and_random_images_with_noise():
    (without, noisy) = (
        probes(torch.Size([3, 40, 40]), GaussianNoise(sigma), stream(0, "rounding"), torch.float64)
        for sigma in (1e-9, 0.25)
    )
    assert noisy.shape == (PROBES, 3, 40, 40)
    assert without.dtype == noisy.dtype == torch.float64
    grey = without.flatten(1).std(1) < 1e-6
    assert without[grey].mean((1, 2, 3)).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-6)
    assert without[~grey].std((1, 2, 3)).tolist() == pytest.approx([12**-0.5] * (PROBES - 5), rel=0.05)
    assert (noisy - without).std((1, 2, 3)).tolist() == pytest.approx([0.25] * PROBES, rel=0.05)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_margin_and_panel_do_not_depend_on_the_images(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Softmax(dim=1))
    saturated = IMAGES * 0 + 1
    with torch.no_grad():
        model[1].weight[0] = 100.0
    deciders = [Poll(model, images, 0.25, dtype=dtype).decide for images in (IMAGES, IMAGES[1:], saturated)]
    assert len({(decide.rounding, decide.panel) for decide in deciders}) == 1
    copies = saturated[:1].expand(PROBES, -1, -1, -1)
    assert deciders[0].rounding > Decider.measured(model, copies, 4).rounding == 0 or dtype


def test_decisions_that_were_turned_by_far_are_counted():
    decide = Decider(Logits(), 2, 0.01)  # closer than .16 is close
    copies = torch.tensor([[0.0, 0.07], [0.0, 0.09], [0.09, 0.0], [0.09, 0.0], [0.0, math.nan]])
    assert decide.again(copies, torch.tensor([0, 0, 0, 1, 1])).tolist() == [1, 1, 0, 0, 2]
    assert decide.again(copies[1:2], torch.tensor([0])).tolist() == [1]
    assert (decide.surprises(), decide.surprises()) == (4, 0)


@pytest.mark.parametrize(("bias", "warned"), [(1e-3, False), (0.4, True)], ids=["as measured", "more than measured"])
def test_rounding_beyond_what_was_measured_is_told_once(bias, warned):
    """Rounding that follows the batch is larger where the last pixel is 5, which no probe is."""

    def change(x):
        flat = x.flatten(1)
        lead = flat[:, 0] - 0.5 + (-1) ** len(x) * torch.where(flat[:, -1] > 4, bias, 0.002)
        return torch.stack([lead, -lead], dim=1)

    class Reaching(Logits):
        def forward(self, x):
            return super().forward(x + 5 * self.reach * torch.eye(16)[15].view(1, 4, 4))

        reach = 0

    model = Reaching(change)
    poll = Poll(model, IMAGES, 0.25, chunk=100)
    model.reach = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        poll.votes(300)
    said = [str(warning.message) for warning in caught if warning.category is ModelWarning]
    assert len(said) == warned
    assert all("logits differ between batches by more than 4 times what was measured" in text for text in said)
