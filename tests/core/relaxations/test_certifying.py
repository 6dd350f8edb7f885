import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from rs_plugins.core.relaxations import certifying
from rs_plugins.core.relaxations.bound_results import BoundResults
from rs_plugins.core.relaxations.certifying import BoundCertifier, cascade_up_to, certify_bounds
from rs_plugins.core.relaxations.falsifying import falsify, smallest_margin
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning

SHAPE = (1, 3, 3)


def network(seed=0, width=24, classes=4):
    """A network with steep layers, that knows all classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes)
    )
    with torch.no_grad():
        for layer in (model[0], model[3], model[5]):
            layer.weight *= 3
        model[5].bias -= model(images(200)).mean(dim=0)
    return model


def images(n=40, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labelled(model, n=40, seed=0):
    """Images with the model's own classes as labels, but for the last tenth."""
    x = images(n, seed)
    y = model(x).argmax(dim=1)
    y[-n // 10 :] = (y[-n // 10 :] + 1) % 4
    return x, y


def plain(certificates):
    return [(c.index, c.label, c.prediction, c.status, c.method) for c in certificates]


class Scripted:
    """Stands in for the bounds: a network whose logits are its first pixels, with margins as a test says."""

    def __init__(self, margins):
        self.margins_of, self.asked = margins, []

    def __call__(self, model, shape):
        self.logits = lambda x: x.flatten(1)[:, :3]
        return self

    def terms(self, x, y):
        return torch.zeros(len(x), 2, dtype=x.dtype)

    def margins(self, region, y, *, method):
        self.asked.append((method, region.x.flatten(1)[:, 3].tolist()))
        return self.margins_of(method, region.x.flatten(1)[:, 3])

    def alpha_margins(self, region, y, *, steps):
        self.asked.append((f"alpha {steps}", region.x.flatten(1)[:, 3].tolist()))
        return self.margins_of("alpha-crown", region.x.flatten(1)[:, 3])


def scripted(monkeypatch, margins, n=4, **options):
    """Certify n images of class 0, of which the fourth pixel is a name: 0, 1/16, 2/16, …"""
    stand_in = Scripted(margins)
    monkeypatch.setattr(certifying, "RelaxedNetwork", stand_in)
    x = torch.zeros(n, 4)
    x[:, 0], x[:, 3] = 1, torch.arange(n) / 16
    y = torch.zeros(n, dtype=torch.long)
    options = {"attack_steps": 0} | options
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return certify_bounds(model, options.pop("x", x), y, 0.1, **options), stand_in.asked


def test_each_bound_is_asked_about_what_is_open_and_the_first_that_proves_it_is_named(monkeypatch):
    proves = {"ibp": [0.0], "crown-ibp": [0.0625], "crown": [0.125], "alpha-crown": [0.1875]}

    def margins(method, names):
        one = torch.tensor([0.5 if name in proves[method] else -1.0 for name in names.tolist()], dtype=torch.float64)
        return torch.stack([one, torch.full_like(one, 2.0)], dim=1)

    found, asked = scripted(monkeypatch, margins, n=5, cascade=cascade_up_to("alpha-crown"), alpha_steps=7)
    assert [c.status for c in found] == ["verified"] * 4 + ["unknown"]
    assert [c.method for c in found] == ["ibp", "crown-ibp", "crown", "alpha-crown", "alpha-crown"]
    assert [c.margin for c in found] == [0.5] * 4 + [-1.0]
    assert [c.slack for c in found] == pytest.approx([1.5e-10] * 4 + [2e-10])
    assert asked == [
        ("ibp", [0.0, 0.0625, 0.125, 0.1875, 0.25]),
        ("crown-ibp", [0.0625, 0.125, 0.1875, 0.25]),
        ("crown", [0.125, 0.1875, 0.25]),
        ("alpha 7", [0.1875, 0.25]),
    ]


def test_bounds_are_joined_element_by_element(monkeypatch):
    values = {"ibp": [1.0, -1.0], "crown": [-3.0, 2.0]}
    found, _ = scripted(
        monkeypatch,
        lambda method, names: torch.tensor([values[method]] * len(names), dtype=torch.float64),
        cascade=("ibp", "crown"),
    )
    assert {(c.status, c.method, c.margin) for c in found} == {("verified", "crown", 1.0)}


@pytest.mark.parametrize(
    ("dtype", "margin", "verified"),
    [
        (torch.float64, 1.1e-10, True),
        (torch.float64, 0.9e-10, False),
        (torch.float32, 1.1e-5, True),
        (torch.float32, 0.9e-5, False),
        (torch.float64, 0.0, False),
        (torch.float64, math.nan, False),
        (torch.float64, math.inf, False),
    ],
)
def test_a_margin_has_to_exceed_the_slack(monkeypatch, dtype, margin, verified):
    found, _ = scripted(
        monkeypatch,
        lambda method, names: torch.tensor([[5.0, margin]] * len(names), dtype=dtype),
        dtype=dtype,
        cascade=["crown"],
    )
    assert [c.verified for c in found] == [verified] * 4
    assert {c.status for c in found} == {"verified" if verified else "unknown"}
    assert all(c.dtype == str(dtype).removeprefix("torch.") for c in found)
    if math.isnan(margin):
        assert all(math.isnan(c.margin) for c in found)


@pytest.mark.parametrize(("size", "verified"), [(0.0, True), (1e8, True), (1e9, False), (math.nan, False)])
def test_what_a_margin_is_summed_from_counts(monkeypatch, size, verified):
    monkeypatch.setattr(Scripted, "terms", lambda self, x, y: torch.full((len(x), 2), size, dtype=x.dtype))
    found, _ = scripted(
        monkeypatch,
        lambda method, names: torch.tensor([[5.0, 1e-6]] * len(names), dtype=torch.float64),
        cascade=["ibp", "crown"],
    )
    assert [c.verified for c in found] == [verified] * 4
    assert found[0].slack == pytest.approx(1e-10 + 16 * 2**-52 * size, nan_ok=True)


def test_nan_of_one_bound_does_not_hide_what_another_says(monkeypatch):
    values = {"ibp": -2.0, "crown-ibp": math.nan, "crown": -1.0}
    found, _ = scripted(
        monkeypatch, lambda method, names: torch.full((len(names), 2), values[method], dtype=torch.float64)
    )
    assert {(c.status, c.method, c.margin) for c in found} == {("unknown", "crown", -1.0)}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_error_on_one_image_is_its_own_status_and_others_go_on(monkeypatch, size):
    def margins(method, names):
        if method == "crown" and (names == 0.1875).any():
            raise RuntimeError("a layer broke")
        return torch.full((len(names), 2), 1.0 if method == "crown" else -1.0, dtype=torch.float64)

    found, _ = scripted(monkeypatch, margins, n=7, cascade=("ibp", "crown"), batch_size=size)
    assert [c.status for c in found] == ["verified"] * 3 + ["failed"] + ["verified"] * 3
    assert (found[3].method, found[3].message) == ("crown", "RuntimeError: a layer broke")
    assert (found[3].prediction, found[3].margin, found[3].verified) == (0, -1.0, False)
    results = BoundResults.of(found)
    assert (results.certified_accuracy().count, results.robust_accuracy_at_most().count) == (6, 7)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("[enforce] can't allocate memory")]
)
def test_where_memory_is_too_small_batches_get_smaller(monkeypatch, error):
    def margins(method, names):
        if len(names) > 2:
            raise error
        return torch.ones(len(names), 2, dtype=torch.float64)

    found, asked = scripted(monkeypatch, margins, n=16, cascade=["crown"], batch_size=8)
    assert {c.status for c in found} == {"verified"}
    assert [len(names) for _, names in asked] == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]  # the second batch knows


def test_too_little_memory_for_one_image_is_no_unknown(monkeypatch):
    def margins(method, names):
        if method == "crown":
            raise MemoryError("no more")
        return torch.full((len(names), 2), -1.0, dtype=torch.float64)

    found, _ = scripted(monkeypatch, margins, cascade=("ibp", "crown", "alpha-crown"))
    assert {(c.status, c.method, c.message) for c in found} == {("failed", "crown", "MemoryError: no more")}


def test_what_the_bounds_refuse_ends_the_run(monkeypatch):
    def margins(method, names):
        raise ModelError("model: its layer 3 (Strange) is not supported")

    with pytest.raises(ModelError, match="Strange"):
        scripted(monkeypatch, margins)


def test_an_error_of_the_attack_is_a_status_too(monkeypatch):
    def attack(*_, **__):
        raise RuntimeError("no gradient")

    monkeypatch.setattr(certifying, "falsify", attack)
    found, asked = scripted(monkeypatch, lambda method, names: torch.ones(len(names), 2), attack_steps=1)
    assert {(c.status, c.method, c.message) for c in found} == {("failed", "pgd", "RuntimeError: no gradient")}
    assert asked == []


def test_single_precision_is_all_of_it(monkeypatch):
    seen = []

    def margins(method, names):
        seen.append((torch.get_float32_matmul_precision(), (torch.eye(2) @ torch.eye(2)).dtype))
        return torch.ones(len(names), 2)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            scripted(monkeypatch, margins, dtype=torch.float32, cascade=["ibp"])
        assert (seen, torch.get_float32_matmul_precision()) == ([("highest", torch.float32)], "medium")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.04), ("l2", 0.06)])
def test_no_verified_image_can_be_broken_and_every_falsified_one_is(norm, eps):
    statuses, bounds = set(), set()
    for seed in range(3):
        model = network(seed)
        x, y = labelled(model, seed=seed)
        found = certify_bounds(model, x, y, eps, norm=norm, attack_steps=10)
        double = network(seed).double()
        for status in ("verified", "falsified", "misclassified"):
            rows = [row for row, c in enumerate(found) if c.status == status]
            wide, labels = x[rows].double(), y[rows]
            if status == "falsified":
                bad = torch.stack([found[row].adversarial for row in rows])
                delta = (bad - wide).flatten(1)
                length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
                assert bool((length <= eps * (1 + 1e-12)).all())
                assert 0 <= float(bad.min()) <= float(bad.max()) <= 1
                assert bool((double(bad).argmax(dim=1) != labels).all())
                margins = smallest_margin(double(bad), labels)
                assert [found[row].margin for row in rows] == pytest.approx(margins.tolist())
            elif status == "misclassified":
                assert rows == list(range(36, 40))
                assert double(wide).argmax(dim=1).tolist() == [found[row].prediction for row in rows]
            else:
                hit = {"eps": eps, "norm": norm, "steps": 15, "restarts": 5, "seed": seed}
                _, margins = falsify(double, wide, labels, **hit)
                least = torch.tensor([found[row].margin for row in rows], dtype=torch.float64) - 1e-9
                assert bool((margins >= least).all())
                assert bool((margins > 0).all())
                noise = torch.randn(200, *wide.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
                ends = noise.sign() if norm == "linf" else functional.normalize(noise.flatten(2), dim=2).view_as(noise)
                near = (wide + eps * ends).clamp(0, 1).flatten(0, 1)
                assert bool((smallest_margin(double(near), labels.repeat(200)).view(200, -1) >= least).all())
            statuses |= {status} if rows else set()
        bounds |= {c.method for c in found if c.verified}
    assert statuses == {"verified", "falsified", "misclassified"}
    assert {"ibp", "crown-ibp", "crown"} <= bounds


def test_alpha_crown_verifies_more():
    model = network(3)
    x, y = labelled(model)
    options = {"eps": 0.06, "attack_steps": 0, "cascade": ["crown"]}
    crown = BoundResults.of(certify_bounds(model, x, y, **options))
    options["cascade"] = ["crown", "alpha-crown"]
    both = BoundResults.of(certify_bounds(model, x, y, **options, alpha_steps=20))
    assert both.verified_by["crown"] == crown.verified_by["crown"]
    assert both.verified_by["alpha-crown"] > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_depends_on_batches_or_order(norm):
    model = network()
    x, y = labelled(model)
    options = {"eps": 0.06, "norm": norm, "attack_steps": 5, "attack_restarts": 2}
    whole = certify_bounds(model, x, y, **options)
    assert len({c.status for c in whole}) > 2
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for size in (1, 7):
        found = certify_bounds(model, x[order], y[order], **options, batch_size=size, indices=order.tolist())
        found.sort(key=lambda c: c.index)
        assert plain(found) == plain(whole)
        assert [c.margin for c in found] == pytest.approx([c.margin for c in whole], rel=1e-9)


def test_without_an_attack_nothing_is_falsified():
    model = network()
    x, y = labelled(model)
    with_it = certify_bounds(model, x, y, 0.4)
    without = certify_bounds(model, x, y, 0.4, attack_steps=0)
    assert {c.status for c in without} == {"misclassified", "unknown"}
    assert {c.status for c in with_it} == {"misclassified", "falsified"}
    assert without[0].made_with.attack == "none"


def test_a_ball_of_no_radius_is_the_prediction():
    model = network()
    x, y = labelled(model)
    found = certify_bounds(model, x, y, 0)
    assert [c.status for c in found] == ["verified"] * 36 + ["misclassified"] * 4
    assert {c.method for c in found} == {"ibp", "prediction"}
    clean = smallest_margin(network().double()(x.double()), y)
    assert [c.margin for c in found] == pytest.approx(clean.tolist(), rel=1e-6)


def test_an_image_with_nan_logits_fails_and_others_do_not():
    certifier = BoundCertifier(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), SHAPE, 0.1)
    exact = certifier._network.logits
    certifier._network.logits = lambda x: torch.where(x.flatten(1)[:, :1] == 0.5, torch.nan, exact(x))
    x = images(3)
    x[1, 0, 0, 0] = 0.5
    y = exact(x.double()).argmax(dim=1)
    found = certifier.batch(x, y, [0, 1, 2])
    assert [c.status == "failed" for c in found] == [False, True, False]
    assert (found[1].prediction, found[1].message) == (-1, "the model returns NaN logits")


def test_the_model_stays_as_it_was():
    model = network()
    model.train()
    model[0].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = labelled(network())
    state = torch.get_rng_state()
    certify_bounds(model, x, y, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [False, True, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_a_certificate_says_with_what_it_was_made():
    model = network()
    x, y = labelled(model)
    options = {"norm": "l2", "cascade": ["ibp", "alpha-crown"], "alpha_steps": 3, "seed": 5, "dtype": torch.float32}
    (found,) = certify_bounds(model, x[:1], y[:1], 0.25, **options, attack_steps=3, attack_restarts=2, indices=[17])
    run = found.made_with
    assert (found.index, found.label) == (17, int(y[0]))
    assert (run.eps, run.norm, run.seed, run.dtype, run.device) == (0.25, "l2", 5, "float32", "cpu")
    assert (run.cascade, run.attack) == ("ibp, alpha-crown (3 steps)", "pgd, 2 runs of 3 steps")
    assert run.slack == "1e-05·(1 + |margin|) + 16 roundings of all terms"
    assert re.fullmatch("[0-9a-f]{64}", run.model)
    assert f"torch {torch.__version__}" in run.versions
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "eps: expected a finite number >= 0, got -1"),
        ({"norm": "l1"}, "norm: expected one of 'linf', 'l2', got 'l1'"),
        ({"cascade": "crown"}, "cascade: expected a list of different bounds out of 'ibp', .*, got 'crown'"),
        ({"cascade": []}, r"cascade: expected a list of different bounds out of .*, got \[\]"),
        ({"cascade": ["ibp", "ibp"]}, "cascade: expected a list of different bounds"),
        ({"cascade": ["ibp", "zonotope"]}, "cascade: expected bounds out of .*, got 'zonotope'"),
        ({"dtype": torch.float16}, "dtype: expected torch.float64 or torch.float32, got torch.float16"),
        ({"alpha_steps": 0}, "alpha_steps: expected an integer >= 1, got 0"),
        ({"attack_steps": -1}, "attack_steps: expected an integer >= 0, got -1"),
        ({"attack_restarts": 0}, "attack_restarts: expected an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"seed": "1"}, "seed: expected an integer"),
        ({"indices": [1, 2]}, r"indices: expected one per image \(40\), got 2"),
        ({"device": "nowhere"}, "device: expected a device of this machine"),
        ({"y": torch.full((40,), 4)}, r"y: expected labels in \[0, 4\)"),
        ({"x": images() * 255}, r"x: expected pixels in \[0, 1\]"),
        ({"model": lambda x: x}, "model: expected a torch.nn.Module, which bounds can look into, got function"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(options, message):
    model = network()
    x, y = labelled(model)
    options = {"model": model, "x": x, "y": y, "eps": 0.1} | options
    with pytest.raises(InputError, match=message):
        certify_bounds(**options)


def test_a_module_that_is_not_supported_is_refused_by_name():
    class Sorting(nn.Module):
        def forward(self, x):
            return x.sort(dim=1).values

    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), Sorting(), nn.Linear(5, 3))
    with pytest.raises(ModelError, match=r"sort|Sorting"):
        certify_bounds(model, images(2), torch.zeros(2, dtype=torch.long), 0.1)


def test_a_radius_for_other_pixels_is_suspicious():
    model = network()
    with pytest.warns(RSPluginsWarning, match=r"a radius of 8 in \[0, 255\] give 0.0313725"):
        certify_bounds(model, *(each[:1] for each in labelled(model)), 8)


def test_a_cascade_goes_up_to_its_last_bound():
    assert cascade_up_to("crown") == ("ibp", "crown-ibp", "crown") == certifying.CASCADE
    assert cascade_up_to("ibp") == ("ibp",)
    with pytest.raises(InputError, match="got 'deep'"):
        cascade_up_to("deep")


def test_a_margin_that_is_its_slack_proves_nothing(monkeypatch):
    margin = 1e-10
    for _ in range(5):
        margin = 1e-10 * (1 + margin)
    found, _ = scripted(
        monkeypatch, lambda method, names: torch.full((len(names), 2), margin, dtype=torch.float64), cascade=["ibp"]
    )
    assert {(c.status, c.margin, c.slack) for c in found} == {("unknown", margin, margin)}


def test_two_classes_that_are_equal_are_neither_proved_nor_falsified():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    (found,) = certify_bounds(model, images(1), torch.tensor([0]), 0.1, attack_steps=2)
    assert (found.status, found.margin) == ("unknown", 0.0)
