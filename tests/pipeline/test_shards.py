import hashlib
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline import shards, storage
from pipeline.errors import UserError
from pipeline.manifest import SPLITS, Manifest
from pipeline.shards import load_labels, load_rows, share, stream_batches
from pipeline.sources import ArraySource, Rows
from pipeline.staging import Layout, stage

ROWS = 1_003
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(ROWS) % 7
LAYOUT = Layout(rows_per_part=96, rows_per_group=32)


def stage_images(destination: str) -> Manifest:
    rows = {split: Rows(IMAGES, LABELS) for split in SPLITS}
    rows["test"] = Rows(IMAGES[:10], np.full(10, -1))
    stage(ArraySource("random", rows), destination, layout=LAYOUT)
    return Manifest.load(destination)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    uri = str(tmp_path_factory.mktemp("shards") / "random")
    return uri, stage_images(uri)


def expected(start: int, stop: int) -> Tensor:
    return torch.from_numpy(IMAGES[start:stop]).permute(0, 3, 1, 2)


# --- contiguous rows


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, ROWS),
        (0, 1),
        (ROWS - 1, ROWS),
        (0, 0),
        (ROWS, ROWS),
        (31, 33),
        (32, 64),
        (95, 97),
        (10, 20),
        (96, 960),
        (50, 777),
    ],
)
def test_rows_are_the_staged_pixels(dataset: tuple[str, Manifest], start: int, stop: int) -> None:
    rows = load_rows(*dataset, "train", start, stop)
    assert rows.dtype == torch.uint8
    assert rows.shape == (stop - start, 3, 6, 5)
    assert rows.is_contiguous()
    assert torch.equal(rows, expected(start, stop))
    labels = load_labels(*dataset, "train", start, stop)
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS[start:stop].tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, ROWS + 1)])
def test_rows_that_do_not_exist(dataset: tuple[str, Manifest], start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="are not within the 1003 of the train split"):
        load_rows(*dataset, "train", start, stop)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    grey = ArraySource("grey", {split: Rows(IMAGES[:40, :, :, :1], LABELS[:40]) for split in SPLITS})
    stage(grey, str(tmp_path / "grey"), layout=LAYOUT)
    rows = load_rows(str(tmp_path / "grey"), Manifest.load(str(tmp_path / "grey")), "valid", 3, 37)
    assert torch.equal(rows, expected(3, 37)[:, :1])


def test_only_what_is_needed_is_read_and_only_once(
    dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    decoded: list[int] = []
    read_bytes, read_row_group = storage.read_bytes, pq.ParquetFile.read_row_group
    monkeypatch.setattr(storage, "read_bytes", lambda uri: fetched.append(uri[-13:-8]) or read_bytes(uri))
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, index, **options: decoded.append(index) or read_row_group(self, index, **options),
    )
    load_rows(*dataset, "train", 96 + 40, 2 * 96 + 20)
    assert sorted(fetched) == ["00001", "00002"]
    # The second and third group of part 1, the first of part 2.
    assert sorted(decoded) == [0, 1, 2]


def test_rows_come_from_s3_too(bucket_uri: str) -> None:
    uri = storage.join(bucket_uri, "random")
    manifest = stage_images(uri)
    assert torch.equal(load_rows(uri, manifest, "train", 50, 777), expected(50, 777))
    assert sum(len(batch) for batch in stream_batches(uri, manifest, "train", 0, ROWS, 100, seed=1)) == 1_000


def test_images_without_labels_have_none_to_read(dataset: tuple[str, Manifest]) -> None:
    with pytest.raises(UserError, match="images of the test split have no label"):
        load_labels(*dataset, "test", 0, 10)


# --- shares


@pytest.mark.parametrize("rows", [0, 1, 7, 1_003, 50_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_shares_cover_all_rows_once_and_are_even(rows: int, world_size: int) -> None:
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    assert [row for part in shares for row in part] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_must_exist() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2 workers"):
        share(10, 2, 2)


# --- streaming


def numbers(batches: list[Tensor]) -> list[int]:
    """The row numbers of streamed images; all images differ."""
    rows = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    return [rows[image.permute(1, 2, 0).numpy().tobytes()] for batch in batches for image in batch]


@pytest.mark.parametrize("shuffle_bytes", [1, 90 * 200, 1 << 20], ids=["a part", "two parts", "all"])
@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (40, 700)])
@pytest.mark.parametrize("batch_size", [1, 64, 150])
def test_streaming_gives_each_row_once(
    dataset: tuple[str, Manifest],
    monkeypatch: pytest.MonkeyPatch,
    shuffle_bytes: int,
    start: int,
    stop: int,
    batch_size: int,
) -> None:
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", shuffle_bytes)
    batches = list(stream_batches(*dataset, "train", start, stop, batch_size, seed=3))
    assert {tuple(batch.shape) for batch in batches} == {(batch_size, 3, 6, 5)}
    assert len(batches) == (stop - start) // batch_size
    found = numbers(batches)
    assert max(Counter(found).values()) == 1
    assert set(found) <= set(range(start, stop))
    assert found != sorted(found)


def test_streaming_order_is_the_seeds(dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 90 * 200)
    once, again, other = (
        numbers(list(stream_batches(*dataset, "train", 0, ROWS, 50, seed=seed))) for seed in (5, 5, 6)
    )
    assert once == again
    assert once != other
    # The parts of the first window are the seed's as well, and neighbours in a part do not stay neighbours.
    assert {row // 96 for row in once[:150]} != {row // 96 for row in other[:150]}
    assert np.mean(np.diff(once) == 1) < 0.05


def test_streaming_fetches_a_part_once(dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: Counter[str] = Counter()
    read_bytes = storage.read_bytes

    def count(uri: str) -> bytes:
        fetched[uri] += 1
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", count)
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 90 * 200)
    list(stream_batches(*dataset, "train", 0, ROWS, 50, seed=5))
    assert len(fetched) == 11
    assert set(fetched.values()) == {1}


def test_streaming_reads_one_window_ahead_and_no_more(
    dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int] = []
    third = threading.Event()
    load_images = shards._load_images

    def count(uri: str, manifest: Manifest, pieces: list, room: int) -> np.ndarray:
        windows.append(sum(piece.rows for piece in pieces))
        if len(windows) == 3:
            third.set()
        return load_images(uri, manifest, pieces, room)

    monkeypatch.setattr(shards, "_load_images", count)
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 90 * 200)
    stream = stream_batches(*dataset, "train", 0, ROWS, 10, seed=5)
    next(stream)
    assert not third.wait(0.5)
    assert max(windows) <= 200
    for _ in range(windows[0] // 10):
        next(stream)
    assert third.wait(10)
    stream.close()


def test_streaming_holds_the_window_in_use_and_the_next(
    dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []
    load_images = shards._load_images

    def count(uri: str, manifest: Manifest, pieces: list, room: int) -> np.ndarray:
        held.append(sum(window() is not None for window in windows))
        images = load_images(uri, manifest, pieces, room)
        windows.append(weakref.ref(images))
        return images

    monkeypatch.setattr(shards, "_load_images", count)
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 90 * 200)
    for _ in stream_batches(*dataset, "train", 0, ROWS, 50, seed=5):
        pass
    assert len(held) == 6
    assert max(held) == 1


# --- damage


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "random")
    manifest = stage_images(uri)
    path = tmp_path / "random" / "train" / "part-00004.parquet"
    intact = path.read_bytes()
    damaged = intact[:1000] + bytes([intact[1000] ^ 1]) + intact[1001:]
    path.write_bytes(damaged)
    digests = f"SHA-256 {hashlib.sha256(damaged).hexdigest()}, in the manifest {hashlib.sha256(intact).hexdigest()}"
    message = rf"train/part-00004\.parquet is not the file that was staged \({digests}\); .*--overwrite"
    with pytest.raises(UserError, match=message):
        load_rows(uri, manifest, "train", 0, ROWS)
    with pytest.raises(UserError, match=message):
        list(stream_batches(uri, manifest, "train", 0, ROWS, 50, seed=1))
    # What lies in other parts can be read.
    assert torch.equal(load_rows(uri, manifest, "train", 0, 96), expected(0, 96))

    path.write_bytes(intact[:-8])
    with pytest.raises(UserError, match="is not the file that was staged"):
        load_rows(uri, manifest, "train", 0, ROWS)

    path.unlink()
    with pytest.raises(UserError, match=r"train/part-00004\.parquet is missing; .*--overwrite") as caught:
        load_rows(uri, manifest, "train", 0, ROWS)
    assert "\n" not in str(caught.value)
