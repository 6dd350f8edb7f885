import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from rs_plugins.core.data_sets.data_set import in_memory, spaced_images, split_off
from rs_plugins.core.data_sets.opening import has_parts, open_data_set, open_training_set
from rs_plugins.errors import InputError, MissingDependencyError

DATA = Path(os.environ.get("RS_PLUGINS_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_mnist = pytest.mark.skipif(
    not (DATA / "MNIST").is_dir(), reason="MNIST is not here; RS_PLUGINS_DATA says where it is"
)
needs_cifar = pytest.mark.skipif(
    not (DATA / "cifar10_jpeg.npz").is_file(), reason="CIFAR-10 is not here; RS_PLUGINS_DATA says where it is"
)
BYTES = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1])


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, images=BYTES[:, 0], labels=LABELS, prefix="t10k", zipped=False, dash="-"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"images{dash}idx3", images), (f"labels{dash}idx1", labels.astype(np.uint8))):
        data = idx(array)
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(data) if zipped else data)
    return folder


def pixels(data, positions=None):
    return data.read(range(len(data)) if positions is None else positions)


def expected(images):
    return torch.from_numpy(images.astype(np.float32)) / 255


def test_digits_in_two_parts():
    pytest.importorskip("sklearn")
    test, train = open_data_set("digits"), open_data_set("digits", split="train")
    assert (len(train), len(test), test.shape, test.classes) == (1500, 297, (1, 8, 8), 10)
    assert test.labels[:3].tolist() == [1, 7, 4]
    assert pixels(train).max() == 1
    assert test.identity == {"data": "digits test", "images": 297, "shape": "1x8x8", "digest": test.digest}
    assert train.digest != test.digest


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize(("zipped", "dash"), [(False, "-"), (True, "-"), (False, ".")])
def test_mnist(tmp_path, place, zipped, dash):
    write_mnist(tmp_path / place, zipped=zipped, dash=dash)
    write_mnist(tmp_path / place, BYTES[:2, 1], LABELS[:2], "train", zipped, dash)
    test = open_data_set(f"mnist:{tmp_path}")
    assert (test.name, test.shape, test.labels.tolist()) == ("mnist test", (1, 32, 32), LABELS.tolist())
    assert torch.equal(pixels(test, [2, 0]), expected(BYTES[[2, 0], :1]))
    assert torch.equal(pixels(open_data_set(f"mnist:{tmp_path}", split="train")), expected(BYTES[:2, 1:2]))


@needs_mnist
def test_real_mnist():
    test = open_data_set(f"mnist:{DATA}")
    assert (len(test), test.shape, test.labels[:5].tolist()) == (10000, (1, 28, 28), [7, 2, 1, 0, 4])
    assert len(open_data_set(f"mnist:{DATA}", split="train")) == 60000


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images-idx3", lambda data: data[:-1], r"expected 4x32x32 bytes of data, got 4095; is it cut off\?"),
        ("images-idx3", lambda data: data + b"x", r"expected 4x32x32 bytes of data, got 4097"),
        ("images-idx3", lambda data: data[:10], "expected an idx file that begins with 00000803, got 00000803"),
        ("images-idx3", lambda data: b"", "expected an idx file that begins with 00000803, got"),
        ("images-idx3", lambda data: b"\0\0\x0d\x03" + data[4:], "expected an idx file that begins with 00000803, got"),
        ("labels-idx1", lambda data: idx(LABELS[:3].astype(np.uint8)), "expected one label for each of 4 images, got"),
    ],
)
def test_damaged_mnist(tmp_path, name, change, message):
    path = write_mnist(tmp_path) / f"t10k-{name}-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=f"data: .*{message}"):
        open_data_set(f"mnist:{tmp_path}")


def test_mnist_cut_off_in_the_gzip_file(tmp_path):
    path = write_mnist(tmp_path, zipped=True) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"ubyte.gz: expected a gzip file, got a damaged one"):
        open_data_set(f"mnist:{tmp_path}")


def write_cifar_binary(folder, name="test_batch", images=BYTES, labels=LABELS):
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
    (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_cifar_python(folder, name="test_batch", protocol=2, images=BYTES):
    folder.mkdir(parents=True, exist_ok=True)
    batch = {b"batch_label": b"x", b"labels": LABELS.tolist(), b"data": images.reshape(len(images), -1)}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_cifar10_binary(tmp_path, place):
    write_cifar_binary(tmp_path / place)
    for number in range(1, 6):
        write_cifar_binary(tmp_path / place, f"data_batch_{number}", BYTES[:2], LABELS[:2] * 0 + number)
    test = open_data_set(f"cifar10:{tmp_path}")
    assert (test.name, test.labels.tolist()) == ("cifar10 test", LABELS.tolist())
    assert torch.equal(pixels(test, [3, 1]), expected(BYTES[[3, 1]]))
    assert open_data_set(f"cifar10:{tmp_path}", split="train").labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar10_python(tmp_path, protocol):
    write_cifar_python(tmp_path / "cifar-10-batches-py", protocol=protocol)
    test = open_data_set(f"cifar10:{tmp_path}")
    assert torch.equal(pixels(test), expected(BYTES))
    assert test.labels.tolist() == LABELS.tolist()
    write_cifar_binary(tmp_path)
    assert open_data_set(f"cifar10:{tmp_path}").digest == test.digest


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """The published files: protocol 2 with Python 2's byte strings."""
    raw = BYTES.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x04M\x00\x0ctcnumpy\ndtype\n"
        b"(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tb"
    )
    labels = b"](K\x03K\x00K\x09K\x01e"
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")
    test = open_data_set(f"cifar10:{tmp_path}")
    assert torch.equal(pixels(test), expected(BYTES))
    assert test.labels.tolist() == LABELS.tolist()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}, protocol=2))
    with pytest.raises(InputError, match=r"expected a pickle of numbers, texts and arrays, got one that calls .*exec"):
        open_data_set(f"cifar10:{tmp_path}")


def test_damaged_cifar10(tmp_path):
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}(U\x04da")
    with pytest.raises(InputError, match="expected a batch of CIFAR-10's Python version, got"):
        open_data_set(f"cifar10:{tmp_path}")
    write_cifar_python(tmp_path, images=BYTES[:, :2])
    with pytest.raises(InputError, match=r"expected images of 3072 bytes, got an array of shape \(4, 2048\)"):
        open_data_set(f"cifar10:{tmp_path}")
    write_cifar_python(tmp_path, images=BYTES.astype(np.float32))
    with pytest.raises(InputError, match="expected rows of 8-bit numbers, got an array of f4"):
        open_data_set(f"cifar10:{tmp_path}")
    rows = np.asfortranarray(BYTES.reshape(4, -1))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": rows, b"labels": LABELS.tolist()}, protocol=2))
    with pytest.raises(InputError, match="expected rows of 8-bit numbers"):
        open_data_set(f"cifar10:{tmp_path}")
    write_cifar_binary(tmp_path, labels=LABELS + 1)
    with pytest.raises(InputError, match="expected labels from 0 to 9, got 1 to 10"):
        open_data_set(f"cifar10:{tmp_path}")
    path = tmp_path / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"expected a multiple of 3073 bytes \(label, image\), got 12287; is it cut"):
        open_data_set(f"cifar10:{tmp_path}")


LAYOUTS = {
    "grey": (BYTES[:, 0], BYTES[:, :1]),
    "channels first": (BYTES, BYTES),
    "channels last": (BYTES.transpose(0, 2, 3, 1), BYTES),
    "one channel last": (BYTES[:, :1].transpose(0, 2, 3, 1), BYTES[:, :1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_npz(tmp_path, layout):
    given, meant = LAYOUTS[layout]
    np.savez(tmp_path / "x.npz", images=given, labels=LABELS)
    data = open_data_set(f"npz:{tmp_path / 'x.npz'}")
    assert (data.shape, data.labels.tolist(), data.classes) == (meant.shape[1:], LABELS.tolist(), None)
    assert torch.equal(pixels(data, [1, 3]), expected(meant[[1, 3]]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_floating_point_pixels(tmp_path, dtype):
    images = (BYTES / 255).astype(dtype)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=LABELS)
    data = open_data_set(f"npz:{tmp_path / 'x.npz'}")
    assert torch.equal(pixels(data), torch.from_numpy(images.astype(np.float32)))


NAN = (BYTES / 255).astype(np.float32)
NAN[2, 1, 5, 5] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": BYTES}, "expected an array 'labels', got images"),
        ({"images": BYTES, "labels": LABELS[:3]}, r"expected one label for each of 4 images, got shape \(3,\)"),
        ({"images": BYTES, "labels": np.eye(4)}, r"expected one label for each of 4 images, got shape \(4, 4\)"),
        ({"images": BYTES, "labels": LABELS / 2}, "expected integer labels >= 0, got float64"),
        ({"images": BYTES, "labels": LABELS - 1}, "expected integer labels >= 0, got the label -1"),
        ({"images": BYTES[:0], "labels": LABELS[:0]}, "expected images, got none"),
        ({"images": NAN, "labels": LABELS}, r"expected floating-point pixels in \[0, 1\], got NaN"),
        ({"images": BYTES * 1.0, "labels": LABELS}, "got values from 0 to 255; store 8-bit images as uint8"),
        ({"images": BYTES / -255, "labels": LABELS}, "got values from -1 to "),
        ({"images": BYTES.astype(int), "labels": LABELS}, "expected 8-bit or floating-point images, got int64"),
        ({"images": BYTES[:, :2], "labels": LABELS}, r"with 1 or 3 channels, got shape \(4, 2, 32, 32\)"),
        ({"images": BYTES[..., :3], "labels": LABELS}, r"with 1 or 3 channels, got shape \(4, 3, 32, 3\)"),
        ({"images": BYTES.reshape(4, -1), "labels": LABELS}, r"got shape \(4, 3072\)"),
        (
            {"images": np.array([None] * 4), "labels": LABELS},
            "expected an .npz archive of plain arrays, got Object arr",
        ),
    ],
)
def test_archives_that_will_not_do(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=f"data: .*{message}"):
        open_data_set(f"npz:{tmp_path / 'x.npz'}")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps({"images": 3})], ids=["empty", "cut", "pickle"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x.npz: expected an .npz archive of plain arrays, got"):
        open_data_set(f"npz:{tmp_path / 'x.npz'}")


def test_an_array_alone_is_no_archive(tmp_path):
    np.save(tmp_path / "x.npy", BYTES)
    with pytest.raises(InputError, match=r"x.npy: expected an .npz archive of plain arrays, got"):
        open_data_set(f"npz:{tmp_path / 'x.npy'}")


def test_spaced_images_are_a_data_set_of_their_own():
    whole = in_memory("noise", BYTES, LABELS, classes=10)
    part = spaced_images(whole, 3)
    assert (len(part), part.labels.tolist(), part.classes, part.shape) == (3, [3, 0, 9], 10, (3, 32, 32))
    assert torch.equal(pixels(part), pixels(whole, range(3)))
    two = spaced_images(whole, 2)
    assert two.labels.tolist() == whole.labels[[0, 2]].tolist()
    assert torch.equal(pixels(two, [1, 0]), pixels(whole, [2, 0]))
    assert len({whole.digest, part.digest, spaced_images(whole, 2).digest, spaced_images(part, 2).digest}) == 4
    assert spaced_images(whole, 4) is whole
    assert spaced_images(whole, 5) is whole
    with pytest.raises(InputError, match="images: expected an integer >= 1, got 0"):
        spaced_images(whole, 0)


@pytest.mark.parametrize(("n", "count"), [(2, 1), (7, 1), (7, 3), (7, 6), (10, 4), (100, 33)])
def test_images_are_held_out(n, count):
    numbers = (np.arange(n) / 128).astype(np.float32)
    whole = in_memory("numbers", numbers.reshape(n, 1, 1, 1), np.arange(n), classes=200)
    others, held = split_off(whole, count)
    assert (len(others), len(held)) == (n - count, count)
    assert sorted([*others.labels, *held.labels]) == list(range(n))
    for part in (others, held):
        assert part.labels.tolist() == sorted(part.labels)
        assert pixels(part).flatten().tolist() == numbers[part.labels].tolist()
        assert (part.shape, part.classes) == ((1, 1, 1), 200)
    gaps = np.diff([*held.labels, n])
    assert held.labels[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_identities_of_what_is_held_out_and_of_the_rest():
    whole = in_memory("noise", BYTES, LABELS)
    others, held = split_off(whole, 1)
    assert others.identity == {"data": "noise, all but 1", "images": 3, "shape": "3x32x32", "digest": others.digest}
    assert (held.name, len(held)) == ("noise, 1 held out", 1)
    sets = (whole, others, held, *split_off(whole, 2), *split_off(from_place(2), 1), spaced_images(whole, 1))
    assert len({part.digest for part in sets}) == 8
    assert split_off(whole, 1)[0].identity == others.identity


def from_place(start):
    return in_memory("noise", BYTES[start:], LABELS[start:])


@pytest.mark.parametrize("count", [0, 4, 5, 1.5, "two"])
def test_no_set_may_be_empty(count):
    with pytest.raises(InputError, match=rf"^held_out: expected an integer from 1 to 3, got {count!r}"):
        split_off(in_memory("noise", BYTES, LABELS), count)
    with pytest.raises(InputError, match=r"^held_out: expected at least 2 images to take one away, got 1 of noise$"):
        split_off(from_place(3), 1)


def test_training_takes_the_part_for_it_if_there_are_parts(tmp_path):
    write_mnist(tmp_path, prefix="train", labels=LABELS[::-1])
    write_mnist(tmp_path)
    assert has_parts(f"mnist:{tmp_path}")
    assert open_training_set(f"mnist:{tmp_path}").labels.tolist() == LABELS[::-1].tolist()
    np.savez(tmp_path / "x.npz", images=BYTES, labels=LABELS)
    assert not has_parts(f"npz:{tmp_path / 'x.npz'}")
    assert open_training_set(f"npz:{tmp_path / 'x.npz'}").name == "npz"
    assert [has_parts(text) for text in ("digits", "imagefolder:x", "npz-jpeg:x", "cifar10:x")] == [1, 0, 1, 1]


def test_the_digest_tells_data_sets_apart(tmp_path):
    def digest(images, labels):
        np.savez(tmp_path / "x.npz", images=images, labels=labels)
        return open_data_set(f"npz:{tmp_path / 'x.npz'}").digest

    changed = BYTES.copy()
    changed[0, 0, 0, 0] ^= 1
    digests = [digest(BYTES, LABELS), digest(changed, LABELS), digest(BYTES, LABELS + 1), digest(BYTES[:, :1], LABELS)]
    assert len(set(digests)) == 4
    assert digest(BYTES, LABELS.astype(np.uint8)) == digests[0]


def jpeg_of(image):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_jpegs(path, files, **changes):
    arrays = {
        "test_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "test_offsets": np.cumsum([0, *map(len, files)]),
        "test_labels": LABELS[: len(files)],
    }
    np.savez(path, **(arrays | changes))
    return f"npz-jpeg:{path}"


def test_npz_of_jpeg_files(tmp_path):
    pytest.importorskip("PIL")
    flat = np.broadcast_to(np.array([0, 100, 200], dtype=np.uint8)[:, None, None, None], (3, 3, 16, 16))
    data = open_data_set(write_jpegs(tmp_path / "x.npz", [jpeg_of(image) for image in flat]))
    assert (data.name, data.shape, data.labels.tolist()) == ("npz-jpeg test", (3, 16, 16), [3, 0, 9])
    torch.testing.assert_close(pixels(data, [2, 0]), expected(flat[[2, 0]]), atol=3 / 255, rtol=0)


def test_jpeg_archives_that_will_not_do(tmp_path):
    pytest.importorskip("PIL")
    good, small = jpeg_of(BYTES[0]), jpeg_of(BYTES[0, :, :16])
    path = tmp_path / "x.npz"
    offsets = np.array([0, len(good), 7 + 2 * len(good)])
    with pytest.raises(InputError, match="expected test_offsets to increase from 0 to"):
        open_data_set(write_jpegs(path, [good, good], test_offsets=offsets))
    with pytest.raises(InputError, match="at least two integers in test_offsets"):
        open_data_set(write_jpegs(path, [good, good], test_offsets=offsets / 2))
    with pytest.raises(InputError, match="expected an array 'train_jpeg', got test_jpeg, test_offsets, test_labels"):
        open_data_set(write_jpegs(path, [good]), split="train")
    with pytest.raises(InputError, match="npz-jpeg test, image 0: expected an image, got something else"):
        open_data_set(write_jpegs(path, [b"nonsense"]))
    data = open_data_set(write_jpegs(path, [good, small, good[:-200]]))
    with pytest.raises(InputError, match=r"image 1: expected shape \(3, 32, 32\) as of the first, got \(3, 16, 32\)"):
        pixels(data, [0, 1])
    with pytest.raises(InputError, match="image 2: cannot be decoded"):
        pixels(data, [2])


@needs_cifar
def test_the_real_jpegs():
    pytest.importorskip("PIL")
    data = open_data_set(f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}")
    assert (len(data), data.shape, pixels(data, [0, 9999]).shape) == (10000, (3, 32, 32), (2, 3, 32, 32))


def write_folder(folder, sizes=((32, 32),) * 4):
    from PIL import Image

    names = ["cat/b.png", "ant/z.PNG", "cat/a.png", "bee/deep/x.png"]
    for name, image, size in zip(names, BYTES, sizes, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).resize(size).save(path)
    (folder / "cat" / "notes.txt").write_text("no image")
    return f"imagefolder:{folder}"


def test_image_folder(tmp_path):
    pytest.importorskip("PIL")
    data = open_data_set(write_folder(tmp_path))
    assert (data.name, data.shape, data.classes, data.labels.tolist()) == ("imagefolder", (3, 32, 32), 3, [0, 1, 2, 2])
    assert torch.equal(pixels(data), expected(BYTES[[1, 3, 2, 0]]))
    before = data.digest
    (tmp_path / "cat" / "b.png").unlink()
    assert open_data_set(f"imagefolder:{tmp_path}").digest != before


def test_image_folder_of_many_sizes(tmp_path):
    pytest.importorskip("PIL")
    text = write_folder(tmp_path, ((40, 20), (32, 32), (64, 128), (20, 70)))
    with pytest.raises(InputError, match=r"expected images of one size, got 32x32 \(z.PNG\), 20x70 .*; give an image"):
        open_data_set(text)
    data = open_data_set(text, image_size=14)
    assert pixels(data).shape == (4, 3, 14, 14)
    assert data.digest != open_data_set(text, image_size=16).digest


@pytest.mark.parametrize(
    ("size", "place"), [(100, 50), (5000, 10), (5000, 4995), (8192, 4096), (50_000, 3), (50_000, 49_990)]
)
def test_image_folders_of_other_content_are_told_apart(tmp_path, size, place):
    """As bitmaps, of which the files of all images of a shape have one size."""
    Image = pytest.importorskip("PIL.Image")
    path, pixels = tmp_path / "cat" / "a.ppm", np.zeros((1, size, 3), dtype=np.uint8)
    path.parent.mkdir()

    def digest(image_size=None):
        Image.fromarray(pixels).save(path)
        return open_data_set(f"imagefolder:{tmp_path}", image_size=image_size).digest

    before = digest()
    assert digest() == before
    pixels.reshape(-1)[place if place < size / 2 else place - size] ^= 1
    assert digest() != before


def test_image_folders_exchanged_or_scaled_are_told_apart(tmp_path):
    pytest.importorskip("PIL")
    text = write_folder(tmp_path)
    before = open_data_set(text).digest
    assert open_data_set(text, image_size=32).digest != before
    (tmp_path / "cat" / "a.png").rename(tmp_path / "a.png")
    (tmp_path / "cat" / "b.png").rename(tmp_path / "cat" / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "cat" / "b.png")
    assert open_data_set(text).digest != before


def test_image_size_is_what_is_usual_for_imagenet(tmp_path):
    """The sizes and boxes are those of torchvision's Resize(16) and CenterCrop(14)."""
    Image = pytest.importorskip("PIL.Image")
    data = open_data_set(write_folder(tmp_path, ((40, 20), (33, 31), (64, 128), (20, 71))), image_size=14)
    usual = {
        "ant/z.PNG": ((17, 16), (2, 1)),
        "bee/deep/x.png": ((16, 56), (1, 21)),
        "cat/a.png": ((16, 32), (1, 9)),
        "cat/b.png": ((32, 16), (9, 1)),
    }
    for image, (name, (size, (left, top))) in zip(pixels(data), usual.items(), strict=True):
        resized = Image.open(tmp_path / name).resize(size, Image.Resampling.BILINEAR)
        cropped = np.asarray(resized.crop((left, top, left + 14, top + 14))).transpose(2, 0, 1)
        assert torch.equal(image, expected(cropped)), name


def test_image_folders_that_will_not_do(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(InputError, match=r"expected subfolders with images in .*, found none"):
        open_data_set(f"imagefolder:{tmp_path}")
    text = write_folder(tmp_path)
    (tmp_path / "bee" / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad.png: expected an image, got something else"):
        open_data_set(text)
    (tmp_path / "bee" / "bad.png").unlink()
    with pytest.raises(InputError, match=r"imagefolder: expected a folder, got .*a.png"):
        open_data_set(f"imagefolder:{tmp_path / 'cat' / 'a.png'}")
    broken = tmp_path / "cat" / "a.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"a.png: cannot be decoded"):
        pixels(open_data_set(text))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("emnist:x", {}, "data: expected digits, mnist:DIR, cifar10:DIR, .*, got 'emnist:x'"),
        ("mnist", {}, "data: expected digits, mnist:DIR, .*, got 'mnist'"),
        ("digits:here", {}, "data: expected digits, mnist:DIR, .*, got 'digits:here'"),
        ("mnist:/no/such/folder", {}, "data: mnist: there is no /no/such/folder"),
        ("mnist:.", {}, "data: mnist: expected one of these files, found none: t10k-images-idx3-ubyte, "),
        ("mnist:.", {"split": "valid"}, "split: expected test or train, got 'valid'"),
        ("npz:.", {"split": "test"}, "split: npz has no parts; name the folder or file of the part that you want"),
        ("imagefolder:.", {"split": "test"}, "split: imagefolder has no parts"),
        ("mnist:.", {"image_size": 3}, "image_size: only for imagefolder, got it with mnist"),
        ("imagefolder:.", {"image_size": 0}, "image_size: expected an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, text, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_data_set(text, **options)


@pytest.mark.parametrize(("module", "text"), [("sklearn.datasets", "digits"), ("PIL", "imagefolder:.")])
def test_missing_packages_are_named(tmp_path, monkeypatch, module, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"need (scikit-learn|Pillow): pip install 'rs-plugins\["):
        open_data_set(text)
