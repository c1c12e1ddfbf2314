"""Pictures, pixel by pixel."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.noise import GeneratorNoise
from pipeline.figures import (
    image_grid,
    infusion_chains_picture,
    inpainting_picture,
    neighbours_picture,
    samples_picture,
    sampling_chains_picture,
    stacked,
)


def test_every_image_is_enlarged_sharply_in_its_cell() -> None:
    images = torch.rand(2, 3, 3, 4, 5)
    picture = np.asarray(image_grid(images, image_pixels=8))
    assert picture.shape == (2 + 2 * (8 + 2), 2 + 3 * (10 + 2), 3)
    for row in range(2):
        for column in range(3):
            y, x = 2 + row * 10, 2 + column * 12
            cell = picture[y : y + 8, x : x + 10].reshape(4, 2, 5, 2, 3)
            expected = (images[row, column].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
            assert (cell == expected[:, None, :, None, :]).all()


def test_grey_and_out_of_range_values() -> None:
    images = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1, 1)
    picture = np.asarray(image_grid(images, image_pixels=1))
    assert [tuple(picture[2, 2 + 3 * c]) for c in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_left_over_cells_are_white() -> None:
    picture = np.asarray(samples_picture(torch.zeros(3, 1, 2, 2), columns=2, image_pixels=2))
    assert (picture[6:8, 2:4] == 0).all()
    assert (picture[6:8, 6:8] == 255).all()


def test_chains_have_a_column_for_every_state() -> None:
    config = ModelConfig(image_shape=(4, 4, 1), num_steps=3, hidden_sizes=(8,), rate_increment=0.1)
    model = InfusionModel(config, FactorialGaussian(torch.zeros(1, 4, 4), torch.ones(1, 4, 4))).eval()
    noise = GeneratorNoise.from_seed(1)
    cell = 56 + 2
    # t = 0 … 3, and the last mean.
    assert sampling_chains_picture(model, noise, chains=2).width == 2 + 5 * cell
    assert sampling_chains_picture(model, noise, chains=2, num_steps=6).width == 2 + 8 * cell
    # t = 0 … 2, the last mean, and the target.
    targets = torch.rand(2, 1, 4, 4)
    picture = np.asarray(infusion_chains_picture(model, targets, noise))
    assert picture.shape[1] == 2 + 5 * cell
    top_left_of_targets = picture[16 + 2 :: cell, 2 + 4 * cell][:2, 0]
    assert (top_left_of_targets == (targets[:, 0, 0, 0] * 255).round().numpy()).all()


def cell(picture: Image.Image, row: int, column: int, image: Tensor) -> bool:
    """Whether a grid with titles shows an image of 2 × 2 grey pixels, each 28 pixels wide, at a place."""
    y, x = 16 + 2 + row * 58, 2 + column * 58
    expected = np.kron((image[0] * 255).round().numpy(), np.ones((28, 28)))
    return bool((np.asarray(picture)[y : y + 56, x : x + 56] == expected[..., None]).all())


def test_samples_stand_left_of_their_neighbours() -> None:
    samples, neighbours = torch.rand(3, 1, 2, 2), torch.rand(3, 2, 1, 2, 2)
    picture = neighbours_picture(samples, neighbours)
    for row in range(3):
        assert cell(picture, row, 0, samples[row])
        assert all(cell(picture, row, 1 + rank, neighbours[row, rank]) for rank in range(2))


def test_what_was_not_known_is_grey() -> None:
    images, completed = torch.rand(2, 1, 2, 2), torch.rand(2, 3, 1, 2, 2)
    known = torch.tensor([[True, True], [False, False]])
    picture = inpainting_picture(images, known, completed)
    for row in range(2):
        shown = torch.cat([images[row, :, :1], torch.full((1, 1, 2), 0.5)], 1)
        assert cell(picture, row, 0, images[row])
        assert cell(picture, row, 1, shown)
        assert all(cell(picture, row, 2 + number, completed[row, number]) for number in range(3))


def test_pictures_are_stacked_below_their_titles() -> None:
    pictures = {"first": Image.new("RGB", (40, 6), (9, 8, 7)), "second": Image.new("RGB", (30, 5), (1, 2, 3))}
    canvas = np.asarray(stacked(pictures))
    assert canvas.shape == (22 + 6 + 22 + 5, 40, 3)
    assert (canvas[22:28] == (9, 8, 7)).all()
    assert (canvas[50:, :30] == (1, 2, 3)).all()
    assert (canvas[50:, 30:] == 255).all()
    assert (canvas[:22] < 255).any()
