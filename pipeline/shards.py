"""Reading a staged data set: a contiguous range of rows into memory, or batches of it in random order.

A Parquet part is small, so it is fetched as a whole, once, and its SHA-256 digest is compared with the manifest's
before anything is taken from it; then only the row groups that are wanted are decoded.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import Manifest, PartFile, damaged_part

# Threads hide the latency of storage and share out hashing and decoding; each holds a part in memory.
READ_THREADS = 4

# Streaming shuffles within this many bytes of pixels.
SHUFFLE_BYTES = 64 << 20

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `stop` of one file."""

    file: PartFile
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def share(rows: int, rank: int, world_size: int) -> range:
    """Returns the rows that belong to worker `rank`: contiguous shares that differ by at most one row."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} workers")
    return range(rows * rank // world_size, rows * (rank + 1) // world_size)


def load_rows(dataset_uri: str, manifest: Manifest, split: str, start: int, stop: int) -> Tensor:
    """Reads rows `start` to `stop` of a split into memory.

    Every part that the range touches is fetched once, and its row groups outside of the range are not decoded. Beyond
    the result, memory holds no more than a few parts.

    Args:
        dataset_uri: the data set's folder.
        manifest: its manifest.
        split: name of the split.
        start: first row.
        stop: row after the last.

    Returns:
        uint8 grey levels, of shape (stop - start, C, H, W).

    Raises:
        UserError: a file is missing, or differs from what was staged.
    """
    return torch.from_numpy(_load_images(dataset_uri, manifest, list(_pieces(manifest, split, start, stop))))


def load_labels(dataset_uri: str, manifest: Manifest, split: str, start: int, stop: int) -> Tensor:
    """Reads the labels of rows `start` to `stop` of a split; see `load_rows`.

    Returns:
        int64 class numbers, of shape (stop - start,).

    Raises:
        UserError: a file is missing or differs from what was staged, or a row has no label.
    """
    pieces = list(_pieces(manifest, split, start, stop))
    labels = np.empty(sum(piece.rows for piece in pieces), np.int64)

    def copy(target: npt.NDArray[Any], column: pa.Array) -> None:
        if column.null_count:
            raise UserError(f"{dataset_uri}: images of the {split} split have no label; use a data set with labels")
        target[...] = column.to_numpy()

    _load(dataset_uri, pieces, "label", labels, copy)
    return torch.from_numpy(labels)


def stream_batches(
    dataset_uri: str, manifest: Manifest, split: str, start: int, stop: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Yields rows `start` to `stop` of a split as shuffled batches, without holding them all.

    The parts that the range touches are taken in random order, and as many of them as make up `SHUFFLE_BYTES` are
    shuffled together, while a thread reads the next ones. Every part is fetched once. The order is a function of the
    arguments alone. Every row comes once, but for the last, incomplete batch, which is dropped: there are
    `(stop - start) // batch_size` batches, which for shares that differ by a row need not be equally many.

    Args:
        dataset_uri: the data set's folder.
        manifest: its manifest.
        split: name of the split.
        start: first row.
        stop: row after the last.
        batch_size: rows of a batch.
        seed: determines the order.

    Yields:
        uint8 grey levels, of shape (batch_size, C, H, W).

    Raises:
        UserError: a file is missing, or differs from what was staged.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = list(_pieces(manifest, split, start, stop))
    order = torch.randperm(len(pieces), generator=generator).tolist()
    windows = _windows([pieces[i] for i in order], SHUFFLE_BYTES // manifest.image_bytes)

    def load(item: tuple[list[_Piece], int]) -> Tensor:
        window, room = item
        return torch.from_numpy(_load_images(dataset_uri, manifest, window, room))

    height, width, channels = manifest.image_shape
    left_over = torch.empty((0, channels, height, width), dtype=torch.uint8)
    for rows in _read_ahead(load, _with_room(windows, batch_size)):
        rows[: len(left_over)] = left_over
        shuffled = torch.randperm(len(rows), generator=generator)
        whole = len(rows) // batch_size * batch_size
        for first in range(0, whole, batch_size):
            yield rows[shuffled[first : first + batch_size]]
        left_over = rows[shuffled[whole:]]
        # Before another window is begun: there are never more than two, the one in use and the next.
        del rows


def _windows(pieces: Iterable[_Piece], most_rows: int) -> Iterator[list[_Piece]]:
    """Yields consecutive pieces, as many at a time as have at most `most_rows` rows together, but at least one."""
    window: list[_Piece] = []
    for piece in pieces:
        if window and sum(taken.rows for taken in window) + piece.rows > most_rows:
            yield window
            window = []
        window.append(piece)
    if window:
        yield window


def _with_room(windows: Iterable[list[_Piece]], batch_size: int) -> Iterator[tuple[list[_Piece], int]]:
    """Yields every window with the number of rows that earlier ones leave over, for which it has to have room."""
    room = 0
    for window in windows:
        yield window, room
        room = (room + sum(piece.rows for piece in window)) % batch_size


def _read_ahead(load: Callable[[_T], _U], items: Iterable[_T]) -> Iterator[_U]:
    """Yields `load(item)` for every item, while a thread is loading the next."""
    with ThreadPoolExecutor(1) as thread:
        # Nothing but the queue may refer to a result, so that its memory is free once the consumer lets go of it.
        loading: deque[Future[_U]] = deque()
        for item in items:
            loading.append(thread.submit(load, item))
            if len(loading) > 1:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


def _pieces(manifest: Manifest, split: str, start: int, stop: int) -> Iterator[_Piece]:
    """Yields what rows `start` to `stop` of a split are of its files, in order."""
    if not 0 <= start <= stop <= manifest.rows(split):
        raise ValueError(f"rows {start} to {stop} are not within the {manifest.rows(split)} of the {split} split")
    first = 0
    for file in manifest.splits[split]:
        low, high = max(start - first, 0), min(stop - first, file.rows)
        if low < high:
            yield _Piece(file, low, high)
        first += file.rows


def _load_images(
    dataset_uri: str, manifest: Manifest, pieces: Sequence[_Piece], room: int = 0
) -> npt.NDArray[np.uint8]:
    """Returns the images of pieces, one after the other, of shape (room + n, C, H, W), after `room` undefined ones."""
    height, width, channels = manifest.image_shape
    images = np.empty((room + sum(piece.rows for piece in pieces), channels, height, width), np.uint8)

    def copy(target: npt.NDArray[Any], column: pa.Array) -> None:
        # Arrow keeps values of fixed size back to back, so that no row is touched on its own.
        offset = column.offset * manifest.image_bytes
        pixels = np.frombuffer(column.buffers()[1], np.uint8, len(column) * manifest.image_bytes, offset)
        target[...] = pixels.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)

    _load(dataset_uri, pieces, "image", images[room:], copy)
    return images


def _load(
    dataset_uri: str,
    pieces: Sequence[_Piece],
    column: str,
    result: npt.NDArray[Any],
    copy: Callable[[npt.NDArray[Any], pa.Array], None],
) -> None:
    """Fills `result` with a column of the pieces' rows, several pieces at a time."""
    ends = np.cumsum([piece.rows for piece in pieces])

    def load(piece: _Piece, end: int) -> None:
        target = result[end - piece.rows : end]
        for rows, values in _read_column(dataset_uri, piece, column):
            copy(target[rows], values)

    with ThreadPoolExecutor(min(READ_THREADS, os.cpu_count() or 1)) as pool:
        # Going through the results raises what a thread raised.
        for _ in pool.map(load, pieces, ends):
            pass


def _read_column(dataset_uri: str, piece: _Piece, column: str) -> Iterator[tuple[slice, pa.Array]]:
    """Yields a column of a piece's rows as arrays, each with the place it takes among these rows."""
    parquet = pq.ParquetFile(pa.BufferReader(_fetch(dataset_uri, piece.file)))
    first = 0
    for index, rows in enumerate(piece.file.row_groups):
        low, high = max(piece.start - first, 0), min(piece.stop - first, rows)
        if low < high:
            group = parquet.read_row_group(index, columns=[column], use_threads=False)[column].slice(low, high - low)
            position = first + low - piece.start
            for chunk in group.chunks:
                yield slice(position, position + len(chunk)), chunk
                position += len(chunk)
        first += rows


def _fetch(dataset_uri: str, file: PartFile) -> bytes:
    """Returns a part's bytes after comparing them with the manifest."""
    try:
        content = storage.read_bytes(storage.join(dataset_uri, file.path))
    except FileNotFoundError:
        raise UserError(damaged_part(dataset_uri, file, "is missing")) from None
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        wrong = f"is not the file that was staged (SHA-256 {found}, in the manifest {file.sha256})"
        raise UserError(damaged_part(dataset_uri, file, wrong))
    return content
