import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.manifest import SPLITS, Manifest, Origin, PartFile, check_files


def a_manifest() -> Manifest:
    return Manifest(
        name="tiny",
        image_shape=(1, 2, 3),
        levels=256,
        splits={split: (PartFile(f"{split}/part-00000.parquet", 5, (3, 2), 7, "ab" * 32),) for split in SPLITS},
        pixel_sum=(1, 2, 3, 4, 5, 2**60),
        pixel_sum_of_squares=(1, 4, 9, 16, 25, 2**62),
        class_names=("cat", "dog"),
        origin=Origin("npz:/data/tiny.npz", {"valid_fraction": 0.1}, "cd" * 32),
        created="2026-01-02T03:04:05+00:00",
        software_version="0.1.0",
    )


def write(folder: Path, text: str) -> str:
    (folder / "manifest.json").write_text(text)
    return str(folder)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert Manifest.load(write(tmp_path, a_manifest().to_json())) == a_manifest()


def test_the_json_holds_the_contract_fields() -> None:
    fields = json.loads(a_manifest().to_json())
    assert fields["format_version"] == 1
    assert fields["image_shape"] == [1, 2, 3]
    assert fields["splits"]["train"]["rows"] == 5
    file = {"path": "valid/part-00000.parquet", "rows": 5, "row_groups": [3, 2], "bytes": 7, "sha256": "ab" * 32}
    assert fields["splits"]["valid"]["files"] == [file]
    assert fields["source"]["spec"] == "npz:/data/tiny.npz"


def test_rows_are_those_of_all_files() -> None:
    assert a_manifest().rows("train") == 5
    assert a_manifest().image_bytes == 6


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a staged data set: there is no manifest\.json; .*python -m jobs\.stage"):
        Manifest.load(str(tmp_path))


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    text = a_manifest().to_json().replace('"format_version": 1', '"format_version": 2')
    with pytest.raises(UserError, match="format is version 2, this software reads version 1"):
        Manifest.load(write(tmp_path, text))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"levels"', '"grays"'),
        lambda text: text.replace('"row_groups": [3, 2]', '"row_groups": [3, 3]'),
        lambda text: text.replace('"image_shape": [1, 2, 3]', '"image_shape": [1, 2, 4]'),
        lambda text: text.replace('"image_shape": [1, 2, 3]', '"image_shape": [6]'),
        lambda text: text.replace('"valid": {', '"validation": {'),
    ],
)
def test_a_damaged_manifest_gives_one_line(tmp_path: Path, damage) -> None:
    write(tmp_path, damage(a_manifest().to_json()))
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest .*--overwrite") as caught:
        Manifest.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_must_be_there_in_full_size(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "part-00000.parquet").write_bytes(b"1234567")
    check_files(str(tmp_path), a_manifest())

    (tmp_path / "valid" / "part-00000.parquet").write_bytes(b"123456")
    with pytest.raises(UserError, match=r"valid/part-00000\.parquet has 6 bytes, the manifest says 7"):
        check_files(str(tmp_path), a_manifest())

    (tmp_path / "valid" / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"valid/part-00000\.parquet is missing; .*--overwrite"):
        check_files(str(tmp_path), a_manifest())
