import re
from dataclasses import replace
from decimal import Decimal
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.relaxations import export
from rs_plugins.core.relaxations.bound_results import BoundResults
from rs_plugins.core.relaxations.certifying import certify_bounds
from rs_plugins.core.relaxations.export import export_unknown, export_unknown_of_log, vnnlib
from rs_plugins.errors import InputError, MissingDependencyError, ModelError

needs_onnx = pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")
PIXELS = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        Normalise([0.3], [0.5]),
        nn.Conv2d(1, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.SiLU(),
        nn.Linear(8, 4),
    )


def certificates(norm="linf", eps=0.1):
    y = network()(PIXELS).argmax(dim=1)
    made = certify_bounds(network(), PIXELS, y, eps, norm=norm, cascade=["ibp"], attack_steps=0)
    statuses = ("unknown", "verified", "unknown", "failed", "falsified", "unknown")
    return [replace(c, status=status, index=10 + c.index) for c, status in zip(made, statuses, strict=True)]


def stand_in(monkeypatch):
    """Write something else than ONNX, whose package may be missing."""
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    monkeypatch.setattr(export, "_onnx", lambda model, shape: f"{shape} {next(model.parameters()).dtype}".encode())


def parsed(text):
    """Return the declared names, the box and the classes of the disjunction of a VNN-LIB file."""
    lines = [line for line in text.splitlines() if not line.startswith(";")]
    declared = [match[1] for line in lines if (match := re.fullmatch(r"\(declare-const (\w+) Real\)", line))]
    ends = {}
    for line in lines:
        if match := re.fullmatch(r"\(assert \((<=|>=) X_(\d+) (-?\d+(?:\.\d+)?)\)\)", line):
            ends[match[1], int(match[2])] = Decimal(match[3])
    rest = lines[len(declared) + len(ends) :]
    assert (rest[0], rest[-1]) == ("(assert (or", "))")
    pairs = [re.fullmatch(r"    \(and \(>= Y_(\d) Y_(\d)\)\)", line).groups() for line in rest[1:-1]]
    return declared, ends, [(int(k), int(y)) for k, y in pairs]


@pytest.mark.parametrize("eps", [0.1, 8 / 255, 0.0, 1e-12])
def test_a_property_is_the_ball_and_the_other_classes(eps):
    image = torch.tensor([[[0.0, 1.0, 0.5], [0.05, 1e-9, 0.95], [1 / 3, 1 + 5e-7, -5e-7]]])
    declared, ends, pairs = parsed(vnnlib(image, 2, 4, eps))
    assert declared == [*(f"X_{place}" for place in range(9)), *(f"Y_{k}" for k in range(4))]
    assert pairs == [(0, 2), (1, 2), (3, 2)]
    for place, pixel in enumerate(image.flatten().tolist()):
        exact, radius = Decimal(pixel), Decimal(eps)
        low = min(max(exact - radius, Decimal(0)), exact)
        high = max(min(exact + radius, Decimal(1)), exact)
        assert low - Decimal("2e-17") <= ends[">=", place] <= low
        assert high <= ends["<=", place] <= high + Decimal("2e-16")


def test_what_is_unknown_is_written(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    made = certificates()
    assert export_unknown(network(), made, PIXELS, tmp_path / "open", timeout=12.5) == [10, 12, 15]
    folder = tmp_path / "open"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *("instances.csv", "model.onnx"),
        *(f"vnnlib/image_{index}.vnnlib" for index in (10, 12, 15)),
    ]
    rows = [f"model.onnx,vnnlib/image_{index}.vnnlib,12.5\n" for index in (10, 12, 15)]
    assert (folder / "instances.csv").read_text() == "".join(rows)
    assert (folder / "model.onnx").read_text() == "(1, 3, 3) torch.float32"
    expected = vnnlib(PIXELS[2], made[2].label, 4, 0.1)
    assert (folder / "vnnlib" / "image_12.vnnlib").read_text() == expected


def test_of_a_log_the_images_are_those_of_the_data_set(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    pixels = np.random.default_rng(0).random((16, 1, 3, 3), dtype=np.float32)
    pixels[10:] = PIXELS.numpy()
    data, made = in_memory("squares", pixels, np.arange(16) % 4), certificates()
    (tmp_path / "of_log").mkdir()
    assert export_unknown_of_log(network(), data, BoundResults.of(made), tmp_path / "of_log") == [10, 12, 15]
    export_unknown(network(), made, PIXELS, tmp_path / "direct")
    for path in (tmp_path / "direct").rglob("*.*"):
        assert (tmp_path / "of_log" / path.relative_to(tmp_path / "direct")).read_bytes() == path.read_bytes()
    none = BoundResults.of(made[1:2])
    assert export_unknown_of_log(network(), data, none, tmp_path / "none") == []
    assert (tmp_path / "none" / "instances.csv").read_text() == ""


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="norm: VNN-LIB has words for balls of linf only, got 'l2'"):
        export_unknown(network(), certificates("l2"), PIXELS, tmp_path / "open")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs onnx: pip install 'rs-plugins\[onnx\]'"):
        export_unknown(network(), certificates(), PIXELS, tmp_path / "open")
    stand_in(monkeypatch)
    with pytest.raises(InputError, match=r"x: expected one image per certificate \(6\), got 5"):
        export_unknown(network(), certificates(), PIXELS[:5], tmp_path / "open")
    with pytest.raises(InputError, match="expected those of one eps and norm, got none or several"):
        export_unknown(network(), [], PIXELS[:0], tmp_path / "open")
    with pytest.raises(InputError, match="timeout: expected a finite number > 0, got 0"):
        export_unknown(network(), certificates(), PIXELS, tmp_path / "open", timeout=0)
    with pytest.raises(InputError, match=r"folder: .* cannot be made"):
        export_unknown(network(), certificates(), PIXELS, tmp_path / "no" / "open")
    assert not any(tmp_path.iterdir())


@needs_onnx
def test_the_network_is_written_as_onnx(tmp_path):
    model = network().train()
    before = torch.get_rng_state()
    export_unknown(model, certificates(), PIXELS, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    import onnx

    content = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(content)
    assert [each.name for each in content.graph.input] == ["X"]
    assert [each.dim_value for each in content.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 3, 3]
    assert [each.name for each in content.graph.output] == ["Y"]
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for image in PIXELS:
        (logits,) = session.run(None, {"X": image[None].numpy()})
        np.testing.assert_allclose(logits, network()(image[None]).detach().numpy(), rtol=1e-4, atol=1e-5)


@needs_onnx
def test_what_onnx_has_no_operator_for_is_refused(tmp_path):
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x.flatten(1)[:, :4])

    with pytest.raises(ModelError, match="model: it cannot be written as ONNX"):
        export_unknown(Special(), certificates(), PIXELS, tmp_path)
