"""Which pixels are known, and completions of staged images by a registered model."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.errors import UserError
from pipeline.inpainting import inpaint_images, read_mask
from pipeline.manifest import Manifest
from pipeline.registry import RegisteredModel
from pipeline.shards import load_rows


@pytest.mark.parametrize(
    ("known", "rows"),
    [
        ("top", ["###", "...", "..."]),
        ("bottom", ["...", "###", "###"]),
        ("left", ["#..", "#..", "#.."]),
        ("right", [".##", ".##", ".##"]),
        ("1:3,0:2", ["...", "##.", "##."]),
    ],
)
def test_masks_by_name(known: str, rows: list[str]) -> None:
    expected = torch.tensor([[pixel == "#" for pixel in row] for row in rows])
    assert torch.equal(read_mask(known, 3, 3), expected)


def test_mask_from_a_picture(tmp_path: Path) -> None:
    mask = np.array([[True, False, True], [False, False, True]])
    file = tmp_path / "mask.png"
    Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").save(file)
    assert read_mask(str(file), 2, 3).numpy().tolist() == mask.tolist()
    with pytest.raises(UserError, match=r"mask.png has 2 × 3 pixels, but the images have 3 × 2"):
        read_mask(str(file), 3, 2)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("middle", "'middle' is neither one of top, bottom, left, right, nor a rectangle"),
        ("2:2,0:3", "empty or leaves the images, which have 4 × 6 pixels"),
        ("0:5,0:3", "empty or leaves"),
        ("0:4,0:7", "empty or leaves"),
        ("/nowhere/mask.png", "/nowhere/mask.png"),
    ],
)
def test_masks_that_are_refused(known: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_mask(known, 4, 6)


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"mask.png: not a picture"):
        read_mask(str(tmp_path / "mask.png"), 4, 6)


def test_known_grey_levels_come_back_and_the_rest_is_completed(
    client_env: Mapping[str, str], registered_digits: RegisteredModel, digits: tuple[str, Manifest], bucket_uri: str
) -> None:
    address, manifest = digits
    result = inpaint_images(
        registered_digits.uri, address, bucket_uri, known="left", num_images=6, num_completions=3, seed=1
    )
    assert (result.images, result.completions, result.known) == (6, 3, 0.5)
    table = pq.read_table(io.BytesIO(storage.read_bytes(result.table))).to_pydict()
    assert table["image"] == [i for i in range(6) for _ in range(3)]
    assert table["completion"] == [0, 1, 2] * 6
    pixels = torch.tensor(table["pixels"], dtype=torch.uint8).view(6, 3, 8, 8)
    originals = load_rows(address, manifest, "test", 0, 6)
    assert torch.equal(pixels[..., :4], originals.expand(6, 3, 8, 8)[..., :4])
    assert not torch.equal(pixels[:, 0, :, 4:], pixels[:, 1, :, 4:])
    assert Image.open(io.BytesIO(storage.read_bytes(result.picture))).size == (2 + 5 * 58, 16 + 2 + 6 * 58)


def test_more_images_than_there_are_are_refused(
    client_env: Mapping[str, str], registered_digits: RegisteredModel, digits: tuple[str, Manifest], bucket_uri: str
) -> None:
    with pytest.raises(UserError, match="num_images must be from 1 to the 250 images"):
        inpaint_images(registered_digits.uri, digits[0], bucket_uri, num_images=251)
