"""Who does which block, with a Ray that is played: calls are answered in an order that the test chooses."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.certification import certify
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.engines import ray_crew
from rs_plugins.core.engines.engine import Task
from rs_plugins.core.engines.ray_crew import Crew
from rs_plugins.core.engines.ray_worker import Begun, Reply
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.errors import InputError, ModelError, ModelWarning, RSPluginsWarning, WorkerError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 3), dtype=np.uint8)
DATA = in_memory("squares", IMAGES, np.arange(12) % 4)
BLOCKS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
torch.manual_seed(0)
TASK = Task(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), 0.5, FixedBudget(n0=10, n=100), 0, {})


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


@dataclass(eq=False)
class Call:
    answer: object
    worker: "Actor"


class Actor:
    """A worker that answers at once, or dies of the images in ``deadly``, each as often as it says."""

    def __init__(self, stage):
        self.stage, self.task, self.begun = stage, TASK, None
        self.begin = SimpleNamespace(remote=self._begin)
        self.certify = SimpleNamespace(remote=self._certify)

    def _begin(self, images, positions):
        self.begun = self.task.begin(images, positions)
        answer = Begun(self.begun.made_with, self.begun.classes, self.task.identity())
        change = self.stage.starts.pop(0) if self.stage.starts else None
        return Call(change if isinstance(change, Exception) else Reply(change(answer) if change else answer), self)

    def _certify(self, images, positions, ahead):
        self.stage.given.append(list(positions))
        self.stage.ahead.append(ahead)
        for image in positions:
            if self.stage.deadly.get(image, 0):
                self.stage.deadly[image] -= 1
                return Call(RayError("struck\n  by lightning"), self)
        if error := self.stage.errors.get(positions[0]):
            return Call(Reply(None, error, "the place"), self)
        self.begun = self.begun.go_on(images, positions)
        said = ((ModelWarning, f"image {positions[0]} is odd"),) if positions[0] in self.stage.odd else ()
        return Call(Reply(list(self.begun), warnings=said), self)


class Stage:
    """A Ray: ``order`` chooses which of the calls that are out is answered next."""

    def __init__(self, order=lambda calls: calls[0]):
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.order, self.starts, self.deadly, self.errors, self.odd = order, [], {}, {}, ()
        self.given, self.ahead, self.hired, self.killed, self.timeouts = [], [], [], [], 0

    def hire(self):
        self.hired.append(Actor(self))
        return self.hired[-1]

    def wait(self, calls, num_returns, timeout):
        assert num_returns == 1
        if self.timeouts and timeout is not None:
            self.timeouts -= 1
            return [], calls
        chosen = self.order(calls)
        return [chosen], [call for call in calls if call is not chosen]

    def get(self, call):
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    def kill(self, worker):
        self.killed.append(worker)


def crew(stage, size=2, blocks=BLOCKS):
    return Crew(stage, stage.hire, DATA, blocks, size, TASK.identity())


def run(stage, **options):
    workers = crew(stage, **options)
    begun = workers.begin()
    found = list(workers.certificates())
    workers.close()
    return begun, found


@pytest.fixture(scope="module")
def expected():
    return list(certify(TASK.model, DATA.read(range(12)), 0.5, plan=TASK.plan))


def counts(certificates):
    return [(c.index, c.prediction, c.count, c.radius, c.made_with) for c in certificates]


ORDERS = {
    "first": lambda calls: calls[0],
    "last": lambda calls: calls[-1],
    "slow first worker": lambda calls: next((c for c in calls if c.worker is not c.worker.stage.hired[0]), calls[0]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_certificates_come_in_order_whoever_is_fast(expected, order, size):
    stage = Stage(ORDERS[order])
    begun, found = run(stage, size=size)
    assert counts(found) == counts(expected)
    assert begun.made_with == expected[0].made_with
    assert begun.classes == 4
    assert sorted(stage.given) == BLOCKS
    assert len(stage.hired) == size
    assert len(stage.killed) == size  # also those that have not begun


def test_workers_are_told_how_much_is_ahead():
    stage = Stage()
    run(stage)
    assert stage.ahead == [5, 4, 3, 2, 1, 0]  # images, of two a block, for each of two workers


@pytest.mark.parametrize("order", ORDERS)
def test_the_block_of_a_dead_worker_is_done_again(expected, order):
    stage = Stage(ORDERS[order])
    stage.deadly = {5: 2, 0: 1}
    with pytest.warns(RSPluginsWarning, match="workers: one died at work on images") as caught:
        _, found = run(stage)
    assert counts(found) == counts(expected)
    texts = sorted(str(warning.message) for warning in caught)
    again = "workers: one died at work on images {}, which are done again"
    assert texts == [again.format("0, 1"), again.format("4, 5"), again.format("4, 5")]
    assert len(stage.hired) == 5
    assert {id(worker) for worker in stage.killed} == {id(worker) for worker in stage.hired}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["dies", "fails"])
@pytest.mark.filterwarnings("ignore:workers. one died")
def test_what_comes_before_a_block_that_is_given_up_is_out_first(expected, order, kind):
    stage, found = Stage(ORDERS[order]), []
    if kind == "dies":
        stage.deadly, error, message = (
            {7: 9},
            WorkerError,
            "^workers: 3 died at work on images 6, 7: struck by lightning$",
        )
    else:
        stage.errors, error, message = {6: InputError("image 6 cannot be")}, InputError, "^image 6 cannot be$"
    workers = crew(stage)
    workers.begin()
    with pytest.raises(error, match=message):
        found.extend(workers.certificates())
    assert counts(found) == counts(expected[:6])
    assert stage.given.count([6, 7]) == (3 if kind == "dies" else 1)


def test_an_error_shows_where_it_came_from():
    stage = Stage()
    stage.errors = {0: InputError("wrong")}
    with pytest.raises(InputError, match=r"^wrong$") as caught:
        run(stage)
    assert str(caught.value.__cause__) == "in a worker:\nthe place"


def test_warnings_are_said_again(expected):
    stage = Stage()
    stage.odd = (2,)
    with pytest.warns(ModelWarning, match=r"^image 2 is odd$"):
        _, found = run(stage)
    assert counts(found) == counts(expected)


def test_a_mistake_of_ours_is_no_death():
    stage = Stage()
    stage.starts = [RayTaskError("a bug")]
    with pytest.raises(RayTaskError, match="a bug"):
        run(stage)


def test_workers_that_die_before_they_begin():
    stage = Stage()
    stage.starts = [RayError("no room"), RayError("no room"), None]
    assert len(run(stage)[1]) == 12
    stage = Stage()
    stage.starts = [RayError("no\nroom")] * 3
    with pytest.raises(WorkerError, match=r"^workers: 3 in a row died before they had begun: no room$"):
        run(stage)


def test_another_model_in_a_worker_is_refused():
    stage = Stage()
    stage.starts = [lambda begun: replace(begun, identity="0" * 64)]
    with pytest.raises(ModelError, match="model: in a worker it is another one"):
        run(stage)


def test_workers_on_other_hardware_are_refused():
    stage = Stage()
    stage.starts = [None, lambda begun: replace(begun, made_with=replace(begun.made_with, numerics="AVX512"))]
    with pytest.raises(
        WorkerError, match=r"expected machines of one kind with the same versions, got numerics: '.*' -> 'A"
    ):
        run(stage)


def test_a_worker_that_never_begins_stops_nobody(expected):
    stage = Stage(lambda calls: next((c for c in calls if c.worker is not c.worker.stage.hired[1]), None))
    assert counts(run(stage)[1]) == counts(expected)


def test_a_cluster_that_is_busy_is_told_of_once():
    stage = Stage()
    stage.timeouts = 3
    with pytest.warns(RSPluginsWarning, match="workers: none has begun within 30 s; is the cluster busy") as caught:
        run(stage)
    assert len(caught) == 1


def test_no_worker_runs_far_ahead(monkeypatch):
    monkeypatch.setattr(ray_crew, "AHEAD", 1)
    stage = Stage(ORDERS["slow first worker"])
    workers = crew(stage)
    workers.begin()
    assert next(workers.certificates()).index == 0
    assert stage.given == [
        [0, 1]
    ]  # the fast worker has block 0, is done, and block 1 follows only when it is asked for
