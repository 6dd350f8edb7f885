"""What is left out of account for rounding, beside exact arithmetic with fractions."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.certifying import certify_bounds
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.slack import slack


def exact_logits(model, x):
    """Return the logits of one image without any rounding, as fractions."""
    z = [Fraction(value) for value in x.tolist()]
    for layer in model:
        if isinstance(layer, nn.ReLU):
            z = [max(value, Fraction(0)) for value in z]
        else:
            rows, shifts = layer.weight.tolist(), layer.bias.tolist()
            z = [
                sum((Fraction(w) * value for w, value in zip(row, z, strict=True)), Fraction(shift))
                for row, shift in zip(rows, shifts, strict=True)
            ]
    return z


def network_wrong_by_little(seed, scale, dtype):
    """Return a network, and an image that it takes for class 1 by about as much as rounding hides."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)).to(dtype)
    x = torch.rand(1, 12, dtype=dtype)
    last = model[4]
    with torch.no_grad():
        last.weight.mul_(scale)
        first, second = exact_logits(model, x[0])
        last.bias[0] -= float(first - second)
        while not exact_logits(model, x[0])[0] < exact_logits(model, x[0])[1]:
            last.bias[0] = torch.nextafter(last.bias[0], last.bias[0] - 1)
    return model, x


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float64, 1e9)])
def test_large_logits_do_not_hide_a_wrong_class(dtype, scale):
    """At a radius of 0 all bounds are the margin and rounding; without its terms it would be proved in some."""
    hidden = 0
    for seed in range(20):
        model, x = network_wrong_by_little(seed, scale, dtype)
        (found,) = certify_bounds(model, x, torch.tensor([0]), 0.0, attack_steps=0, dtype=dtype)
        assert found.status in ("unknown", "misclassified")
        hidden += found.margin > slack(torch.tensor(found.margin, dtype=dtype))
    assert hidden > 0


def test_a_shift_that_cancels_counts():
    """What a batch normalisation with a large mean takes away again is rounded at its size."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    x, y = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    plain = RelaxedNetwork(model, (4,)).terms(x, y)
    model[0].bias.data += 1e6
    model[1].running_mean.data += 1e6
    assert (RelaxedNetwork(model, (4,)).terms(x, y) > 1e5 * plain).all()


def test_terms_by_definition():
    """Of two layers by hand: sensitivities times sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(Normalise([0.5], [0.25]), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    model = model.double()
    x, y = torch.rand(2, 1, 2, 2, dtype=torch.float64), torch.tensor([2, 0])
    terms = RelaxedNetwork(model, (1, 2, 2)).terms(x, y)
    first, last = model[2], model[4]
    for n in range(2):
        normal = (x[n].flatten() - 0.5) / 0.25
        before = first(normal)
        others = [k for k in range(3) if k != y[n]]
        for place, k in enumerate(others):
            unit = torch.eye(3).double()[y[n]] - torch.eye(3).double()[k]
            hidden = unit @ last.weight
            deep = (hidden * (before > 0)) @ first.weight
            expected = (
                unit.abs() @ (last.weight.abs() @ before.relu() + last.bias.abs())
                + hidden.abs() @ before.relu()
                + (hidden * (before > 0)).abs() @ (first.weight.abs() @ normal.abs() + first.bias.abs())
                + deep.abs() @ normal.abs()  # flattened
                + deep.abs() @ (x[n].flatten() / 0.25 + 2)
                + (deep / 0.25).abs() @ x[n].flatten()
            )
            torch.testing.assert_close(terms[n, place], expected)


def test_what_the_slack_is():
    m = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert slack(m).tolist() == pytest.approx([2e-10, 3e-10])
    assert slack(m.float()).tolist() == pytest.approx([2e-5, 3e-5])
    assert slack(m, 1e9 * m.abs()).tolist() == pytest.approx([2e-10 + 16 * 2**-52 * 1e9, 3e-10 + 16 * 2**-52 * 2e9])
    assert slack(m.float(), m.float().abs() * 1e6)[0].item() == pytest.approx(2e-5 + 16 * 2**-23 * 1e6)
    assert slack(m.half()).tolist() == [torch.inf] * 2
