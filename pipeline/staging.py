"""Writes a source as a staged data set: Parquet parts of bounded size, then the manifest that makes them a data set.

A part is encoded in memory, written in one go, and followed by a small record of itself under `DEST/_staging/`. A run
that was killed leaves parts and records but no manifest; the same run again skips every part whose record fits and
whose file is there in its full size. Records carry the plan they belong to (the source's fingerprint and the layout),
so those of another run are never mistaken for this one's. When all parts are there the manifest is put together from
the records, and the records are removed. Memory is bounded by a few parts, whatever the size of the data set.
"""

import hashlib
import importlib.metadata
import json
import logging
import re
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import FORMAT_VERSION, MANIFEST_NAME, SPLITS, Manifest, Origin, PartFile, check_files
from pipeline.progress import Progress
from pipeline.sources import DamagedSourceError, ImageFileSource, Pixels, Rows, Source

# A part is fetched and checked as a whole by its readers, and shares of workers end within parts: parts are large
# enough for the requests' latency not to matter, and small enough to hold a few in memory and to waste little.
PART_BYTES = 8 << 20
MAX_ROWS_PER_GROUP = 1024
MIN_TRAIN_GROUPS = 8

# Encoding and writing overlap with reading; more threads would hold more parts in memory.
WRITER_THREADS = 4
RECORD_READERS = 8

RECORDS_FOLDER = "_staging"
_PART_FILE = re.compile(rf"(?:{'|'.join(SPLITS)})/\.?part-\d+\.parquet(?:\.\w+)?")


@dataclass(frozen=True)
class StagingResult:
    """What a staging run made.

    Attributes:
        dataset: address of the data set; what other jobs take.
        manifest: address of its manifest.
        images: number of images by split.
        images_staged: images that this run staged; fewer than there are if it finished another one's work.
        images_per_second: rate at which it did.
        status: in words, what was done.
    """

    dataset: str
    manifest: str
    images: dict[str, int]
    images_staged: int
    images_per_second: float
    status: str


@dataclass(frozen=True)
class Layout:
    """How a data set is cut into files.

    Attributes:
        rows_per_part: rows of a Parquet file.
        rows_per_group: rows of a row group.
    """

    rows_per_part: int
    rows_per_group: int

    @classmethod
    def for_source(cls, source: Source) -> "Layout":
        """Returns parts of at most `PART_BYTES` of pixels, in row groups of a power of two of at most 1,024 rows.

        Row groups are smaller where a training split would otherwise have fewer than eight.
        """
        part_rows = max(1, PART_BYTES // int(np.prod(source.image_shape)))
        most = max(1, min(MAX_ROWS_PER_GROUP, part_rows, source.rows("train") // MIN_TRAIN_GROUPS))
        group_rows = 1 << (most.bit_length() - 1)
        return cls(part_rows // group_rows * group_rows, group_rows)


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `stop` of a split, which make one file."""

    split: str
    index: int
    start: int
    stop: int

    @property
    def path(self) -> str:
        return f"{self.split}/part-{self.index:05d}.parquet"

    @property
    def record_path(self) -> str:
        return f"{RECORDS_FOLDER}/{self.split}-{self.index:05d}.json"


@dataclass(frozen=True)
class _Record:
    """What is known of a part that has been written.

    Attributes:
        plan: digest of the source's fingerprint and the layout.
        file: the part.
        pixel_sum: per pixel, the sum over its rows.
        pixel_sum_of_squares: per pixel, the sum of squares.
    """

    plan: str
    file: PartFile
    pixel_sum: Sequence[int]
    pixel_sum_of_squares: Sequence[int]

    def to_json(self) -> str:
        return json.dumps({**vars(self), "file": vars(self.file)})

    @classmethod
    def from_json(cls, text: str) -> "_Record":
        fields = json.loads(text)
        return cls(**{**fields, "file": PartFile.from_json(fields["file"])})


@dataclass(frozen=True)
class _PartWriter:
    """Writes parts and their records; small, so that it can be sent to workers."""

    destination: str
    plan: str
    rows_per_group: int

    def write(self, part: _Part, rows: Rows) -> None:
        content = encode_part(rows, self.rows_per_group)
        whole, rest = divmod(len(rows.images), self.rows_per_group)
        file = PartFile(
            path=part.path,
            rows=len(rows.images),
            row_groups=(self.rows_per_group,) * whole + (rest,) * (rest > 0),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        storage.write_bytes(storage.join(self.destination, part.path), content)
        record = _Record(self.plan, file, *(sums.tolist() for sums in pixel_sums(rows.images)))
        storage.write_bytes(storage.join(self.destination, part.record_path), record.to_json().encode())


def encode_part(rows: Rows, rows_per_group: int) -> bytes:
    """Returns a Parquet file with the columns `image` and `label`; equal rows give equal bytes."""
    images = np.ascontiguousarray(rows.images)
    image_type = pa.binary(images[0].size)
    table = pa.table(
        {
            "image": pa.Array.from_buffers(image_type, len(images), [None, pa.py_buffer(images.reshape(-1))]),
            "label": pa.array(rows.labels, pa.int64(), mask=rows.labels < 0),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=rows_per_group, compression="zstd", use_dictionary=False, write_statistics=["label"]
    )
    return bytes(sink.getvalue().to_pybytes())


def pixel_sums(images: Pixels) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Returns the exact sum and sum of squares over images (n, H, W, C), each H·W·C long."""
    flat = images.reshape(len(images), -1)
    total = np.zeros(flat.shape[1], np.uint64)
    squares = np.zeros(flat.shape[1], np.uint64)
    # 1,024 squares of at most 255² fit into 32 bits, which add up faster and without large intermediate arrays.
    for start in range(0, len(flat), 1024):
        some = flat[start : start + 1024]
        total += some.sum(axis=0, dtype=np.uint32)
        squares += np.square(some, dtype=np.uint16).sum(axis=0, dtype=np.uint32)
    return total, squares


def stage(source: Source, destination: str, *, layout: Layout | None = None, overwrite: bool = False) -> StagingResult:
    """Stages a source at a destination, finishing an interrupted run of the same, and doing nothing if it is there.

    Images that have to be decoded are decoded by Ray tasks; Ray is initialised by the caller, or else by its first use.

    Args:
        source: where the images come from.
        destination: the data set's folder, on S3 or local; its last part is the data set's name.
        layout: how the data set is cut into files; by default as the source asks for.
        overwrite: replace a data set that is there.

    Raises:
        UserError: the destination holds other data, the source cannot be read, or the destination cannot be written.
    """
    destination = storage.absolute(destination)
    manifest_uri = storage.join(destination, MANIFEST_NAME)
    origin = source.origin()
    images = {split: source.rows(split) for split in SPLITS}

    if storage.exists(manifest_uri):
        if not overwrite:
            _check_same(Manifest.load(destination), source, origin, destination)
            storage.delete_folder(storage.join(destination, RECORDS_FOLDER))
            return StagingResult(destination, manifest_uri, images, 0, 0.0, "the same data is there, nothing to do")
        # Before any part changes, so that no reader takes the old manifest for a description of the new files.
        storage.delete_folder(storage.join(destination, RECORDS_FOLDER))
        storage.delete_file(manifest_uri)

    layout = layout or Layout.for_source(source)
    identity = [FORMAT_VERSION, origin.fingerprint, layout.rows_per_part, layout.rows_per_group]
    plan = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    parts = list(_cut(source, layout))
    finished = _resume(destination, parts, plan)
    to_do = [part for part in parts if part not in finished]
    rows_to_do = sum(part.stop - part.start for part in to_do)
    total = sum(images.values())

    writer = _PartWriter(destination, plan, layout.rows_per_group)
    with Progress(f"stage {source.spec}", total, "images", done=total - rows_to_do) as progress:
        try:
            if isinstance(source, ImageFileSource):
                _stage_on_cluster(source, writer, to_do, progress)
            else:
                _stage_here(source, writer, to_do, progress)
        except DamagedSourceError:
            # Else a run with the repaired source, which has the same fingerprint, would take these parts for finished.
            storage.delete_folder(storage.join(destination, RECORDS_FOLDER))
            raise
        rate = progress.rate

    _finish(source, origin, destination, parts)
    status = f"finished an interrupted run, {len(finished)} of {len(parts)} parts were there" if finished else "staged"
    return StagingResult(destination, manifest_uri, images, rows_to_do, rate, status)


def _check_same(manifest: Manifest, source: Source, origin: Origin, destination: str) -> None:
    """Checks that a destination holds, completely, what the source would be staged as.

    Raises:
        UserError: it does not; the line says what differs.
    """
    if manifest.origin.fingerprint == origin.fingerprint:
        check_files(destination, manifest)
        return
    compared = {
        "source": (manifest.origin.spec, source.spec),
        "parameters": (dict(manifest.origin.parameters), dict(origin.parameters)),
        "image shape": (manifest.image_shape, source.image_shape),
        "grey levels": (manifest.levels, source.levels),
        "images": ({s: manifest.rows(s) for s in SPLITS}, {s: source.rows(s) for s in SPLITS}),
    }
    differences = [f"{what} {there}, not {asked}" for what, (there, asked) in compared.items() if there != asked]
    raise UserError(
        f"{destination} holds different data ({'; '.join(differences) or 'the same source with other content'}); "
        "choose another destination, or replace it with --overwrite"
    )


def _cut(source: Source, layout: Layout) -> Iterator[_Part]:
    for split in SPLITS:
        rows = source.rows(split)
        for index, start in enumerate(range(0, rows, layout.rows_per_part)):
            yield _Part(split, index, start, min(start + layout.rows_per_part, rows))


def _resume(destination: str, parts: Sequence[_Part], plan: str) -> set[_Part]:
    """Returns the parts that an interrupted run with the same plan has finished; discards all other records."""
    sizes = storage.file_sizes(destination)
    candidates = [part for part in parts if part.record_path in sizes and part.path in sizes]

    def is_finished(part: _Part) -> bool:
        try:
            record = _read_record(destination, part)
        except (KeyError, TypeError, ValueError):
            return False
        return record.plan == plan and record.file.bytes == sizes[part.path]

    with ThreadPoolExecutor(RECORD_READERS) as pool:
        finished = {part for part, is_so in zip(candidates, pool.map(is_finished, candidates), strict=True) if is_so}
    kept = {part.record_path for part in finished}
    for path in sizes:
        if path.startswith(f"{RECORDS_FOLDER}/") and path not in kept:
            storage.delete_file(storage.join(destination, path))
    return finished


def _read_record(destination: str, part: _Part) -> _Record:
    uri = storage.join(destination, part.record_path)
    try:
        return _Record.from_json(storage.read_bytes(uri).decode())
    except FileNotFoundError:
        raise UserError(
            f"{uri} is gone, or lies on another machine; "
            "on a cluster of several machines stage to S3, and to one destination by one job at a time"
        ) from None


def _stage_here(source: Source, writer: _PartWriter, parts: Sequence[_Part], progress: Progress) -> None:
    """Reads parts one after the other, and encodes and writes them in other threads meanwhile."""
    writing: deque[tuple[_Part, Future[None]]] = deque()

    def wait_for_first() -> None:
        part, future = writing.popleft()
        future.result()
        progress.advance(part.stop - part.start)

    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        for part in parts:
            if len(writing) >= WRITER_THREADS:
                wait_for_first()
            writing.append((part, pool.submit(writer.write, part, source.read(part.split, part.start, part.stop))))
        while writing:
            wait_for_first()


def _stage_on_cluster(source: ImageFileSource, writer: _PartWriter, parts: Sequence[_Part], progress: Progress) -> None:
    """Decodes and writes parts in parallel, each in a Ray task that is sent the names of its files."""
    if not parts:
        return
    import ray.data

    # Progress is printed here; Ray Data's own bars and notes would only disturb it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    decoder = source.decoder

    def write_part(item: dict[str, Any]) -> dict[str, Any]:
        part = _Part(item["split"], item["index"], item["start"], item["stop"])
        try:
            writer.write(part, Rows(decoder(item["paths"]), np.array(item["labels"], dtype=np.int64)))
        except UserError as error:
            # As a value, because Ray wraps exceptions in its own and logs their traceback.
            return {"rows": 0, "error": str(error)}
        return {"rows": part.stop - part.start, "error": ""}

    items = []
    for part in parts:
        paths, labels = source.files(part.split, part.start, part.stop)
        items.append({**vars(part), "paths": list(paths), "labels": labels.tolist()})
    # One block an item makes one task a part.
    for result in ray.data.from_items(items, override_num_blocks=len(items)).map(write_part).iter_rows():
        if result["error"]:
            raise UserError(result["error"])
        progress.advance(result["rows"])


def _finish(source: Source, origin: Origin, destination: str, parts: Sequence[_Part]) -> None:
    """Writes the manifest from the parts' records, and removes everything else that staging left."""
    image_bytes = int(np.prod(source.image_shape))
    total = np.zeros(image_bytes, np.uint64)
    squares = np.zeros(image_bytes, np.uint64)
    files: dict[str, list[PartFile]] = {split: [] for split in SPLITS}
    with ThreadPoolExecutor(RECORD_READERS) as pool:
        for part, record in zip(parts, pool.map(lambda part: _read_record(destination, part), parts), strict=True):
            files[part.split].append(record.file)
            if part.split == "train":
                total += np.array(record.pixel_sum, np.uint64)
                squares += np.array(record.pixel_sum_of_squares, np.uint64)

    # Parts of an earlier, larger data set, and temporary files of a killed run.
    kept = {part.path for part in parts}
    for path in storage.file_sizes(destination):
        if _PART_FILE.fullmatch(path) and path not in kept:
            storage.delete_file(storage.join(destination, path))

    manifest = Manifest(
        name=destination.rpartition("/")[2],
        image_shape=source.image_shape,
        levels=source.levels,
        splits={split: tuple(files[split]) for split in SPLITS},
        pixel_sum=tuple(total.tolist()),
        pixel_sum_of_squares=tuple(squares.tolist()),
        class_names=source.class_names,
        origin=origin,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        software_version=_software_version(),
    )
    storage.write_bytes(storage.join(destination, MANIFEST_NAME), manifest.to_json().encode())
    storage.delete_folder(storage.join(destination, RECORDS_FOLDER))


def _software_version() -> str:
    # A submitted job runs from a copy of the repository, which is not an installed package.
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.exists():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return importlib.metadata.version("infusion")
