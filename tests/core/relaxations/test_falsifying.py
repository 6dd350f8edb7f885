import pytest
import torch
from torch import nn

from rs_plugins.core.relaxations import falsifying
from rs_plugins.core.relaxations.falsifying import falsify, smallest_margin


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()


def inner_images(n=6):
    """Images so far from 0 and 1 that no ball here reaches them."""
    return 0.4 + 0.2 * torch.rand(n, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attack(model, x, y, **options):
    options = {"eps": 0.05, "norm": "linf", "steps": 25, "restarts": 1, "seed": 0} | options
    return falsify(model, x, y, **options)


def test_the_smallest_margin_is_that_against_the_best_rival():
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 1.0, 0.0]])
    assert smallest_margin(logits, torch.tensor([0, 1, 0])).tolist() == [0.5, -2.0, 0.0]


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_of_a_linear_model_it_finds_the_worst_image(norm, dual):
    model, x = linear(), inner_images()
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    y = torch.zeros(6, dtype=torch.long)
    slope = weight[0] - weight[1]
    clean = (x.flatten(1) @ slope + bias[0] - bias[1]).tolist()
    for reach in (0.4, 1.5):  # of the way to the border
        radius = [reach * margin / float(slope.norm(dual)) for margin in clean]
        for row, eps in enumerate(radius):
            if clean[row] <= 0:
                continue
            found, margin = attack(model, x[row : row + 1], y[:1], eps=eps, norm=norm)
            length = (found - x[row]).flatten().norm(torch.inf if norm == "linf" else 2)
            assert float(length) <= eps * (1 + 1e-12)
            if reach < 1:
                assert float(margin) == pytest.approx((1 - reach) * clean[row])
            else:
                assert float(margin) < 0
    assert max(clean) > 0


def test_what_it_finds_depends_on_no_other_image():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = inner_images()
    y = model(x).argmax(dim=1)
    options = {"eps": 0.02, "steps": 4, "restarts": 3}
    whole, margins = attack(model, x, y, **options)
    alone = [attack(model, x[row : row + 1], y[row : row + 1], **options) for row in range(6)]
    torch.testing.assert_close(torch.cat([found for found, _ in alone]), whole)
    torch.testing.assert_close(torch.cat([margin for _, margin in alone]), margins)


def test_several_runs_find_what_one_does_not():
    def two_valleys(x):
        """The slope at the image leads into the shallow one."""
        t = x.flatten(1)[:, 0] - 0.5
        return torch.stack([0.5 - 0.5 * t - 20 * torch.relu(-t - 0.05), 0 * t], dim=1)

    x, y = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    _, once = attack(two_valleys, x, y, eps=0.1)
    assert once.tolist() == pytest.approx([0.45, 0.45])
    found, margins = attack(two_valleys, x, y, eps=0.1, restarts=30)
    assert margins.tolist() == smallest_margin(two_valleys(found), y).tolist()
    assert float(margins.max()) < 0
    starts = [attack(two_valleys, x, y, eps=0.1, restarts=30, seed=seed)[0] for seed in range(3)]
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_leaves_ball_and_box(norm, dtype):
    model = linear().to(dtype)
    model[1].bias.data[1] += 5  # all are of class 1, wherever they go
    x = torch.rand(50, 2, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    found, _ = attack(model, x, torch.ones(50, dtype=torch.long), eps=0.3, norm=norm, restarts=2, steps=3)
    delta = (found.double() - x.double()).flatten(1)
    length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert float(length.max()) <= 0.3 * (1 + 4 * torch.finfo(dtype).eps)
    assert float(length.max()) > 0.29
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_rounding_leaves_no_image_outside_the_ball():
    x = torch.full((200, 50), 0.5, dtype=torch.float64)
    direction = torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = falsifying._inside(x + 0.1 * direction, x, 0.3, "l2")
    lengths = torch.linalg.vector_norm(found - x, dim=1)
    assert (lengths <= 0.3).all()
    assert (lengths > 0.3 - 1e-9).all()
