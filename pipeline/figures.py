"""Pictures of images and chains, laid out as the paper's figures.

Small images are enlarged by whole factors without interpolation: a pixel stays a sharp square.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from infusion_core.chain import infusion_chain, sampling_trajectory
from infusion_core.model import InfusionModel
from infusion_core.noise import Noise

_GAP = 2
_BACKGROUND = 255
_MARGIN = 16
_TITLE = 22


def image_grid(rows: Tensor, *, column_titles: Sequence[str] = (), image_pixels: int = 56) -> Image.Image:
    """Lays images out in a grid.

    Args:
        rows: images in [0, 1], shape `(rows, columns, C, H, W)` with one or three channels; values outside are clipped.
        column_titles: what stands above each column; nothing if empty.
        image_pixels: least height of an image in the picture.
    """
    n_rows, n_columns, channels, height, width = rows.shape
    scale = max(-(-image_pixels // height), 1)
    top = _MARGIN if column_titles else 0
    cell_height, cell_width = height * scale + _GAP, width * scale + _GAP
    canvas = np.full((top + n_rows * cell_height + _GAP, n_columns * cell_width + _GAP, 3), _BACKGROUND, np.uint8)
    pixels = (rows.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(-1, -1, 3, -1, -1) if channels == 1 else pixels
    enlarged = pixels.permute(0, 1, 3, 4, 2).repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()
    for r in range(n_rows):
        for c in range(n_columns):
            y, x = top + _GAP + r * cell_height, _GAP + c * cell_width
            canvas[y : y + height * scale, x : x + width * scale] = enlarged[r, c]
    picture = Image.fromarray(canvas)
    if column_titles:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
        for c, title in enumerate(column_titles):
            draw.text((_GAP + c * cell_width + width * scale / 2, 2), title, fill=0, font=font, anchor="ma")
    return picture


def samples_picture(samples: Tensor, columns: int = 10, *, image_pixels: int = 56) -> Image.Image:
    """Lays samples `(N, C, H, W)` out in rows of `columns`; cells left over in the last row stay white."""
    missing = -len(samples) % columns
    padded = torch.cat([samples.cpu(), torch.ones(missing, *samples.shape[1:])])
    return image_grid(padded.unflatten(0, (-1, columns)), image_pixels=image_pixels)


@torch.no_grad()
def sampling_chains_picture(model: InfusionModel, noise: Noise, *, chains: int = 8, num_steps: int = 0) -> Image.Image:
    """Draws sampling chains, one a row, from the prior's noise to the sample (Figure 1).

    The last column is the mean of the last transition, which the paper shows as the sample.

    Args:
        model: in evaluation mode.
        noise: what the chains are drawn with.
        chains: how many.
        num_steps: how long; the model's T if 0.
    """
    num_steps = num_steps or model.config.num_steps
    trajectory = sampling_trajectory(model.prior, model.operator, num_steps, chains, noise)
    images = torch.cat([trajectory.states, trajectory.means[-1:]])
    titles = [f"t={t}" for t in range(num_steps + 1)] + ["mean"]
    return image_grid(images.transpose(0, 1), column_titles=titles)


@torch.no_grad()
def infusion_chains_picture(model: InfusionModel, targets: Tensor, noise: Noise) -> Image.Image:
    """Draws infusion chains, one a row, beside the target that they lead to (Figure 2).

    Args:
        model: in evaluation mode.
        targets: dequantised images, shape `(chains, C, H, W)`.
        noise: what the chains are drawn with.
    """
    steps = list(infusion_chain(model.prior, model.operator, model.schedule, targets, noise))
    images = [step.transition.mean if step.draw is None else step.draw.state for step in steps]
    titles = [f"t={step.step}" for step in steps[:-1]] + ["mean", "target"]
    return image_grid(torch.stack([*images, targets]).transpose(0, 1), column_titles=titles)


def neighbours_picture(samples: Tensor, neighbours: Tensor) -> Image.Image:
    """Draws samples and the training images nearest to each, a sample a row (Figure 4).

    Args:
        samples: in [0, 1], shape `(N, C, H, W)`.
        neighbours: the nearest first, in [0, 1], shape `(N, K, C, H, W)`.
    """
    titles = ["sample", *(f"nearest {rank}" for rank in range(1, neighbours.shape[1] + 1))]
    return image_grid(torch.cat([samples[:, None], neighbours], 1), column_titles=titles)


def inpainting_picture(images: Tensor, known: Tensor, completed: Tensor) -> Image.Image:
    """Draws images, what was known of them, and their completions, an image a row (Figure 5).

    Args:
        images: in [0, 1], shape `(B, C, H, W)`.
        known: true where a pixel was known, of a shape that broadcasts to that of `images`; the rest is drawn grey.
        completed: shape `(B, K, C, H, W)`.
    """
    masked = torch.where(known, images, torch.full_like(images, 0.5))
    titles = ["original", "known", *(str(number) for number in range(1, completed.shape[1] + 1))]
    return image_grid(torch.cat([images[:, None], masked[:, None], completed], 1), column_titles=titles)


def stacked(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Puts pictures one below the other, each under its title (chains over the epochs, or of several schedules)."""
    width = max(picture.width for picture in pictures.values())
    height = sum(picture.height + _TITLE for picture in pictures.values())
    canvas = Image.new("RGB", (width, height), (_BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    top = 0
    for title, picture in pictures.items():
        draw.text((_GAP, top + 4), title, fill=0, font=font)
        canvas.paste(picture, (0, top + _TITLE))
        top += picture.height + _TITLE
    return canvas


def png(picture: Image.Image) -> bytes:
    """Returns a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
