import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core import votes
from rs_plugins.core.decisions import PROBES
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.procedures import BLOCK
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.core.votes import SPACING, Poll
from rs_plugins.errors import InputError, ModelError, ModelWarning


def network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, classes))


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Recorder(nn.Module):
    """Passes on what a network says, keeping the batches that it saw."""

    def __init__(self, network):
        super().__init__()
        self.network, self.batches = network, []

    def forward(self, x):
        self.batches.append(x.clone())
        return self.network(x)


def voting_batches(model):
    """The sizes of the batches, without those of the checks before."""
    checks = 1 + 2 + PROBES
    assert [len(batch) for batch in model.batches[:checks]] == [1, PROBES, 5] + [1] * PROBES
    return [len(batch) for batch in model.batches[checks:]]


@pytest.mark.parametrize("chunk", [1, 3, 63, 64, 65, 1000])
def test_votes_are_those_of_a_plain_loop(chunk):
    model, sigma, n = network(), 0.5, 150
    votes = Poll(model, IMAGES, sigma, seed=7, chunk=chunk).votes(n)
    for index, image in enumerate(IMAGES):
        source = stream(7, "votes", index)
        noise = torch.cat([GaussianNoise(sigma).draw_(torch.empty(BLOCK, 1, 4, 4), source) for _ in range(3)])[:n]
        expected = torch.bincount(model(image + noise).argmax(1), minlength=4)
        assert votes[index].tolist() == expected.tolist()


@settings(max_examples=25)
@given(st.permutations(range(5)), st.integers(1, 5), st.integers(1, 200))
def test_an_image_does_not_care_about_its_company(order, kept, chunk):
    model = network()
    together = Poll(model, IMAGES, 0.5).votes(70)
    chosen = order[:kept]
    apart = Poll(model, IMAGES[chosen], 0.5, indices=chosen, chunk=chunk).votes(70)
    assert np.array_equal(apart, together[chosen])


def test_seed_and_index_change_the_noise():
    same = IMAGES[:1].expand(3, -1, -1, -1)
    votes = Poll(network(), same, 1.0, indices=[0, 1, 2]).votes(500)
    assert len({tuple(row) for row in votes.tolist()}) == 3
    assert not np.array_equal(Poll(network(), same[:1], 1.0, seed=1).votes(500), votes[:1])
    unseeded = [Poll(network(), same[:1], 1.0, seed=None).votes(500).tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_batches_are_filled_across_images():
    model = Recorder(network())
    Poll(model, IMAGES, 0.5, chunk=64).votes(100)
    assert voting_batches(model) == [64] * 7 + [52]


def test_noise_is_neither_clipped_nor_scaled():
    model = Recorder(network())
    Poll(model, IMAGES * 0 + 1, 0.5, chunk=500).votes(500)
    assert voting_batches(model) == [500] * 5
    seen = torch.cat(model.batches[-5:])
    assert float(seen.std()) == pytest.approx(0.5, rel=0.02)
    assert float(seen.mean()) == pytest.approx(1, abs=0.02)
    assert seen.max() > 2.5
    assert seen.min() < -0.5


def test_adaptive_procedures_share_batches_and_results_come_in_order():
    asked = {}

    def until_majority(_turn):
        total, number = np.zeros(4, dtype=np.int64), len(asked)
        asked[number] = []
        for want in (10, 20 + number, 40):
            asked[number].append(want)
            total += yield want
            assert total.sum() == sum(asked[number])
            if number % 2:
                break
        return number, total.tolist()

    outcomes = list(Poll(network(), IMAGES, 0.5, chunk=16).run(until_majority))
    assert [outcome.result[0] for outcome in outcomes] == list(range(5))
    assert [sum(outcome.result[1]) for outcome in outcomes] == [70, 10, 72, 10, 74]
    assert all(outcome.seconds > 0 for outcome in outcomes)


def test_a_result_is_there_before_the_next_image_is_begun():
    model = Recorder(network())

    def ask(_turn):
        return (yield 64)

    outcomes = Poll(model, IMAGES, 0.5, chunk=64).run(ask)
    next(outcomes)
    assert voting_batches(model) == [64]


def test_few_images_are_alive_at_a_time_however_little_they_ask_for():
    begun = []

    def ask(_turn):
        begun.append(len(begun))
        return (yield 1)

    images = IMAGES[:1].expand(100, -1, -1, -1)
    outcomes = Poll(network(), images, 0.5, chunk=160).run(ask)
    next(outcomes)
    assert len(begun) == 10  # a sixteenth of the chunk
    assert len(list(outcomes)) == 99


def test_procedures_may_end_without_a_vote():
    def silent(_turn):
        return "done"
        yield

    assert [outcome.result for outcome in Poll(network(), IMAGES, 0.5).run(silent)] == ["done"] * 5


@pytest.mark.parametrize("wish", [0, -1, 2.5, None], ids=repr)
def test_procedures_that_ask_for_nonsense_are_stopped(wish):
    def ask(_turn):
        yield wish

    with pytest.raises(InputError, match="votes asked for by the procedure: expected an integer >= 1, got"):
        list(Poll(network(), IMAGES, 0.5).run(ask))


def test_time_and_invalid_votes_add_up_over_requests():
    def ask_twice(_turn):
        yield 200
        yield 200

    with pytest.warns(ModelWarning):
        (together,) = Poll(SometimesNaN(1.0), IMAGES[:1] * 0 + 0.5, 0.5, chunk=50).votes(400)
    (outcome,) = Poll(SometimesNaN(1.0), IMAGES[:1] * 0 + 0.5, 0.5, chunk=50).run(ask_twice)
    assert outcome.invalid == 400 - together.sum() > 0


class SometimesNaN(nn.Module):
    """NaN logits wherever the first pixel is above a threshold; without noise the images are below it."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        pixel = x.flatten(1)[:, :1]
        logits = torch.cat([torch.full_like(pixel, math.inf), torch.zeros_like(pixel)], dim=1)
        logits[:, :1] = torch.where(pixel > self.threshold, math.nan, 1.0)  # the other logit is 0
        return logits


@pytest.mark.parametrize("chunk", [1, 64])
def test_nan_logits_are_no_votes(chunk):
    images = IMAGES * 0 + 0.5
    with pytest.warns(
        ModelWarning, match=r"image \d: \d+ noisy copies gave NaN logits; they count as votes for no class"
    ):
        votes = Poll(SometimesNaN(1.0), images, 0.5, chunk=chunk).votes(400)
    assert votes[:, 1].sum() == 0
    assert ((votes[:, 0] > 300) & (votes[:, 0] < 380)).all()  # P(N(0, 1) < 1) = .84


def test_half_precision_models_vote_too():
    votes = Poll(network().bfloat16(), IMAGES, 0.5).votes(50)
    assert votes.sum(axis=1).tolist() == [50] * 5


def test_the_model_is_in_eval_mode_while_voting_and_as_before_between_results():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(16, 3)).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(module.training or model.training))

    def ask(_turn):
        return (yield 10)

    for _ in Poll(model, IMAGES, 0.5, chunk=10).run(ask):
        assert [module.training for module in model.modules()] == modes
    assert seen
    assert not any(seen)


def test_an_exception_in_the_model_restores_it():
    model = network().train()
    handle = model[1].register_forward_hook(lambda module, inputs, output: output * (1 // abs(len(output) - 7) * 0 + 1))
    poll = Poll(model, IMAGES, 0.5, chunk=7)
    with pytest.raises(ZeroDivisionError):
        poll.votes(100)
    handle.remove()
    assert model.training


def test_the_global_generators_are_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    Poll(network(), IMAGES, 0.5, seed=None).votes(10)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_the_autocast_of_the_caller_does_not_change_the_model():
    model = Recorder(network())
    seen = []
    model.network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = Poll(model, IMAGES, 0.5).votes(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(Poll(model, IMAGES, 0.5).votes(50), expected)
    assert seen[-1] == torch.float32


def test_no_images_no_votes():
    assert Poll(network(), IMAGES[:0], 0.5, classes=4).votes(10).shape == (0, 4)


def test_wholes_are_numbers_of_any_type():
    assert Poll(network(), IMAGES, 0.5).votes(1e2).sum() == 500


def test_the_meaning_of_a_seed():
    """Golden: what has been certified can be certified again. Never to be changed without a new major version."""
    (votes,) = Poll(network(), torch.full((1, 1, 4, 4), 0.5), 1.0, seed=5, indices=[3]).votes(100)
    assert stream(5, "votes", 3).initial_seed() == 2250930305
    assert votes.sum() == 100


def test_a_model_whose_number_of_columns_changes_is_stopped():
    class Growing(nn.Module):
        weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.zeros(len(x), 2 + (len(x) > 1))

    with pytest.raises(ModelError, match="model: expected 2 columns of logits, got 3"):
        Poll(Growing(), IMAGES, 0.5, device="cpu").votes(10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0}, InputError, "sigma: expected a finite number > 0, got 0"),
        ({"images": IMAGES * 2}, InputError, r"images: expected pixels in \[0, 1\], got values from .* to"),
        (
            {"images": IMAGES[0, 0, 0]},
            InputError,
            r"images: expected a batch of shape \(n, \*input\), got shape \(4,\)",
        ),
        ({"images": IMAGES[:, :, :3]}, ModelError, r"model: it fails on an input of shape \(1, 1, 3, 4\)"),
        ({"indices": [1]}, InputError, r"indices: expected one per image \(5\), got 1"),
        ({"indices": [0, 1, 2, 3, 2**32]}, InputError, r"indices: expected integers in \[0, 2\*\*32\), got 4294967296"),
        ({"chunk": 0}, InputError, "chunk: expected an integer >= 1, got 0"),
        ({"classes": 3}, ModelError, "model: expected 3 columns of logits, got 4"),
        ({"classes": 1}, InputError, "classes: expected an integer >= 2, got 1"),
        ({"seed": 0.5}, InputError, "seed: expected an integer or None, got 0.5"),
        ({"device": "cuda:7"}, InputError, "device: expected"),
        (
            {"model": SmoothedModel(network(), 0.5)},
            InputError,
            "model: expected a base classifier, got a SmoothedModel; noise",
        ),
        (
            {"model": nn.Sequential(SmoothedModel(network(), 0.5))},
            InputError,
            "got a Sequential with a SmoothedModel inside; noise",
        ),
        ({"model": print}, InputError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_before_any_vote(options, error, message):
    arguments = {"model": network(), "images": IMAGES, "sigma": 0.5} | options
    model, images, sigma = (arguments.pop(name) for name in ("model", "images", "sigma"))
    with pytest.raises(error, match=message):
        Poll(model, images, sigma, **arguments)


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Poll(network(), IMAGES, 0.5).votes(10)


def asking(*wishes, classes=4):
    def procedure(_turn):
        total = np.zeros(classes, dtype=np.int64)
        for wish in wishes:
            total += yield wish
        return total.tolist()

    return procedure


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_passes_whose_votes_nobody_waits_for_change_no_count(depth):
    expected = [outcome.result for outcome in Poll(network(), IMAGES, 0.5, chunk=16).run(asking(10, 33, 70))]
    poll = Poll(network(), IMAGES, 0.5, chunk=16)
    poll.depth = depth
    outcomes = list(poll.run(asking(10, 33, 70)))
    assert [outcome.result for outcome in outcomes] == expected
    assert all(outcome.seconds > 0 for outcome in outcomes)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_so_many_passes_are_queued_before_the_votes_of_one_are_read(depth):
    model, passes = Recorder(network()), {}

    def ask(turn):
        begun = len(model.batches)
        yield 64
        passes[turn.index] = len(model.batches) - begun

    poll = Poll(model, IMAGES, 0.5, chunk=64)
    poll.depth = depth
    assert len(list(poll.run(ask))) == 5
    assert passes == {index: min(depth + 1, 5 - index) for index in range(5)}


class Coarse(nn.Module):
    """Close decisions galore: one logit in four is a tie but for a rounding error that follows the batch size."""

    def __init__(self):
        super().__init__()
        self.weight, self.sizes = nn.Parameter(torch.ones(1)), []

    def forward(self, x):
        self.sizes.append(len(x))
        pixel = x.flatten(1)[:, 0].float()
        lead = torch.where(pixel < 0.5, (len(x) % 3 - 1) * 1e-3, pixel)
        return torch.stack([torch.ones_like(lead), 1 + lead, -torch.ones_like(lead)], dim=1)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("chunk", [7, 64, 200])
def test_close_copies_are_decided_again_in_panels(chunk, depth):
    """A panel holds 16, and 16 % 3 - 1 = 0: there the first two logits are equal, and the first wins."""
    model, images = Coarse(), torch.full((4, 1, 2, 2), 0.4)
    poll = Poll(model, images, 0.2, chunk=chunk, seed=3)
    poll.decide.panel, poll.depth = 16, depth
    model.sizes.clear()
    votes = poll.votes(300)
    for index, row in enumerate(votes):
        noise = GaussianNoise(0.2).draw_(torch.empty(5 * BLOCK, 1, 2, 2), stream(3, "votes", index))[:300]
        ties = int((0.4 + noise[:, 0, 0, 0] < 0.5).sum())
        assert row.tolist() == [ties, 300 - ties, 0]
    panels = model.sizes.count(16)
    assert math.ceil(votes[:, 0].sum() / 16) <= panels <= votes[:, 0].sum() / 16 + 6  # full but for a few


class RarelyTied(nn.Module):
    """A tie wherever the first pixel is above 1.5; it counts the images that it sees."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.sizes = nn.Parameter(torch.ones(1)), 0, []

    def forward(self, x):
        self.seen += len(x)
        self.sizes.append(len(x))
        lead = torch.where(x.flatten(1)[:, 0] > 1.5, 0.0, 4.0)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_result_does_not_wait_for_others_to_fill_its_panel(depth):
    """Some of image 0's copies are ties, no other image's are, and a panel holds 16."""
    model, images = RarelyTied(), torch.zeros(200, 1, 2, 2)
    images[0] = 1
    poll = Poll(model, images, 0.25, chunk=64)
    poll.decide.panel, poll.depth = 16, depth
    model.seen, model.sizes = 0, []
    lags = []
    outcomes = poll.run(asking(100, 500, classes=2))
    for place, outcome in enumerate(outcomes):
        lags.append(model.seen - 600 * (place + 1))
        assert outcome.result == [600, 0]
    panels = model.sizes.count(16)
    assert 1 <= panels <= 4
    assert max(lags[:-20]) <= 1200
    assert sum(model.sizes) == 200 * 600 + 16 * panels


def test_panels_that_are_not_full_are_rare():
    """Each image has ties, fewer than fill a panel."""
    model, images = RarelyTied(), torch.ones(100, 1, 2, 2)
    poll = Poll(model, images, 0.25, chunk=512)
    poll.decide.panel, model.sizes = 32, []
    assert [outcome.result for outcome in poll.run(asking(*[50] * 8, classes=2))] == [[400, 0]] * 100
    tied = 0.0228 * 100 * 400  # P(N(0, 1) > 2)
    assert tied / 32 <= model.sizes.count(32) <= 1.1 * tied / 32 + 100 * 400 / (SPACING * 32)


def test_not_too_many_images_are_begun_behind_a_slow_one(monkeypatch):
    monkeypatch.setattr(votes, "MOST_BEGUN", 20)
    begun = []

    def ask(turn):
        begun.append(turn.index)
        for _ in range(200 if turn.index == 0 else 1):
            yield 5
        return len(begun)

    images = IMAGES[:1].expand(100, -1, -1, -1)
    outcomes = [outcome.result for outcome in Poll(network(), images, 0.5, chunk=64).run(ask)]
    assert outcomes[0] == 20
    assert len(outcomes) == len(begun) == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 7}, {"chunk": 100}, {"channels_last": True}], ids=repr)
def test_half_precision_rounds_the_sum_once(dtype, options):
    """A model whose logits are the pixels: nothing but the sum is rounded, and many are equal."""
    images = torch.full((2, 4, 1, 1), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
    votes = Poll(model, images, 0.02, dtype=dtype, **options).votes(300)
    for index, row in enumerate(votes):
        noise = GaussianNoise(0.02).draw_(torch.empty(5 * BLOCK, 4, 1, 1), stream(0, "votes", index))[:300]
        winners = (0.5 + noise).to(dtype).flatten(1).argmax(1)
        assert row.tolist() == torch.bincount(winners, minlength=4).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_care_about_the_chunk(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6))
    runs = [Poll(model, IMAGES, 0.5, chunk=chunk, dtype=dtype).votes(400).tolist() for chunk in (3, 64, 500)]
    assert runs[0] == runs[1] == runs[2]


def test_the_trial_of_chunks_draws_from_no_stream_of_votes():
    poll = Poll(network(), IMAGES, 0.5, seed=4)
    (first, *_) = (outcome.result for outcome in poll.run(asking(100), most=10**9))
    assert first == Poll(network(), IMAGES, 0.5, seed=4, chunk=64).votes(100)[0].tolist()


def test_a_chunk_is_tried_for_long_work_only_and_never_where_one_is_given():
    def sizes_tried(most, **options):
        model = Recorder(network())
        poll = Poll(model, IMAGES, 0.5, **options)
        next(poll.run(asking(1), most=most))
        return {len(batch) for batch in model.batches[1 + 2 + PROBES :]}

    assert sizes_tried(10**9) >= {128, 256, 512, 1024, 2048}
    assert sizes_tried(100) == {5}  # one vote for each image
    assert sizes_tried(10**9, chunk=3) == {2}  # of so many images at a time


def test_batches_stay_full_while_one_image_asks_again_and_again():
    """The others, which are done sooner, make room for those behind them."""
    model = Recorder(network())

    def ask(turn):
        for _ in range(40 if turn.index == 0 else 1):
            yield 20

    images = IMAGES[:1].expand(300, -1, -1, -1)
    assert len(list(Poll(model, images, 0.5, chunk=64).run(ask))) == 300
    sizes = voting_batches(model)
    assert sum(sizes) == 300 * 20 + 39 * 20
    assert all(size == 64 for size in sizes[:-2])


MEMORY = """
import sys, re, torch
from torch import nn
from rs_plugins.core.votes import Poll
torch.set_num_threads(1)
images = torch.zeros(1, 1, 28, 28).expand(int(sys.argv[1]), -1, -1, -1)
def ask(turn):
    yield 5
    yield 5
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
for _ in Poll(model, images, 0.5, chunk=256).run(ask):
    pass
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell peak memory")
def test_memory_does_not_grow_with_the_number_of_images():
    """One block of noise kept for each of 4,000 images would be 800 MB."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", MEMORY, n], check=True, capture_output=True, text=True).stdout)
        for n in ("100", "4000")
    ]
    assert peaks[1] - peaks[0] < 60_000  # kB; the images themselves are one
