import hashlib
import os
import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.manifest import SPLITS
from pipeline.sources import NO_LABEL, ImageFileSource, Source, SourceOptions, open_source


def everything(source: Source, split: str) -> tuple[np.ndarray, np.ndarray]:
    return source.read(split, 0, source.rows(split))


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- digits


def test_digits_are_scikit_learns_digits_each_once() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    expected = Counter(
        (image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    source = open_source("digits")
    found: Counter[tuple[bytes, int]] = Counter()
    for split in SPLITS:
        images, labels = everything(source, split)
        found.update((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
        # Every class has its part of every split.
        assert np.bincount(labels, minlength=10).min() >= 0.05 * len(labels)
    assert found == expected
    assert [source.rows(split) for split in SPLITS] == [1297, 250, 250]
    assert (source.image_shape, source.levels) == ((8, 8, 1), 17)


def test_digits_are_always_cut_alike() -> None:
    images, _ = everything(open_source("digits"), "test")
    # NumPy's legacy generator is frozen, and so is this digest.
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "9293fef9ca3c56b2"
    assert open_source("digits").origin() == open_source("digits").origin()


# --- torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like MNIST's: every image is filled with values that tell its number."""
    root = tmp_path_factory.mktemp("torchvision")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, rows in (("train", 60_000), ("t10k", 10_000)):
        numbers = np.arange(rows, dtype=np.uint32)
        images = np.zeros((rows, 28, 28), np.uint8)
        images[:, 0, :4] = numbers.view(np.uint8).reshape(rows, 4)
        write_idx(raw / f"{half}-images-idx3-ubyte", images)
        write_idx(raw / f"{half}-labels-idx1-ubyte", (numbers % 10).astype(np.uint8))
    (root / "FashionMNIST").symlink_to(root / "MNIST")
    return root


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_validates_on_the_last_ten_thousand(mnist_root: Path, name: str) -> None:
    source = open_source(f"torchvision:{name}", SourceOptions(root=str(mnist_root)))
    for split, expected in (("train", range(50_000)), ("valid", range(50_000, 60_000)), ("test", range(10_000))):
        images, labels = everything(source, split)
        numbers = images[:, 0, :4, 0].copy().view(np.uint32).ravel()
        assert images.shape == (len(expected), 28, 28, 1)
        assert numbers.tolist() == list(expected)
        assert labels.tolist() == [number % 10 for number in expected]
    assert source.class_names is not None
    assert len(source.class_names) == 10


def test_missing_torchvision_data_says_where_and_what_to_do(tmp_path: Path) -> None:
    for name in ("MNIST", "CIFAR10", "CelebA"):
        with pytest.raises(UserError, match=rf"torchvision:{name}: .*--root {tmp_path}.*--download"):
            open_source(f"torchvision:{name}", SourceOptions(root=str(tmp_path)))


def test_cifar10_is_turned_to_height_width_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = random_images(5_600, 3, 32, 32)
    labels = np.arange(5_600) % 10
    digests = {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, rows in zip(names, np.split(np.arange(5_600), [1_100, 2_200, 3_300, 4_400, 5_500]), strict=True):
        entry = {"data": images[rows].reshape(len(rows), -1), "labels": labels[rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in [*names, "batches.meta"]:
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, digests[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": digests["batches.meta"]})

    source = open_source("torchvision:CIFAR10", SourceOptions(root=str(tmp_path)))
    for split, rows in (("train", slice(500)), ("valid", slice(500, 5_500)), ("test", slice(5_500, None))):
        found, found_labels = everything(source, split)
        assert np.array_equal(found, images[rows].transpose(0, 2, 3, 1))
        assert np.array_equal(found_labels, labels[rows])
    assert source.class_names == tuple("abcdefghij")


@pytest.fixture
def celeba_root(tmp_path: Path) -> Path:
    """Six faces in the official layout, without loss although they are called .jpg: Pillow looks at the content."""
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.fromarray(random_images(218, 178, 3, seed=i)).save(folder / f"{i:06d}.jpg", format="PNG")
    lines = "".join(f"{i:06d}.jpg {part}\n" for i, part in enumerate([0, 0, 0, 1, 2, 2]))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text(lines)
    return tmp_path


def test_celeba_is_cropped_and_scaled_as_torchvision_does(celeba_root: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    source = open_source("torchvision:CelebA", SourceOptions(root=str(celeba_root)))
    assert [source.rows(split) for split in SPLITS] == [3, 1, 2]
    images, labels = everything(source, "test")
    transform = Compose([CenterCrop(140), Resize(64)])
    for image, number in zip(images, (4, 5), strict=True):
        with Image.open(celeba_root / "celeba" / "img_align_celeba" / f"{number:06d}.jpg") as original:
            assert np.array_equal(image, np.asarray(transform(original)))
    assert labels.tolist() == [NO_LABEL, NO_LABEL]


def test_celeba_with_a_missing_face_is_refused(celeba_root: Path) -> None:
    (celeba_root / "celeba" / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"000003\.jpg and 0 more images are missing"):
        open_source("torchvision:CelebA", SourceOptions(root=str(celeba_root)))


# --- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_npz_gives_its_arrays(tmp_path: Path, save, channels: tuple[int, ...]) -> None:
    train, test = random_images(101, 7, 5, *channels), random_images(20, 7, 5, *channels, seed=1)
    train_labels, test_labels = np.arange(101, dtype=np.uint8), np.arange(20, dtype=np.int32)
    path = tmp_path / "images.npz"
    save(path, train_images=train, test_images=test, train_labels=train_labels, test_labels=test_labels)

    source = open_source(f"npz:{path}", SourceOptions(valid_fraction=0.2))
    assert source.image_shape == (7, 5, *(channels or (1,)))
    assert [source.rows(split) for split in SPLITS] == [81, 20, 20]
    shape = (-1, *source.image_shape)
    for split, images, labels in (
        ("train", train[:81], train_labels[:81]),
        ("valid", train[81:], train_labels[81:]),
        ("test", test, test_labels),
    ):
        found, found_labels = everything(source, split)
        assert np.array_equal(found, images.reshape(shape))
        assert np.array_equal(found_labels, labels)
    # Backwards as well, which reads from the start again.
    assert np.array_equal(source.read("train", 40, 50).images, train[40:50].reshape(shape))
    assert np.array_equal(source.read("train", 10, 20).images, train[10:20].reshape(shape))


def test_npz_needs_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=random_images(30, 4, 4), test_images=random_images(5, 4, 4))
    assert set(everything(open_source(f"npz:{tmp_path / 'a.npz'}"), "train")[1].tolist()) == {NO_LABEL}


def test_npz_fingerprint_is_of_content_and_parameters_and_not_of_the_path(tmp_path: Path) -> None:
    arrays = {"train_images": random_images(30, 4, 4), "test_images": random_images(5, 4, 4)}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays)
    arrays["test_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "c.npz", **arrays)

    def fingerprint(name: str, fraction: float = 0.1) -> str:
        return open_source(f"npz:{tmp_path / name}", SourceOptions(valid_fraction=fraction)).origin().fingerprint

    assert fingerprint("a.npz") == fingerprint("b.npz")
    assert fingerprint("a.npz") != fingerprint("c.npz")
    assert fingerprint("a.npz") != fingerprint("a.npz", 0.2)


GOOD = {"train_images": random_images(30, 4, 6), "test_images": random_images(5, 4, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": None}, "no array train_images; it holds test_images"),
        ({"test_images": None}, "no array test_images; it holds train_images"),
        ({"train_images": GOOD["train_images"] / 255}, "train_images is float64 of shape .* must be uint8"),
        ({"train_images": random_images(30, 24)}, r"train_images is uint8 of shape \(30, 24\)"),
        ({"train_images": random_images(30, 3, 4, 6)}, r"shape \(30, 3, 4, 6\); .* C 1 or 3"),
        ({"test_images": random_images(5, 4, 7)}, r"shape \(4, 6\), those of test_images \(4, 7\)"),
        ({"train_images": np.asfortranarray(GOOD["train_images"])}, "stored column by column"),
        ({"train_labels": np.arange(29)}, r"train_labels is int64 of shape \(29,\); .* shape \(30,\)"),
        ({"train_labels": np.zeros(30)}, "train_labels is float64"),
        ({"train_labels": np.array([{}] * 30, dtype=object)}, "train_labels: it is not a plain array"),
        ({"train_images": random_images(1, 4, 6)}, "the valid split would be empty"),
        ({"test_images": random_images(0, 4, 6)}, "the test split would be empty"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    arrays = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"npz:{tmp_path}/a.npz: .*{message}"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_is_noticed_when_it_is_read(tmp_path: Path, save) -> None:
    path = tmp_path / "a.npz"
    save(path, **GOOD)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the array train_images"):
        everything(open_source(f"npz:{path}"), "train")


def test_npz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        open_source(f"npz:{tmp_path / 'missing.npz'}")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"text\.npz: not an \.npz file"):
        open_source(f"npz:{tmp_path / 'text.npz'}")


# --- folder


def save_images(folder: Path, count: int, *, size: tuple[int, int] = (9, 8), seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(random_images(size[1], size[0], 3, seed=1000 * seed + i)).save(folder / f"{i:03d}.png")


def open_folder(path: Path, **options) -> ImageFileSource:
    source = open_source(f"folder:{path}", SourceOptions(**{"size": 8, **options}))
    assert isinstance(source, ImageFileSource)
    return source


def paths(source: ImageFileSource, split: str) -> list[str]:
    return list(source.files(split, 0, source.rows(split))[0])


def test_folder_is_cut_by_a_fixed_permutation(tmp_path: Path) -> None:
    save_images(tmp_path, 50)
    (tmp_path / "notes.txt").write_text("not an image")
    save_images(tmp_path / ".thumbnails", 1)
    source = open_folder(tmp_path, valid_fraction=0.2, test_fraction=0.1)
    assert [source.rows(split) for split in SPLITS] == [36, 9, 5]
    found = [path for split in SPLITS for path in paths(source, split)]
    assert sorted(found) == [f"{i:03d}.png" for i in range(50)]
    assert found != sorted(found)
    again = open_folder(tmp_path, valid_fraction=0.2, test_fraction=0.1)
    assert found == [path for split in SPLITS for path in paths(again, split)]
    assert set(everything(source, "test")[1].tolist()) == {NO_LABEL}
    assert source.class_names is None


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "cat" / "young", 10)
    save_images(tmp_path / "dog", 20)
    save_images(tmp_path, 3)
    source = open_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    for split in SPLITS:
        _, labels = everything(source, split)
        expected = [{"cat": 0, "dog": 1}.get(path.split("/")[0], NO_LABEL) for path in paths(source, split)]
        assert labels.tolist() == expected


def test_folders_called_like_splits_are_splits(tmp_path: Path) -> None:
    for seed, (split, count) in enumerate((("train", 10), ("valid", 4), ("test", 3))):
        save_images(tmp_path / split / "a", count, seed=seed)
        save_images(tmp_path / split / "b", 1, seed=9 + seed)
    source = open_folder(tmp_path)
    assert [source.rows(split) for split in SPLITS] == [11, 5, 4]
    assert source.class_names == ("a", "b")
    assert all(path.startswith("valid/") for path in paths(source, "valid"))
    with pytest.raises(UserError, match="--test-fraction does not apply, for the folder has a test split"):
        open_folder(tmp_path, test_fraction=0.1)


def test_a_split_that_the_folder_lacks_is_cut_off(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 20)
    save_images(tmp_path / "test", 3)
    source = open_folder(tmp_path, valid_fraction=0.25)
    assert [source.rows(split) for split in SPLITS] == [15, 5, 3]
    assert source.class_names is None


def test_misnamed_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 3)
    save_images(tmp_path / "val", 3)
    with pytest.raises(UserError, match="beside train there is val; the splits must be called train, valid and test"):
        open_folder(tmp_path)


@pytest.mark.parametrize("crop", [None, 20])
@pytest.mark.parametrize("shape", [(31, 44), (44, 31), (25, 25)])
def test_decoding_is_a_centre_crop_and_a_scaling(tmp_path: Path, crop: int | None, shape: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    save_images(tmp_path, 3, size=shape)
    source = open_folder(tmp_path, size=16, crop=crop, valid_fraction=0.3, test_fraction=0.3)
    transform = Compose([CenterCrop(crop or min(shape)), Resize(16)])
    for split in SPLITS:
        images, _ = everything(source, split)
        for image, path in zip(images, paths(source, split), strict=True):
            with Image.open(tmp_path / path) as original:
                assert np.array_equal(image, np.asarray(transform(original)))


def test_images_of_the_right_size_are_left_as_they_are(tmp_path: Path) -> None:
    save_images(tmp_path, 3, size=(8, 8))
    source = open_folder(tmp_path, valid_fraction=0.3, test_fraction=0.3)
    images, _ = everything(source, "train")
    with Image.open(tmp_path / paths(source, "train")[0]) as original:
        assert np.array_equal(images[0], np.asarray(original))


def test_grey_channels(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(random_images(8, 8, seed=i)).save(tmp_path / f"{i}.png")
    source = open_folder(tmp_path, channels=1, valid_fraction=0.3, test_fraction=0.3)
    images, _ = everything(source, "train")
    assert images.shape == (1, 8, 8, 1)
    with Image.open(tmp_path / paths(source, "train")[0]) as original:
        assert np.array_equal(images[0, :, :, 0], np.asarray(original))


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    pixels = random_images(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
    source = open_folder(tmp_path, valid_fraction=0.3, test_fraction=0.3)
    assert np.array_equal(source.read("train", 0, 1).images[0], np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "of no known format"),
        (b"", "of no known format"),
        ("truncated", "truncated"),
        ("16 bits", "not 8 bits a channel"),
        ("small", r"5 × 5 pixels, smaller than --crop 8"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes | str, message: str) -> None:
    save_images(tmp_path, 3, size=(64, 64))
    broken = tmp_path / "001.png"
    if content == "truncated":
        broken.write_bytes(broken.read_bytes()[:5000])
    elif content == "16 bits":
        Image.fromarray(np.zeros((9, 9), np.uint16)).save(broken)
    elif content == "small":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(broken)
    else:
        assert isinstance(content, bytes)
        broken.write_bytes(content)
    source = open_folder(tmp_path, crop=8, valid_fraction=0.3, test_fraction=0.3)
    with pytest.raises(UserError, match=message) as caught:
        [everything(source, split) for split in SPLITS]
    assert str(caught.value).startswith(f"{broken}: ")
    assert "\n" not in str(caught.value)


def test_folder_fingerprint_changes_with_names_sizes_times_and_parameters(tmp_path: Path) -> None:
    save_images(tmp_path, 10)
    before = open_folder(tmp_path).origin()
    assert open_folder(tmp_path).origin() == before
    fingerprints = {before.fingerprint, open_folder(tmp_path, size=7).origin().fingerprint}
    os.utime(tmp_path / "000.png", ns=(0, 1))
    fingerprints.add(open_folder(tmp_path).origin().fingerprint)
    (tmp_path / "000.png").rename(tmp_path / "a.png")
    fingerprints.add(open_folder(tmp_path).origin().fingerprint)
    assert len(fingerprints) == 4


def test_folder_without_enough_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no images"):
        open_folder(tmp_path / "missing")
    save_images(tmp_path, 3)
    with pytest.raises(UserError, match="3 images are too few: the valid split would be empty"):
        open_folder(tmp_path)


# --- names and options


@pytest.mark.parametrize(
    "spec", ["", "digit", "digits:8", "torchvision:", "torchvision:SVHN", "npz:", "folder", "s3://x"]
)
def test_an_unknown_source_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(
        UserError, match=r"no such source; there are digits, torchvision:MNIST\|.*, npz:PATH, folder:PATH"
    ):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("digits", {"size": 8}, "--size does not apply to the source digits"),
        ("npz:x.npz", {"test_fraction": 0.1}, "--test-fraction does not apply to the source npz:x.npz"),
        ("torchvision:MNIST", {}, "the source torchvision:MNIST needs --root"),
        ("folder:x", {}, "the source folder:x needs --size"),
        ("folder:x", {"size": 0}, "--size 0: must be at least 1 pixel"),
        ("torchvision:CelebA", {"root": "x", "crop": -1}, "--crop -1: must be at least 1 pixel"),
    ],
)
def test_options_must_fit_the_source(spec: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(spec, SourceOptions(**options))


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, float("nan")])
def test_fractions_lie_between_0_and_1(tmp_path: Path, fraction: float) -> None:
    np.savez(tmp_path / "a.npz", **GOOD)
    with pytest.raises(UserError, match=r"--valid-fraction .* must lie between 0 and 1"):
        open_source(f"npz:{tmp_path / 'a.npz'}", SourceOptions(valid_fraction=fraction))
