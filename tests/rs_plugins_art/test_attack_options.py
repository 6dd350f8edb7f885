"""Every attack, with every option at a value that is not its default, on every kind of estimator: one table."""

import inspect
from functools import cache, partial

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from art.summary_writer import SummaryWriter
from torch import nn

from rs_plugins.core.attacks.norms import LINF
from rs_plugins.core.attacks.smoothadv import PUBLISHED, PUBLISHED_DDN, smooth_adv_ddn, smooth_adv_pgd
from rs_plugins.errors import InputError
from rs_plugins_art.attacks import SmoothAdvDDN, SmoothAdvLinfPGD, SmoothAdvPGD
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, cnn
from .test_state import state

SIGMA = 0.25
N = 5
X = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
X[:, :, 0] = X[:, :, 0].round()  # pixels at the bounds
Y = torch.tensor([0, 3, 2, 1, 0])


class Model(nn.Module):
    """A network that keeps the sizes of its batches and can be told to fail."""

    def __init__(self):
        super().__init__()
        self.network = cnn(3)
        self.network[3] = nn.Identity()
        self.sizes, self.left = [], None

    def forward(self, x):
        self.sizes.append(len(x))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("as if out of memory")
        return self.network(x)


def art_smoothed(sigma):
    return PyTorchRandomizedSmoothing(Model(), nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", scale=sigma)


def plain(sigma):
    return PyTorchClassifier(Model(), nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu")


ESTIMATORS = {
    "ours": lambda sigma: SmoothedClassifier(Model(), sigma, input_shape=SHAPE),
    "art's": art_smoothed,
    "plain": plain,
}


def model_of(estimator):
    return getattr(estimator.model, "base", estimator.model)


class Core:
    """An option whose effect is that of ``settings`` of core, and not that of the defaults."""

    def __init__(self, function=None, **settings):
        self.function, self.settings = function, settings

    def __call__(self, run):
        expected = run.core(self.function, **self.settings)
        np.testing.assert_allclose(run.adv, expected, atol=1e-5)
        assert np.abs(expected - run.default).max() > 1e-4


class Listener(SummaryWriter):
    def __init__(self):
        self.steps, self.resets = [], 0

    def update(self, batch_id, global_step, **what):
        self.steps.append(global_step)

    def reset(self):
        self.resets += 1


def passes_of_at_most(size, run):
    assert max(run.sizes) <= size < max(run.default_sizes)
    np.testing.assert_allclose(run.adv, run.default, atol=1e-5)


def one_sigma_only(run):
    """A plain classifier is attacked at that sigma, a smoothed one refuses it."""
    assert run.kind == "plain"
    Core(sigma=0.5)(run)


def bar_is_shown(run):
    assert run.attack.__name__ in run.stderr
    assert np.array_equal(run.adv, run.default)


def steps_are_written(run):
    writer, steps = run.options["summary_writer"], run.base["max_iter"]
    assert writer.steps == list(range(1, steps + 1)) * (len(writer.steps) // steps)
    assert writer.resets == len(writer.steps) // steps > 0
    assert np.array_equal(run.adv, run.default)


def stops_early(run):
    Core(early_stop=0.5)(run)
    assert sum(run.sizes) != sum(run.default_sizes)


def confirmed(run):
    Core(confirm=1e-9)(run)
    assert sum(run.sizes) > sum(run.default_sizes)


SHARED = {
    "targeted": (True, Core(targeted=True)),
    "batch_size": (2, partial(passes_of_at_most, 2 * 4)),
    "sigma": (0.5, one_sigma_only),
    "samples": (6, Core(samples=6)),
    "objective": ("mean-logits", Core(objective="mean-logits")),
    "gradient": ("centred-stein", Core(gradient="centred-stein")),
    "chunk": (3, partial(passes_of_at_most, 3)),
    "seed": (4, Core(seed=4)),
    "verbose": (True, bar_is_shown),
    "summary_writer": (Listener, steps_are_written),
}
PGD = SHARED | {
    "norm": ("inf", Core(norm=LINF)),
    "eps": (0.3, Core(eps=0.3)),
    "eps_step": (0.05, Core(step=0.05)),
    "max_iter": (2, Core(steps=2)),
    "num_random_init": (2, Core(random_start=True, restarts=2)),
    "minimal": (
        True,
        Core(smooth_adv_ddn, steps=4, max_norm=0.5, samples=4, noise="fresh", antithetic=True, levels=None),
    ),
    "noise": ("fixed", Core(noise="fixed")),
    "antithetic": (False, Core(antithetic=False)),
    "rule": ("projected", Core(rule="projected")),
    "early_stop": (0.5, stops_early),
}
PGD_BASE = {"eps": 0.5, "max_iter": 4, "samples": 4}
# attack: (base settings, the same for core, core's function, options with a value and an effect or a refusal)
TABLE = {
    SmoothAdvPGD: (PGD_BASE, {"eps": 0.5, "steps": 4, "samples": 4}, smooth_adv_pgd, PGD),
    SmoothAdvLinfPGD: (
        {"eps": 0.3, "max_iter": 4, "samples": 4},
        {"norm": LINF, "eps": 0.3, "steps": 4, "samples": 4},
        smooth_adv_pgd,
        PGD
        | {
            "eps": (0.1, Core(eps=0.1)),
            "eps_step": (0.03, Core(step=0.03)),
            "norm": (2, "norm: expected inf, got 2"),
            "minimal": (True, "minimal: expected False for norm=inf; smallest perturbations are l2 ones"),
        },
    ),
    SmoothAdvDDN: (
        {"max_iter": 8, "samples": 4, "eps": 2.0},
        {"steps": 8, "samples": 4, "max_norm": 2.0},
        smooth_adv_ddn,
        SHARED
        | {
            "eps": (0.4, Core(max_norm=0.4)),
            "max_iter": (3, Core(steps=3)),
            "gamma": (0.3, Core(gamma=0.3)),
            "init_norm": (0.2, Core(init_norm=0.2)),
            "levels": (4, Core(levels=4)),
            "noise": ("fresh", Core(noise="fresh")),
            "antithetic": (False, Core(antithetic=False)),
            "confirm": (1e-9, confirmed),
            "minimal": (False, "minimal: expected True, which DDN always is, got False"),
        },
    ),
}


class Run:
    """One generate of ``attack`` with its base settings and ``options`` on an estimator of that ``kind``."""

    def __init__(self, attack, kind, **options):
        self.attack, self.kind, self.options = attack, kind, options
        self.base, self._base_of_core, self._core, _ = TABLE[attack]
        settings = self.base | options
        self.estimator = ESTIMATORS[kind](SIGMA)
        if kind == "plain":
            settings.setdefault("sigma", SIGMA)
        self.made = attack(self.estimator, **settings)
        model_of(self.estimator).sizes = []
        self.adv = self.made.generate(X.numpy(), Y.numpy())
        self.sizes = model_of(self.estimator).sizes
        self.eps = settings["eps"]

    @property
    def default(self):
        return default_run(self.attack, self.kind).adv

    @property
    def default_sizes(self):
        return default_run(self.attack, self.kind).sizes

    def core(self, function=None, **settings):
        sigma = settings.pop("sigma", SIGMA)
        if function is None:
            function, settings = self._core, self._base_of_core | settings
        found = function(Model().eval(), X, Y, sigma, **settings)
        return (found[0] if isinstance(found, tuple) else found).numpy()


@cache
def default_run(attack, kind):
    return Run(attack, kind)


CASES = [(attack, option) for attack, (*_, options) in TABLE.items() for option in options]
each_case = pytest.mark.parametrize(("attack", "option"), CASES, ids=lambda each: getattr(each, "__name__", each))
each_estimator = pytest.mark.parametrize("kind", ESTIMATORS)
each_accepted = pytest.mark.parametrize(
    ("attack", "option", "kind"),
    [
        pytest.param(attack, option, kind, id=f"{attack.__name__}-{option}-{kind}")
        for attack, option in CASES
        for kind in ESTIMATORS
        if not isinstance(TABLE[attack][-1][option][1], str) and (option, kind == "plain") != ("sigma", False)
    ],
)


def value_of(attack, option):
    value, effect = TABLE[attack][-1][option]
    return (value() if isinstance(value, type) else value), effect


@each_estimator
@each_case
def test_an_option_has_its_effect_and_the_result_holds_budget_and_box(attack, option, kind, capsys):
    value, effect = value_of(attack, option)
    if option == "sigma" and kind != "plain":
        effect = "sigma: expected 0.25, which the smoothed classifier brings, got 0.5"
    if isinstance(effect, str):
        with pytest.raises(InputError, match=effect):
            attack(ESTIMATORS[kind](SIGMA), **{"sigma": SIGMA, option: value})
        return
    capsys.readouterr()
    run = Run(attack, kind, **{option: value})
    run.stderr = capsys.readouterr().err
    effect(run)
    delta = (run.adv.astype(np.float64) - X.numpy()).reshape(N, -1)
    order = getattr(run.made, "norm", 2)
    assert np.linalg.norm(delta, ord=order, axis=1).max() <= run.eps * (1 + 1e-6)
    assert 0 <= run.adv.min() <= run.adv.max() <= 1
    assert (run.adv.dtype, run.adv.shape) == (np.float32, tuple(X.shape))


@each_accepted
def test_everything_is_as_it_was_after_an_exception(attack, option, kind):
    value, _ = value_of(attack, option)
    estimator = ESTIMATORS[kind](SIGMA)
    made = attack(estimator, **TABLE[attack][0] | {"sigma": SIGMA if kind == "plain" else None} | {option: value})
    model = model_of(estimator)
    estimator.model.train()
    model.network[1].eval()
    model.network[5].bias.requires_grad_(False)
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.ones_like(parameter)
    before, settings, images = state(estimator), repr(made), X.clone()
    for call in (1, 2):
        model.left = call
        with pytest.raises(MemoryError):
            made.generate(images.numpy(), Y.numpy())
        assert state(estimator) == before
        assert (repr(made), made.success) == (settings, None)
        assert torch.equal(images, X)


@pytest.mark.parametrize("attack", TABLE)
def test_the_table_is_complete(attack):
    """An option that somebody adds must be in the table, and where ART looks for options."""
    options = set(inspect.signature(attack).parameters) - {"estimator", "classifier"}
    assert options == set(TABLE[attack][-1])
    assert options == set(attack.attack_params)
    defaults = {name: inspect.signature(attack).parameters[name].default for name in options}
    assert [name for name, (value, _) in TABLE[attack][-1].items() if value == defaults[name]] == []


TO_CORE = {"max_iter": "steps", "eps_step": "step"}
HOSTS = {"batch_size", "num_random_init", "minimal", "verbose", "summary_writer", "sigma", "norm"}


@pytest.mark.parametrize("attack", TABLE)
def test_defaults_are_those_of_core(attack):
    known = inspect.signature(TABLE[attack][2]).parameters
    to_core = TO_CORE | ({"eps": "max_norm"} if attack is SmoothAdvDDN else {})
    ours = inspect.signature(attack).parameters
    names = set(ours) - {"estimator", "classifier"} - HOSTS
    if attack is SmoothAdvLinfPGD:
        names.remove("eps")
        assert (ours["eps"].default, ours["norm"].default) == (8 / 255, np.inf)
    assert {name: ours[name].default for name in names} == {
        name: known[to_core.get(name, name)].default for name in names
    }
    # and core has nothing that cannot be reached from here
    given = {to_core.get(name, name) for name in names} | {"norm", "eps", "random_start", "restarts"}
    assert set(known) - given == {"logits", "x", "y", "sigma", "family", "mask", "watch"}


PAPERS = {SmoothAdvPGD: PUBLISHED, SmoothAdvLinfPGD: PUBLISHED, SmoothAdvDDN: PUBLISHED_DDN}


@pytest.mark.parametrize("attack", PAPERS)
@each_estimator
def test_the_settings_of_the_paper_have_a_name(attack, kind):
    estimator, sigma, papers = ESTIMATORS[kind](SIGMA), SIGMA if kind == "plain" else None, PAPERS[attack]
    made = attack.published(estimator, sigma=sigma, **TABLE[attack][0])
    assert type(made) is attack
    assert {name: getattr(made, name) for name in papers} == papers
    adv = made.generate(X.numpy(), Y.numpy())
    np.testing.assert_allclose(adv, default_run(attack, kind).core(**papers), atol=1e-5)
    assert np.abs(adv - default_run(attack, kind).adv).max() > 1e-4
    assert attack.published(estimator, sigma=sigma, noise="fresh").noise == "fresh"
    assert attack.published(classifier=estimator, sigma=sigma).estimator is estimator


MANY = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(64) % CLASSES
VARIANTS = {
    "SmoothAdvPGD": (SmoothAdvPGD, {"max_iter": 5}),
    "as published": (SmoothAdvPGD.published, {"max_iter": 5}),
    "random starts, early stop": (SmoothAdvPGD, {"max_iter": 3, "num_random_init": 2, "early_stop": 0.1}),
    "minimal": (SmoothAdvPGD, {"max_iter": 6, "minimal": True}),
    "SmoothAdvLinfPGD": (SmoothAdvLinfPGD, {"max_iter": 4}),
    "Stein": (SmoothAdvPGD, {"max_iter": 3, "gradient": "centred-stein", "samples": 16}),
    "SmoothAdvDDN": (SmoothAdvDDN, {"max_iter": 6, "eps": 1.0}),
    "SmoothAdvDDN as published": (SmoothAdvDDN.published, {"max_iter": 6, "eps": 1.0}),
    "SmoothAdvDDN, confirmed": (SmoothAdvDDN, {"max_iter": 6, "eps": 2.0, "confirm": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_change_no_result(variant):
    make, settings = VARIANTS[variant]
    attack = make(ESTIMATORS["ours"](SIGMA), **{"samples": 4, **settings}, batch_size=64)
    at_once = attack.generate(MANY.numpy(), LABELS.numpy())
    success = attack.success
    for size in (16, 1):
        attack.set_params(batch_size=size)
        np.testing.assert_allclose(attack.generate(MANY.numpy(), LABELS.numpy()), at_once, atol=1e-5)
        assert success is None or np.array_equal(attack.success, success)
    alone = [attack.generate(MANY[k : k + 1].numpy(), LABELS[k : k + 1].numpy()) for k in (0, 7, 63)]
    np.testing.assert_allclose(np.concatenate(alone), at_once[[0, 7, 63]], atol=1e-5)
