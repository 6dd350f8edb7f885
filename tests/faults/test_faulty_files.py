"""Files of weights and images that are damaged or made to do harm: nothing in them is executed, errors are ours."""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from rs_plugins.core.attacks.folder import count_done
from rs_plugins.core.checkpoints import load_weights, read_weights
from rs_plugins.core.data_sets.opening import open_data_set
from rs_plugins.core.training.trained import load_trained
from rs_plugins.errors import InputError, ResultsError, RSPluginsError

FUZZ = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))


def saved(content, *, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def array(content):
    file = io.BytesIO()
    np.save(file, np.array([content, None], dtype=object), allow_pickle=True)
    return file.getvalue()


def tarred(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("pickle", "tensors", "storages", "sys_info"):
            inside = pickle.dumps(content)
            info = tarfile.TarInfo(name)
            info.size = len(inside)
            tar.addfile(info, io.BytesIO(inside))
    return file.getvalue()


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as box:
        box.writestr(name, content)
    return file.getvalue()


def whole_module(mark):
    module = network()
    module.hidden = Harmful(mark)
    return module


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 3), dtype=np.uint8)
HARM = {
    "weights.pt": lambda mark: saved(Harmful(mark)),
    "inside.pt": lambda mark: saved({"state_dict": {"0.weight": torch.zeros(4, 9), "x": {"y": [Harmful(mark)]}}}),
    "module.pth": lambda mark: saved(whole_module(mark)),
    "legacy.pt": lambda mark: saved({"0.weight": Harmful(mark)}, legacy=True),
    "tar.pt": lambda mark: tarred(Harmful(mark)),
    "pickle.pt": lambda mark: pickle.dumps(Harmful(mark)),
    "text.pt": lambda mark: pickle.dumps(Harmful(mark), protocol=0),
    "zip.pt": lambda mark: zipped("archive/data.pkl", pickle.dumps(Harmful(mark), protocol=2)),
    "names.pt": lambda mark: zipped("../../../data.pkl", pickle.dumps(Harmful(mark), protocol=2)),
    "pickle.safetensors": lambda mark: pickle.dumps(Harmful(mark)),
    "objects.npz": lambda mark: archive(images=np.array([Harmful(mark), None], dtype=object), labels=np.arange(2)),
    "labels.npz": lambda mark: archive(images=IMAGES, labels=np.array([Harmful(mark)] * 4, dtype=object)),
    "pickle.npz": lambda mark: pickle.dumps(Harmful(mark)),
    "array.npz": lambda mark: array(Harmful(mark)),
    "names.npz": lambda mark: zipped("../../images.npy", array(Harmful(mark))),
    "test_batch": lambda mark: pickle.dumps({b"data": [Harmful(mark)], b"labels": [1]}, protocol=2),
}


def opened(path):
    if path.name == "test_batch":
        return open_data_set(f"cifar10:{path.parent}")
    return open_data_set(f"npz:{path}") if path.suffix == ".npz" else read_weights(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(HARM))
def test_nothing_in_a_file_is_executed(tmp_path, name):
    mark = tmp_path / "executed"
    (tmp_path / name).write_bytes(HARM[name](mark))
    with pytest.raises(InputError, match=name):
        opened(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["parts/0000000000.npz", "adversarial.npz"])
def test_nothing_in_the_folder_of_an_attack_is_executed(tmp_path, part):
    (tmp_path / "parts").mkdir()
    index = np.array([Harmful(tmp_path / "executed"), None], dtype=object)
    (tmp_path / part).write_bytes(archive(index=index))
    with pytest.raises(ResultsError, match="expected an archive of plain arrays"):
        count_done(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_harm_would_be_done_by_others(tmp_path):
    """The files above do what they are made for, if they are opened without care."""
    pickle.loads(pickle.dumps(Harmful(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


NAMES = [
    *("os:getcwd", "subprocess:run", "/etc/passwd:x", "../evil:make", "evil.py:make", "builtins:exec", "a:b:c", ":"),
    *("\0:x", "../../resnet20", "/resnet20", "timm.hf_hub:x/y", "torchvision.os", "", 3, None, {}),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_record_calls_nothing(tmp_path, name):
    record = {"format": "rs-plugins model", "sigma": 0.5, "network": {"name": name}}
    (tmp_path / "model.json").write_text(json.dumps(record))
    (tmp_path / "model.safetensors").write_bytes(save(network().state_dict()))
    with pytest.raises((RSPluginsError, ImportError)) as caught:
        load_trained(tmp_path)
    assert isinstance(caught.value, RSPluginsError)


def header(content, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start, stop, *, shape=(4, 9), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LYING = {
    "a header of all memory": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "offsets behind the end": header({"0.weight": tensor(0, 144)}),
    "offsets backwards": header({"0.weight": tensor(144, 0)}, bytes(144)),
    "negative offsets": header({"0.weight": tensor(-144, 0)}, bytes(144)),
    "tensors over each other": header({"0.weight": tensor(0, 144), "0.bias": tensor(0, 144)}, bytes(144)),
    "a hole": header({"0.weight": tensor(0, 144), "0.bias": tensor(160, 176, shape=(4,))}, bytes(176)),
    "a shape of more": header({"0.weight": tensor(0, 144, shape=(2**40, 2**40))}, bytes(144)),
    "a shape below zero": header({"0.weight": tensor(0, 144, shape=(-4, 9))}, bytes(144)),
    "no such type": header({"0.weight": tensor(0, 144, dtype="PICKLE")}, bytes(144)),
    "a list": header([1, 2, 3]),
    "nesting": header(b"[" * 100_000),
    "no text": header(b"\xff\xfe\xfd"),
}


@pytest.mark.parametrize("lie", list(LYING))
def test_safetensors_that_lie(tmp_path, lie):
    (tmp_path / "w.safetensors").write_bytes(LYING[lie])
    with pytest.raises(InputError, match=r"w.safetensors: expected a safetensors file, got a damaged one"):
        load_weights(network(), tmp_path / "w.safetensors")


UNFIT = {
    "numbers for names": lambda: {1: torch.zeros(4, 9), 2: torch.zeros(4)},
    "sparse": lambda: {"0.weight": torch.zeros(4, 9).to_sparse()},
    "complex": lambda: {"0.weight": torch.zeros(4, 9, dtype=torch.complex64)},
    "without numbers": lambda: {"0.weight": torch.zeros(4, 9, device="meta")},
    "quantised": lambda: {"0.weight": torch.quantize_per_tensor(torch.zeros(4, 9), 0.1, 0, torch.qint8)},
    "names that lead elsewhere": lambda: {"../../0.weight": torch.zeros(4, 9)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(UNFIT))
def test_tensors_that_are_no_weights(tmp_path, kind):
    model = network()
    (tmp_path / "w.pt").write_bytes(saved({**model.state_dict(), **UNFIT[kind]()}))
    with pytest.raises(InputError, match=r"w\.pt"):
        load_weights(model, tmp_path / "w.pt")
    assert same(model, network())


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, another) for one, another in pairs)


def damaged(content, draw):
    size, way = len(content), draw(st.integers(0, 4))
    place = draw(st.integers(0, size - 1))
    if way == 0:
        return content[:place]
    if way == 1:
        return content[:place] + content[draw(st.integers(place, size)) :]
    if way == 2:
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    changed = bytearray(content)
    changed[place if way == 3 else draw(st.integers(max(0, size - 200), size - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def batch_of_cifar():
    images = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": images, b"labels": [1, 2]}, protocol=2)


def picture(form):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.repeat(IMAGES[0][:, :, None], 3, axis=2)).save(file, form)
    return file.getvalue()


GOOD = {
    "zip.pt": lambda: saved(network().state_dict()),
    "legacy.pt": lambda: saved(network().state_dict(), legacy=True),
    "w.safetensors": lambda: save(network().state_dict()),
    "x.npz": lambda: archive(images=IMAGES, labels=np.arange(4)),
    "test_batch": batch_of_cifar,
    "x.png": lambda: picture("PNG"),
    "x.ppm": lambda: picture("PPM"),
    "x.bmp": lambda: picture("BMP"),
    "x.jpg": lambda: picture("JPEG"),
}


def check_damage(folder, name, data):
    if name.startswith("x.") and name != "x.npz":
        path = folder / "pictures" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path = folder / name
    path.write_bytes(damaged(GOOD[name](), data.draw))
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if path.suffix in (".pt", ".safetensors"):
                load_weights(model, path)
            elif path.parent.name == "a":
                open_data_set(f"imagefolder:{folder / 'pictures'}").read([0])
            else:
                opened(path).read([0])
        except RSPluginsError as error:
            refused = str(error)
        else:
            refused = None
        finally:
            path.unlink()
    if refused is not None:
        assert name in refused
        assert same(model, network())


@pytest.mark.parametrize("name", list(GOOD))
@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_damaged_files_are_refused(tmp_path_factory, name, data):
    check_damage(tmp_path_factory.getbasetemp(), name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GOOD))
@settings(FUZZ, max_examples=500)
@given(data=st.data())
def test_many_damaged_files_are_refused(tmp_path_factory, name, data):
    check_damage(tmp_path_factory.getbasetemp(), name, data)


@pytest.mark.parametrize("text", ["npz:" + "x" * 5000, "npz:\0", "cifar10:" + "x" * 300 + "/y", "mnist:/dev/null"])
def test_names_that_no_file_can_have(text):
    with pytest.raises(InputError, match="data: "):
        open_data_set(text)
    with pytest.raises(InputError, match="weights: there is no file"):
        read_weights("x" * 5000)


def test_an_image_that_asks_for_all_memory(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.ppm").write_bytes(b"P6 100000 100000 255\n")
    with pytest.raises(InputError, match=r"x.ppm: expected an image, got something else"):
        open_data_set(f"imagefolder:{tmp_path}")
