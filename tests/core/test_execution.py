import copy

import pytest
import torch
from torch import nn

from rs_plugins.core.execution import Runner, check_channels_last
from rs_plugins.core.models import digest
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError, MissingDependencyError, ModelError

IMAGES = torch.rand(3, 2, 6, 5, generator=torch.Generator().manual_seed(0))


class Watching(nn.Module):
    """Keeps the types, layouts and sizes of its batches, in a list that its copies share."""

    def __init__(self, network, seen):
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x):
        self.seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last), len(x)))
        return self.network(x)

    def __deepcopy__(self, memo):
        return Watching(copy.deepcopy(self.network, memo), self.seen)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_copy_in_that_type_is_run_and_the_callers_model_is_untouched(dtype):
    seen, model = [], network()
    before = digest(model)
    runner = Runner(Watching(model, seen), dtype=dtype)
    logits = runner(IMAGES)
    assert (runner.dtype, logits.dtype, seen) == (dtype, dtype, [(dtype, False, 3)])
    assert torch.equal(logits, copy.deepcopy(model).to(dtype)(IMAGES.to(dtype)))
    assert digest(model) == before
    assert model[0].weight.dtype == torch.float32
    assert digest(runner.model.network) == digest(copy.deepcopy(model).to(dtype)) != before


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_a_model_that_is_so_already_is_not_copied(dtype):
    model = network()
    assert Runner(model, dtype=dtype).model is model


def test_a_model_of_two_types_becomes_one():
    model = network()
    model[3].double()
    assert {p.dtype for p in Runner(model, dtype=torch.float32).model.parameters()} == {torch.float32}


def test_channels_last_is_a_copy_that_gets_such_images():
    seen, model = [], network()
    runner = Runner(Watching(model, seen), channels_last=True)
    assert torch.allclose(runner(IMAGES), model(IMAGES), atol=1e-6)
    assert seen == [(torch.float32, True, 3)]
    assert runner.model.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert digest(runner.model.network) == digest(model)  # the same numbers


def test_a_model_without_tensors_is_run_in_the_type_asked_for():
    class Flat(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    assert Runner(Flat(), device="cpu", dtype=torch.bfloat16)(IMAGES).dtype == torch.bfloat16
    assert Runner(Flat(), device="cpu").dtype == torch.float32


def test_how_it_is_run_is_told_in_words(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    assert Runner(network()).execution == "eager"
    assert Runner(network(), channels_last=True).execution == "eager, channels last"
    runner = Runner(network(), channels_last=True)
    runner.compile_(IMAGES.shape[1:], 4)
    assert runner.execution == "compiled, channels last"


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
def test_the_compiled_model_sees_batches_of_one_size_only(monkeypatch, channels_last):
    seen = []

    def compiled(model, *, dynamic):
        assert dynamic is False
        return Watching(model, seen)

    monkeypatch.setattr(torch, "compile", compiled)
    runner = Runner(network(), channels_last=channels_last)
    runner.compile_(IMAGES.shape[1:], 4, 3)
    for n in (1, 4, 11):
        images = torch.rand(n, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(n))
        assert torch.allclose(runner.compiled(images, 4), runner(images), atol=1e-6)
    sizes = [4, 3] + [4] * (1 + 1 + 3)
    assert seen == [(torch.float32, channels_last, size) for size in sizes]


@pytest.mark.parametrize(("dtype", "sizes"), [(None, {32}), (torch.bfloat16, {32, 16})], ids=str)
def test_votes_of_a_compiled_model_are_those_of_the_model(monkeypatch, dtype, sizes):
    """Those of half precision that are close are compiled too, for panels."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: Watching(model, seen))
    expected = Poll(network(), IMAGES, 0.5, chunk=32, dtype=dtype).votes(100)
    assert Poll(network(), IMAGES, 0.5, chunk=32, dtype=dtype, compile=True).votes(100).tolist() == expected.tolist()
    assert {size for _, _, size in seen} == sizes
    assert len(seen) >= 10  # 300 votes


class InvalidCxxCompiler(RuntimeError):  # as torch names it
    pass


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (InvalidCxxCompiler("No working C++ compiler\nmore"), MissingDependencyError, r"compile: .* install g\+\+ or"),
        (
            ZeroDivisionError("in the model"),
            ModelError,
            r"compile: the model cannot be compiled \(ZeroDivisionError: in",
        ),
        (RuntimeError(), ModelError, r"compile: the model cannot be compiled \(RuntimeError"),
    ],
    ids=["no compiler", "model", "no reason"],
)
def test_what_cannot_be_compiled_is_refused_before_any_vote(monkeypatch, raised, error, message):
    def fails(*_, **__):
        raise raised

    monkeypatch.setattr(torch, "compile", fails)
    model = network().train()
    with pytest.raises(error, match=message):
        Poll(model, IMAGES, 0.5, compile=True)
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_torch_compiles_models(dtype):
    state = torch.get_rng_state()
    options = {"dtype": dtype, "channels_last": True, "chunk": 24}
    poll = Poll(network_without_draws(), IMAGES, 0.5, compile=True, **options)
    assert poll.votes(100).tolist() == Poll(network_without_draws(), IMAGES, 0.5, **options).votes(100).tolist()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_torch_compiles_as_many_models_as_there_are_and_each_once_for_each_size():
    from torch._dynamo.testing import CompileCounter  # takes seconds

    counted = CompileCounter()
    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=counted, **options))
        for width in range(2, 12):  # torch gives up after eight cases of one piece of code
            model = nn.Sequential(nn.Flatten(), nn.Linear(60, width))
            Poll(model, IMAGES, 0.5, chunk=24, compile=True).votes(100)
        assert counted.frame_count == 10
        Poll(network_without_draws(), IMAGES, 0.5, chunk=24, compile=True, dtype=torch.bfloat16).votes(100)
    assert counted.frame_count == 12


def network_without_draws():
    with torch.random.fork_rng():
        return network()


@pytest.mark.parametrize("dtype", [torch.int64, "float16", torch.complex64], ids=str)
def test_types_that_are_none_are_refused(dtype):
    with pytest.raises(InputError, match=r"dtype: expected None or one of torch\.float16, torch\.bfloat16, .*, got"):
        Runner(network(), dtype=dtype)


def test_images_without_channels_have_none_last():
    assert check_channels_last(True, IMAGES)
    assert not check_channels_last(False, IMAGES.flatten(1))
    with pytest.raises(
        InputError, match=r"channels_last: expected images of shape \(n, channels, height, width\), got"
    ):
        Poll(nn.Linear(60, 2), IMAGES.flatten(1), 0.5, channels_last=True)


def test_a_model_that_cannot_be_copied_is_refused():
    model = network()
    model.leaf = model[3].weight * 2  # autograd's intermediate results have no copy
    with pytest.raises(ModelError, match="model: dtype and channels_last need a copy of it, which failed"):
        Runner(model, dtype=torch.float64)
