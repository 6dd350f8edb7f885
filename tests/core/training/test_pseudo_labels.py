"""Labels from a network, kept in a file, and used in training."""

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.data_sets.npz import write_npz
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.pseudo_labels import pseudo_labelled
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError, ModelError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 1, 4, 4), dtype=np.uint8)
BRIGHT = np.where(np.arange(23).reshape(-1, 1, 1, 1) == 17, 255, IMAGES // 2).astype(np.uint8)
DATA = in_memory("made up", IMAGES, np.zeros(23, dtype=np.int64))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3))


@pytest.mark.parametrize("batch_size", [256, 5])
def test_labels_are_the_classes_that_the_network_finds(batch_size):
    model = network()
    model.train()
    found = pseudo_labelled(DATA, model, batch_size=batch_size)
    expected = model.eval()(torch.from_numpy(IMAGES).float() / 255).argmax(1)
    assert found.labels.tolist() == expected.tolist()
    assert len(set(found.labels.tolist())) > 1
    assert found.classes == 3
    assert torch.equal(found.read([3, 1]), DATA.read([3, 1]))
    assert found.name == "made up, pseudo-labels"
    other = network()
    nn.init.normal_(other[3].weight)
    assert len({DATA.digest, found.digest, pseudo_labelled(DATA, other).digest}) == 3


def test_the_network_is_left_as_it_was(capsys):
    model = network()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pseudo_labelled(DATA, model, progress=True)
    assert "label: 100%" in capsys.readouterr().err
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (IMAGES, np.uint8),
        (IMAGES.repeat(3, axis=1), np.uint8),
        (np.random.default_rng(1).random((23, 3, 4, 4)).astype("float32"), np.float32),
    ],
    ids=["grey", "colour", "floating point"],
)
def test_they_can_be_kept(tmp_path, images, kind):
    data = in_memory("made up", images, np.arange(23))
    write_npz(data, tmp_path / "x.npz", at_once=10)
    again = open_data_set(f"npz:{tmp_path / 'x.npz'}")
    assert again.labels.tolist() == data.labels.tolist()
    assert torch.equal(again.read(range(23)), data.read(range(23)))
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["images"].dtype == kind


def test_a_part_that_is_no_multiple_makes_all_floating_point(tmp_path):
    images = IMAGES.astype("float32") / 255
    images[-1, 0, 0, 0] = 0.1
    data = in_memory("made up", images, np.arange(23))
    write_npz(data, tmp_path / "x.npz", at_once=10)
    assert torch.equal(open_data_set(f"npz:{tmp_path / 'x.npz'}").read(range(23)), data.read(range(23)))


def test_training_takes_them(tmp_path):
    teacher = network()
    labels = teacher.eval()(torch.from_numpy(IMAGES).float() / 255).argmax(1).numpy()
    labelled = in_memory("few", IMAGES[:5], labels[:5])
    recipe = Recipe(method="gaussian", sigma=0.1, epochs=3, batch_size=5)
    both, alone = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    alone.load_state_dict(both.state_dict())
    extra = pseudo_labelled(DATA, teacher)
    train_data_set(both, labelled, recipe, tmp_path / "both", extra=extra)
    train_data_set(alone, labelled, recipe, tmp_path / "alone")
    assert not torch.equal(both[1].weight, alone[1].weight)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ModelError, match="model: it fails on an input of shape"):
        pseudo_labelled(DATA, nn.Linear(3, 2))
    with pytest.raises(InputError, match="model: expected a base classifier, got a SmoothedModel"):
        pseudo_labelled(DATA, SmoothedModel(network(), 0.1))
    with pytest.raises(InputError, match="batch_size: expected an integer >= 1, got 0"):
        pseudo_labelled(DATA, network(), batch_size=0)
    with pytest.raises(InputError, match=r"path: expected a name that ends in \.npz, got .*x"):
        write_npz(DATA, tmp_path / "x")
    with pytest.raises(InputError, match=r"path: .* cannot be written"):
        write_npz(DATA, tmp_path / "no" / "x.npz")

    half = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    bright = in_memory("bright", BRIGHT, np.zeros(23, dtype=np.int64))

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = half

        def forward(self, x):
            return self.inner(x).masked_fill(x.flatten(1).amin(1, keepdim=True) == 1, torch.nan)

    with pytest.raises(ModelError, match="model: it returns NaN on an image between 10 and 19"):
        pseudo_labelled(bright, Blind(), batch_size=10)


def test_a_text_names_the_part_for_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert pseudo_labelled("digits", model).name == "digits train, pseudo-labels"
    with pytest.raises(InputError, match="data: expected a data set"):
        pseudo_labelled(torch.zeros(2, 1, 8, 8), model)
