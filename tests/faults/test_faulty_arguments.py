"""Bad arguments at public names: it works, or raises an error of ours that says what is wrong; nothing else changes.

No long work is asked for: numbers that would mean a million steps are left out.
"""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rs_plugins
from rs_plugins.errors import RSPluginsError

pytestmark = pytest.mark.filterwarnings("ignore")
TRIED: dict[str, int] = {}

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])
PLAN = rs_plugins.FixedBudget(n0=5, n=20)


class Anything:
    pass


NUMBERS = st.one_of(
    st.floats(max_value=0.9),
    st.integers(max_value=3),
    st.integers(min_value=2**63),
    st.booleans(),
    st.text(max_size=4),
    st.binary(max_size=3),
    st.lists(st.integers(-2, 3) | st.floats(-1, 1) | st.text(max_size=2), max_size=3),
    st.complex_numbers(),
    st.sampled_from(
        [
            math.nan,
            math.inf,
            -math.inf,
            10**400,
            None,
            {},
            np.float64("nan"),
            np.array([1, 2]),
            np.int64(3),
            torch.tensor([1, 2]),
            torch.tensor(math.nan),
            Anything(),
            Anything,
            print,
            "nope",
            (),
            (1, 4, 4),
            (0, 4, 4),
        ]
    ),
)
IMAGES = st.sampled_from(
    [
        None,
        "x",
        1,
        [],
        [[0.5]],
        X.int(),
        X * 255,
        X - 1,
        X * math.nan,
        X * math.inf,
        X[0, 0, 0],
        torch.rand(3, 5),
        torch.rand(3, 2, 4, 4),
        torch.rand(0, 1, 4, 4),
        torch.rand(3, 1, 4, 4, 1),
        X.half(),
        X.bool(),
        X.to_sparse(),
        X.to(torch.complex64),
        X.to("meta"),
        torch.rand(3, 0, 4, 4),
        X.numpy(),
        np.array(["a"]),
        Anything(),
        X.double(),
    ]
)
LABELS = st.sampled_from(
    [
        None,
        "y",
        1,
        [0, 1, 2],
        Y.float(),
        Y.bool(),
        Y + 10,
        Y - 5,
        Y[:2],
        Y[None],
        torch.eye(3),
        torch.empty(0),
        torch.tensor(3),
        Anything(),
        Y * 10**15,
        Y.to("meta"),
        np.array(["a", "b", "c"]),
        Y.numpy(),
        Y.to(torch.uint8),
    ]
)


def network(classes=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes))


MODELS = st.sampled_from(
    [
        None,
        "m",
        nn.Linear,
        network,
        Anything(),
        lambda x: x,
        lambda: 1,
        nn.Identity(),
        nn.Flatten(),
        network(1),
        nn.Sequential(),
        nn.Linear(3, 4),
        network().half(),
        network().to("meta"),
        nn.Module(),
        [network()],
    ]
)


def state_of(model):
    return [
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad is None, p.detach().clone().tolist()) for name, p in model.named_parameters()],
    ]


def entries():
    """Name → (what is called, arguments that work, arguments that bad values are tried for)."""
    base = {"model": network()}
    smoothed = rs_plugins.SmoothedModel(network(), 0.5, samples=2)
    bounds = {"x": X, "y": Y, "eps": 0.01, "attack_steps": 2, "alpha_steps": 2}
    plain = {
        "certify": (_certify, {**base, "images": X, "sigma": 0.5, "plan": PLAN}, {"plan", "progress", "compile"}),
        "evaluate_attack": (
            rs_plugins.evaluate_attack,
            {"smoothed": smoothed, "x": X, "x_adv": X, "y": Y, "n": 20},
            {"n", "progress"},
        ),
        "certify_bounds": (rs_plugins.certify_bounds, {**base, **bounds}, {"progress"}),
        "SmoothedModel": (rs_plugins.SmoothedModel, {"base": network(), "sigma": 0.5}, set()),
        "BlackBox": (rs_plugins.BlackBox, {"predict": lambda x: x.reshape(len(x), -1)[:, :4]}, set()),
        "smooth_activations": (
            rs_plugins.smooth_activations,
            {**base, "activation": "silu", "example": (1, 4, 4)},
            {"options"},
        ),
        "adapt": (rs_plugins.adapt, {**base, "shape": (1, 4, 4)}, {"feature_fn", "shape"}),
        "AdapterDesign": (rs_plugins.AdapterDesign, {}, set()),
        "AdapterEnsemble": (rs_plugins.AdapterEnsemble, {"members": []}, {"router"}),
        "load_trained": (rs_plugins.load_trained, {"folder": "/nonexistent"}, {"model"}),
        "FixedBudget": (rs_plugins.FixedBudget, {}, set()),
        "Anytime": (rs_plugins.Anytime, {}, set()),
        "OnGrid": (rs_plugins.OnGrid, {"radii": (0.0, 0.25)}, set()),
        "AtRadius": (rs_plugins.AtRadius, {"r": 0.25}, set()),
        "GaussianNoise": (rs_plugins.GaussianNoise, {"sigma": 0.5}, set()),
        "LaplaceNoise": (rs_plugins.LaplaceNoise, {"sigma": 0.5}, set()),
        "UniformNoise": (rs_plugins.UniformNoise, {"sigma": 0.5}, set()),
    }
    return {
        name: (call, given_, [one for one in inspect.signature(_signed(call)).parameters if one not in left_out])
        for name, (call, given_, left_out) in plain.items()
    }


def _certify(**options):
    return list(rs_plugins.certify(**options))


def _signed(call):
    return rs_plugins.certify if call is _certify else call


ENTRIES = entries()
KINDS = {"x": IMAGES, "x_adv": IMAGES, "images": IMAGES, "y": LABELS, "model": MODELS, "base": MODELS}


def attempt(name, call, options):
    """Call, and return why it was refused, or nothing; whatever is raised else is a crash."""
    TRIED[name] = TRIED.get(name, 0) + 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**options)
    except RSPluginsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted(ENTRIES))
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bad_arguments_are_refused_by_name(name, data):
    call, options, arguments = ENTRIES[name]
    argument = data.draw(st.sampled_from(arguments))
    value = data.draw(KINDS.get(argument, NUMBERS))
    models = [one for one in options.values() if isinstance(one, nn.Module)]
    before = [state_of(model) for model in models]
    why = attempt(name, call, {**options, argument: value})
    # where a model, images and labels do not fit together any of them can be to blame
    assert not why or argument in why or why.partition(":")[0] in ("model", "predict", "x", "y", "images"), why
    assert [state_of(model) for model in models] == before
