"""Models that misbehave while they are certified: what is finished stays on disk, no result changes in silence."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.job import certify_data_set
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.results.files import read_results
from rs_plugins.errors import ModelError, ModelWarning

PLAN = FixedBudget(n0=5, n=40)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 1, 3, 3), dtype=np.uint8)
DATA = in_memory("squares", PIXELS, np.arange(6) % 4)
IMAGES = torch.from_numpy(PIXELS.astype(np.float32)) / 255


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


class Odd(nn.Module):
    """Does something odd with a batch before or after the network; a function of its own keeps what it remembers."""

    def __init__(self, odd):
        super().__init__()
        self.net, self.odd = network(), odd

    def forward(self, x):
        return self.odd(self.net, x)


def job(model, log, **options):
    return certify_data_set(model, DATA, 0.5, log, plan=PLAN, chunk=20, **options)


def counts(model, **options):
    return [(c.prediction, c.count, c.radius) for c in certify(model, IMAGES, 0.5, plan=PLAN, chunk=20, **options)]


def as_numpy(net, x):
    return net(x).numpy()


def as_tuple(net, x):
    return (net(x), x)


def as_whole_numbers(net, x):
    return net(x).argmax(1)


def as_complex(net, x):
    return net(x) + 0j


def as_sparse(net, x):
    return net(x).to_sparse()


def on_meta(net, x):
    return net(x).to("meta")


def as_dict(net, x):
    return {"logits": net(x)}


def fewer(net, x):
    return net(x)[:-1]


@pytest.mark.parametrize("odd", [as_numpy, as_tuple, as_whole_numbers, as_complex, as_sparse, on_meta, as_dict, fewer])
def test_what_is_no_tensor_of_logits_is_refused_before_any_work(tmp_path, odd):
    with pytest.raises(ModelError, match="model: expected"):
        job(Odd(odd), tmp_path / "log.tsv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_another_type_are_logits(dtype):
    found = counts(Odd(lambda net, x: net(x).to(dtype)))
    assert [prediction for prediction, _, _ in found] == [prediction for prediction, _, _ in counts(network())]


def in_place(net, x):
    logits = net(x)
    x.zero_()
    return logits


def past_the_counter(net, x):
    logits = net(x)
    x.data.zero_()
    return logits


def by_numpy(net, x):
    logits = net(x)
    x.numpy()[:] = 0
    return logits


@pytest.mark.parametrize("odd", [in_place, past_the_counter, by_numpy])
def test_a_model_that_writes_into_its_input_is_refused(odd):
    before = IMAGES.clone()
    with pytest.raises(ModelError, match="it changes its input in place"):
        counts(Odd(odd))
    assert torch.equal(IMAGES, before)


def test_one_that_begins_to_later_changes_no_image_and_no_count():
    """Nobody sees it, and nobody needs to: a model is handed noisy copies that are used once."""
    seen, before = [], IMAGES.clone()

    def later(net, x):
        logits = net(x)
        seen.append(len(x))
        if len(x) == 20 and len(seen) > 20:
            x.data.zero_()
        return logits

    assert counts(Odd(later)) == counts(network())
    assert seen.count(20) > 5
    assert torch.equal(IMAGES, before)


class Troubled(nn.Module):
    """Works for some batches of 20, and then does what the environment says: as a model it is always the same."""

    def __init__(self):
        super().__init__()
        self.net, self.passes = network(), 0

    def forward(self, x):
        self.passes += len(x) == 20
        trouble = os.environ.get("TROUBLE") if self.passes > 8 and len(x) == 20 else None
        return self.net(x) if trouble is None else TROUBLE[trouble][0](self.net, x)


def raises(net, x):
    raise RuntimeError("the driver is gone")


def interrupts(net, x):
    raise KeyboardInterrupt


def is_wider(net, x):
    return torch.cat([net(x)] * 2, dim=1)


def is_shorter(net, x):
    return net(x)[:3]


def is_no_memory(net, x):
    raise MemoryError


TROUBLE = {
    "no memory": (is_no_memory, MemoryError, ""),
    "raises": (raises, RuntimeError, "the driver is gone"),
    "hangs and is interrupted": (interrupts, KeyboardInterrupt, ""),
    "more classes": (is_wider, ModelError, "expected 4 columns of logits, got 8"),
    "fewer rows": (is_shorter, ModelError, r"expected logits of shape \(20, classes\), got shape \(3, 4\)"),
}


@pytest.mark.parametrize("name", [name for name in TROUBLE if name != "no memory"])
def test_what_is_finished_stays_and_the_job_goes_on(tmp_path, monkeypatch, name):
    _, kind, message = TROUBLE[name]
    good, log = tmp_path / "good.tsv", tmp_path / "log.tsv"
    expected = job(Troubled(), good)
    monkeypatch.setenv("TROUBLE", name)
    with pytest.raises(kind, match=message or None):
        job(Troubled(), log)
    monkeypatch.delenv("TROUBLE")
    kept, rows = read_results(log), log.read_bytes()
    assert 1 <= len(kept) < 6
    found = job(Troubled(), log, resume=True)
    for column in ("idx", "predict", "radius", "samples"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist()
    assert log.read_bytes().startswith(rows)  # no image is certified again


def test_too_little_memory_in_the_middle_of_a_job_changes_nothing_but_the_size_of_passes(tmp_path, monkeypatch):
    expected, model = job(Troubled(), tmp_path / "good.tsv"), Troubled()
    monkeypatch.setenv("TROUBLE", "no memory")
    found = job(model, tmp_path / "log.tsv")
    assert model.passes == 9  # of 20 images, the last of them in vain
    assert found.radius.tolist() == expected.radius.tolist()


def test_nan_now_and_then_lowers_the_bound_and_is_told():
    calls = []

    def odd(net, x):
        calls.append(len(x))
        logits = net(x)
        if len(x) == 20 and calls.count(20) % 3 == 0:
            logits[::2] = torch.nan
        return logits

    with pytest.warns(ModelWarning, match="noisy copies gave NaN logits; they count as votes for no class"):
        found = counts(Odd(odd))
    for (_, count, radius), (_, right, reach) in zip(found, counts(network()), strict=True):
        assert count <= right
        assert radius <= reach


def test_a_model_whose_weights_change_gets_no_more_certificates(tmp_path):
    calls = []

    def odd(net, x):
        calls.append(len(x))
        if calls.count(20) > 8:
            with torch.no_grad():
                net[1].weight.add_(0.01)
        return net(x)

    with pytest.raises(ModelError, match=r"its weights \(net.1.weight\) were changed while it was in use"):
        job(Odd(odd), tmp_path / "log.tsv")
    good = job(network(), tmp_path / "good.tsv")
    kept = read_results(tmp_path / "log.tsv")
    assert 1 <= len(kept) < 6
    assert kept.radius.tolist() == good.radius[: len(kept)].tolist()
