import json

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.relaxations.bound_files import BOUND_LOG, BoundsWriter, read_bounds
from rs_plugins.core.relaxations.bound_results import BoundResults
from rs_plugins.core.relaxations.certifying import certify_bounds
from rs_plugins.core.relaxations.job import certify_bounds_data_set
from rs_plugins.core.results.merging import merge_logs
from rs_plugins.core.selection import Selection
from rs_plugins.errors import InputError, ModelError, ResultsError, ResultsWarning

IMAGES = np.random.default_rng(0).integers(0, 256, (14, 1, 3, 3), dtype=np.uint8)
OPTIONS = {"attack_steps": 3, "batch_size": 4}
EPS = 0.06


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight *= 3
        model[3].bias -= model(torch.from_numpy(IMAGES).float() / 255).mean(dim=0)
    return model


def data(images=IMAGES, labels=None):
    own = network()(torch.from_numpy(images).float() / 255).argmax(dim=1).numpy()
    own[-2:] = (own[-2:] + 1) % 4
    return in_memory("squares", images, own if labels is None else labels)


def job(log, model=None, eps=EPS, **options):
    return certify_bounds_data_set(model or network(), options.pop("data", data()), eps, log, **OPTIONS | options)


SLACK = "1e-10·(1 + |margin|) + 16 roundings of all terms"


def content(log):
    """A log without its times, and its record."""
    rows = [[cell for place, cell in enumerate(line.split("\t")) if place != 7] for line in log.read_text().split("\n")]
    return rows, log.with_name(log.name + ".json").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    log = tmp_path_factory.mktemp("whole") / "log.tsv"
    job(log)
    return log


def test_the_log_is_what_certify_bounds_says(whole):
    x, y = torch.from_numpy(IMAGES).float() / 255, torch.from_numpy(data().labels)
    expected = certify_bounds(network(), x, y, EPS, **OPTIONS)
    results, direct = read_bounds(whole), BoundResults.of(expected)
    for name in ("idx", "label", "predict", "status", "method"):
        assert getattr(results, name).tolist() == getattr(direct, name).tolist()
    assert set(direct.status.tolist()) == {"verified", "falsified", "misclassified", "unknown"}
    assert results.margin == pytest.approx(direct.margin, rel=1e-7)
    record = json.loads(whole.with_name("log.tsv.json").read_text())
    run = {"eps": EPS, "norm": "linf", "cascade": "ibp, crown-ibp, crown", "attack": "pgd, 1 run of 3 steps", "seed": 0}
    assert record.items() >= {**run, "dtype": "float64", "device": "cpu", "slack": SLACK}.items()
    assert record["model"] == expected[0].made_with.model
    assert (record["digest"], record["images"]) == (data().digest, 14)
    assert record["selection"] == {"start": 0, "stop": 14, "skip": 1, "shard": [0, 1]}


@pytest.mark.parametrize("rows", [0, 1, 4, 7, 13, 14])
@pytest.mark.parametrize("cut", [0, 9])
def test_a_killed_run_goes_on_to_the_same_log(tmp_path, whole, rows, cut):
    log = tmp_path / "log.tsv"
    lines = whole.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: rows + 1]) + (lines[rows + 1][:cut] if rows < 14 else b""))
    log.with_name("log.tsv.json").write_bytes(whole.with_name("log.tsv.json").read_bytes())
    results = job(log, resume=True)
    assert content(log) == content(whole)
    assert len(results) == 14


def test_each_batch_is_on_disk_before_the_next(tmp_path):
    log, lazy, held = tmp_path / "log.tsv", data(), []

    def read(positions):
        held.append((len(positions), log.read_bytes().count(b"\n") if log.exists() else None))
        return data().read(positions)

    object.__setattr__(lazy, "read", read)
    job(log, data=lazy)
    assert held == [(4, 1), (4, 5), (4, 9), (2, 13)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.05}, "eps: 0.06 -> 0.05"),
        ({"norm": "l2"}, "norm: 'linf' -> 'l2'"),
        ({"cascade": ["crown"]}, "cascade: 'ibp, crown-ibp, crown' -> 'crown'"),
        ({"attack_steps": 4}, "attack: 'pgd, 1 run of 3 steps' -> 'pgd, 1 run of 4 steps'"),
        ({"dtype": torch.float32}, "slack: '1e-10.*dtype: 'float64' -> 'float32'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"model": network(1)}, "model: '"),
        ({"data": data(255 - IMAGES)}, "digest: '"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_log_of_another_run_is_not_gone_on_with(tmp_path, whole, change, message):
    log = tmp_path / "log.tsv"
    for name in ("log.tsv", "log.tsv.json"):
        (tmp_path / name).write_bytes(whole.with_name(name).read_bytes())
    with pytest.raises(ResultsError, match=rf"begun by another run \(.*{message}"):
        job(log, **{"resume": True, **change})
    assert content(log) == content(whole)


def test_what_makes_no_sense_is_refused(tmp_path, whole):
    log = tmp_path / "log.tsv"
    with pytest.raises(ResultsError, match="it exists; to go on with it use resume"):
        job(whole)
    with pytest.raises(InputError, match="log: there is no folder"):
        job(tmp_path / "none" / "log.tsv")
    with pytest.raises(ModelError, match="expected at least 8 classes, as squares has, got 4"):
        job(log, data=data(labels=np.full(14, 7)))
    with pytest.raises(InputError, match="batch_size: expected an integer >= 1, got 0"):
        job(log, batch_size=0)
    with pytest.raises(TypeError, match="alpha"):
        job(log, alpha=0.1)
    assert not any(tmp_path.iterdir())
    log.write_text("idx\tlabel\n")
    with pytest.raises(ResultsError, match="expected a log begun by rs-plugins, got another file"):
        job(log, resume=True)
    with BoundsWriter(tmp_path / "held.tsv"), pytest.raises(ResultsError, match="another process is writing"):
        job(tmp_path / "held.tsv")


def test_other_images_are_refused_but_a_later_stop_extends(tmp_path, whole):
    log = tmp_path / "log.tsv"
    job(log, selection=Selection(stop=6))
    with pytest.raises(ResultsError, match="begun with other images"):
        job(log, selection=Selection(skip=2), resume=True)
    job(log, resume=True)
    assert content(log) == content(whole)


def test_shards_are_put_together(tmp_path, whole):
    logs = [tmp_path / f"{part}.tsv" for part in range(3)]
    for part, log in enumerate(logs):
        job(log, selection=Selection(shard=(part, 3)))
    results = merge_logs(logs, tmp_path / "merged.tsv", BOUND_LOG)
    assert results.idx.tolist() == list(range(14))
    for mine, other in zip(content(tmp_path / "merged.tsv")[0], content(whole)[0], strict=True):
        assert mine[:5] == other[:5]
    assert content(tmp_path / "merged.tsv")[1] == content(whole)[1]
    with pytest.raises(ResultsError, match="4 images are missing, the first is image 2, so is shard 2/3"):
        merge_logs(logs[:2], tmp_path / "some.tsv", BOUND_LOG)
    with pytest.warns(ResultsWarning, match="4 images are missing"):
        assert len(merge_logs(logs[:2], tmp_path / "some.tsv", BOUND_LOG, partial=True)) == 10
