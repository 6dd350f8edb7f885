"""GLS as an objective: its settings, its schedules, what it leaves untouched, and that it certifies more."""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from rs_plugins.core.relaxations.network import RelaxedNetwork
from rs_plugins.core.relaxations.regions import Region
from rs_plugins.core.streams import stream
from rs_plugins.core.training import gls
from rs_plugins.core.training.certified_loss import CertifiedLoss
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.core.training.eps_schedule import SmoothEps
from rs_plugins.core.training.gaussian import plain
from rs_plugins.core.training.gls import Gls
from rs_plugins.core.training.gradient_estimators import RGS, PlainGradient
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.methods import make_objective
from rs_plugins.core.training.objective import Batch, StreamDraws, weighted
from rs_plugins.core.training.pgpe import PGPE
from rs_plugins.errors import InputError, ModelError

BOUNDS = ("ibp", "crown-ibp", "crown")
GRADIENTS = {"plain": {}, "rgs": {"draws": 2}, "pgpe": {"population": 4}}


def draws(seed=0):
    return StreamDraws(stream(seed, "test"), seed)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 4)),
    )


@pytest.fixture
def batch():
    source = torch.Generator().manual_seed(1)
    x, y = torch.rand(8, 1, 6, 6, generator=source), torch.randint(0, 4, (8,), generator=source)
    return Batch(x, y, epoch=1, elapsed=1.5)


def value_and_gradients(objective, model, batch):
    value = objective(model, batch, draws())
    value.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return value.detach(), found


def same(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


# ---- what is minimised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_plain_gradient_is_that_of_the_certified_loss_at_this_time_of_the_ramp(bound, batch):
    settings = {"bound": bound, "w_rob": 0.7, "l1": 1e-3, "regulariser": 0.25}
    objective = Gls(0.1, gradient="plain", ramp_start=1, ramp=2, ramp_shape="linear", **settings)
    loss = CertifiedLoss(RelaxedNetwork(network(), (1, 6, 6)), **settings)
    value = loss(batch.x, batch.y, 0.025, 0.25)
    value.backward()
    found, gradients = value_and_gradients(objective, network(), batch)
    torch.testing.assert_close(found, value.detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, loss.network.model.get_parameter(name).grad)


@pytest.mark.parametrize("bound", BOUNDS)
def test_rgs_without_noise_is_the_plain_gradient_bit_for_bit(bound, batch):
    one, other = network(), network()
    settings = {"bound": bound, "w_rob": 0.8, "l1": 1e-3, "ramp": 3}
    expected = value_and_gradients(Gls(0.05, gradient="plain", **settings), one, batch)
    assert same(value_and_gradients(Gls(0.05, sigma_w=0, **settings), other, batch), expected)
    assert not same(value_and_gradients(Gls(0.05, **settings), other, batch), expected)
    assert all(torch.equal(value, other.state_dict()[name]) or "running" in name or "batches" in name
               for name, value in one.state_dict().items())  # fmt: skip


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_at_several_weights_at_once_are_those_one_after_the_other(bound, batch):
    some = dataclasses.replace(batch, x=batch.x.double())
    objectives = [Gls(0.05, bound=bound, gradient="pgpe", population=8, chunk=chunk, ramp=3) for chunk in (1, 6)]
    one, other = (value_and_gradients(each, network().double(), some) for each in objectives)
    torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)
    assert not objectives[1]._estimator._state.sequential


def test_each_setting_arrives_where_it_belongs():
    rgs = Gls(0.1, draws=3, sigma_w=0.3, noise_mode="fixed", antithetic=False)
    assert rgs._estimator == RGS(draws=3, sigma_w=0.3, mode="fixed", antithetic=False)
    assert Gls(0.1)._estimator == RGS(draws=2, sigma_w=0.1, mode="relative", antithetic=True)
    pgpe = Gls(0.1, gradient="pgpe", population=8, sigma_w=0.3, ranks=True, adapt=True, lr_sd=0.2, chunk=4)
    assert pgpe._estimator == PGPE(population=8, sigma_w=0.3, ranks=True, adapt=True, lr_sd=0.2, chunk=4)
    assert Gls(0.1, gradient="pgpe")._estimator == PGPE(population=256, sigma_w=0.01)
    assert Gls(0.1, gradient="plain")._estimator == PlainGradient()
    assert Gls(0.1, ramp_start=1, ramp=3, ramp_shape="linear").schedule == SmoothEps(0.1, 1, 3, "linear")
    assert Gls(0.1).schedule == SmoothEps(0.1, 0, 20, "smooth")


def test_the_lower_slope_counts(batch):
    values = [
        value_and_gradients(Gls(0.05, gradient="plain", ramp=0, lower_slope=slope), network(), batch)[0]
        for slope in ("adaptive", "parallel")
    ]
    assert values[0] != values[1]


def test_the_noise_falls_geometrically_after_the_ramp(batch):
    objective = Gls(0.1, sigma_w=0.2, sigma_w_end=0.05, decay=4, ramp_start=1, ramp=2)
    expected = {0: 1, 3: 1, 4: 0.25**0.25, 5: 0.5, 7: 0.25, 50: 0.25}
    for elapsed, scale in expected.items():
        assert objective.noise_scale(elapsed) == pytest.approx(scale)
    at_once = dataclasses.replace(objective, decay=0)
    assert [at_once.noise_scale(elapsed) for elapsed in (2.9, 3)] == [1, 0.25]
    assert Gls(0.1, sigma_w=0.2).noise_scale(50) == 1
    later = dataclasses.replace(batch, elapsed=5.0)
    torch.testing.assert_close(
        value_and_gradients(objective, network(), later), value_and_gradients(Gls(0.1, ramp=0), network(), later)
    )


def test_weights_and_halves_of_a_batch_go_with_it(batch):
    """As two processes take them: the noise of both is the same, and so is the mean of their gradients."""
    objective = Gls(0.05, ramp=0, regulariser=0, w_rob=0.9)
    model = network().eval()

    def taken(rows, factor):
        some = dataclasses.replace(batch, x=batch.x[rows], y=batch.y[rows])
        weighted(objective, factor)(model, some, BlockDraws(7, "training step 3", first=rows.start)).backward()
        found = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return found

    halves = [taken(rows, 0.5) for rows in (slice(0, 4), slice(4, 8))]
    for whole, one, other in zip(taken(slice(0, 8), 1.0), *halves, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-4, atol=1e-5)


# ---- a guest's manners -----------------------------------------------------------------------------------------------


def state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "asking": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "names": [list(vars(module)) for module in model.modules()],
    }


RUNNING = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("elapsed", [1.5, 9.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_only_running_statistics_change_and_those_once(bound, gradient, elapsed, batch):
    model, seen = network().train(), network().train()
    for each in (model, seen):
        each[0].weight.requires_grad_(False)
        each[3].bias.grad = torch.full_like(each[3].bias, 0.5)
    seen(batch.x)
    before, numbers = state(model), torch.get_rng_state()
    objective = Gls(0.05, bound=bound, gradient=gradient, ramp=3, **GRADIENTS[gradient])
    objective(model, dataclasses.replace(batch, elapsed=elapsed), draws())
    after = state(model)
    assert {key for key, value in before.pop("tensors").items() if value != after["tensors"][key]} == RUNNING
    assert all(torch.equal(model.state_dict()[name], seen.state_dict()[name]) for name in RUNNING)
    after.pop("tensors")
    assert after == before
    assert torch.equal(numbers, torch.get_rng_state())


@pytest.mark.parametrize("gradient", ["rgs", "pgpe"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_leaves_everything_as_it_was(gradient, at, batch):
    """The third call is one more loss of PGPE, or the clean pass after the two gradients of RGS."""
    model = network().train()
    objective = Gls(0.05, gradient=gradient, ramp=3, **GRADIENTS[gradient])
    objective(model, batch, draws())
    before = state(model)
    calls = []

    def stumble(*_):
        calls.append(1)
        if len(calls) == at:
            raise MemoryError

    handle = model[4].register_forward_hook(stumble)
    with pytest.raises(MemoryError):
        objective(model, batch, draws())
    handle.remove()
    if gradient == "rgs" and at == 3:  # the pass that is to move them
        before["tensors"] = {name: value for name, value in before["tensors"].items() if name not in RUNNING}
        assert before["tensors"].items() <= state(model)["tensors"].items()
    else:
        assert state(model) == before


def test_a_model_is_read_once_and_again_if_it_is_another(batch, monkeypatch):
    read = []

    def reading(model, shape):
        read.append(shape)
        return RelaxedNetwork(model, shape)

    monkeypatch.setattr(gls, "RelaxedNetwork", reading)
    objective, model = Gls(0.05, gradient="plain"), network()
    for _ in range(3):
        objective(model, batch, draws())
    assert read == [(1, 6, 6)]
    model[6] = nn.Linear(16, 5)
    objective(model, batch, draws())
    objective(network(), batch, draws())
    assert len(read) == 3


@pytest.mark.parametrize("place", [0, 5])
def test_what_bounds_do_not_go_through_is_refused_before_the_ramp(place, batch):
    model = network()
    model.insert(place, nn.Dropout(0.5))
    before = state(model)
    for regulariser in (0.0, 0.5):
        objective = Gls(0.05, gradient="plain", ramp_start=5, regulariser=regulariser)
        with pytest.raises(ModelError, match=rf"{place} \(Dropout\)"):
            objective(model, batch, draws())
    assert state(model) == before
    model[place].eval()
    assert objective(model, batch, draws()).isfinite()


def test_copies_and_pickles_of_an_objective_have_no_model(batch):
    objective, model = Gls(0.05, l1=0.5), network()
    objective(model, batch, draws())
    for each in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective), dataclasses.replace(objective)):
        assert each == objective
        assert hash(each) == hash(objective)
        assert repr(each) == repr(objective)
    assert "Sequential" not in repr(objective)
    assert len(pickle.dumps(objective)) < 2000
    known = weakref.ref(model)
    kept = copy.deepcopy(objective)
    del objective, model, each
    gc.collect()
    assert known() is None
    assert kept == Gls(0.05, l1=0.5)


def test_the_state_is_that_of_adapted_deviations(batch):
    assert Gls(0.05).state_dict() == {}
    Gls(0.05).load_state_dict({})
    with pytest.raises(InputError, match="state: expected none, as adapt is False, got standard deviations"):
        Gls(0.05).load_state_dict({"a": torch.ones(1)})
    objectives = [Gls(0.05, gradient="pgpe", population=4, adapt=True) for _ in range(2)]
    model = network()
    value_and_gradients(objectives[0], model, batch)
    found = objectives[0].state_dict()
    assert {name.rpartition("model.")[2] for name in found} == {name for name, _ in model.named_parameters()}
    objectives[1].load_state_dict(found)
    assert same(*(value_and_gradients(each, copy.deepcopy(model), batch) for each in objectives))


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "lower_slope"), [*((bound, "adaptive") for bound in BOUNDS), ("crown", "parallel")])
def test_validation_counts_images_whose_margins_are_positive(bound, lower_slope):
    source = torch.Generator().manual_seed(1)
    x, model = torch.rand(60, 1, 6, 6, generator=source), network().eval()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
        y[:20] = (y[:20] + 1) % 4
        read, how = RelaxedNetwork(model, (1, 6, 6)), {"method": bound, "lower_slope": lower_slope}
        for eps in (0.005, 0.02, 0.03, 0.04):
            least = read.margins(Region(x, eps), y, **how).amin(dim=1)
            found = Gls(eps, bound=bound, lower_slope=lower_slope).validate(model, x, y)
            assert int((least > 1e-4).sum()) <= found <= int((least > 0).sum()) <= 40
            assert found > 0 or eps > 0.005
    assert Gls(0.005).figure == "certified accuracy"


@pytest.mark.parametrize(("margin", "count"), [(5e-6, 0), (2e-5, 3)])
def test_validation_leaves_room_for_rounding(margin, count):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([margin, 0.0]))
        assert Gls(0.1).validate(model, torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)) == count


def test_validation_takes_all_digits_and_proves_nothing_in_half_precision(monkeypatch):
    source = torch.Generator().manual_seed(1)
    x, model = torch.rand(60, 1, 6, 6, generator=source), network().eval()
    y = model(x).argmax(dim=1)
    objective, margins = Gls(0.005), []
    expected, network_read = objective.validate(model, x, y), objective._read(model, x)
    read = network_read.margins
    monkeypatch.setattr(network_read, "margins", lambda *args, **how: margins.append(read(*args, **how)) or margins[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.validate(model, x, y) == expected > 0
    (found,) = margins
    assert torch.equal(found, read(Region(x, 0.005), y, method="crown-ibp", lower_slope="adaptive"))
    assert Gls(0.005).validate(model.bfloat16(), x.bfloat16(), y) == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, r"eps: expected a radius in pixels of \[0, 1\], got 8.0; divide by 255"),
        ({"eps": 0}, "eps: expected a finite number > 0, got 0"),
        ({"bound": "deepz"}, "bound: expected one of 'ibp', 'crown-ibp', 'crown', got 'deepz'"),
        ({"gradient": "es"}, "gradient: expected one of 'plain', 'rgs', 'pgpe', got 'es'"),
        ({"ramp_shape": "step"}, "ramp_shape: expected one of 'smooth', 'linear', got 'step'"),
        ({"lower_slope": "zero"}, "lower_slope: expected one of 'adaptive', 'parallel', got 'zero'"),
        ({"noise_mode": "none"}, "noise_mode: expected one of 'relative', 'fixed', got 'none'"),
        ({"w_rob": 1.5}, r"w_rob: expected a number in \[0, 1\], got 1.5"),
        ({"l1": -1}, "l1: expected a finite number >= 0, got -1"),
        ({"regulariser": -1}, "regulariser: expected a finite number >= 0, got -1"),
        ({"ramp": -1}, "ramp: expected a finite number >= 0, got -1"),
        ({"draws": 3}, "draws: expected an even number of antithetic draws, got 3"),
        ({"draws": 2.5}, "draws: expected an integer >= 1, got 2.5"),
        ({"gradient": "pgpe", "population": 7}, "population: expected an even number"),
        ({"gradient": "pgpe", "sigma_w": 0}, "sigma_w: expected a finite number > 0, got 0"),
        ({"gradient": "plain", "draws": 4}, "draws: only for the gradient 'rgs', got 4 with 'plain'"),
        ({"gradient": "plain", "sigma_w": 0.1}, "sigma_w: only for the gradient 'rgs' or 'pgpe', got 0.1 with 'plain'"),
        ({"gradient": "plain", "decay": 3}, "decay: only for the gradient 'rgs' or 'pgpe', got 3.0 with 'plain'"),
        ({"population": 64}, "population: only for the gradient 'pgpe', got 64 with 'rgs'"),
        ({"ranks": True}, "ranks: only for the gradient 'pgpe', got True with 'rgs'"),
        ({"gradient": "pgpe", "draws": 4}, "draws: only for the gradient 'rgs', got 4 with 'pgpe'"),
        ({"gradient": "pgpe", "noise_mode": "fixed"}, "noise_mode: only for the gradient 'rgs', got 'fixed' with 'pgp"),
        ({"gradient": "pgpe", "lr_sd": 0.3}, "lr_sd: only with adapt, got 0.3 without"),
        ({"bound": "ibp", "lower_slope": "parallel"}, "lower_slope: not for the bound 'ibp', which has no lines, got"),
        ({"sigma_w_end": 0.01}, "sigma_w_end, decay: expected both or neither, got 0.01 and None"),
        ({"decay": 3}, "sigma_w_end, decay: expected both or neither, got None and 3.0"),
        ({"sigma_w_end": 0, "decay": 3}, "sigma_w_end: expected a finite number > 0, got 0"),
        ({"sigma_w_end": 0.3, "decay": 3}, "sigma_w_end: expected none with sigma_w=0.1, which is less, got 0.3"),
        (
            {"gradient": "pgpe", "adapt": True, "sigma_w_end": 0.001, "decay": 3},
            "sigma_w_end: expected none with adapt, which learns it, got 0.001",
        ),
    ],
)
def test_impossible_settings_and_those_without_an_effect_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Gls(**{"eps": 0.1, **options})


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_labels_that_the_network_does_not_know_are_refused(gradient, batch):
    objective = Gls(0.05, gradient=gradient, **GRADIENTS[gradient])
    for y, message in [
        (torch.full((8,), 4), r"y: expected labels in \[0, 4\), got values from 4 to 4"),
        (torch.zeros(7, dtype=torch.int64), r"y: expected one label per image, shape \(8,\), got shape \(7,\)"),
        (torch.full((8, 4), 0.25), r"y: expected a tensor of integer labels, got torch\.float32"),
    ]:
        with pytest.raises(InputError, match=message):
            objective(network(), dataclasses.replace(batch, y=y), draws())


def test_what_cannot_be_bounded_is_refused_with_the_engines_words(batch):
    model = network().train()
    model.insert(6, nn.Dropout(0.5))
    with pytest.raises(ModelError, match="Dropout"):
        Gls(0.05, gradient="plain")(model, dataclasses.replace(batch, elapsed=30.0), draws())
    with pytest.raises(ModelError, match="Softmax"):
        Gls(0.05)(nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.Linear(36, 4)), batch, draws())


# ---- learning --------------------------------------------------------------------------------------------------------


EPS = 0.09


def halves(n, seed):
    """Two classes: faint in most rows of the images, which hides within EPS, and clear in one row, in 9 of 10."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=source)
    sign = 2.0 * y - 1
    shown = sign * (1 - 2.0 * (torch.rand(n, generator=source) < 0.1))
    x = 0.5 + 0.02 * torch.randn(n, 1, 4, 4, generator=source)
    x[:, :, :1] += 0.2 * shown.view(-1, 1, 1, 1)
    x[:, :, 1:] += 0.07 * sign.view(-1, 1, 1, 1)
    return x, y


def trained(model, objective, epochs, lr):
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    train(model, *halves(256, 0), objective, optimizer=optimizer, epochs=epochs, batch_size=64)
    with torch.no_grad():
        x, y = halves(200, 1)
        return model, Gls(EPS, bound="crown").validate(model.eval(), x, y) / len(x)


@pytest.fixture(scope="module")
def begun():
    """A network that was trained a little, what of it can be certified, and what after more of the same training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model, certified = trained(model, plain, 6, 3e-2)
    return model, certified, trained(model, plain, 20, 5e-2)[1]


FAST = [("ibp", "plain"), ("ibp", "pgpe"), ("crown-ibp", "rgs"), ("crown", "plain")]


@pytest.mark.parametrize(
    ("bound", "gradient"),
    [
        pytest.param(bound, gradient, marks=() if (bound, gradient) in FAST else pytest.mark.slow)
        for bound in BOUNDS
        for gradient in GRADIENTS
    ],
)
def test_training_certifies_more_than_standard_training(bound, gradient, begun):
    model, before, standard = begun
    options, epochs, lr = GRADIENTS[gradient], 4, 2e-2
    if gradient == "pgpe":
        options, epochs, lr = {"population": 16, "sigma_w": 0.05, "chunk": 16}, 12, 5e-2
    objective = Gls(EPS, bound=bound, gradient=gradient, ramp=1, **options)
    _, certified = trained(model, objective, epochs, lr)
    assert certified > max(before, standard) + 0.1
    assert standard < before


class Residual(nn.Module):
    """A block with a way around it and a smooth activation."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.silu = nn.SiLU()

    def forward(self, x):
        return self.silu(x + self.norm(self.conv(x)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_residual_network_with_pooling_and_silu_goes_through(gradient, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.MaxPool2d(2), Residual(3), nn.Flatten(), nn.Linear(12, 4))
    value, found = value_and_gradients(
        Gls(0.02, bound="crown-ibp", gradient=gradient, ramp=2, **GRADIENTS[gradient]), model, batch
    )
    assert bool(value.isfinite())
    assert all(bool(each.isfinite().all()) and float(each.abs().max()) > 0 for each in found.values())


def test_it_is_made_by_name():
    assert make_objective("gls", eps=0.1, bound="ibp", draws=4) == Gls(0.1, bound="ibp", draws=4)
    assert repr(Gls(0.1, draws=4.0)) == repr(Gls(0.1, draws=4))
