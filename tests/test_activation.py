"""Names appear on hosts, in every import order, and go again; nothing escapes into the user's import of a host."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import subprocess
import sys
import threading
import warnings

import pytest

from rs_plugins.activation import Activation
from rs_plugins.errors import PluginError, PluginWarning
from rs_plugins.import_hook import ImportWatcher
from rs_plugins.registry import Registry

HOST = """
from .base import Base
class Theirs(Base): pass
__all__ = ["Theirs", "Last"]
Last = Theirs
"""


@pytest.fixture
def hosts(site):
    """A host with ``__all__`` and a lazy part, and a host adapter that imports it, as ours does."""
    site.write("fakehost/__init__.py", HOST)
    site.write("fakehost/base.py", "class Base: pass")
    site.write("fakehost/late/__init__.py", "from fakehost import Theirs")
    site.write("fakehost/late/inner.py", "from fakehost.late import Theirs")
    site.write("fakeadapter/__init__.py", "")
    site.write("fakeadapter/helpers.py", "import fakehost\nimport fakehost.base\nready = True")
    site.write(
        "fakeadapter/attacks.py", "import fakehost\nfrom .helpers import ready\nclass Ours(fakehost.Theirs): pass"
    )
    site.exporting("fake", ("fakehost", "Ours", "fakeadapter.attacks:Ours"))
    return site


@pytest.fixture
def start(site):
    """Make activations of what is installed in `site`; whatever a test leaves open is closed."""
    made = []

    def make(*, strict: bool = True) -> Activation:
        made.append(Activation(Registry(site.entry_points(), strict=strict)))
        return made[-1]

    before = list(sys.meta_path)
    yield make
    for activation in made:
        if activation._session is not None:
            activation._session.close()
    assert sys.meta_path == before


def states(activation):
    return [landing.state for landing in activation.landings()]


STEPS = {
    "host": "fakehost",
    "adapter": "fakeadapter.attacks",
    "helper": "fakeadapter.helpers",
    "part": "fakehost.late.inner",
}
ORDERS = [
    *itertools.permutations(["activate", "host", "adapter"]),
    ("activate", "helper"),
    ("helper", "activate"),
    ("activate", "part"),
    ("part", "activate"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_import_order(hosts, start, order):
    activation = start()
    for step in order:
        activation.activate() if step == "activate" else importlib.import_module(STEPS[step])
    import fakehost
    from fakeadapter.attacks import Ours

    assert vars(fakehost)["Ours"] is Ours
    assert fakehost.__all__ == ["Theirs", "Last", "Ours"]
    assert states(activation) == ["placed"]
    activation.deactivate()
    assert not hasattr(fakehost, "Ours")
    assert fakehost.__all__ == ["Theirs", "Last"]
    assert states(activation) == ["inactive"]


def test_every_way_to_look_a_name_up(hosts, start):
    start().activate()
    found = {}
    exec("from fakehost import *", found)
    import fakehost

    assert "Ours" in found
    assert fakehost.__dict__["Ours"] is getattr(fakehost, "Ours") is eval("fakehost.Ours")  # noqa: B009
    assert "Ours" in vars(fakehost)["__all__"]
    assert "Ours" in dict(inspect.getmembers(fakehost, inspect.isclass))
    assert "Ours" in dir(fakehost)


def test_names_are_placed_before_the_import_statement_returns_to_the_module_that_made_it(hosts, start):
    hosts.write("harness.py", "import fakeadapter.helpers\nfrom fakehost import Ours")
    start().activate()
    assert importlib.import_module("harness").Ours.__name__ == "Ours"


def test_a_half_imported_adapter_is_waited_for_and_not_tried_in_vain(hosts, start):
    hosts.write("counter.py", "runs = 0")
    hosts.write(
        "fakeadapter/attacks.py", "import counter\ncounter.runs += 1\nfrom .helpers import ready\nclass Ours: pass"
    )
    start().activate()
    import fakeadapter.helpers

    assert fakeadapter.helpers.fakehost.Ours
    assert sys.modules["counter"].runs == 1


def test_activating_twice_is_activating_once(hosts, start):
    import fakehost

    activation = start()
    activation.activate()
    activation.activate()
    assert fakehost.__all__.count("Ours") == 1
    assert sum(isinstance(finder, ImportWatcher) for finder in sys.meta_path) == 1
    activation.deactivate()
    activation.deactivate()
    assert not hasattr(fakehost, "Ours")


def test_blocks_nest_and_count_together_with_activate(hosts, start):
    import fakehost

    activation = start()
    with activation.activated():
        with activation.activated():
            assert hasattr(fakehost, "Ours")
        assert hasattr(fakehost, "Ours")
        activation.activate()
    assert hasattr(fakehost, "Ours")
    with activation.activated():
        activation.deactivate()
        assert hasattr(fakehost, "Ours")
    assert not hasattr(fakehost, "Ours")
    assert fakehost.__all__ == ["Theirs", "Last"]


def test_a_block_ends_also_after_an_exception(hosts, start):
    import fakehost

    activation = start()
    block = activation.activated()
    block.__enter__()
    assert hasattr(fakehost, "Ours")
    block.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not hasattr(fakehost, "Ours")


def test_a_host_without_all_gets_none_and_a_tuple_stays_a_tuple(site, start):
    site.write("bare.py", "x = 1")
    site.write("tupled.py", "__all__ = ('b', 'a')\na = b = 1")
    site.exporting("both", ("bare", "dumps", "json:dumps"), ("tupled", "dumps", "json:dumps"))
    activation = start()
    activation.activate()
    import bare
    import tupled

    assert bare.dumps
    assert not hasattr(bare, "__all__")
    assert tupled.__all__ == ("b", "a", "dumps")
    activation.deactivate()
    assert tupled.__all__ == ("b", "a")
    assert not hasattr(bare, "dumps")
    assert not hasattr(tupled, "dumps")


@pytest.mark.parametrize("source", ["Ours = 'theirs'", "def __getattr__(name):\n    return 'theirs'"])
def test_the_hosts_own_name_stays(site, start, source):
    site.write("fakehost.py", source)
    site.exporting("clash", ("fakehost", "Ours", "json:dumps"))
    activation = start(strict=False)
    activation.activate()
    message = "plugin 'clash' .* fakehost has a Ours of its own, which stays; the plugin's is json:dumps"
    with pytest.warns(PluginWarning, match=message) as warned:
        import fakehost
    activation.activate()
    assert len(warned) == 1
    assert fakehost.Ours == "theirs"
    assert [(landing.state, landing.detail) for landing in activation.landings()] == [
        ("kept", "fakehost has a Ours of its own, which stays")
    ]
    activation.deactivate()
    assert fakehost.Ours == "theirs"


def test_the_hosts_own_name_is_an_error_under_strict(site, start):
    site.write("fakehost.py", "Ours = 'theirs'")
    site.exporting("clash", ("fakehost", "Ours", "json:dumps"))
    start().activate()
    with pytest.raises(PluginError, match="fakehost has a Ours of its own"):
        importlib.import_module("fakehost")


BROKEN_TARGETS = {
    "raises": ("raise RuntimeError('host too old')", "RuntimeError: host too old"),
    "exits": ("raise SystemExit(2)", "SystemExit: 2"),
    "plugin error": ("from rs_plugins.errors import PluginError\nraise PluginError('no')", "PluginError: no"),
    "missing": ("import no_such_module_x", "ModuleNotFoundError: No module named 'no_such_module_x'"),
    "no class": ("", "AttributeError: module 'fakeadapter.attacks' has no attribute 'Ours'"),
}


@pytest.mark.parametrize("case", BROKEN_TARGETS)
def test_a_class_that_cannot_be_imported_is_one_warning_and_the_others_work(hosts, start, case):
    source, cause = BROKEN_TARGETS[case]
    hosts.write("fakeadapter/attacks.py", source)
    hosts.exporting(
        "fake", ("fakehost", "Ours", "fakeadapter.attacks:Ours"), ("fakehost.base", "Ours", "fakeadapter.attacks:Ours")
    )
    hosts.exporting("works", ("fakehost", "dumps", "json:dumps"))
    activation = start(strict=False)
    activation.activate()
    with pytest.warns(PluginWarning) as warned:
        import fakehost.late.inner  # two chances to warn
    assert [str(warning.message) for warning in warned] == [
        "plugin 'fake' (dist-fake 1.0): cannot place Ours on fakehost, fakehost.base: "
        f"loading fakeadapter.attacks:Ours: {cause}"
    ]
    assert fakehost.dumps
    assert fakehost.__all__ == ["Theirs", "Last", "dumps"]
    assert states(activation) == ["failed", "failed", "placed"]


def test_a_class_that_cannot_be_imported_raises_under_strict(hosts, start):
    hosts.write("fakeadapter/attacks.py", "raise RuntimeError('host too old')")
    activation = start()
    activation.activate()
    with pytest.raises(PluginError, match=r"cannot place Ours on fakehost: .* RuntimeError: host too old"):
        importlib.import_module("fakehost")
    activation.deactivate()
    import fakehost

    assert not hasattr(fakehost, "Ours")


def test_under_strict_the_plugin_at_fault_is_named_and_not_the_one_that_was_being_placed(hosts, start):
    hosts.write("otherhost.py", "")
    hosts.write("fakeadapter/attacks.py", "import otherhost\nclass Ours: pass")
    hosts.exporting("bad", ("otherhost", "Nothing", "json:nothing"))
    activation = start()
    activation.activate()
    with pytest.raises(PluginError) as caught:
        importlib.import_module("fakehost")
    assert str(caught.value) == (
        "plugin 'bad' (dist-bad 1.0): cannot place Nothing on otherhost: loading json:nothing: "
        "AttributeError: module 'json' has no attribute 'nothing'"
    )
    assert [(landing.plugin.name, landing.state) for landing in activation.landings()] == [
        ("bad", "failed"),
        ("fake", "waiting"),
    ]


def test_an_error_that_a_target_raises_itself_is_its_own_also_under_strict(hosts, start):
    hosts.write("fakeadapter/attacks.py", "from rs_plugins.errors import PluginError\nraise PluginError('of mine')")
    start().activate()
    with pytest.raises(
        PluginError, match=r"^plugin 'fake' .*: cannot place Ours on fakehost: .* PluginError: of mine$"
    ):
        importlib.import_module("fakehost")


def test_strict_activation_that_fails_leaves_nothing_behind(hosts, start):
    import fakehost

    hosts.write("fakeadapter/attacks.py", "raise RuntimeError('host too old')")
    activation = start()
    finders = list(sys.meta_path)
    with pytest.raises(PluginError, match="host too old"):
        activation.activate()
    assert sys.meta_path == finders
    assert states(activation) == ["inactive"]
    assert fakehost.__all__ == ["Theirs", "Last"]


def test_no_exception_reaches_the_users_import_even_where_warnings_are_errors(hosts, start, capsys):
    hosts.write("fakeadapter/attacks.py", "raise RuntimeError('host too old')")
    start(strict=False).activate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import fakehost
    assert fakehost.Theirs
    assert "rs-plugins: plugin 'fake' (dist-fake 1.0): cannot place Ours" in capsys.readouterr().err


def test_a_host_that_is_not_installed_is_no_error(site, start):
    site.exporting("lonely", ("no_such_host_here.sub", "Ours", "no_such_adapter:Ours"))
    activation = start()
    activation.activate()
    assert states(activation) == ["waiting"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_host_here'"):
        importlib.import_module("no_such_host_here")


def test_a_part_of_a_host_gets_its_names_when_it_is_imported(hosts, start):
    hosts.exporting("fake", ("fakehost.late", "Ours", "fakeadapter.attacks:Ours"))
    activation = start()
    activation.activate()
    import fakehost

    assert states(activation) == ["waiting"]
    assert "fakehost.late" not in sys.modules
    import fakehost.late.inner

    assert fakehost.late.Ours
    assert not hasattr(fakehost, "Ours")


def test_a_host_that_fails_to_import_fails_as_always_and_can_be_imported_later(hosts, start):
    hosts.write(
        "fakehost/base.py",
        "import sys\nif not hasattr(sys, '_repaired'): raise ImportError('theirs')\nclass Base: pass",
    )
    start().activate()
    with pytest.raises(ImportError, match=r"^theirs$"):
        importlib.import_module("fakehost")
    sys._repaired = True
    try:
        import fakehost
    finally:
        del sys._repaired
    assert fakehost.Ours


def test_names_come_although_the_import_that_brought_the_host_failed(hosts, start):
    hosts.write("fakeadapter/other.py", "import fakehost\nraise ImportError('theirs')")
    start().activate()
    with pytest.raises(ImportError, match=r"^theirs$"):
        importlib.import_module("fakeadapter.other")
    assert sys.modules["fakehost"].Ours


def test_a_host_that_imports_another_host(site, start):
    """The inner host's adapter needs the outer host, which is still half imported when the inner one is complete."""
    site.write("outerhost.py", "import innerhost\nclass Outer: pass")
    site.write("innerhost.py", "")
    site.write("someadapter.py", "from outerhost import Outer\nclass Ours(Outer): pass")
    site.exporting("nested", ("innerhost", "Ours", "someadapter:Ours"), ("outerhost", "Mine", "someadapter:Ours"))
    activation = start()
    activation.activate()
    import innerhost
    import outerhost

    assert innerhost.Ours is outerhost.Mine
    sys.modules.pop("innerhost"), sys.modules.pop("outerhost"), sys.modules.pop("someadapter")
    import outerhost

    assert sys.modules["innerhost"].Ours is outerhost.Mine


def test_the_loader_is_the_hosts_own_again(hosts, start):
    start().activate()
    import fakeadapter.attacks
    import fakehost

    for module in (fakehost, fakeadapter.attacks):
        assert type(module.__spec__.loader) is type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert "class Theirs(Base): pass" in inspect.getsource(fakehost)


def test_a_spec_that_is_only_looked_at_still_offers_what_its_loader_does(hosts, start):
    start().activate()
    spec = importlib.util.find_spec("fakeadapter.attacks")
    assert spec.loader.get_filename("fakeadapter.attacks").endswith("attacks.py")
    assert spec.loader.get_code("fakeadapter.attacks").co_name == "<module>"
    assert "fakehost" not in sys.modules
    import fakeadapter.attacks

    assert fakeadapter.attacks.Ours.__name__ == "Ours"


def test_reloading_the_host_keeps_one_entry(hosts, start):
    activation = start()
    activation.activate()
    import fakehost

    importlib.reload(fakehost)
    assert fakehost.__all__ == ["Theirs", "Last", "Ours"]
    activation.deactivate()
    assert fakehost.__all__ == ["Theirs", "Last"]
    assert not hasattr(fakehost, "Ours")


def test_a_host_that_is_imported_afresh_gets_its_names_again(hosts, start):
    activation = start()
    activation.activate()
    first = importlib.import_module("fakehost")
    del sys.modules["fakehost"]
    second = importlib.import_module("fakehost")
    assert first is not second
    assert "Ours" in second.__all__
    activation.deactivate()
    assert not hasattr(first, "Ours")
    assert not hasattr(second, "Ours")


def test_what_somebody_else_put_there_meanwhile_stays(hosts, start):
    activation = start()
    activation.activate()
    import fakehost

    fakehost.Ours = "somebody else's"
    fakehost.__all__ = ["Theirs"]
    activation.deactivate()
    assert fakehost.Ours == "somebody else's"
    assert fakehost.__all__ == ["Theirs"]


class _Asking:
    """A finder as other import-hook libraries write it: asks for the spec by importlib.util.find_spec, guarded."""

    def __init__(self):
        self.asked = []

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("fakehost") or fullname in self.asked:
            return None
        self.asked.append(fullname)
        return importlib.util.find_spec(fullname)


@pytest.mark.parametrize("position", [0, 1])
def test_another_finder_that_asks_all_finders(hosts, start, monkeypatch, position):
    start().activate()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path[:position], _Asking(), *sys.meta_path[position:]])
    import fakehost

    assert fakehost.Ours
    monkeypatch.undo()


def test_two_activations_at_once(hosts, start):
    first, second = start(), start()
    first.activate()
    second.activate()
    import fakehost

    assert fakehost.__all__ == ["Theirs", "Last", "Ours"]
    assert states(first) == states(second) == ["placed"]
    assert type(fakehost.__loader__) is importlib.machinery.SourceFileLoader
    second.deactivate()
    first.deactivate()
    assert fakehost.__all__ == ["Theirs", "Last"]


def test_threads_that_import_host_and_adapter_at_the_same_time(hosts, start):
    slow = "import time\ntime.sleep(0.05)\n"
    hosts.write("fakehost/base.py", slow + "class Base: pass")
    hosts.write("fakeadapter/helpers.py", slow + "import fakehost\nready = True")
    for _ in range(5):
        activation = start()
        steps = [activation.activate] * 2
        steps += [lambda name=name: importlib.import_module(name) for name in (*STEPS.values(), *STEPS.values())]
        failures = []

        def guarded(step, failures=failures):
            try:
                step()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(step,), daemon=True) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []
        fakehost = sys.modules["fakehost"]
        assert fakehost.__all__ == ["Theirs", "Last", "Ours"]
        assert fakehost.Ours is sys.modules["fakeadapter.attacks"].Ours
        activation.deactivate()
        for name in [name for name in sys.modules if name.startswith(("fakehost", "fakeadapter"))]:
            del sys.modules[name]


REAL = """
import sys
import rs_plugins
rs_plugins.activate()
assert not {"torch", "art", "torchattacks"} & set(sys.modules)
import rs_plugins_torchattacks.attacks
import torchattacks
assert torchattacks.SmoothAdvPGD is rs_plugins_torchattacks.attacks.SmoothAdvPGD is rs_plugins.SmoothAdvPGD
ours = ["SmoothAdvPGD", "SmoothAdvLinfPGD", "SmoothAdvDDN"]
assert torchattacks.__all__[-3:] == ours and len(torchattacks.__all__) == len(set(torchattacks.__all__))
assert all(getattr(torchattacks, name) is getattr(rs_plugins, name) for name in ours)
rs_plugins.deactivate()
assert not hasattr(torchattacks, "SmoothAdvPGD") and torchattacks.__all__[-1] == "LGV"
import art
assert not hasattr(art.attacks.evasion, "SmoothAdvPGD")
with rs_plugins.activated():
    assert art.attacks.evasion.SmoothAdvPGD
    classes = {
        art.estimators.classification.SmoothedClassifier,
        art.estimators.certification.SmoothedClassifier,
        art.estimators.certification.randomized_smoothing.SmoothedClassifier,
    }
    assert classes == {rs_plugins.SmoothedClassifier}
    assert art.estimators.classification.CertifyingAdapterClassifier is rs_plugins.CertifyingAdapterClassifier
assert not hasattr(art.estimators.classification, "SmoothedClassifier")
"""


def test_the_real_hosts():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
