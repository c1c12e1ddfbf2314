"""Where images come from before they are staged.

A source is named by a short text: `digits`, `torchvision:MNIST`, `npz:PATH`, `folder:PATH`. It knows its splits,
gives any range of rows of a split as uint8 images, and has a fingerprint that changes when its images do. There are
three kinds: arrays in memory (small, fixed data sets), an `.npz` file that is read front to back, and image files that
have to be decoded, which staging does in parallel on the cluster.
"""

import hashlib
import io
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pyarrow import fs

from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import SPLITS, Origin

KNOWN_SOURCES = "digits, torchvision:MNIST|FashionMNIST|CIFAR10|CelebA, npz:PATH, folder:PATH"

NO_LABEL = -1
DEFAULT_FRACTION = 0.1
READ_BYTES = 1 << 20

# The last images of torchvision's training set become the validation split.
_VALID_ROWS = {"MNIST": 10_000, "FashionMNIST": 10_000, "CIFAR10": 5_000}

_DIGITS_ROWS = {"train": 1297, "valid": 250, "test": 250}

# The aligned faces are 178 × 218 pixels. The centre square of 140, scaled to 64, is what most published 64 × 64 results
# use; 148 is the other usual choice.
_CELEBA_CROP = 140
_CELEBA_SIZE = 64

_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class DamagedSourceError(UserError):
    """The source's data turned out not to be what its fingerprint says: nothing that was read of it can be trusted."""


class Rows(NamedTuple):
    """Consecutive examples.

    Attributes:
        images: uint8 grey levels, of shape (n, H, W, C).
        labels: class numbers, of shape (n,); negative where there is none.
    """

    images: Pixels
    labels: Labels


class Source(ABC):
    """A data set that can be staged.

    Attributes:
        spec: its name on the command line.
        parameters: the options that decide what its images are.
        image_shape: (H, W, C) of every image.
        levels: number of grey levels.
        class_names: what the labels 0, 1, … mean; `None` where that is not known.
    """

    def __init__(
        self,
        spec: str,
        *,
        image_shape: tuple[int, int, int],
        levels: int = 256,
        parameters: Mapping[str, Any] | None = None,
        class_names: Iterable[str] | None = None,
    ) -> None:
        self.spec = spec
        self.image_shape = image_shape
        self.levels = levels
        self.parameters = dict(parameters or {})
        self.class_names = None if class_names is None else tuple(class_names)

    @abstractmethod
    def rows(self, split: str) -> int:
        """Returns the number of images in a split."""

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> Rows:
        """Returns rows `start` to `stop` of a split; cheapest when ranges are asked for in order.

        Raises:
            UserError: the data cannot be read.
        """

    @abstractmethod
    def content_digest(self) -> str:
        """Returns a text that changes when the content does."""

    def origin(self) -> Origin:
        """Returns what the manifest says of this source, with the fingerprint of content and parameters."""
        identity = {
            "kind": self.spec.partition(":")[0],
            "parameters": self.parameters,
            "image_shape": self.image_shape,
            "levels": self.levels,
            "class_names": self.class_names,
            "rows": {split: self.rows(split) for split in SPLITS},
            "content": self.content_digest(),
        }
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return Origin(self.spec, self.parameters, fingerprint)


class ArraySource(Source):
    """A data set that is small enough to lie in memory.

    Args:
        spec: its name on the command line.
        splits: its rows by split.
        kwargs: see `Source`; `image_shape` is that of the arrays.
    """

    def __init__(self, spec: str, splits: Mapping[str, Rows], **kwargs: Any) -> None:
        _, height, width, channels = splits["train"].images.shape
        super().__init__(spec, image_shape=(height, width, channels), **kwargs)
        self._splits = splits

    def rows(self, split: str) -> int:
        """Returns the number of images in a split."""
        return len(self._splits[split].images)

    def read(self, split: str, start: int, stop: int) -> Rows:
        """Returns rows `start` to `stop` of a split."""
        images, labels = self._splits[split]
        return Rows(images[start:stop], labels[start:stop])

    def content_digest(self) -> str:
        """Returns the SHA-256 digest of all images and labels."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for array in self._splits[split]:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def digits() -> ArraySource:
    """Returns scikit-learn's bundled scans of handwritten digits: 1,797 images of 8 × 8 pixels and 17 grey levels.

    They lie there in blocks by writer, so the first or last rows would be other people's hands than the rest. The
    splits (1,297 / 250 / 250) are therefore cut from one fixed permutation, drawn by NumPy's legacy generator, whose
    stream never changes between releases.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = _permutation(len(bunch.target))
    images = bunch.images.astype(np.uint8)[order, :, :, np.newaxis]
    labels = bunch.target.astype(np.int64)[order]
    splits, start = {}, 0
    for split, rows in _DIGITS_ROWS.items():
        splits[split] = Rows(images[start : start + rows], labels[start : start + rows])
        start += rows
    return ArraySource("digits", splits, levels=17, class_names=[str(digit) for digit in range(10)])


def torchvision_arrays(name: str, root: str, *, download: bool = False) -> ArraySource:
    """Returns torchvision's `MNIST`, `FashionMNIST` or `CIFAR10`.

    The last 10,000 training images of the first two, and the last 5,000 of CIFAR-10, are the validation split.

    Args:
        name: the data set's class in `torchvision.datasets`.
        root: the folder where torchvision keeps its data sets.
        download: whether to fetch what is missing.

    Raises:
        UserError: the data is not there, or is damaged.
    """
    import torchvision

    spec = f"torchvision:{name}"
    dataset_class = getattr(torchvision.datasets, name)
    with _explained_torchvision(spec, root, download):
        train, test = (dataset_class(root, train=train, download=download) for train in (True, False))
    train_rows, test_rows = (
        Rows(
            np.asarray(half.data, dtype=np.uint8).reshape(*half.data.shape[:3], -1),
            np.asarray(half.targets, dtype=np.int64),
        )
        for half in (train, test)
    )
    cut = len(train_rows.images) - _VALID_ROWS[name]
    if cut <= 0:
        raise UserError(f"{spec}: only {len(train_rows.images):,} training images under {root}; the files are damaged")
    splits = {
        "train": Rows(train_rows.images[:cut], train_rows.labels[:cut]),
        "valid": Rows(train_rows.images[cut:], train_rows.labels[cut:]),
        "test": test_rows,
    }
    # torchvision calls MNIST's classes "0 - zero".
    class_names = [class_name.partition(" - ")[0] for class_name in train.classes]
    return ArraySource(spec, splits, parameters={"valid_rows": _VALID_ROWS[name]}, class_names=class_names)


@contextmanager
def _explained_torchvision(spec: str, root: str, download: bool) -> Iterator[None]:
    """Turns torchvision's errors on missing or damaged data into one line that says what to do."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if download:
            raise UserError(f"{spec}: cannot download to {root}: {reason}") from error
        raise UserError(
            f"{spec}: no complete data under --root {root} ({reason}); "
            "name the folder in which torchvision keeps its data sets, or add --download"
        ) from error


class NpzSource(Source):
    """An `.npz` file with `train_images` and `test_images`, (N, H, W) or (N, H, W, C) uint8, and labels or not.

    The file, compressed or not, is read front to back and never held: memory does not depend on its size. For the same
    reason the validation split is the last part of `train_images` as it stands, which should therefore be in random
    order.

    Args:
        path: the file, local or on S3. Its optional arrays `train_labels` and `test_labels` are integers of shape (N,).
        valid_fraction: the part of `train_images` that becomes the validation split.

    Raises:
        UserError: the file is missing or damaged, or an array is missing, or has another type or shape.
    """

    def __init__(self, path: str, *, valid_fraction: float = DEFAULT_FRACTION) -> None:
        self._path = path
        spec = f"npz:{path}"
        filesystem, file = storage.open_filesystem(path)
        try:
            with storage.explained("read", path):
                stream = filesystem.open_input_file(file)
        except FileNotFoundError:
            raise UserError(f"{spec}: there is no such file") from None
        try:
            # Buffered because zipfile reads in small pieces, each of which would be a request to S3.
            self._archive = zipfile.ZipFile(io.BufferedReader(stream, READ_BYTES))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{spec}: not an .npz file ({error})") from error

        images = {half: self._open_images(f"{half}_images") for half in ("train", "test")}
        labels = {half: self._open_labels(f"{half}_labels", len(images[half])) for half in ("train", "test")}
        if images["train"].shape[1:] != images["test"].shape[1:]:
            raise UserError(
                f"{spec}: the images of train_images have shape {images['train'].shape[1:]}, "
                f"those of test_images {images['test'].shape[1:]}; they must be alike"
            )
        train_rows = len(images["train"]) - _fraction_of(len(images["train"]), "--valid-fraction", valid_fraction)
        self._ranges = {
            "train": range(train_rows),
            "valid": range(train_rows, len(images["train"])),
            "test": range(len(images["test"])),
        }
        for split, rows in self._ranges.items():
            if not rows:
                raise UserError(f"{spec}: the {split} split would be empty")
        self._images = {"train": images["train"], "valid": images["train"], "test": images["test"]}
        self._labels = {"train": labels["train"], "valid": labels["train"], "test": labels["test"]}
        height, width, *channels = images["train"].shape[1:]
        super().__init__(
            spec,
            image_shape=(height, width, channels[0] if channels else 1),
            parameters={"valid_fraction": valid_fraction},
        )

    def _open_images(self, name: str) -> "_ArrayStream":
        array = _ArrayStream.open(self._archive, self._path, name)
        if array is None:
            raise UserError(f"npz:{self._path}: there is no array {name}; it holds {_member_names(self._archive)}")
        shape = array.shape
        if array.dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise UserError(
                f"npz:{self._path}: {name} is {array.dtype} of shape {shape}; "
                "it must be uint8 of shape (N, H, W) or (N, H, W, C) with C 1 or 3"
            )
        return array

    def _open_labels(self, name: str, rows: int) -> "_ArrayStream | None":
        array = _ArrayStream.open(self._archive, self._path, name)
        if array is not None and (array.dtype.kind not in "iu" or array.shape != (rows,)):
            raise UserError(
                f"npz:{self._path}: {name} is {array.dtype} of shape {array.shape}; "
                f"it must be integers of shape ({rows},)"
            )
        return array

    def rows(self, split: str) -> int:
        """Returns the number of images in a split."""
        return len(self._ranges[split])

    def read(self, split: str, start: int, stop: int) -> Rows:
        """Returns rows `start` to `stop` of a split; going back to earlier rows reads the array anew."""
        first = self._ranges[split].start
        images = self._images[split].read(first + start, first + stop).reshape(-1, *self.image_shape)
        stream = self._labels[split]
        if stream is None:
            return Rows(images, np.full(len(images), NO_LABEL, dtype=np.int64))
        return Rows(images, stream.read(first + start, first + stop).astype(np.int64))

    def content_digest(self) -> str:
        """Returns the arrays' sizes and CRC-32 checksums, which the file's directory holds: no pixel is read."""
        streams = {stream.name: stream for stream in [*self._images.values(), *self._labels.values()] if stream}
        return ", ".join(f"{name} {stream.checksum}" for name, stream in sorted(streams.items()))


class _ArrayStream:
    """One array of an `.npz` file, of which ranges of rows are read without holding the rest.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: its type.
        checksum: size and CRC-32 of its bytes.
    """

    def __init__(self, member: IO[bytes], path: str, info: zipfile.ZipInfo) -> None:
        self.name = info.filename.removesuffix(".npy")
        self.checksum = f"{info.file_size}:{info.CRC:08x}"
        self._member = member
        self._path = path
        with self._explained():
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"its .npy format version {version} is unknown")
            self.shape, in_columns, self.dtype = read_header(member)
            if in_columns:
                raise ValueError("it is stored column by column; save it through numpy.ascontiguousarray")
            if self.dtype.hasobject or not self.shape:
                raise ValueError("it is not a plain array")
        self._data_start = member.tell()
        self._row_shape = self.shape[1:]
        self._row_bytes = self.dtype.itemsize * int(np.prod(self._row_shape))

    @classmethod
    def open(cls, archive: zipfile.ZipFile, path: str, name: str) -> "_ArrayStream | None":
        """Returns the array of that name, or `None` if the file has none."""
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            return None
        return cls(archive.open(info), path, info)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Returns rows `start` to `stop`; zipfile compares the array's checksum when the last row is reached."""
        rows = np.empty((stop - start, *self._row_shape), self.dtype)
        target = rows.reshape(-1).view(np.uint8).data
        with self._explained():
            self._member.seek(self._data_start + start * self._row_bytes)
            position = 0
            while position < len(target):
                piece = self._member.read(min(READ_BYTES, len(target) - position))
                if not piece:
                    raise EOFError("it ends too early")
                target[position : position + len(piece)] = piece
                position += len(piece)
        return rows

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise DamagedSourceError(f"npz:{self._path}: cannot read the array {self.name}: {reason}") from error


def _member_names(archive: zipfile.ZipFile) -> str:
    return ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"


@dataclass(frozen=True)
class Decoder:
    """Turns image files into equal squares of pixels; small, so that it can be sent to workers.

    The centre square of an image is cut out, then scaled with an antialiasing linear filter.

    Attributes:
        folder: what the files' paths are relative to, local or on S3.
        size: height and width of the result in pixels.
        crop: side of the centre square in pixels; `None` means the image's shorter side.
        channels: 1 for grey, 3 for RGB.
    """

    folder: str
    size: int
    crop: int | None
    channels: int

    def __call__(self, paths: Sequence[str]) -> Pixels:
        """Returns the images, of shape (n, size, size, channels).

        Raises:
            UserError: a file is missing or is no image of at least the crop's size; the line names it.
        """
        images = np.empty((len(paths), self.size, self.size, self.channels), np.uint8)
        for image, path in zip(images, paths, strict=True):
            image[...] = self._decode(storage.join(self.folder, path))
        return images

    def _decode(self, uri: str) -> Pixels:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            content = storage.read_bytes(uri)
        except FileNotFoundError:
            raise UserError(f"{uri}: no such file; every machine of the cluster must see the source's folder") from None
        try:
            with Image.open(io.BytesIO(content)) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode[0] in "IF":
                    raise ValueError(f"its pixels are of kind {image.mode}, not 8 bits a channel")
                image = image.convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            # Pillow's decoders raise errors of many kinds on damaged files.
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "of no known format" if unknown else " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{uri}: cannot be decoded as an image ({reason}); repair or remove it") from error
        crop = self.crop or min(image.size)
        if crop > min(image.size):
            raise UserError(f"{uri}: {image.width} × {image.height} pixels, smaller than --crop {crop}")
        left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
        square = image.crop((left, top, left + crop, top + crop))
        scaled = square.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(scaled, dtype=np.uint8).reshape(self.size, self.size, self.channels)


class ImageFileSource(Source):
    """Image files that have to be decoded.

    Args:
        spec: its name on the command line.
        decoder: how a file becomes an image.
        files: per split, the files' paths below the decoder's folder, with their labels (negative for none).
        digest: a text that changes when the files do.
        parameters: the options that chose the files; those of the decoder are added.
        class_names: what the labels 0, 1, … mean.

    Attributes:
        decoder: how a file becomes an image.
    """

    def __init__(
        self,
        spec: str,
        decoder: Decoder,
        files: Mapping[str, tuple[Sequence[str], Labels]],
        *,
        digest: str,
        parameters: Mapping[str, Any] | None = None,
        class_names: Iterable[str] | None = None,
    ) -> None:
        decoding = {"size": decoder.size, "crop": decoder.crop, "channels": decoder.channels}
        super().__init__(
            spec,
            image_shape=(decoder.size, decoder.size, decoder.channels),
            parameters={**decoding, **(parameters or {})},
            class_names=class_names,
        )
        self.decoder = decoder
        self._files = files
        self._digest = digest

    def rows(self, split: str) -> int:
        """Returns the number of images in a split."""
        return len(self._files[split][0])

    def files(self, split: str, start: int, stop: int) -> tuple[Sequence[str], Labels]:
        """Returns paths and labels of rows `start` to `stop`: what a worker needs to decode them."""
        paths, labels = self._files[split]
        return paths[start:stop], labels[start:stop]

    def read(self, split: str, start: int, stop: int) -> Rows:
        """Returns rows `start` to `stop` of a split, decoded here and now."""
        paths, labels = self.files(split, start, stop)
        return Rows(self.decoder(paths), labels)

    def content_digest(self) -> str:
        """Returns a text that changes when the files do."""
        return self._digest


def celeba(root: str, *, download: bool = False, size: int = _CELEBA_SIZE, crop: int = _CELEBA_CROP) -> ImageFileSource:
    """Returns CelebA's aligned faces in their official splits, cropped and scaled to `size` × `size` RGB, no labels.

    Args:
        root: the folder where torchvision keeps its data sets; the faces are in `celeba/img_align_celeba` below it.
        download: whether to fetch what is missing.
        size: height and width in pixels.
        crop: side of the centre square that is cut out of the 178 × 218 pixels before scaling.

    Raises:
        UserError: the data is not there, or is damaged.
    """
    spec = "torchvision:CelebA"
    if download:
        import torchvision

        with _explained_torchvision(spec, root, download):
            torchvision.datasets.CelebA(root, split="all", download=True)
    folder = storage.join(storage.absolute(root), "celeba", "img_align_celeba")
    partition_file = storage.join(storage.absolute(root), "celeba", "list_eval_partition.txt")
    with _explained_torchvision(spec, root, download):
        partition = [line.split() for line in storage.read_bytes(partition_file).decode().splitlines() if line.strip()]
        found = _list_images(folder)
        if not found:
            raise FileNotFoundError(f"{folder}: no images")
        paths = {split: [name for name, part in partition if part == str(i)] for i, split in enumerate(SPLITS)}
        missing = [name for name, _ in partition if name not in found]
        if missing:
            raise FileNotFoundError(f"{folder}: {missing[0]} and {len(missing) - 1:,} more images are missing")
    return ImageFileSource(
        spec,
        Decoder(folder, size, crop, channels=3),
        {split: (names, np.full(len(names), NO_LABEL, dtype=np.int64)) for split, names in paths.items()},
        digest=_digest_of_files({name: found[name] for name, _ in partition}, json.dumps(partition)),
    )


def folder(
    path: str,
    *,
    size: int,
    crop: int | None = None,
    channels: int = 3,
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
) -> ImageFileSource:
    """Returns the images below a folder, local or on S3, as squares of equal size.

    If the folder holds `train`, and beside it nothing but `valid` or `test`, these are the splits. Other splits are
    cut off the end of a fixed permutation: the test split from all images, then the validation split from what remains.
    Where images lie in sub-folders (of the split), the first sub-folder's name is their class. The rows of a split are
    in random, fixed order, so that a part of them is like the whole.

    Args:
        path: the folder.
        size: height and width in pixels.
        crop: side of the centre square that is cut out before scaling; by default the image's shorter side.
        channels: 1 for grey, 3 for RGB.
        valid_fraction: the part of the training images that becomes the validation split; 0.1 by default.
        test_fraction: the part of all images that becomes the test split; 0.1 by default.

    Raises:
        UserError: there are too few images, or a fraction is given for a split that the folder has.
    """
    spec = f"folder:{path}"
    found = _list_images(path)
    if not found:
        raise UserError(f"{spec}: there are no images ({', '.join(sorted(_IMAGE_SUFFIXES))}) in this folder")
    top_level = {PurePosixPath(name).parts[0] for name in found}
    given = top_level if "train" in top_level and top_level <= set(SPLITS) else set()
    if "train" in top_level and not given and top_level & {"valid", "val", "validation", "test"}:
        others = ", ".join(sorted(top_level - {"train"}))
        raise UserError(
            f"{spec}: beside train there is {others}; "
            "the splits must be called train, valid and test, with nothing else beside them"
        )

    names = sorted(found)
    members: dict[str, list[str]] = {}
    if given:
        members = {split: [name for name in names if name.startswith(f"{split}/")] for split in given}
    else:
        members = {"train": names}
    members = {split: [inside[i] for i in _permutation(len(inside))] for split, inside in members.items()}
    fractions = {}
    for split, fraction in (("test", test_fraction), ("valid", valid_fraction)):
        if split in members:
            if fraction is not None:
                raise UserError(f"{spec}: --{split}-fraction does not apply, for the folder has a {split} split")
            continue
        fractions[f"{split}_fraction"] = DEFAULT_FRACTION if fraction is None else fraction
        cut = len(members["train"]) - _fraction_of(
            len(members["train"]), f"--{split}-fraction", fractions[f"{split}_fraction"]
        )
        members["train"], members[split] = members["train"][:cut], members["train"][cut:]
    for split in SPLITS:
        if not members[split]:
            raise UserError(f"{spec}: {len(found)} images are too few: the {split} split would be empty")

    depth = 1 if given else 0
    classes = {name: parts[depth] for name in names if len(parts := PurePosixPath(name).parts) > depth + 1}
    class_names = sorted(set(classes.values()))
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    return ImageFileSource(
        spec,
        Decoder(storage.absolute(path), size, crop, channels),
        {
            split: (
                inside,
                np.array([numbers[classes[name]] if name in classes else NO_LABEL for name in inside], dtype=np.int64),
            )
            for split, inside in members.items()
        },
        digest=_digest_of_files(found),
        parameters=fractions,
        class_names=class_names or None,
    )


def _list_images(uri: str) -> dict[str, tuple[int, int]]:
    """Returns size and time of change (ns) of a folder's images by relative path; hidden files are left out."""
    filesystem, base = storage.open_filesystem(uri)
    with storage.explained("list", uri):
        infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    images = {}
    for info in infos:
        path = PurePosixPath(info.path.removeprefix(f"{base}/"))
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if info.type == fs.FileType.File and path.suffix.lower() in _IMAGE_SUFFIXES and not hidden:
            images[str(path)] = (info.size, info.mtime_ns)
    return images


def _digest_of_files(files: Mapping[str, tuple[int, int]], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for name, (size, changed) in sorted(files.items()):
        digest.update(f"{name}\0{size}\0{changed}\0".encode())
    return digest.hexdigest()


def _permutation(rows: int) -> npt.NDArray[np.int64]:
    """Returns the one permutation of `rows` rows that is the same with every release of NumPy."""
    return np.random.RandomState(0).permutation(rows)


def _fraction_of(rows: int, option: str, fraction: float) -> int:
    if not 0 < fraction < 1:
        raise UserError(f"{option} {fraction}: must lie between 0 and 1")
    return round(rows * fraction)


@dataclass(frozen=True)
class SourceOptions:
    """Options of all sources, as the command line gives them; `None` where they were not given.

    Attributes:
        root: torchvision's folder of data sets.
        download: fetch what is missing.
        size: height and width of decoded images in pixels.
        crop: side of the centre square that is cut out before scaling, in pixels.
        channels: 1 for grey, 3 for RGB.
        valid_fraction: the part of the training images that becomes the validation split.
        test_fraction: the part of all images that becomes the test split.
    """

    root: str | None = None
    download: bool | None = None
    size: int | None = None
    crop: int | None = None
    channels: int | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None

    def for_source(self, spec: str, accepted: Iterable[str], needed: str | None = None) -> dict[str, Any]:
        """Returns the options that were given.

        Raises:
            UserError: one was given that the source does not take or that makes no sense, or the needed one was not.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name in given:
            if name not in accepted:
                raise UserError(f"--{name.replace('_', '-')} does not apply to the source {spec}")
        for name in ("size", "crop"):
            if given.get(name, 1) < 1:
                raise UserError(f"--{name} {given[name]}: must be at least 1 pixel")
        if needed is not None and needed not in given:
            raise UserError(f"the source {spec} needs --{needed.replace('_', '-')}")
        return given


def open_source(spec: str, options: SourceOptions | None = None) -> Source:
    """Returns the source that `spec` names.

    Args:
        spec: `digits`, `torchvision:NAME`, `npz:PATH` or `folder:PATH`.
        options: the options that were given for it.

    Raises:
        UserError: there is no such source, an option does not fit it, or its data cannot be read.
    """
    options = options or SourceOptions()
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        options.for_source(spec, ())
        return digits()
    if spec == "torchvision:CelebA":
        return celeba(**options.for_source(spec, ("root", "download", "size", "crop"), needed="root"))
    if kind == "torchvision" and rest in _VALID_ROWS:
        return torchvision_arrays(rest, **options.for_source(spec, ("root", "download"), needed="root"))
    if kind == "npz" and rest:
        return NpzSource(rest, **options.for_source(spec, ("valid_fraction",)))
    if kind == "folder" and rest:
        accepted = ("size", "crop", "channels", "valid_fraction", "test_fraction")
        return folder(rest, **options.for_source(spec, accepted, needed="size"))
    raise UserError(f"{spec}: no such source; there are {KNOWN_SOURCES}")
