"""The description of a staged data set: the `manifest.json` that makes its Parquet files a data set.

A staged data set is a folder, on S3 or local:

    DEST/train/part-00000.parquet      image: fixed_size_binary(H·W·C), label: int64 or null
    DEST/valid/part-00000.parquet
    DEST/test/part-00000.parquet
    DEST/manifest.json                 written last

`image` holds uint8 grey levels in height × width × channel order. A folder without a manifest is not a data set,
so a staging run that died leaves nothing that a reader could mistake for one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class PartFile:
    """One Parquet file of a split.

    Attributes:
        path: where it lies, relative to the data set's folder.
        rows: how many images it holds.
        row_groups: rows of each of its row groups, in order.
        bytes: its size.
        sha256: the SHA-256 digest of its bytes, in hexadecimal.
    """

    path: str
    rows: int
    row_groups: tuple[int, ...]
    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PartFile":
        """Returns the part that `fields` describes.

        Raises:
            KeyError, TypeError, ValueError: `fields` is not such a description.
        """
        part = cls(
            path=str(fields["path"]),
            rows=int(fields["rows"]),
            row_groups=tuple(int(rows) for rows in fields["row_groups"]),
            bytes=int(fields["bytes"]),
            sha256=str(fields["sha256"]),
        )
        if sum(part.row_groups) != part.rows:
            raise ValueError(f"the row groups of {part.path} do not add up to its {part.rows} rows")
        return part


@dataclass(frozen=True)
class Origin:
    """Where a data set's images came from.

    Attributes:
        spec: the source as it was named on the command line.
        parameters: the options that decide what the images are.
        fingerprint: a digest of the source's content and parameters; two sources with one fingerprint stage alike.
    """

    spec: str
    parameters: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """A staged data set without its pixels.

    Attributes:
        name: the last part of the data set's address.
        image_shape: (H, W, C) of every image.
        levels: number of grey levels; pixel values are 0 … levels - 1.
        splits: the files of each of `SPLITS`, in row order.
        pixel_sum: per pixel, the sum over the training split; exact, H·W·C long, in height × width × channel order.
        pixel_sum_of_squares: per pixel, the sum of squares over the training split, likewise.
        class_names: what the labels 0, 1, … mean; `None` where there are no labels.
        origin: where the images came from.
        created: when staging ended, UTC, as ISO 8601.
        software_version: the version of this software that staged them.
    """

    name: str
    image_shape: tuple[int, int, int]
    levels: int
    splits: Mapping[str, tuple[PartFile, ...]]
    pixel_sum: tuple[int, ...]
    pixel_sum_of_squares: tuple[int, ...]
    class_names: tuple[str, ...] | None
    origin: Origin
    created: str
    software_version: str

    @property
    def image_bytes(self) -> int:
        """The number of values of one image, H·W·C, which is also its size in bytes."""
        height, width, channels = self.image_shape
        return height * width * channels

    def rows(self, split: str) -> int:
        """Returns the number of images in a split."""
        return sum(file.rows for file in self.splits[split])

    def to_json(self) -> str:
        """Returns the text of `manifest.json`: a JSON object, one field a line."""
        fields = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "image_shape": self.image_shape,
            "levels": self.levels,
            "class_names": self.class_names,
            "source": vars(self.origin),
            "created": self.created,
            "software_version": self.software_version,
            "splits": {
                split: {"rows": self.rows(split), "files": [vars(file) for file in files]}
                for split, files in self.splits.items()
            },
            "pixel_sum": self.pixel_sum,
            "pixel_sum_of_squares": self.pixel_sum_of_squares,
        }
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        return f"{{\n{lines}\n}}\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Returns the manifest that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: `text` is not a manifest of this format version.
        """
        fields = json.loads(text)
        class_names = fields["class_names"]
        height, width, channels = (int(size) for size in fields["image_shape"])
        manifest = cls(
            name=str(fields["name"]),
            image_shape=(height, width, channels),
            levels=int(fields["levels"]),
            splits={
                split: tuple(PartFile.from_json(file) for file in fields["splits"][split]["files"]) for split in SPLITS
            },
            pixel_sum=tuple(int(value) for value in fields["pixel_sum"]),
            pixel_sum_of_squares=tuple(int(value) for value in fields["pixel_sum_of_squares"]),
            class_names=None if class_names is None else tuple(str(name) for name in class_names),
            origin=Origin(**fields["source"]),
            created=str(fields["created"]),
            software_version=str(fields["software_version"]),
        )
        if {len(manifest.pixel_sum), len(manifest.pixel_sum_of_squares)} != {manifest.image_bytes}:
            raise ValueError("the pixel sums do not have the image's shape")
        return manifest

    @classmethod
    def load(cls, dataset_uri: str) -> "Manifest":
        """Reads the manifest of the data set at `dataset_uri`.

        Raises:
            UserError: there is no manifest, it is damaged, or it was written by newer software.
        """
        uri = storage.join(dataset_uri, MANIFEST_NAME)
        try:
            text = storage.read_bytes(uri).decode(errors="replace")
        except FileNotFoundError:
            raise UserError(
                f"{dataset_uri}: not a staged data set: there is no {MANIFEST_NAME}; "
                f"stage it with `python -m jobs.stage SOURCE {dataset_uri}`"
            ) from None
        again = f"stage the data set again with `python -m jobs.stage SOURCE {dataset_uri} --overwrite`"
        try:
            version = json.loads(text)["format_version"]
            if version == FORMAT_VERSION:
                return cls.from_json(text)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{uri}: damaged manifest ({type(error).__name__}: {error}); {again}") from error
        raise UserError(
            f"{uri}: its format is version {version}, this software reads version {FORMAT_VERSION}; "
            f"use the software that staged it, or {again}"
        )


def check_files(dataset_uri: str, manifest: Manifest) -> None:
    """Checks that every file of a data set is there in its full size; reads none of them.

    Raises:
        UserError: a file is missing or has another size; the line names the first such file.
    """
    sizes = storage.file_sizes(dataset_uri)
    for files in manifest.splits.values():
        for file in files:
            found = sizes.get(file.path)
            if found != file.bytes:
                wrong = "is missing" if found is None else f"has {found:,} bytes, the manifest says {file.bytes:,}"
                raise UserError(damaged_part(dataset_uri, file, wrong))


def damaged_part(dataset_uri: str, file: PartFile, wrong: str) -> str:
    """Returns the line that says what is wrong with a file of a staged data set, and what to do about it."""
    return (
        f"{storage.join(dataset_uri, file.path)} {wrong}; "
        f"stage the data set again with `python -m jobs.stage SOURCE {dataset_uri} --overwrite`"
    )
