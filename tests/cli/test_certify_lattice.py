import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rs_plugins.cli import main
from rs_plugins.core.results.files import read_results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "lattice_models", raising=False)
    (tmp_path / "lattice_models.py").write_text(
        "from torch import nn\n\ndef linear():\n    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))\n"
    )
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).state_dict(), "w.pt")
    return tmp_path


def certify(images, *more):
    np.savez("squares.npz", images=images, labels=np.arange(len(images)) % 3)
    command = "certify --model lattice_models:linear --weights w.pt --data npz:squares.npz --sigma 0.25 --device cpu"
    noise = () if "--noise" in more else ("--noise", "lattice-gaussian")
    plan = "--plan fixed:n0=10,n=100 --out log.tsv"
    return CliRunner().invoke(main, [*command.split(), *plan.split(), *noise, *more])


def test_a_log_says_for_which_grid_its_certificates_hold(folder):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    done = certify(images)
    assert done.exit_code == 0, done.output
    record = json.loads((folder / "log.tsv.json").read_text())
    assert (record["family"], record["norm"]) == ("lattice-gaussian", "l2")
    assert record["noise"] == "LatticeGaussianNoise(sigma=0.25, levels=255)"
    whole = read_results("log.tsv")
    assert len(whole) == 5
    (folder / "log.tsv").unlink()
    assert certify(images, "--stop", "2").exit_code == 0
    assert certify(images, "--resume").exit_code == 0
    again = read_results("log.tsv")
    assert (again.radii.tolist(), again.predict.tolist()) == (whole.radii.tolist(), whole.predict.tolist())


def test_images_off_the_grid_are_refused(folder):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 3)).astype(np.float32) / 255
    images[3, 1, 1] = 0.3
    done = certify(images)
    assert done.exit_code != 0
    assert "images: expected pixels on the grid k/255" in done.output
    assert "0.300000012 at (0, 1, 1) of image 3" in done.output


def test_images_of_another_grid_are_certified_with_its_levels(folder):
    images = np.random.default_rng(0).integers(0, 17, (3, 3, 3)).astype(np.float32) / 16
    assert "expected pixels on the grid k/255" in certify(images).output
    done = certify(images, "--noise", "lattice-gaussian:levels=256")
    assert done.exit_code == 0, done.output
    record = json.loads((folder / "log.tsv.json").read_text())
    assert record["noise"] == "LatticeGaussianNoise(sigma=0.25, levels=256)"
    refused = certify(images, "--noise", "lattice-gaussian:levels=16", "--resume")
    assert "LatticeGaussianNoise(sigma=0.25, levels=256)" in refused.output


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("lattice-gaussian:level=256", "noise: lattice-gaussian has no option 'level'; it has levels"),
        ("lattice-gaussian:levels=many", "noise: levels: expected an integer, got 'many'"),
        ("lattice-gaussian:levels=0", "levels: expected"),
        ("laplace:levels=2", "noise: laplace has no option 'levels'; it has none"),
        ("lattice-gaussian:", "noise: expected OPTION=VALUE after lattice-gaussian:, got nothing"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_options_of_a_family_that_are_none(noise, message):
    done = certify(np.zeros((2, 3, 3), dtype=np.uint8), "--noise", noise)
    assert done.exit_code != 0
    assert message in done.output
