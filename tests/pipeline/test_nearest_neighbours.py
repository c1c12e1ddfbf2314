"""Nearest neighbours against a search by brute force in whole numbers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pipeline import bound_evaluation
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.nearest_neighbours import nearest_neighbours
from pipeline.sources import ArraySource, Rows
from pipeline.staging import Layout, stage

ROWS = 1_103
IMAGES = np.random.default_rng(1).integers(0, 256, (ROWS, 4, 3, 2), dtype=np.uint8)
# Equally near images in the same chunk, in the next one and in the last.
IMAGES[[7, 13, 300, 1_102]] = IMAGES[5]

Data = tuple[str, Manifest]


def staged(folder: Path, images: npt.NDArray[np.uint8], levels: int = 256) -> Data:
    rows = Rows(images, np.full(len(images), -1))
    uri = str(folder / "data")
    source = ArraySource(
        "some", {"train": rows, "valid": rows, "test": Rows(images[:3], rows.labels[:3])}, levels=levels
    )
    stage(source, uri, layout=Layout(rows_per_part=192, rows_per_group=64))
    return uri, Manifest.load(uri)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return staged(tmp_path_factory.mktemp("neighbours"), IMAGES)


@pytest.fixture(autouse=True)
def several_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks are read at a time: the 1,103 images take three reads."""
    monkeypatch.setattr(bound_evaluation, "READ_BYTES", 2 * bound_evaluation.CHUNK_IMAGES * 24)


def as_samples(grey: npt.NDArray[np.uint8], levels: int = 256) -> Tensor:
    return (torch.from_numpy(grey).permute(0, 3, 1, 2).double() + 0.5) / levels


def brute_force(
    grey: npt.NDArray[np.uint8], images: npt.NDArray[np.uint8], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the rows of the nearest images, and squared distances in grey levels."""
    difference = grey[:, None].astype(np.int64) - images[None].astype(np.int64)
    squares = (difference**2).sum((2, 3, 4))
    rows = np.argsort(squares, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(squares, rows, 1)


@pytest.mark.parametrize("count", [1, 4, 300])
def test_they_are_those_of_brute_force(data: Data, count: int) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (9, 4, 3, 2), dtype=np.uint8)
    grey[3] = IMAGES[700]
    found = nearest_neighbours(as_samples(grey), *data, count=count)
    rows, squares = brute_force(grey, IMAGES, count)
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_allclose(found.distances.numpy(), np.sqrt(squares) / 256, rtol=1e-14)
    assert found.distances[3, 0] == 0
    assert np.array_equal(found.images.numpy(), IMAGES[rows].transpose(0, 1, 4, 2, 3))


def test_of_equally_near_images_the_lowest_row_comes_first(data: Data) -> None:
    found = nearest_neighbours(as_samples(IMAGES[5:6]), *data, count=6)
    assert found.rows[0, :5].tolist() == [5, 7, 13, 300, 1_102]
    assert found.distances[0, :5].tolist() == [0] * 5
    assert found.distances[0, 5] > 0


def test_images_that_differ_by_one_grey_level_in_one_pixel_are_told_apart(tmp_path: Path) -> None:
    white = np.full((260, 64, 64, 3), 255, np.uint8)
    # Row i differs from white by one level in i + 1 pixels, but for rows 129 and 255, which differ in one and none.
    flat = white.reshape(260, -1)
    for row in range(260):
        flat[row, : row + 1] = 254
    flat[129], flat[255] = 255, 255
    flat[129, -1] = 254
    data = staged(tmp_path, white)
    found = nearest_neighbours(as_samples(np.full((1, 64, 64, 3), 255, np.uint8)), *data, count=4)
    assert found.rows.tolist() == [[255, 0, 129, 1]]
    np.testing.assert_allclose(found.distances[0].numpy() * 256, np.sqrt([0, 1, 1, 2]), rtol=1e-14)


def test_samples_are_taken_for_the_grey_levels_that_they_show(tmp_path: Path) -> None:
    grey = np.random.default_rng(3).integers(0, 17, (40, 4, 3, 2), dtype=np.uint8)
    data = staged(tmp_path, grey, levels=17)
    generator = torch.Generator().manual_seed(0)
    shift = torch.rand(40, 2, 4, 3, generator=generator, dtype=torch.float64) * 0.98 - 0.49
    found = nearest_neighbours(as_samples(grey, 17) + shift / 17, *data)
    assert found.rows[:, 0].tolist() == list(range(40))
    assert not found.distances.any()
    bright = nearest_neighbours(torch.full((1, 2, 4, 3), 7.0), *data)
    rows, squares = brute_force(np.full((1, 4, 3, 2), 16, np.uint8), grey, 1)
    assert bright.rows.tolist() == rows.tolist()
    assert bright.distances.item() == pytest.approx(np.sqrt(squares.item()) / 17)


def test_another_split(data: Data) -> None:
    found = nearest_neighbours(as_samples(IMAGES[300:301]), *data, split="test", count=3)
    rows, _ = brute_force(IMAGES[300:301], IMAGES[:3], 3)
    assert found.rows.tolist() == rows.tolist()


def test_what_cannot_be_searched(data: Data) -> None:
    with pytest.raises(UserError, match=r"shape \(2, 4, 3\) .* samples are of shape \(1, 8, 8\)"):
        nearest_neighbours(torch.zeros(1, 1, 8, 8), *data)
    for count in (0, 4):
        with pytest.raises(UserError, match=r"from 1 to the 3 images of .* test split"):
            nearest_neighbours(torch.zeros(1, 2, 4, 3), *data, split="test", count=count)
