import pytest
import torch
from torch import nn

from rs_plugins.core.certifying_adapters.backbones import SIZES, ImageBackbone, image_backbone
from rs_plugins.errors import InputError


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_size_is_a_resnet_18_of_11_2_million_parameters():
    backbone = image_backbone((3, 32, 32), "paper")
    assert backbone.features == 512
    assert parameters(backbone) + parameters(nn.Linear(512, 64)) == pytest.approx(11.20e6, rel=1e-3)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_features_are_8_times_the_width(size):
    backbone = image_backbone((1, 28, 20), size).eval()
    assert backbone(torch.rand(2, 1, 28, 20)).shape == (2, 8 * SIZES[size].width)


def test_sizes_grow():
    counts = [parameters(image_backbone((3, 32, 32), size)) for size in SIZES]
    assert counts == sorted(counts)
    assert counts[-1] > 20 * counts[0]


def test_stages_halve_the_image_three_times_and_a_large_one_is_made_4_times_smaller_first():
    seen = []
    for shape in ((3, 32, 32), (3, 96, 96)):
        backbone = image_backbone(shape, "tiny").eval()
        backbone.stages.register_forward_hook(lambda _m, inside, out: seen.append((inside[0].shape, out.shape)))
        backbone(torch.rand(1, *shape))
    assert [(tuple(a[2:]), tuple(b[2:])) for a, b in seen] == [((32, 32), (4, 4)), ((24, 24), (3, 3))]


def test_width_and_blocks_are_counted():
    small, wide, deep = (ImageBackbone(3, width=w, blocks=b) for w, b in ((4, 1), (8, 1), (4, 3)))
    assert (small.features, wide.features) == (32, 64)
    convolutions = [sum(isinstance(part, nn.Conv2d) for part in net.modules()) for net in (small, wide, deep)]
    # a stem, 4 stages of blocks with 2 convolutions, and 3 shortcuts where the image is halved
    assert convolutions == [1 + 4 * 2 + 3, 1 + 4 * 2 + 3, 1 + 4 * 6 + 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageBackbone(3, width=0), "width: expected"),
        (lambda: ImageBackbone(3, blocks=0), "blocks: expected"),
        (lambda: ImageBackbone(0), "channels: expected"),
        (lambda: image_backbone((3, 32, 32), "huge"), "size: expected one of 'tiny', .*, got 'huge'"),
        (lambda: image_backbone((8,), "tiny"), r"shape: expected images \(channels, height, width\), got \(8,\)"),
    ],
)
def test_impossible_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
