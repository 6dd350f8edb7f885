import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rs_plugins.core.certifying_adapters.modules import (
    FeatureCertifyingAdapter,
    ImageCertifyingAdapter,
    TokenCertifyingAdapter,
)
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.errors import InputError, ModelError


@pytest.fixture(autouse=True)
def _seeded():
    with global_randomness(0):
        yield


class Tokens(nn.Module):
    """Patches to tokens, two blocks, the mean of the tokens."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), -1, 4))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(dim=1)


def erf_gelu(v):
    return v * 0.5 * (1 + torch.erf(v / 2**0.5))


def filled(module):
    """Give every parameter random values."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda zero: ImageCertifyingAdapter(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), 3, zero_init=zero),
        lambda zero: FeatureCertifyingAdapter(3, zero_init=zero),
    ],
    ids=["image", "feature"],
)
def test_the_correction_begins_as_zero_unless_told_otherwise(make, zero):
    x, z = torch.rand(5, 2, 2, 2), torch.randn(5, 3)
    correction = make(zero)(x, z)
    assert correction.shape == z.shape
    assert bool((correction == 0).all()) is zero


def test_the_last_layer_gets_a_gradient_at_the_start_and_the_layers_before_it_none():
    adapter = FeatureCertifyingAdapter(3)
    adapter(torch.rand(4, 2), torch.randn(4, 3)).square().sum().backward()
    assert not adapter.first.weight.grad.any()
    adapter.zero_grad()
    adapter(torch.rand(4, 2), torch.randn(4, 3)).sum().backward()
    assert adapter.last.weight.grad.any()


def test_image_corrects_by_a_linear_layer_of_what_the_backbone_returns():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh())
    adapter = filled(ImageCertifyingAdapter(backbone, 3, backbone_dim=5))
    x, z = torch.rand(4, 2, 2, 2).double(), torch.randn(4, 3).double()
    expected = torch.tanh(x.flatten(1) @ backbone[1].weight.T + backbone[1].bias) @ adapter.last.weight.T
    torch.testing.assert_close(adapter(x, z), expected + adapter.last.bias)
    torch.testing.assert_close(adapter(x, z), adapter(x, -7 * z))


def test_feature_corrects_by_a_bottleneck():
    adapter = filled(FeatureCertifyingAdapter(4, hidden=3))
    x, z = torch.rand(5, 2).double(), torch.randn(5, 4).double()
    inner = erf_gelu(z @ adapter.first.weight.T + adapter.first.bias)
    torch.testing.assert_close(adapter(x, z), inner @ adapter.last.weight.T + adapter.last.bias)
    assert FeatureCertifyingAdapter(7).first.out_features == 3
    assert FeatureCertifyingAdapter(1).first.out_features == 1


def test_token_corrects_what_its_blocks_return_and_leaves_the_extractor_as_it_was():
    extractor, adapter = filled(Tokens()), filled(TokenCertifyingAdapter(["blocks.1"], 6, 6, hidden=5))
    x = torch.rand(3, 2, 2, 4).double()
    before = extractor(x)
    tokens = extractor.blocks[1](extractor.blocks[0](extractor.embed(x.reshape(3, 4, 4))))
    part = adapter.bottlenecks[0]
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + part.norm.eps).sqrt() * part.norm.weight
    inner = erf_gelu((normed + part.norm.bias) @ part.first.weight.T + part.first.bias)
    expected = (tokens + inner @ part.last.weight.T + part.last.bias).mean(dim=1)
    with adapter.inside(extractor):
        torch.testing.assert_close(extractor(x), expected)
    assert torch.equal(extractor(x), before)
    with pytest.raises(RuntimeError, match="on purpose"), adapter.inside(extractor):
        raise RuntimeError("on purpose")
    assert torch.equal(extractor(x), before)


def test_token_begins_as_the_extractor():
    extractor, adapter = Tokens(), TokenCertifyingAdapter(["blocks.0", "blocks.1"], 6, 6)
    x = torch.rand(3, 2, 2, 4)
    before = extractor(x)
    with adapter.inside(extractor):
        assert torch.equal(extractor(x), before)
    assert adapter.bottlenecks[0].first.out_features == 64
    with TokenCertifyingAdapter(["blocks.0"], 6, 6, zero_init=False).inside(extractor):
        assert not torch.equal(extractor(x), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureCertifyingAdapter(0), "feature_dim: expected an integer >= 1, got 0"),
        (lambda: FeatureCertifyingAdapter(4, hidden=0), "hidden: expected an integer >= 1"),
        (lambda: ImageCertifyingAdapter(nn.Identity(), 4, backbone_dim=0), "backbone_dim: expected an integer >= 1"),
        (lambda: TokenCertifyingAdapter([], 4, 4), "sites: expected names of blocks, each once"),
        (lambda: TokenCertifyingAdapter("blocks", 4, 4), "sites: expected names of blocks"),
        (lambda: TokenCertifyingAdapter(["a", "a"], 4, 4), "sites: expected names of blocks, each once"),
        (lambda: TokenCertifyingAdapter(["a"], 0, 4), "width: expected"),
        (lambda: TokenCertifyingAdapter(["a"], 4, 4, hidden=0), "hidden: expected"),
    ],
)
def test_impossible_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_backbone_of_another_width_is_named():
    adapter = ImageCertifyingAdapter(nn.Flatten(), 3, backbone_dim=7)
    with pytest.raises(ModelError, match=r"backbone: expected features of shape \(2, 7\), got \(2, 8\)"):
        adapter(torch.rand(2, 2, 2, 2), torch.rand(2, 3))


def test_sites_that_are_not_there_or_return_no_tokens_are_named():
    extractor = Tokens()
    missing = TokenCertifyingAdapter(["blocks.7"], 6, 6)
    with pytest.raises(InputError, match=r"sites: .* has no module 'blocks"), missing.inside(extractor):
        pass
    whole = TokenCertifyingAdapter([""], 6, 6)
    with whole.inside(extractor), pytest.raises(ModelError, match=r"expected .* to return tokens .*, got \(2, 6\)"):
        extractor(torch.rand(2, 2, 2, 4))


def test_a_copy_corrects_its_own_copy_of_an_extractor():
    extractor, adapter = Tokens(), TokenCertifyingAdapter(["blocks.0"], 6, 6, zero_init=False)
    twin, other = copy.deepcopy((extractor, adapter))
    x = torch.rand(2, 2, 2, 4)
    with adapter.inside(extractor), other.inside(twin):
        assert torch.equal(extractor(x), twin(x))


class Meeting(Tokens):
    """Waits in its first block until another thread is there, too."""

    def __init__(self, parties):
        super().__init__()
        barrier = threading.Barrier(parties, timeout=20)
        self.blocks[0].register_forward_pre_hook(lambda *_: self.meet(barrier))
        self.blocks[1].register_forward_pre_hook(lambda *_: self.meet(barrier))

    def meet(self, barrier):
        barrier.wait()


def test_threads_do_not_see_each_others_corrections():
    """Two that correct and one that does not, each in the middle of the same extractor with the others."""
    alone, together = Tokens(), Meeting(3)
    alone.load_state_dict(together.state_dict())
    sites = ["blocks.0", "blocks.1"]
    adapters = [TokenCertifyingAdapter(sites, 6, 6, zero_init=False) for _ in range(2)]
    x = torch.rand(3, 2, 2, 4)

    def run(adapter, extractor):
        if adapter is None:
            return extractor(x)
        with adapter.inside(extractor):
            return extractor(x)

    expected = [run(adapter, alone) for adapter in (*adapters, None)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda adapter: run(adapter, together), (*adapters, None)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.allclose(expected[0], expected[1])
    assert not any(block._forward_hooks for block in together.blocks)


def test_a_copy_made_meanwhile_is_of_the_extractor_alone():
    extractor, adapter = Tokens(), TokenCertifyingAdapter(["blocks.0"], 6, 6, zero_init=False)
    x = torch.rand(2, 2, 2, 4)
    before = extractor(x)
    with adapter.inside(extractor):
        twin = copy.deepcopy(extractor)
        assert not torch.equal(extractor(x), before)
    assert torch.equal(twin(x), before)


def test_sites_that_do_not_run_are_named():
    extractor = Tokens()
    extractor.more = nn.Linear(6, 6)
    adapter = TokenCertifyingAdapter(["blocks.0", "more"], 6, 6)
    with pytest.raises(ModelError, match=r"^sites: expected more to run in the thread that runs the extractor, but"):  # noqa: SIM117
        with adapter.inside(extractor):
            extractor(torch.rand(2, 2, 2, 4))
    adapter = TokenCertifyingAdapter(["blocks.0"], 6, 6)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ModelError, match=r"^sites: expected blocks.0 to run in the "):  # noqa: SIM117
        with adapter.inside(extractor):
            pool.submit(extractor, torch.rand(2, 2, 2, 4)).result()
    with pytest.raises(RuntimeError, match="on purpose"), adapter.inside(extractor):
        raise RuntimeError("on purpose")


class Checkpointed(Tokens):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), -1, 4))
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=self.reentrant)
        return tokens.mean(dim=1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_never_loses_a_gradient_in_silence():
    adapter, x = TokenCertifyingAdapter(["blocks.1"], 6, 6, zero_init=False), torch.rand(2, 2, 2, 4)
    extractor = Checkpointed(reentrant=True).requires_grad_(False)
    message = r"^sites: expected blocks.1 to keep a graph for gradients, but it runs without; switch gradient checkp"
    for images in (x, x.clone().requires_grad_()):
        with pytest.raises(ModelError, match=message), adapter.inside(extractor):
            extractor(images)
    plain = Tokens()
    plain.load_state_dict(extractor.state_dict())
    with torch.no_grad(), adapter.inside(extractor), adapter.inside(plain):
        assert torch.equal(extractor(x), plain(x))
    with adapter.inside(extractor := Checkpointed(reentrant=False)):
        features = extractor(x)
    with pytest.raises(RuntimeError, match="checkpoint"):  # torch's own error
        features.sum().backward()
