import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import SPLITS, Manifest
from pipeline.sources import ArraySource, Rows, SourceOptions, open_source
from pipeline.staging import PART_BYTES, Layout, pixel_sums, stage

SMALL = Layout(rows_per_part=50, rows_per_group=16)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_source(train: int = 230, valid: int = 60, test: int = 50, *, seed: int = 0) -> ArraySource:
    splits = {}
    for number, (split, rows) in enumerate(zip(SPLITS, (train, valid, test), strict=True)):
        labels = np.arange(rows, dtype=np.int64) % 4 - 1  # some have none
        splits[split] = Rows(random_images(rows, 5, 4, 3, seed=10 * seed + number), labels)
    return ArraySource("random", splits, class_names="abc")


def contents(destination: str) -> Mapping[str, bytes]:
    return {path: storage.read_bytes(storage.join(destination, path)) for path in storage.file_sizes(destination)}


def without_date(files: Mapping[str, bytes]) -> Mapping[str, object]:
    manifest = json.loads(files["manifest.json"])
    del manifest["created"]
    return {**files, "manifest.json": manifest}


def test_parquet_holds_the_pixels_byte_for_byte(tmp_path: Path) -> None:
    source = random_source()
    result = stage(source, str(tmp_path / "random"), layout=SMALL)
    assert result.images == {"train": 230, "valid": 60, "test": 50}
    assert result.images_staged == 340
    for split in SPLITS:
        images, labels = source.read(split, 0, source.rows(split))
        files = sorted((tmp_path / "random" / split).iterdir())
        assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(-(-len(images) // 50))]
        table = pq.read_table(files)
        assert str(table.schema.field("image").type) == "fixed_size_binary[60]"
        assert str(table.schema.field("label").type) == "int64"
        assert table["image"].to_pylist() == [image.tobytes() for image in images]
        assert table["label"].to_pylist() == [None if label < 0 else label for label in labels.tolist()]


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    source = random_source()
    result = stage(source, str(tmp_path / "random"), layout=SMALL)
    assert result.manifest == str(tmp_path / "random" / "manifest.json")
    manifest = Manifest.load(result.dataset)
    assert manifest.name == "random"
    assert manifest.image_shape == (5, 4, 3)
    assert manifest.levels == 256
    assert manifest.class_names == ("a", "b", "c")
    assert manifest.origin == source.origin()

    images = source.read("train", 0, 230).images.astype(np.int64).reshape(230, -1)
    assert list(manifest.pixel_sum) == images.sum(0).tolist()
    assert list(manifest.pixel_sum_of_squares) == (images**2).sum(0).tolist()

    found = set()
    for split in SPLITS:
        assert manifest.rows(split) == source.rows(split)
        for file in manifest.splits[split]:
            path = tmp_path / "random" / file.path
            found.add(path)
            metadata = pq.ParquetFile(path).metadata
            assert file.row_groups == tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            assert file.rows == metadata.num_rows
            assert file.bytes == path.stat().st_size
            assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert metadata.row_group(0).column(0).compression == "ZSTD"
            assert not metadata.row_group(0).column(0).has_dictionary_page
    assert found == set((tmp_path / "random").glob("**/*.parquet"))
    assert not (tmp_path / "random" / "_staging").exists()


@pytest.mark.parametrize("rows", [1, 1024, 1025, 70_000])
def test_pixel_sums_are_exact(rows: int) -> None:
    images = np.full((rows, 1, 2, 1), 255, np.uint8)
    total, squares = pixel_sums(images)
    assert total.tolist() == [255 * rows] * 2
    assert squares.tolist() == [255 * 255 * rows] * 2


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 64, 3), (512, 512, 3), (2048, 2048, 3)])
@pytest.mark.parametrize("train", [1, 9, 1297, 50_000])
def test_layout_is_of_bounded_parts_and_of_enough_row_groups(shape: tuple[int, int, int], train: int) -> None:
    class Shape:
        image_shape = shape

        def rows(self, split: str) -> int:
            return train

    layout = Layout.for_source(Shape())  # type: ignore[arg-type]
    image_bytes = int(np.prod(shape))
    assert layout.rows_per_group <= 1024
    assert layout.rows_per_part % layout.rows_per_group == 0
    assert layout.rows_per_part * image_bytes <= max(PART_BYTES, image_bytes)
    assert train // layout.rows_per_group >= min(8, train)


def test_staging_again_does_nothing(tmp_path: Path) -> None:
    destination = str(tmp_path / "random")
    stage(random_source(), destination, layout=SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")}
    result = stage(random_source(), destination, layout=SMALL)
    assert result.images_staged == 0
    assert "nothing to do" in result.status
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")} == before


def test_staging_again_notices_that_a_file_is_gone(tmp_path: Path) -> None:
    destination = str(tmp_path / "random")
    stage(random_source(), destination, layout=SMALL)
    (tmp_path / "random" / "train" / "part-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"train/part-00002\.parquet is missing; .*--overwrite"):
        stage(random_source(), destination, layout=SMALL)
    assert stage(random_source(), destination, layout=SMALL, overwrite=True).images_staged == 340


def test_a_destination_with_other_data_is_refused_unless_overwritten(tmp_path: Path) -> None:
    destination = str(tmp_path / "random")
    stage(random_source(), destination, layout=SMALL)
    before = contents(destination)
    with pytest.raises(UserError, match=r"holds different data \(images .*230.*, not .*100.*--overwrite"):
        stage(random_source(train=100), destination, layout=SMALL)
    with pytest.raises(UserError, match=r"holds different data \(the same source with other content\)"):
        stage(random_source(seed=1), destination, layout=SMALL)
    with pytest.raises(UserError, match=r"source random, not digits; .*grey levels 256, not 17"):
        stage(open_source("digits"), destination)
    assert contents(destination) == before

    stage(random_source(train=100, seed=1), destination, layout=SMALL, overwrite=True)
    stage(random_source(train=100, seed=1), str(tmp_path / "fresh" / "random"), layout=SMALL)
    assert without_date(contents(destination)) == without_date(contents(str(tmp_path / "fresh" / "random")))


class InterruptionError(Exception):
    pass


class InterruptedSource(ArraySource):
    """Fails when row 150 of the training split is asked for."""

    def __init__(self, source: ArraySource) -> None:
        super().__init__("random", {split: source.read(split, 0, source.rows(split)) for split in SPLITS})
        self.class_names = source.class_names

    def read(self, split: str, start: int, stop: int) -> Rows:
        if split == "train" and start >= 150:
            raise InterruptionError
        return super().read(split, start, stop)


def test_what_an_interrupted_run_left_is_finished_and_not_made_again(tmp_path: Path) -> None:
    destination = tmp_path / "random"
    with pytest.raises(InterruptionError):
        stage(InterruptedSource(random_source()), str(destination), layout=SMALL)
    with pytest.raises(UserError, match="not a staged data set"):
        Manifest.load(str(destination))
    before = {path: path.stat().st_mtime_ns for path in destination.glob("*/*.parquet")}
    assert len(before) == 3
    (destination / "train" / ".part-00003.parquet.0123abcd").write_bytes(b"half a part")

    result = stage(random_source(), str(destination), layout=SMALL)
    assert result.images_staged == 340 - 150
    assert result.status.startswith("finished an interrupted run, 3 of")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    stage(random_source(), str(tmp_path / "fresh" / "random"), layout=SMALL)
    assert without_date(contents(str(destination))) == without_date(contents(str(tmp_path / "fresh" / "random")))


@pytest.mark.parametrize("damage", ["truncated part", "missing part", "damaged record", "other record"])
def test_unfit_leftovers_are_made_again(tmp_path: Path, damage: str) -> None:
    destination = tmp_path / "random"
    with pytest.raises(InterruptionError):
        stage(InterruptedSource(random_source()), str(destination), layout=SMALL)
    part = destination / "train" / "part-00001.parquet"
    record = destination / "_staging" / "train-00001.json"
    if damage == "truncated part":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "missing part":
        part.unlink()
    elif damage == "damaged record":
        record.write_text(record.read_text()[:50])
    else:
        record.write_text(record.read_text().replace('"plan": "', '"plan": "0'))
    assert stage(random_source(), str(destination), layout=SMALL).images_staged == 340 - 100
    stage(random_source(), str(tmp_path / "fresh" / "random"), layout=SMALL)
    assert without_date(contents(str(destination))) == without_date(contents(str(tmp_path / "fresh" / "random")))


@pytest.mark.parametrize(
    ("source", "layout"),
    [(random_source(seed=1), SMALL), (random_source(), replace(SMALL, rows_per_group=8))],
    ids=["other data", "other layout"],
)
def test_leftovers_of_another_run_are_discarded(tmp_path: Path, source: ArraySource, layout: Layout) -> None:
    destination = str(tmp_path / "random")
    with pytest.raises(InterruptionError):
        stage(InterruptedSource(random_source()), destination, layout=SMALL)
    assert stage(source, destination, layout=layout).images_staged == 340
    stage(source, str(tmp_path / "fresh" / "random"), layout=layout)
    assert without_date(contents(destination)) == without_date(contents(str(tmp_path / "fresh" / "random")))


def test_other_files_at_the_destination_are_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "random" / "train" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    stage(random_source(), str(tmp_path / "random"), layout=SMALL)
    assert notes.read_text() == "mine"


def test_parts_of_a_source_that_proves_damaged_are_not_taken_for_finished(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, train_images=random_images(10_000, 16, 16), test_images=random_images(50, 16, 16))
    intact = path.read_bytes()
    path.write_bytes(intact[:5000] + bytes([intact[5000] ^ 1]) + intact[5001:])
    layout = Layout(rows_per_part=1000, rows_per_group=500)
    with pytest.raises(UserError, match="train_images: Bad CRC-32"):
        stage(open_source(f"npz:{path}"), str(tmp_path / "data"), layout=layout)
    path.write_bytes(intact)
    assert stage(open_source(f"npz:{path}"), str(tmp_path / "data"), layout=layout).images_staged == 10_050


@pytest.fixture(scope="module")
def large_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine parts."""
    path = tmp_path_factory.mktemp("npz") / "large.npz"
    np.savez(path, train_images=random_images(80_000, 28, 28), test_images=random_images(500, 28, 28))
    return path


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_killed_job_is_finished_by_the_next(
    where: str, tmp_path: Path, large_npz: Path, request: pytest.FixtureRequest
) -> None:
    base = str(tmp_path) if where == "folder" else request.getfixturevalue("bucket_uri")
    destination = storage.join(base, "large")
    command = [sys.executable, "-m", "jobs.stage", f"npz:{large_npz}", destination]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while not any(map(is_record, storage.file_sizes(destination))):
            assert job.poll() is None
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
    left = storage.file_sizes(destination)
    assert "manifest.json" not in left
    with pytest.raises(UserError, match="not a staged data set"):
        Manifest.load(destination)
    finished = [
        json.loads(storage.read_bytes(storage.join(destination, path)))["file"]["path"]
        for path in left
        if is_record(path)
    ]
    before = modification_times(destination, finished)

    result = stage(open_source(f"npz:{large_npz}"), destination)
    assert 0 < result.images_staged < 80_500
    assert modification_times(destination, finished) == before
    fresh = str(tmp_path / "fresh" / "large")
    stage(open_source(f"npz:{large_npz}"), fresh)
    assert without_date(contents(destination)) == without_date(contents(fresh))


def is_record(path: str) -> bool:
    """Whether a file says that a part is finished, and is not itself still being written under a hidden name."""
    return path.startswith("_staging/") and not path.rpartition("/")[2].startswith(".")


def modification_times(destination: str, paths: list[str]) -> dict[str, int]:
    filesystem, base = storage.open_filesystem(destination)
    infos = filesystem.get_file_info([f"{base}/{path}" for path in paths])
    return {info.path: info.mtime_ns for info in infos}


MEASURED_JOB = """
import re, resource, sys
from pathlib import Path
from jobs.stage import main
status = main(sys.argv[1:])
process = Path("/proc/self/status")
# Linux: not ru_maxrss, which a child inherits from the process that started it.
peak = int(re.search(r"VmHWM:\\s*(\\d+)", process.read_text())[1]) if process.exists() else 0
print("peak", peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(status)
"""


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    peaks = []
    pattern = random_images(1_000, 28, 28)
    for times in (60, 600):
        path = tmp_path / f"{times}.npz"
        # Mostly empty, so that compressing it takes no time.
        images = np.zeros((times * 1_000, 28, 28), np.uint8)
        images[:1_000] = pattern
        np.savez_compressed(path, train_images=images, test_images=pattern)
        command = [sys.executable, "-c", MEASURED_JOB, f"npz:{path}", str(tmp_path / "out" / str(times))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(int(output.rpartition("peak ")[2]) / 1024)
        path.unlink()
    # The larger data set has 470 MB of pixels; allocators keep more or less of what was freed.
    assert peaks[1] - peaks[0] < 100, f"peak memory {peaks} MiB"


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for i in range(90):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(20, 24, 3, seed=i)).save(path)
    return folder


def test_image_files_are_decoded_on_the_cluster(ray_cluster, bucket_uri: str, picture_folder: Path) -> None:
    source = open_source(f"folder:{picture_folder}", SourceOptions(size=16))
    destination = storage.join(bucket_uri, "pictures")
    layout = Layout(rows_per_part=25, rows_per_group=10)
    result = stage(source, destination, layout=layout)
    assert result.images == {"train": 73, "valid": 8, "test": 9}
    manifest = Manifest.load(destination)
    assert manifest.image_shape == (16, 16, 3)
    assert manifest.class_names == ("a", "b")
    for split in SPLITS:
        images, labels = source.read(split, 0, source.rows(split))
        rows = []
        for file in manifest.splits[split]:
            filesystem, path = storage.open_filesystem(storage.join(destination, file.path))
            rows += pq.read_table(path, filesystem=filesystem).to_pylist()
        assert [row["image"] for row in rows] == [image.tobytes() for image in images]
        assert [row["label"] for row in rows] == labels.tolist()
    assert list(manifest.pixel_sum) == source.read("train", 0, 73).images.sum(0, dtype=np.int64).ravel().tolist()
    assert stage(source, destination, layout=layout).images_staged == 0


def test_parts_can_be_written_to_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = stage(random_source(), "data/random", layout=SMALL)
    assert result.dataset == str(tmp_path / "data" / "random")
    assert Manifest.load("data/random").name == "random"


def test_a_destination_that_cannot_be_written_gives_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("in the way")
        destination = str(tmp_path / "file" / "random")
    else:
        tmp_path.chmod(0o500)
        destination = str(tmp_path / "random")
    with pytest.raises(UserError, match="cannot"):
        stage(random_source(), destination, layout=SMALL)
