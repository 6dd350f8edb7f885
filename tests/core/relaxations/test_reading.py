"""What bounds go through, in the ways that people write it, and what they refuse."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm

from rs_plugins.core.architectures.cifar_resnet import CifarResNet
from rs_plugins.core.architectures.lenet import lenet
from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError

SHAPE = (2, 6, 6)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Written(nn.Module):
    """A network with a ``step`` in the middle, from (n, 2, 6, 6) to the same number of values or others."""

    def __init__(self, step, values=72, **parts):
        super().__init__()
        self.conv, self.last, self.step = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(values, 3), step
        for name, part in parts.items():
            setattr(self, name, part)
        self.register_buffer("mean", torch.tensor([0.4, 0.6]))
        self.register_buffer("order", torch.tensor([1, 0]))
        self.scale = nn.Parameter(torch.tensor([[[0.5]], [[-2.0]]]))

    def forward(self, x):
        return self.last(self.step(self, functional.relu(self.conv(x))).flatten(1))


def bounds(model, shape=SHAPE, methods=("ibp", "crown-ibp", "crown")):
    """Check that bounds of ``model`` hold at samples, and return how far apart the ends of the logits are."""
    model = model.double().eval()
    network = RelaxedNetwork(model, shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    points = (x + 0.04 * torch.rand(20, *x.shape, generator=generator, dtype=torch.float64) - 0.02).clamp(0, 1)
    with torch.no_grad():
        logits = model(points.flatten(0, 1)).unflatten(0, (20, 2))
        for method in methods:
            lower, upper = network.output_bounds(Region(x, 0.02), method=method)
            assert (lower <= logits.amin(0) + 1e-9).all()
            assert (upper >= logits.amax(0) - 1e-9).all()
    return float((upper - lower).mean())


STEPS = {
    "own normalisation": lambda m, x: (x - m.mean.view(1, -1, 1, 1)) / m.mean[None, :, None, None],
    "normalisation without a batch": lambda m, x: (x - m.mean.view(2, 1, 1)).div(m.mean.view(2, 1, 1)),
    "a parameter as a factor": lambda m, x: x * m.scale,
    "a factor before": lambda m, x: m.scale.exp() * x,
    "numbers": lambda m, x: 1 - 2 * (-x + 3) / 4,
    "a tensor made on the way": lambda m, x: x * torch.tensor(3.0),
    "sum": lambda m, x: torch.add(x, m.conv(x)),
    "sum with itself": lambda m, x: x + x,
    "difference": lambda m, x: x.sub(m.conv(x)),
    "sum in place": lambda m, x: operator.iadd(m.conv(x), x),
    "relu in place": lambda m, x: functional.relu(m.conv(x), inplace=True),
    "method": lambda m, x: m.conv(x).relu(),
    "torch": lambda m, x: torch.relu(m.conv(x)),
    "leaky": lambda m, x: functional.leaky_relu(m.conv(x), 0.3),
    "gelu": lambda m, x: functional.gelu(m.conv(x), approximate="tanh"),
    "elu": lambda m, x: functional.elu(m.conv(x), inplace=True),
    "view of sizes": lambda m, x: x.view(x.size(0), x.shape[1], -1),
    "squeeze": lambda m, x: x.unsqueeze(1).squeeze(1).contiguous(),
    "reshape": lambda m, x: torch.reshape(x, (-1, 72)),
    "dropout": lambda m, x: functional.dropout(x, 0.4, training=m.training),
    "permute": lambda m, x: x.permute(0, 2, 3, 1),
    "transpose": lambda m, x: torch.transpose(x, 1, 3),
    "relu of a plane": lambda m, x: torch.relu(m.scale.flatten() * x.permute(0, 2, 3, 1) + 0.3),
}
NARROWER = {
    "mean over pixels": (2, lambda m, x: x.mean((2, 3))),
    "mean by keyword": (2, lambda m, x: torch.mean(x, dim=(-2, -1), keepdim=True)),
    "sum over a row": (12, lambda m, x: x.sum(3)),
    "average pooling": (18, lambda m, x: functional.avg_pool2d(x, 2)),
    "average pooling, adaptive": (8, lambda m, x: functional.adaptive_avg_pool2d(x, (2, 2))),
    "average pooling, uneven": (32, lambda m, x: functional.adaptive_avg_pool2d(x, 4)),
    "max-pooling": (18, lambda m, x: functional.max_pool2d(x, 2)),
    "max-pooling by keywords": (18, lambda m, x: functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)),
    "max-pooling of what may be negative": (18, lambda m, x: functional.relu(functional.max_pool2d(m.conv(x), 2))),
    "slice": (18, lambda m, x: x[:, :, ::2, ::2]),
    "padding": (128, lambda m, x: functional.pad(x, (1, 1, 1, 1))),
    "reflection": (128, lambda m, x: functional.pad(x, (1, 1, 1, 1), mode="reflect")),
    "concatenation": (144, lambda m, x: torch.cat([x, m.conv(x)], dim=1)),
    "concatenation of rows": (144, lambda m, x: torch.cat((x, x), -1)),
}


def written(name):
    values, step = NARROWER.get(name, (72, STEPS.get(name)))
    return seeded(lambda: Written(step, values))


@pytest.mark.parametrize("name", [*STEPS, *NARROWER])
def test_ways_to_write_it(name):
    assert 1e-3 < bounds(written(name)) < 20


def test_a_step_with_parameters_looks_them_up():
    model = written("a parameter as a factor")
    narrow = bounds(model)
    network, region = RelaxedNetwork(model, SHAPE), Region(torch.full((1, *SHAPE), 0.5, dtype=torch.float64), 0.02)
    before = network.output_bounds(region)
    model.scale.data.mul_(3)
    assert bounds(model) > 1.5 * narrow
    after = network.output_bounds(region)
    assert not torch.allclose(before[0], after[0])
    assert list(vars(model)) == list(vars(written("a parameter as a factor")))


def test_no_attribute_is_hung_into_the_model():
    model = written("a tensor made on the way")
    before = list(vars(model))
    RelaxedNetwork(model, SHAPE)
    assert list(vars(model)) == before


MODULES = {
    "identity": lambda: [nn.Identity(), nn.Flatten(), nn.Linear(72, 3)],
    "unflatten": lambda: [nn.Flatten(), nn.Unflatten(1, (8, 3, 3)), nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(2, 3)],
    "zero padding": lambda: [nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(128, 3)],
    "same": lambda: [nn.Conv2d(2, 3, 3, padding="same", dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)],
    "grouped, uneven": lambda: [nn.Conv2d(2, 4, 3, 2, (0, 1), groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)],
    "parametrised": lambda: [
        parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ],
    "ends in an activation": lambda: [nn.Flatten(), nn.Linear(72, 3), nn.Softplus()],
    "ends in a normalisation": lambda: [nn.Flatten(), nn.Linear(72, 3), nn.BatchNorm1d(3)],
    "linear on rows": lambda: [nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)],
    "normalisation without parameters": lambda: [
        nn.BatchNorm2d(2, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    ],
    "max-pooling, dilated": lambda: [nn.MaxPool2d(2, 1, dilation=3), nn.Flatten(), nn.Linear(18, 3)],
    "dropout": lambda: [nn.Dropout2d(), nn.Flatten(), nn.Linear(72, 3), nn.Dropout()],
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    assert 1e-3 < bounds(seeded(lambda: nn.Sequential(*MODULES[name]()))) < 20


def test_lenet():
    assert bounds(seeded(lenet), (1, 28, 28), ("ibp", "crown-ibp")) > 0


class Residual(nn.Module):
    """SiLU, max-pooling and a shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act, self.last = nn.BatchNorm2d(4), nn.SiLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = functional.max_pool2d(self.act(self.norm(self.first(x))), 2)
        x = x + self.act(self.second(x))
        return self.last(self.act(x).mean((2, 3)))


def test_a_residual_network_with_silu_and_max_pooling():
    assert 1e-3 < bounds(seeded(Residual)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_resnets(shortcut):
    model = seeded(lambda: CifarResNet(8, shortcut=shortcut)).double().eval()
    x = seeded(lambda: torch.rand(1, 3, 8, 8, dtype=torch.float64))
    network = RelaxedNetwork(model, (3, 8, 8))
    y = torch.tensor([3])
    logits = model(x)[0]
    exact = torch.stack([logits[3] - logits[k] for k in range(10) if k != 3])
    for method in ("ibp", "crown-ibp", "crown"):
        with torch.no_grad():
            torch.testing.assert_close(network.margins(Region(x, 0.0), y, method=method)[0], exact)
            assert (network.margins(Region(x, 1e-3), y, method=method)[0] < exact).all()


class Opaque(nn.Module):
    def forward(self, x):
        return torch.softmax(x, 1)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) ** 2


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Overwriting(nn.Module):
    """A ReLU whose result is in the tensor that it was given."""

    def forward(self, x):
        z = x * 1.0
        torch.relu_(z)
        return z.flatten(1)


class Noisy(nn.Module):
    def forward(self, x):
        return (x + torch.rand(1)).flatten(1)


REFUSED = {
    "LayerNorm": (
        lambda: [nn.LayerNorm(6)],
        r"model: 1 \(LayerNorm\): bounds do not go through it; expected Conv2d, Linear, .*ReLU, .*SiLU",
    ),
    "Softmax": (lambda: [nn.Softmax(1)], r"model: 1 \(Softmax\): bounds do not go through it"),
    "softmax inside": (lambda: [nn.Sequential(Opaque())], r"model: 1.0 \(softmax\): bounds do not go through it"),
    "ConvTranspose2d": (
        lambda: [nn.ConvTranspose2d(2, 2, 1)],
        r"model: 1 \(ConvTranspose2d\): bounds do not go through it",
    ),
    "reflection": (
        lambda: [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")],
        r"model: 1 \(Conv2d\): expected padding_mode 'zeros', got 'reflect'",
    ),
    "own forward": (
        lambda: [OwnConv(2, 2, 1)],
        r"model: 1 \(OwnConv\): bounds do not go through it|model: 1 \(conv2d\): bounds",
    ),
    "branches": (lambda: [Branching()], r"model: torch.fx cannot follow the forward pass of Sequential, .*TraceError"),
    "in place": (
        lambda: [Overwriting()],
        r"^model: 1 \(method flatten\): expected values as they were computed, got a tensor that was .* since$",
    ),
    "indices": (lambda: [nn.MaxPool2d(2, return_indices=True)], r"model: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    layers, message = REFUSED[name]

    def make():
        model = nn.Sequential(nn.Conv2d(2, 2, 1), *layers(), nn.Flatten(), nn.LazyLinear(3))
        if name != "indices":
            model(torch.rand(2, *SHAPE))
        return model

    model = seeded(make)
    with pytest.raises(ModelError, match=message):
        RelaxedNetwork(model, SHAPE)


STEPS_REFUSED = {
    "product": (lambda m, x: x * m.conv(x), r"model: \S*\(?mul\)?: expected a constant factor, got two that depend"),
    "quotient": (
        lambda m, x: 1 / (x + 1),
        r"truediv\)?: expected a constant divisor, got one that depends on the input",
    ),
    "power": (lambda m, x: x**2, r"pow\)?: bounds do not go through it"),
    "mean of the batch": (
        lambda m, x: x - x.mean(0, keepdim=True),
        r"method mean\)?: expected a linear map of each ima",
    ),
    "other images": (lambda m, x: x.flip(0), r"method flip\)?: bounds do not go through it"),
    "clamp": (lambda m, x: x.clamp(max=1), r"method clamp\)?: bounds do not go through it"),
    "weighted sum": (lambda m, x: torch.add(x, x, alpha=2), r"add\)?: expected two arguments alone, got alpha as well"),
    "padding with ones": (
        lambda m, x: functional.pad(x, (1, 1), value=1.0)[..., 1:-1],
        "expected a linear map of each",
    ),
    "broadcast": (
        lambda m, x: x + x[:, :1],
        r"add\)?: expected two of the same shape, got \(2, 6, 6\) and \(1, 6, 6\)",
    ),
    "dropout": (
        lambda m, x: functional.dropout(x, 0.0),
        r"dropout\)?: expected dropout that is off in eval mode, got o",
    ),
    "mixed images": (lambda m, x: x.transpose(0, 1).reshape(x.shape[0], -1), r"expected a linear map of each image"),
    "chunks": (lambda m, x: sum(x.chunk(2, 1)), r"method chunk\)?: bounds do not go through it|cannot follow"),
    "picked by a tensor": (
        lambda m, x: x[:, m.order],
        r"getitem\)?: expected numbers beside the input, got a tensor",
    ),
    "threshold": (lambda m, x: functional.threshold(x, 0.1, 0.0), r"threshold\)?: bounds do not go through it"),
}


@pytest.mark.parametrize("name", STEPS_REFUSED)
def test_steps_refused(name):
    step, message = STEPS_REFUSED[name]
    model = seeded(lambda: Written(step, 36 if name == "chunks" else 72))
    with pytest.raises(ModelError, match=message):
        RelaxedNetwork(model, SHAPE)


def test_hooks_are_refused():
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    hooked, pruned, old = (seeded(make) for _ in range(3))
    hooked[1].register_forward_hook(lambda module, args, output: output + 1)
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    old[2] = seeded(lambda: spectral_norm(old[2]))
    for model, where in ((hooked, r"1 \(ReLU\)"), (pruned, r"0 \(Linear\)"), (old, r"2 \(Linear\)")):
        with pytest.raises(ModelError, match=rf"model: {where}: it has forward hooks, which bounds cannot see through"):
            RelaxedNetwork(model, (4,))
    prune.remove(pruned[0], "weight")
    pruned[0].bias.data.fill_(1.0)
    assert bounds(pruned, (4,)) > 0


class Around(nn.Module):
    """A ReLU in place in the middle, with the values before it added."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        z = self.first(x)
        return self.last(z + self.act(z))


def test_values_that_are_changed_before_they_are_used_are_refused():
    """Also where the images on which the layers are tried do not show it."""
    model = seeded(Around)
    model.first.bias.data.fill_(10.0)
    with pytest.raises(ModelError, match=r"^model: add: expected values as they were computed, got a tensor that was "):
        RelaxedNetwork(model, (4,))
    model.act.inplace = False
    assert bounds(model, (4,)) > 0


def test_a_forward_of_a_module_s_own_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].forward = lambda z: z.clamp(0, 1000)
    with pytest.raises(ModelError, match=r"model: 1 \(ReLU\): it has a forward of its own instead of that"):
        RelaxedNetwork(model, (4,))


def test_what_depends_on_the_number_of_images_is_refused():
    model = seeded(lambda: Written(lambda m, x: x * x.shape[0]))
    with pytest.raises(ModelError, match="depend on other images of the batch or their number"):
        RelaxedNetwork(model, SHAPE)


def test_a_pooling_with_a_divisor_below_0_is_refused():
    model = nn.Sequential(nn.AvgPool2d(2, divisor_override=-2), nn.Flatten(), nn.Linear(18, 2))
    with pytest.raises(ModelError, match=r"model: 0 \(AvgPool2d\): expected a linear map without factors below 0"):
        RelaxedNetwork(model, SHAPE)


def test_a_module_that_was_replaced_is_not_bounded_in_its_old_form():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    network, region = RelaxedNetwork(model, (4,)), Region(torch.full((1, 4), 0.5), 0.1)
    network.output_bounds(region)
    model[2][0] = nn.Linear(4, 2)
    with pytest.raises(ModelError, match=r"model: 2.0: expected the module that was there when .* got another; make a"):
        network.output_bounds(region)
    model[2] = nn.Identity()
    with pytest.raises(ModelError, match=r"model: 2.0: expected the module that was there .*, got none; make a new Re"):
        network.output_bounds(region)


def test_noise_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        InputError, match=r"model: expected a base classifier, got a SmoothedModel; noise would be added"
    ):
        RelaxedNetwork(SmoothedModel(model, sigma=0.1), (4,))
    with (
        torch.random.fork_rng(),
        pytest.raises(ModelError, match=r"give other logits than its forward pass; .* add noise"),
    ):
        RelaxedNetwork(nn.Sequential(Noisy(), nn.Linear(4, 2)), (4,))


def test_a_model_that_does_not_fit():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(ModelError, match=r"model: it fails on an input of shape \(1, 4\)"):
        RelaxedNetwork(model, (4,))
    with pytest.raises(ModelError, match=r"model: expected logits of shape \(1, classes\), got shape \(1, 2, 5\)"):
        RelaxedNetwork(nn.ReLU(), (2, 5))
    with pytest.raises(ModelError, match="model: expected at least one layer, got a model that returns its input"):
        RelaxedNetwork(nn.Sequential(), (5,))
