import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.attacks.evaluation import evaluate_attack
from rs_plugins.core.attacks.job import attack_data_set
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.selection import Selection
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError, ModelWarning, PluginError, ResultsError, RSPluginsWarning

SETTINGS = {"attack": "darken", "options": {"by": 0.5}}
IMAGES = np.random.default_rng(0).random((10, 1, 4, 4), dtype=np.float32)
LABELS = np.arange(10) % 3
DATA = in_memory("test", IMAGES, LABELS)


def darken(images, labels):
    return images * 0.5


class Claims:
    """Attacks by darkening and takes even labels for successes."""

    success = None

    def __call__(self, images, labels):
        self.success = labels % 2 == 0
        return darken(images, labels)


@pytest.fixture(scope="module")
def smoothed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0.25).eval()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def job(attack, smoothed, out, **more):
    return attack_data_set(attack, smoothed, DATA, out, **{"settings": SETTINGS, "n": 100, "batch_size": 4, **more})


def stopped_after(batches):
    """An attack that is interrupted."""
    calls = []

    def attack(images, labels):
        calls.append(len(images))
        if len(calls) > batches:
            raise KeyboardInterrupt
        return darken(images, labels)

    return attack


def same(one, another):
    return json.dumps(one.evaluation.as_dict()) == json.dumps(another.evaluation.as_dict())


def test_it_is_the_evaluation_of_all_images_at_once(smoothed, out):
    found = job(darken, smoothed, out, seed=3, alpha=0.01, confidence=0.9)
    x = torch.from_numpy(IMAGES)
    expected = evaluate_attack(smoothed, x, x * 0.5, LABELS, n=100, seed=3, alpha=0.01, confidence=0.9)
    assert found.evaluation.as_dict() == expected.as_dict()
    assert np.array_equal(found.images, IMAGES * 0.5)
    assert found.claimed is None
    written = json.loads((out / "evaluation.json").read_text())
    assert written["figures"] == json.loads(json.dumps(expected.as_dict()["figures"]))
    assert {**SETTINGS, "n": 100, "alpha": 0.01, "seed": 3, "sigma": 0.25, "data": "test"}.items() <= written[
        "made_with"
    ].items()
    assert sorted(file.name for file in out.iterdir()) == [
        *(".lock", "adversarial.npz", "evaluation.json", "settings.json")
    ]


@pytest.mark.parametrize("shape", [(10, 1, 3, 3), (10, 3, 5, 4)])
def test_the_images_can_be_opened_as_a_data_set(out, shape):
    images = np.random.default_rng(1).random(shape, dtype=np.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape[1:])), 3))
    data = in_memory("test", images, LABELS)
    chosen = Selection(skip=3)
    found = attack_data_set(darken, SmoothedModel(model, 0.25), data, out, settings={}, n=50, selection=chosen)
    again = open_data_set(f"npz:{out / 'adversarial.npz'}")
    assert again.shape == shape[1:]
    assert again.labels.tolist() == LABELS[::3].tolist()
    assert np.array_equal(again.read(range(4)).numpy(), images[::3] * 0.5)
    assert np.array_equal(found.images, images[::3] * 0.5)
    assert np.load(out / "adversarial.npz")["index"].tolist() == [0, 3, 6, 9]


def test_stopped_and_gone_on_with_it_is_the_same(smoothed, out, tmp_path):
    whole = job(darken, smoothed, tmp_path / "whole", batches_matter=False)
    with pytest.raises(KeyboardInterrupt):
        job(stopped_after(2), smoothed, out, batches_matter=False)
    assert sorted(file.name for file in (out / "parts").iterdir()) == ["0000000000.npz", "0000000004.npz"]
    asked = []

    def rest(images, labels):
        asked.append(len(images))
        return darken(images, labels)

    resumed = job(rest, smoothed, out, resume=True, batch_size=1, batches_matter=False)
    assert asked == [1, 1]
    assert same(resumed, whole)
    for name in ("evaluation.json", "adversarial.npz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = job(stopped_after(0), smoothed, out, resume=True, batches_matter=False)  # there is nothing left to do
    assert same(again, whole)


@pytest.mark.parametrize("matter", [{}, {"batches_matter": True}])
def test_another_batch_size_is_another_run_where_batches_matter(smoothed, out, matter):
    with pytest.raises(KeyboardInterrupt):
        job(stopped_after(1), smoothed, out, **matter)
    with pytest.raises(ResultsError, match=r"begun by another run \(batch_size: 4 -> 2\)"):
        job(darken, smoothed, out, resume=True, batch_size=2, **matter)
    assert len(job(darken, smoothed, out, resume=True, **matter).images) == 10
    assert json.loads((out / "evaluation.json").read_text())["made_with"]["batch_size"] == 4


@pytest.mark.parametrize("column", ["images", "labels", "counts_before", "counts_after", "l2", "linf", "index"])
def test_a_file_without_a_column_is_named(smoothed, out, column):
    job(darken, smoothed, out)
    with np.load(out / "adversarial.npz") as archive:
        rest = {name: archive[name] for name in archive.files if name != column}
    np.savez(out / "adversarial.npz", **rest)
    with pytest.raises(ResultsError, match=rf"adversarial\.npz: expected a column {column}, got "):
        job(stopped_after(0), smoothed, out, resume=True)


def test_settings_that_are_not_plain_are_refused_before_the_work(smoothed, out):
    with pytest.raises(InputError, match="settings: expected plain data without infinite numbers, got norm=inf"):
        job(stopped_after(0), smoothed, out, settings={"norm": float("inf")})
    assert not out.exists()


def test_a_later_stop_adds_images(smoothed, out, tmp_path):
    job(darken, smoothed, out, selection=Selection(stop=3))
    longer = job(darken, smoothed, out, selection=Selection(stop=7), resume=True)
    assert same(longer, job(darken, smoothed, tmp_path / "whole", selection=Selection(stop=7)))
    with pytest.raises(ResultsError, match=r"begun with other images \(image 0, which this selection has not\)"):
        job(darken, smoothed, out, selection=Selection(start=2), resume=True)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"attack": "other"}}, "attack: 'darken' -> 'other'"),
        ({"n": 200}, "n: 100 -> 200"),
        ({"alpha": 0.01}, r"alpha: 0\.001 -> 0\.01"),
        ({"seed": 1}, "seed: 0 -> 1"),
    ],
)
def test_another_run_is_refused(smoothed, out, change, difference):
    job(darken, smoothed, out, selection=Selection(stop=1))
    with pytest.raises(ResultsError, match=rf"begun by another run \({difference}"):
        job(stopped_after(0), smoothed, out, resume=True, **change)


def test_another_model_and_another_sigma_are_refused(smoothed, out):
    job(darken, smoothed, out, selection=Selection(stop=1))
    other = SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0.25)
    with pytest.raises(ResultsError, match=r"begun by another run .model: "):
        job(darken, other, out, resume=True)
    with pytest.raises(ResultsError, match=r"begun by another run .sigma: 0\.25 -> 0\.5"):
        job(darken, SmoothedModel(smoothed.base, 0.5), out, resume=True)


def test_another_confidence_is_not_another_run(smoothed, out):
    job(darken, smoothed, out)
    assert job(darken, smoothed, out, confidence=0.5, resume=True).evaluation.confidence == 0.5


def test_what_the_attack_claims_is_kept(smoothed, out):
    found = job(Claims(), smoothed, out)
    assert found.claimed.tolist() == (LABELS % 2 == 0).tolist()
    assert json.loads((out / "evaluation.json").read_text())["images"]["claimed"] == (LABELS % 2 == 0).tolist()


def test_attacks_that_draw_globally_are_repeated_and_the_callers_state_is_put_back(smoothed, tmp_path):
    def noisy(images, labels):
        offset = torch.rand(()) * float(np.random.rand())  # noqa: NPY002
        return images * offset

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    runs = [job(noisy, smoothed, tmp_path / str(k), seed=seed) for k, seed in enumerate((0, 0, 1))]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert np.array_equal(runs[0].images, runs[1].images)
    assert not np.array_equal(runs[0].images, runs[2].images)
    factors = [runs[0].images[k].mean() / IMAGES[k].mean() for k in (0, 4)]
    assert factors[0] != pytest.approx(factors[1], rel=1e-3)  # of two batches


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (
            lambda x, y: x.numpy(),
            InputError,
            r"returned ndarray; expected a tensor \(4, 1, 4, 4\) of pixels in \[0, 1\]",
        ),
        (lambda x, y: x[:1], InputError, r"returned shape \(1, 1, 4, 4\); expected a tensor \(4, 1, 4, 4\)"),
        (lambda x, y: x * 0 + 1.5, InputError, r"returned pixels from 1.5 to 1.5; expected a tensor"),
        (lambda x, y: x / 0, InputError, "returned NaN or infinity; expected"),
        (lambda x, y: 1 / 0, PluginError, "it fails: ZeroDivisionError: division by zero"),
    ],
)
def test_attacks_that_do_not_work(smoothed, out, attack, error, message):
    with pytest.raises(error, match=f"^attack darken: .*{message}"):
        job(attack, smoothed, out)


def test_an_attack_may_write_into_what_it_is_given(smoothed, out):
    def in_place(images, labels):
        labels.zero_()
        return images.mul_(0.5)

    found, expected = job(in_place, smoothed, out), job(darken, smoothed, out.with_name("other"))
    assert same(found, expected)
    assert np.array_equal(found.images, expected.images)
    assert (found.evaluation.l2 > 0.5).all()
    assert torch.equal(DATA.read([0, 1]), torch.from_numpy(IMAGES[:2]))


def test_claims_that_are_none(smoothed, out):
    class Odd:
        success = (1, 2)

        def __call__(self, images, labels):
            return images

    with pytest.raises(
        InputError,
        match=r"^attack darken: expected its success to be boolean, one per image \(4,\), got int64 of shape \(2,\)",
    ):
        job(Odd(), smoothed, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"n": 10}, "n: 10 votes are too few at alpha = 0.001"),
        ({"alpha": 2}, r"alpha: expected a number in \(0, 1\), got 2"),
        ({"confidence": 0}, r"confidence: expected a number in \(0, 1\), got 0"),
        ({"seed": None}, "seed: expected an integer or None, got None"),
        ({"selection": Selection(start=10)}, "selection: expected at least one image, got none of 10"),
        ({"device": "abacus"}, "device: expected a device of this machine"),
    ],
)
def test_mistakes_are_found_before_the_work(smoothed, out, change, message):
    with pytest.raises(InputError, match=message):
        job(stopped_after(0), smoothed, out, **change)
    assert not out.exists()


def test_data_by_name_and_a_model_that_does_not_fit(smoothed, out):
    pytest.importorskip("sklearn")
    with pytest.raises(ModelError, match=r"model: it fails on an input of shape \(1, 1, 8, 8\)"):
        attack_data_set(darken, smoothed, "digits", out, settings={})


def test_models_are_looked_at_as_for_certification(out):
    few = SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 0.25)
    with pytest.raises(ModelError, match="model: expected at least 3 classes, as test has, got 2"):
        job(darken, few, out)
    with pytest.warns(RSPluginsWarning, match=re.escape("sigma: 30 is for pixels in [0, 1]")):
        job(darken, SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 30), out)


def test_the_device_of_a_model_without_parameters(out):
    bare = SmoothedModel(nn.Flatten(), 0.25)
    with pytest.raises(InputError, match="its device is unknown"):
        job(darken, bare, out)
    assert len(job(darken, bare, out, device="cpu").images) == 10


def test_a_progress_bar_goes_on_where_the_run_stopped(smoothed, out, capsys):
    job(darken, smoothed, out, selection=Selection(stop=4))
    assert capsys.readouterr().err == ""
    job(darken, smoothed, out, resume=True, progress=True)
    text = capsys.readouterr().err
    assert "attack:  40%" in text
    assert "evaluate: " in text
    assert "10/10" in text


def test_warnings_of_votes_name_the_image_of_the_data_set(out):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

        def forward(self, x):
            return self.net(x).masked_fill(x.flatten(1)[:, :1] > 1.5, float("nan"))

    with pytest.warns(ModelWarning, match=r"image 9: \d+ noisy copies gave NaN logits"):
        job(lambda x, y: x, SmoothedModel(Fails(), 1.0), out, selection=Selection(start=9))


def test_the_readers_of_the_folder_need_no_torch_objects(smoothed, out):
    job(darken, smoothed, out)
    with np.load(out / "adversarial.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["counts_after", "counts_before", "images", "index", "l2", "labels", "linf"]
    assert not list(Path(out).glob("**/*.part"))
