"""Activations against the table of formulas, derivatives, and what happens at 0 and far from it."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rs_plugins.core.activations import (
    ParametricSoftplus,
    SmoothReLU,
    make_activation,
    parametric_softplus,
    smooth_relu,
)
from rs_plugins.errors import InputError

GRID = torch.tensor([-7.0, -1.5, -0.3, -1e-3, 1e-3, 0.02, 0.4, 1.0, 5.0, 30.0], dtype=torch.float64)


def derivative(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


@pytest.mark.parametrize("raw", [0.5, 3.0, 20.0])
def test_smooth_relu_is_the_formula(raw):
    b = raw**2
    expected = [z - math.log(1 + b * z) / b if z > 0 else 0.0 for z in GRID.tolist()]
    slopes = [b * z / (1 + b * z) if z > 0 else 0.0 for z in GRID.tolist()]
    module = SmoothReLU(raw).double()
    torch.testing.assert_close(module(GRID), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(derivative(module, GRID), torch.tensor(slopes, dtype=torch.float64))
    torch.testing.assert_close(smooth_relu(GRID, b), module(GRID))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 10.0, 33.0])
def test_parametric_softplus_is_the_formula(sharpness):
    scaled = [sharpness * z for z in GRID.tolist()]
    expected = [(max(s, 0) + math.log1p(math.exp(-abs(s)))) / sharpness for s in scaled]
    slopes = [math.exp(min(s, 0)) / (1 + math.exp(-abs(s))) for s in scaled]
    module = ParametricSoftplus(sharpness)
    torch.testing.assert_close(module(GRID), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(derivative(module, GRID), torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(parametric_softplus(GRID, sharpness), module(GRID))


def test_softplus_is_not_cut_off_early():
    z = torch.tensor(25.0, dtype=torch.float64)  # where torch's own default threshold, 20, gives z
    assert float(parametric_softplus(z, 1.0) - z) == pytest.approx(math.exp(-25), rel=1e-3)


def test_the_defaults_are_those_of_the_specification():
    assert float(SmoothReLU().curvature.detach()) == 400
    assert float(SmoothReLU(1e-9).curvature.detach()) == pytest.approx(1e-6)
    assert float(ParametricSoftplus()(torch.zeros(()))) == pytest.approx(math.log(2) / 10)


@pytest.mark.parametrize("module", [SmoothReLU(2.0), ParametricSoftplus(), ParametricSoftplus(2.5)], ids=repr)
def test_gradcheck(module):
    module = module.double()
    z = GRID.clone().requires_grad_()
    assert torch.autograd.gradcheck(module, (z,))
    assert torch.autograd.gradgradcheck(module, (z,))


def test_gradient_of_the_learned_curvature():
    def function(b_raw):
        return smooth_relu(GRID, b_raw.square())

    assert torch.autograd.gradcheck(function, (torch.tensor(1.7, dtype=torch.float64, requires_grad=True),))
    module = SmoothReLU(1.7).double()
    module(GRID).sum().backward()
    b, z = 1.7**2, GRID.clamp(min=0)
    expected = ((z * b).log1p() / b**2 - z / b / (1 + b * z)).sum() * 2 * 1.7
    torch.testing.assert_close(module.b_raw.grad, expected, rtol=1e-6, atol=0)


def test_smooth_relu_is_continuously_differentiable_at_zero_with_curvature_b():
    module = SmoothReLU(3.0).double()
    around = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    assert module(around).abs().max() < 1e-16
    assert derivative(module, around).abs().max() < 1e-7
    z = torch.tensor([1e-8], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), z)
    assert float(second) == pytest.approx(9.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", [SmoothReLU(), SmoothReLU(1e-9), ParametricSoftplus()], ids=repr)
def test_extreme_inputs(module, dtype):
    module = copy.deepcopy(module)
    module = module.to(dtype)
    largest = torch.finfo(dtype).max
    z = torch.tensor([-largest, -1e30, -1e4, 0.0, 1e4, 1e30, largest], dtype=dtype, requires_grad=True)
    values = module(z)
    values.backward(torch.ones_like(z))
    assert values.isfinite().all()
    assert z.grad.isfinite().all()
    assert (values[:4] <= 0.1).all()
    torch.testing.assert_close(values[-2:], z.detach()[-2:])
    parameters = [parameter.grad for parameter in module.parameters()]
    assert all(gradient.isfinite() for gradient in parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("raw", [20.0, 300.0])
def test_half_precision(raw, dtype):
    module = SmoothReLU(raw).to(dtype)
    z = torch.tensor([-60000.0, -1.0, 0.0, 0.25, 1.0, 200.0, 60000.0], dtype=dtype, requires_grad=True)
    values = module(z)
    values.sum().backward()
    assert z.grad.isfinite().all()
    assert module.b_raw.grad.isfinite()
    expected = smooth_relu(z.detach().double(), raw**2)
    torch.testing.assert_close(values.detach().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@given(st.floats(-50, 50), st.floats(0.3, 30))
def test_both_lie_near_relu(z, size):
    z = torch.tensor(z, dtype=torch.float64)
    above = float(ParametricSoftplus(size)(z) - z.relu())
    assert -1e-15 <= above <= math.log(2) / size + 1e-12
    below = float(z.relu() - smooth_relu(z, size))
    assert -1e-15 <= below <= math.log1p(size * 50) / size + 1e-12


def test_what_is_learned_is_the_users_choice():
    learned, fixed = SmoothReLU(2.0), SmoothReLU(2.0, learnable=False)
    assert [name for name, _ in learned.named_parameters()] == ["b_raw"]
    assert not list(fixed.parameters())
    assert list(fixed.state_dict()) == list(learned.state_dict()) == ["b_raw"]
    assert torch.equal(learned(GRID.float()), fixed(GRID.float()))
    assert "learnable=False" in repr(fixed)


def test_activations_by_name():
    assert isinstance(make_activation("relu", inplace=True), nn.ReLU)
    assert make_activation("gelu", approximate="tanh").approximate == "tanh"
    assert make_activation("celu", alpha=0.5).alpha == 0.5
    assert make_activation("elu", alpha=0.5).alpha == 0.5
    assert make_activation("softplus", beta=3).beta == 3
    assert float(make_activation("smooth-relu", initial=3.0, learnable=False).curvature) == 9
    assert make_activation("parametric-softplus", sharpness=4.0).sharpness == 4
    z = GRID.float()
    torch.testing.assert_close(make_activation("silu")(z), z * z.sigmoid())
    torch.testing.assert_close(make_activation("mish")(z), z * torch.log1p(z.exp()).tanh())


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"activation: expected one of relu, silu, .*, got 'swish'"):
        make_activation("swish")
    with pytest.raises(InputError, match=r"activation silu: .*beta"):
        make_activation("silu", beta=2)
    with pytest.raises(InputError, match="initial: expected a finite number > 0, got 0"):
        SmoothReLU(0)
    with pytest.raises(InputError, match="sharpness: expected a finite number > 0, got -1"):
        make_activation("parametric-softplus", sharpness=-1)
    with pytest.raises(InputError, match="learnable: expected True or False, got 1"):
        SmoothReLU(learnable=1)


# ---- the specification's table, whoever wrote the activation ---------------------------------------------------------


def logistic(z):
    return 1 / (1 + math.exp(-z)) if z > -500 else 0.0


def gaussian_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def gaussian_density(z):
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def log_of_one_plus_exp(z):
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def mish_slope(z):
    h = math.tanh(log_of_one_plus_exp(z))
    return h + z * logistic(z) * (1 - h * h)


TABLE = [
    ("silu", {}, lambda z: z * logistic(z), lambda z: logistic(z) * (1 + z * (1 - logistic(z)))),
    ("gelu", {}, lambda z: z * gaussian_cdf(z), lambda z: gaussian_cdf(z) + z * gaussian_density(z)),
    (
        "elu",
        {"alpha": 0.7},
        lambda z: z if z > 0 else 0.7 * math.expm1(z),
        lambda z: 1.0 if z > 0 else 0.7 * math.exp(z),
    ),
    (
        *("celu", {"alpha": 0.7}),
        lambda z: z if z > 0 else 0.7 * math.expm1(z / 0.7),
        lambda z: 1.0 if z > 0 else math.exp(z / 0.7),
    ),
    ("softplus", {}, log_of_one_plus_exp, logistic),
    ("mish", {}, lambda z: z * math.tanh(log_of_one_plus_exp(z)), mish_slope),
    ("relu", {}, lambda z: max(0.0, z), lambda z: float(z > 0)),
]


@pytest.mark.parametrize(("name", "options", "value", "slope"), TABLE, ids=[row[0] for row in TABLE])
def test_values_and_derivatives_are_those_of_the_table(name, options, value, slope):
    module = make_activation(name, **options)
    for function, found in ((value, module(GRID)), (slope, derivative(module, GRID))):
        expected = torch.tensor([function(z) for z in GRID.tolist()], dtype=torch.float64)
        torch.testing.assert_close(
            found, expected, rtol=1e-7, atol=1e-8
        )  # torch has 1/alpha in float32, and softplus linear from 20 on


@pytest.mark.parametrize("name", [row[0] for row in TABLE])
def test_gradcheck_of_all(name):
    assert torch.autograd.gradcheck(make_activation(name), GRID.clone().requires_grad_(), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "where", "least"),
    [
        ("silu", {}, -1.2784645, -0.27846455),
        ("gelu", {}, -0.7517915, -0.16997121),
        ("gelu", {"approximate": "tanh"}, -0.7524614, -0.17004076),
        ("mish", {}, -1.1924312, -0.30884342),
    ],
)
def test_minima_are_where_the_specification_has_them(name, options, where, least):
    module = make_activation(name, **options)
    z = torch.linspace(where - 0.1, where + 0.1, 200_001, dtype=torch.float64)
    found = module(z)
    assert float(z[found.argmin()]) == pytest.approx(where, abs=2e-6)
    assert least - 1e-8 < float(found.min()) < least + 1e-8
    assert abs(float(derivative(module, torch.tensor([where], dtype=torch.float64)))) < 1e-7
