import copy
import dataclasses
import subprocess
import sys
from functools import partial
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rs_plugins.core.black_box import BlackBox
from rs_plugins.core.certification import certify
from rs_plugins.core.identity import identity, numerics
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.plans.fixed_budget import FixedBudget

IMAGES = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
FACTOR = 1.0


def scaled(x):
    return x * FACTOR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.mean = torch.full((4,), 0.5)
        self.array = np.zeros(2)
        self.flip = False
        self.activation = F.relu
        self.sizes = [1, (2, 3)]
        self.config = {"width": 3, "names": {"a", "b", "c"}}
        self.calls = 0
        self.device = "cpu"
        self.hidden = [nn.Linear(1, 1)]

    def helper(self, z):
        return -z if self.flip else z

    def forward(self, x):
        self.calls += 1
        self.seen = x
        return scaled(self.helper(self.activation(self.linear(x - self.mean))))


class Pool:
    """A function with settings; what its calls leave in it is none."""

    def __init__(self, mode="mean", **more):
        self.mode, self.calls, self.seen, self.table = mode, 0, [], {}
        vars(self).update(more)

    def __call__(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        self.table[len(x)] = x
        return x if self.mode == "mean" else self.most(x)

    def most(self, x):
        return x.clamp(min=0)


class Louder(Pool):
    def most(self, x):
        return 2 * x


class Slotted:
    __slots__ = ("_factor", "never")

    def __init__(self, factor):
        self._factor = factor

    def __call__(self, x):
        return x * self._factor


class Settings:
    def __init__(self, **settings):
        vars(self).update(settings)
        self._memory = object()

    def note(self, time):
        self.time = time


@dataclasses.dataclass
class Power:
    exponent: int = 1

    def __call__(self, x):
        return x**self.exponent


class Other(Net):
    pass


class Child(Net):
    def helper(self, z):
        return z + 1


def changed_class():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return torch.relu(self.linear(x))

    return Net


def same_but_for_a_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return torch.tanh(self.linear(x))

    return Net


def changed(change):
    model = Net()
    change(model)
    return model


def hook(_module, _inputs, output):
    return -output


CHANGES = {
    "tensor": lambda m: setattr(m, "mean", torch.zeros(4)),
    "array": lambda m: setattr(m, "array", np.ones(2)),
    "flag": lambda m: setattr(m, "flip", True),
    "private": lambda m: setattr(m, "_scale", 2.0),
    "function": lambda m: setattr(m, "activation", F.silu),
    "lambda": lambda m: setattr(m, "activation", lambda x: x),
    "partial": lambda m: setattr(m, "activation", partial(F.leaky_relu, negative_slope=0.5)),
    "list": lambda m: setattr(m, "sizes", [1, (2, 4)]),
    "dict": lambda m: m.config.update(width=4),
    "hook": lambda m: m.register_forward_hook(hook),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "hook of a part": lambda m: m.linear.register_forward_hook(hook),
    "forward": lambda m: setattr(m, "forward", lambda x: -Net.forward(m, x)),
    "forward of another": lambda m: setattr(m, "forward", changed(CHANGES["tensor"]).forward),
    "unregistered module": lambda m: nn.init.zeros_(m.hidden[0].weight),
    "submodule's setting": lambda m: setattr(m.linear, "scale", 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_logits_is_seen(name):
    assert identity(changed(CHANGES[name])) == identity(changed(CHANGES[name]))
    assert identity(changed(CHANGES[name])) != identity(Net())


def within(value):
    """Return a function of somebody else that has ``value`` in a closure."""
    return lambda x: value(x)


OBJECTS = {
    "callable": (Pool(), Pool("max")),
    "class of a callable": (Pool("max"), Louder("max")),
    "attribute of any name": (Pool(_power=1), Pool(_power=2)),
    "tensor": (Pool(weight=torch.zeros(2)), Pool(weight=torch.ones(2))),
    "in a closure": (within(Pool()), within(Pool("max"))),
    "in a partial": (partial(Pool(), 1), partial(Pool("max"), 1)),
    "bound method": (Pool().most, Pool("max").most),
    "inside another": (Pool(then=Pool()), Pool(then=Pool("max"))),
    "slots": (Slotted(1.0), Slotted(2.0)),
    "dataclass": (Power(1), Power(2)),
    "settings": (Settings(mode="mean"), Settings(mode="max")),
    "settings in settings": (Settings(pool=Settings(mode="mean")), Settings(pool=Settings(mode="max"))),
    "namespace": (SimpleNamespace(mode="mean"), SimpleNamespace(mode="max")),
    "container": (Settings(sizes=[1, {"a": 2}]), Settings(sizes=[1, {"a": 3}])),
    "getter": (itemgetter(0), itemgetter(1)),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_settings_of_objects_are_seen(name):
    one, other = (changed(lambda m, value=value: setattr(m, "activation", value)) for value in OBJECTS[name])
    assert identity(one) == identity(copy.deepcopy(one)) != identity(other)


def test_what_calls_leave_in_objects_is_not():
    model = changed(lambda m: setattr(m, "activation", within(Pool("max"))))
    model.pool, model.settings = Pool("max"), Settings(mode="mean", time=0)
    before = identity(model)
    model(IMAGES)
    model.pool(IMAGES)
    model.settings.note(3)
    model.settings._memory = 7
    assert model.pool.calls == 1
    assert identity(model) == before


def test_objects_that_know_each_other_are_described():
    chain = Settings(mode="max")
    for _ in range(500):
        chain = Settings(after=chain)
    crowd = [Settings(number=number) for number in range(30)]
    for one in crowd:
        one.all = crowd
    first, second = (changed(lambda m: setattr(m, "crowd", crowd)) for _ in range(2))
    first.chain = second.chain = chain
    before = identity(first)
    assert before == identity(second)
    crowd[20].number = 7
    assert identity(first) != before


def test_classes_and_their_code_are_seen(monkeypatch):
    torch.manual_seed(0)
    state = changed_class()().state_dict()
    models = [kind() for kind in (changed_class(), same_but_for_a_name())]
    for model in models:
        model.load_state_dict(state)
    digits = {*map(identity, models), identity(Net()), identity(Other()), identity(Child())}
    monkeypatch.setattr(Net, "helper", lambda self, z: z)
    digits.add(identity(Net()))
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.FACTOR", 2.0)
    digits.add(identity(Net()))
    assert len(digits) == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: m(IMAGES),
        lambda m: m.eval().requires_grad_(False),
        lambda m: setattr(m, "device", "cuda:3"),
        lambda m: setattr(m, "calls", 7),
        lambda m: setattr(m, "seen", IMAGES),
        lambda m: m.hidden.append(m.hidden.pop()),
    ],
    ids=["train", "run", "eval", "device", "counter", "state", "order of making"],
)
def test_what_does_not_decide_them_is_not(change):
    assert identity(changed(change)) == identity(Net())
    assert identity(copy.deepcopy(Net())) == identity(Net())


def test_modules_that_know_each_other_are_described():
    first, second = Net(), Net()
    first.friends, second.friends = [second], [first, second]
    first.itself = [first.linear]
    assert identity(first) == identity(first) != identity(second)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_a_compiled_module_is_the_same_each_time():
    first, second = torch.compile(Net()), torch.compile(Net())
    assert identity(first) == identity(second) != identity(torch.compile(changed(CHANGES["tensor"])))


def test_another_process_finds_the_same(tmp_path):
    """Also where a printed form or an object holds an address, or a constant is a set, whose order changes."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Words:\n"
        "    def __init__(self):\n        self.words, self.inner = {'x', 'y', 'z'}, object()\n"
        "    def __call__(self, x):\n        return x in self.words\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, f):\n        super().__init__()\n        self.f, self.names = f, {'x', 'y', 'z'}\n"
        "        self.words, self.pair = Words(), {Words(), Words()}\n"
        "    def forward(self, x):\n        return self.f(x) if 'a' in {'a', 'b', 'c'} else [y for y in x]\n"
        "    def extra_repr(self):\n        return repr(self.f)\n"
    )
    code = "import nets; from rs_plugins.core.identity import identity; print(identity(nets.Net(lambda x: x)))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", f"{filler}; {code}"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for filler in ("x = 1", "keep = [object() for _ in range(9999)]")
    }
    assert len(runs) == 1


def test_of_a_black_box_only_name_and_labels_count():
    def box(function, **options):
        return identity(BlackBox(function, name="box", **options))

    assert box(len, classes=2) == box(abs, classes=2)
    assert box(len, labels=["cat", "dog"]) != box(len, labels=["dog", "cat"])
    assert box(len, classes=2).startswith("black box box, ")


def made_with(**options):
    return certify(Net(), IMAGES, 0.5, **{"plan": FixedBudget(n0=1, n=20)} | options).made_with


def test_options_of_a_noise_family_are_recorded():
    @dataclasses.dataclass(frozen=True)
    class Stretched(GaussianNoise):
        factor: float = 1.0

    first, second = (made_with(family=partial(Stretched, factor=factor)) for factor in (1.0, 5.0))
    assert (first.family, first.sigma) == (second.family, second.sigma) == ("gaussian", 0.5)
    assert "factor=5.0" in second.noise
    assert first != second


def test_numerics_are_recorded():
    cpu = torch.device("cpu")
    assert made_with().numerics == numerics(cpu)
    before, precision = numerics(cpu), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision == "highest" else "highest")
        assert numerics(cpu) != before
    finally:
        torch.set_float32_matmul_precision(precision)
    assert before == f"{torch.backends.cpu.get_cpu_capability()}, float32 matmul {precision}"


def test_numerics_of_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Abacus 3000")
    words = numerics(torch.device("cuda"))
    assert words.startswith("Abacus 3000, float32 matmul ")
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert numerics(torch.device("cuda")) != words


square = 3


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = 2

    def forward(self, x):
        return x * self.square


def test_an_attribute_is_no_global_of_the_same_name(monkeypatch):
    """So that a model is the same one in a process where that global is not."""
    before = identity(Reading())
    monkeypatch.setitem(globals(), "square", 4)
    assert identity(Reading()) == before
