import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.bounds import margins, output_bounds
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.normalising import batch_statistics
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.errors import InputError, ModelError

METHODS = ("ibp", "crown-ibp", "crown")
SHAPE = (2, 7, 7)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def small_cnn():
    return seeded(
        lambda: nn.Sequential(
            Normalise([0.4, 0.5], [0.5, 0.25]),
            *(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
    ).double()


def images(n=3, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Y = torch.tensor([0, 2, 1])


def plain_margins(logits, y):
    rows = logits.tolist()
    found = [[row[label] - row[k] for k in range(len(row)) if k != label] for row, label in zip(rows, y, strict=True)]
    return torch.tensor(found, dtype=logits.dtype)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_without_radius_margins_are_those_of_the_logits(method, norm):
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    bounds = network.margins(Region(x, 0.0, norm), Y, method=method)
    torch.testing.assert_close(bounds, plain_margins(network.logits(x), Y.tolist()), rtol=0, atol=1e-12)
    lower, upper = network.output_bounds(Region(x, 0.0, norm), method=method)
    torch.testing.assert_close(lower, network.logits(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, network.logits(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_larger_region_has_lower_means(method, norm):
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    means = [network.margins(Region(x, eps, norm), Y, method=method).mean().item() for eps in (0.0, 0.01, 0.05, 0.2)]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[1] > means[3]


def test_each_image_has_its_radius():
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    together = network.margins(Region(x, torch.tensor([0.0, 0.1, 0.02])), Y)
    for i, eps in enumerate((0.0, 0.1, 0.02)):
        alone = network.margins(Region(x[i : i + 1], eps), Y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-7)  # eps was in single precision


@pytest.mark.parametrize("method", METHODS)
def test_an_image_knows_nothing_of_its_batch(method):
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    together = network.margins(Region(x, 0.05), Y, method=method)
    alone = [network.margins(Region(x[i : i + 1], 0.05), Y[i : i + 1], method=method) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-13)


def test_tighter_methods_have_higher_means():
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    ibp, crown_ibp, crown = (network.margins(Region(x, 0.05), Y, method=method) for method in METHODS)
    assert ibp.mean() < crown_ibp.mean() < crown.mean()
    assert (crown_ibp >= ibp).all()
    optimised = network.alpha_margins(Region(x, 0.05), Y, steps=10, lr=0.2)
    assert (optimised >= crown - 1e-12).all()
    assert optimised.mean() > crown.mean() + 1e-4
    assert not optimised.requires_grad


def test_means_on_the_cnn3_of_the_papers():
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 4, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(200, 10)),
        )
    )
    x, y = images(2, (1, 28, 28)), Y[:2]
    single, double = {}, {}
    for method in METHODS:
        single[method] = RelaxedNetwork(model.float(), (1, 28, 28)).margins(Region(x.float(), 0.1), y, method=method)
        double[method] = RelaxedNetwork(model.double(), (1, 28, 28)).margins(Region(x, 0.1), y, method=method)
        torch.testing.assert_close(single[method].double(), double[method], rtol=1e-4, atol=1e-4)
    assert double["ibp"].mean() < double["crown-ibp"].mean() < double["crown"].mean()
    assert single["crown"].dtype == torch.float32


def test_the_lower_slope():
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    adaptive, parallel = (
        network.margins(Region(x, 0.05), Y, method="crown-ibp", lower_slope=slope) for slope in ("adaptive", "parallel")
    )
    assert not torch.allclose(adaptive, parallel)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_change_nothing(chunk):
    network, x = RelaxedNetwork(small_cnn(), SHAPE), images()
    expected = network.margins(Region(x, 0.05), Y)
    torch.testing.assert_close(network.margins(Region(x, 0.05), Y, chunk=chunk), expected, rtol=0, atol=1e-13)


def test_given_intervals_are_taken():
    network, region = RelaxedNetwork(small_cnn(), SHAPE), Region(images(), 0.05)
    intervals = network.intervals(region)
    shapes = [tuple(lower.shape) for lower, _ in intervals.values()]
    assert shapes == [(3, 3, 4, 4), (3, 4, 4, 4), (3, 6)]
    assert all((lower <= upper).all() for lower, upper in intervals.values())
    expected = network.margins(region, Y, method="ibp")
    torch.testing.assert_close(network.margins(region, Y, method="ibp", intervals=intervals), expected, rtol=0, atol=0)
    tight = {name: (low + 0.4 * (high - low), high - 0.4 * (high - low)) for name, (low, high) in intervals.items()}
    assert network.margins(region, Y, method="ibp", intervals=tight).mean() > expected.mean()
    with pytest.raises(InputError, match=r"intervals: expected those of this network's activations, got 'other' as we"):
        network.margins(region, Y, intervals={"other": intervals[next(iter(intervals))]})


@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_the_parameters(method, slope):
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 3, 2, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        )
    ).double()
    for layer in (model[0], model[2], model[5]):
        layer.weight.data.mul_(2)
        layer.bias.data.copy_(torch.linspace(-0.3, 0.5, len(layer.bias)))
    network, x = RelaxedNetwork(model, (1, 4, 4)), images(2, (1, 4, 4))
    names = [name for name, _ in network.named_parameters()]

    def bounds(*values):
        options = {"method": method, "lower_slope": slope}
        return functional_call(
            network, dict(zip(names, values, strict=True)), (Region(x, 0.05), Y[:1].repeat(2)), options
        )

    values = [value.detach().clone().requires_grad_() for value in model.parameters()]
    assert torch.autograd.gradcheck(bounds, values)
    gradients = torch.autograd.grad(bounds(*values).sum(), values)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_twin_with_other_units(method, norm):
    model = small_cnn()
    twin = copy.deepcopy(model)
    twin[0].std.mul_(2)
    twin[1].weight.data.mul_(2)
    region = Region(images(), 0.05, norm)
    ours, theirs = (RelaxedNetwork(m, SHAPE).margins(region, Y, method=method) for m in (model, twin))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parameters_are_looked_up_at_each_call():
    model = small_cnn()
    network, region = RelaxedNetwork(model, SHAPE), Region(images(), 0.05)
    before = network.margins(region, Y)
    model[-1].weight.data.mul_(2)
    model[-1].bias.data.mul_(2)
    torch.testing.assert_close(network.margins(region, Y), 2 * before)
    model.float()
    assert network.margins(Region(images().float(), 0.05), Y).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_stacked_parameters(method):
    network, region = RelaxedNetwork(small_cnn(), SHAPE), Region(images(), 0.05)
    generator = torch.Generator().manual_seed(0)
    stacked = {
        name: value.detach() + 0.05 * torch.randn(3, *value.shape, generator=generator, dtype=value.dtype)
        for name, value in network.named_parameters()
    }

    def bounds(parameters):
        return functional_call(network, parameters, (region, Y), {"method": method})

    together = vmap(bounds)(stacked)
    for i in range(3):
        single = bounds({name: value[i] for name, value in stacked.items()})
        torch.testing.assert_close(together[i], single, rtol=0, atol=1e-12)
    if method != "crown":  # torch warns that it is slow at one of the steps back through windows
        slopes = vmap(grad(lambda parameters: bounds(parameters).sum()))(stacked)
        alone = grad(lambda parameters: bounds(parameters).sum())({name: value[1] for name, value in stacked.items()})
        for name, slope in alone.items():
            torch.testing.assert_close(slopes[name][1], slope, rtol=0, atol=1e-11)


class Pooled(nn.Module):
    """Pooling of both kinds, a shortcut, a mean, a normalisation and a smooth activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.pools, self.last = nn.Sequential(nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1, 1)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.pools(torch.relu(self.norm(self.conv(x))))
        return self.last(nn.functional.silu(self.way(x) + x).mean((2, 3)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS[:2])
def test_stacked_parameters_of_other_layers(method, norm):
    model = seeded(Pooled).double().eval()
    network, region = RelaxedNetwork(model, SHAPE), Region(images(), 0.05, norm)
    generator = torch.Generator().manual_seed(0)
    stacked = {
        name: value.detach() + 0.05 * torch.randn(2, *value.shape, generator=generator, dtype=value.dtype)
        for name, value in network.named_parameters()
    }

    def bounds(parameters):
        return functional_call(network, parameters, (region, Y), {"method": method})

    together = vmap(bounds)(stacked)
    for i in range(2):
        single = bounds({name: value[i] for name, value in stacked.items()})
        torch.testing.assert_close(together[i], single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_affine_layers_in_a_row_with_padding(method):
    """What a convolution, a normalisation and a mean over padded windows do together is one affine map."""

    def make():
        front = [nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)]
        return nn.Sequential(*front, nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(50, 3))

    model = seeded(make).double().eval()
    model[2].running_mean.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    model[2].bias.data.fill_(0.7)
    with torch.no_grad():
        model[3].bias.sub_(model[:4](images()).mean((0, 2, 3)))
    with torch.no_grad():
        size = torch.Size(SHAPE).numel()
        points = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *SHAPE)
        images_of = model[:4](points).flatten(1)
    together = nn.Linear(size, 50).double()
    together.weight.data, together.bias.data = (images_of[1:] - images_of[:1]).T.contiguous(), images_of[0]
    folded = nn.Sequential(nn.Flatten(), together, nn.ReLU(), model[6])
    region = Region(images(), 0.02)
    ((lower, upper),) = RelaxedNetwork(folded, SHAPE).intervals(region).values()
    assert ((lower < 0) & (upper > 0)).float().mean() > 0.1
    ours, theirs = (RelaxedNetwork(m, SHAPE).margins(region, Y, method=method) for m in (model, folded))
    if method == "crown":
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    else:  # intervals widen at each convolution
        assert (ours <= theirs + 1e-12).all()
        assert ours.mean() < theirs.mean()


def test_a_ball_goes_exactly_through_the_first_layer():
    """Row norms after normalisation, for a convolution and for a linear layer."""
    for model, shape in (
        (nn.Sequential(Normalise([0.4, 0.5], [0.5, 0.25]), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()), SHAPE),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (6,)),
    ):
        seeded(lambda model=model: [layer.reset_parameters() for layer in model if hasattr(layer, "reset_parameters")])
        whole = nn.Sequential(*model, nn.Flatten(), nn.LazyLinear(2)).double()
        x = 0.5 + 0 * images(1, shape)
        whole(x)
        ((lower, upper),) = RelaxedNetwork(whole, shape).intervals(Region(x, 0.3, "l2")).values()
        rows = torch.autograd.functional.jacobian(model[:-1].double(), x).flatten(4 if len(shape) == 3 else 2)
        radius = 0.3 * rows.norm(dim=-1).view_as(lower)
        centre = model[:-1](x)
        torch.testing.assert_close(lower, centre - radius)
        torch.testing.assert_close(upper, centre + radius)


def batch_norm_network():
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(75, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 3)),
        )
    ).double()


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_the_batch(method):
    model, x = batch_norm_network().train(), images()
    network = RelaxedNetwork(model, SHAPE)
    with batch_statistics(model) as statistics:
        logits = model(x)
    assert list(statistics) == ["1", "5"]
    bounds = network.margins(Region(x, 0.0), Y, method=method, statistics=statistics)
    torch.testing.assert_close(bounds, plain_margins(logits, Y.tolist()), rtol=0, atol=1e-10)
    gradient = torch.autograd.grad(bounds.sum(), model[0].weight)[0]
    rows = torch.eye(3, dtype=torch.float64)
    through_the_model = sum(
        ((rows[label] - rows[k]) * model(x)[i]).sum() for i, label in enumerate(Y) for k in range(3)
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(through_the_model, model[0].weight)[0])
    assert not any(part._forward_pre_hooks for part in model.modules())
    with pytest.raises(ModelError, match=r"model: 1 \(BatchNorm2d\) takes the statistics of its batch: collect those"):
        network.margins(Region(x, 0.1), Y, method=method)
    model.eval()
    with batch_statistics(model) as statistics:
        model(x)
    assert not statistics


def test_running_statistics():
    model, x = batch_norm_network().train(), images()
    model(x + 1)
    model.eval()
    bounds = RelaxedNetwork(model, SHAPE).margins(Region(x, 0.0), Y)
    torch.testing.assert_close(bounds, plain_margins(model(x), Y.tolist()), rtol=0, atol=1e-12)


def test_dropout_in_train_mode():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))).double()
    network, region = RelaxedNetwork(model, (4,)), Region(images(3, (4,)), 0.1)
    with pytest.raises(
        ModelError, match=r"model: 2 \(Dropout\): bounds go through dropout in eval mode alone; it is in"
    ):
        network.margins(region, Y)
    model.eval()
    assert network.margins(region, Y).isfinite().all()


def test_the_guest_is_left_as_it_was():
    model = batch_norm_network().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, modes = dict(vars(model)), [part.training for part in model.modules()]
    network = RelaxedNetwork(model, SHAPE)
    model.eval()
    network.alpha_margins(Region(images(), 0.1), Y, steps=2)
    model.train()
    model[1].eval()
    assert vars(model) == attributes
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(list(model.parameters())) - 1)]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert list(dict(network.named_children())) == ["model"]


def test_a_deep_network_is_no_deep_recursion():
    layers = [part for _ in range(600) for part in (nn.Linear(2, 2), nn.ReLU())]
    model = seeded(lambda: nn.Sequential(*layers, nn.Linear(2, 2))).double()
    for layer in model[::2]:
        nn.init.eye_(layer.weight)
    network, x = RelaxedNetwork(model, (2,)), images(1, (2,))
    for method in ("ibp", "crown-ibp"):
        assert network.margins(Region(x, 0.1), Y[:1], method=method).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_no_images(method):
    network, y = RelaxedNetwork(small_cnn(), SHAPE), torch.empty(0, dtype=torch.long)
    assert network.margins(Region(images(0), 0.1), y, method=method).shape == (0, 2)


def test_copies_are_of_their_own():
    network, region = RelaxedNetwork(small_cnn(), SHAPE), Region(images(), 0.05)
    before = network.margins(region, Y)
    twin = copy.deepcopy(network)
    twin.model[-1].weight.data.zero_()
    assert torch.equal(network.margins(region, Y), before)
    assert not torch.allclose(twin.margins(region, Y), before)


def test_one_call():
    model, x = small_cnn(), images()
    network, region = RelaxedNetwork(model, SHAPE), Region(x, 0.2, "l2")
    options = {"method": "crown-ibp", "lower_slope": "parallel", "chunk": 3}
    expected = network.margins(region, Y, **options)
    assert torch.equal(margins(model, x, Y, 0.2, norm="l2", **options), expected)
    assert torch.equal(margins(network, x, Y.int(), 0.2, norm="l2", **options), expected)
    assert torch.equal(margins(model, x, Y, 0.2), network.margins(Region(x, 0.2), Y, method="crown"))
    lower, upper = output_bounds(model, x, 0.2, norm="l2", **options)
    assert torch.equal(lower, network.output_bounds(region, **options)[0])
    assert (lower <= upper).all()


def test_what_is_handed_in_is_looked_at():
    model, x = small_cnn(), images()
    network = RelaxedNetwork(model, SHAPE)
    with pytest.raises(
        InputError, match=r"x: expected the type and device of the model \(torch.float64, cpu\), got tor"
    ):
        margins(network, x.float(), Y, 0.1)
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 3\), got values from 1 to 3"):
        margins(network, x, Y + 1, 0.1)
    with pytest.raises(InputError, match=r"x: expected pixels in \[0, 1\], got values from"):
        margins(network, x * 3, Y, 0.1)
    with pytest.raises(InputError, match=r"eps: expected finite values >= 0, got -0.1"):
        margins(network, x, Y, -0.1)
    with pytest.raises(InputError, match=r"norm: expected one of 'linf', 'l2', got 'l1'"):
        margins(network, x, Y, 0.1, norm="l1")
    with pytest.raises(InputError, match=r"method: expected one of 'ibp', 'crown-ibp', 'crown', got 'deepz'"):
        margins(network, x, Y, 0.1, method="deepz")
    with pytest.raises(InputError, match=r"lower_slope: expected one of 'adaptive', 'parallel', got 'zero'"):
        margins(network, x, Y, 0.1, lower_slope="zero")
    with pytest.raises(InputError, match=r"chunk: expected .*, got 0"):
        margins(network, x, Y, 0.1, chunk=0)
    with pytest.raises(InputError, match=r"region: expected images \(n, \*\(2, 7, 7\)\), got shape \(3, 2, 7, 6\)"):
        margins(network, x[..., 1:], Y, 0.1)
    with pytest.raises(InputError, match=r"steps: expected .*, got 0"):
        network.alpha_margins(Region(x, 0.1), Y, steps=0)
    with pytest.raises(InputError, match=r"model: expected a torch.nn.Module, got function"):
        margins(lambda z: z, x, Y, 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("function", [margins, output_bounds])
def test_autocast_makes_no_bounds_of_fewer_digits(function, norm):
    model = seeded(small_cnn).float().eval()
    x, rest = images().float(), ([Y] if function is margins else [])
    expected = function(model, x, *rest, 0.01, norm=norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(model, x, *rest, 0.01, norm=norm)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
