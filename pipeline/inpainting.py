"""Completion of images of a staged data set by a registered model (Section 4.3, Figure 5)."""

import io
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from infusion_core.inpainting import inpaint
from infusion_core.pixels import quantise
from pipeline import model_package, registry, storage, tracking
from pipeline.devices import local_device
from pipeline.errors import UserError
from pipeline.figures import inpainting_picture, png
from pipeline.manifest import Manifest
from pipeline.shards import load_rows
from pipeline.training import check_images

HALVES = ("top", "bottom", "left", "right")
_RECTANGLE = re.compile(r"(\d+):(\d+),(\d+):(\d+)")


@dataclass(frozen=True)
class InpaintingResult:
    """What was completed, and where it is.

    Attributes:
        model: the version that completed the images.
        images: how many images.
        completions: how many of each.
        known: share of the pixels that were known.
        picture: originals, what was known of them, and completions (PNG).
        table: all completions (Parquet): `image` (row of the split), `completion` (its number) and `pixels`, grey
            levels in height × width × channel order; those that were known are the original's.
    """

    model: str
    images: int
    completions: int
    known: float
    picture: str
    table: str


def inpaint_images(
    model_uri: str,
    dataset: str,
    destination: str,
    *,
    known: str = "top",
    split: str = "test",
    num_images: int = 10,
    num_completions: int = 5,
    num_steps: int | None = None,
    seed: int = 0,
    use_gpu: bool = False,
) -> InpaintingResult:
    """Completes the first images of a split; writes `inpainting.png` and `inpainting.parquet`.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        dataset: address of the staged data set.
        destination: folder to write to, on S3 or local.
        known: what is kept of the images; see `read_mask`.
        split: the split that the images are taken of.
        num_images: how many.
        num_completions: how many of each.
        num_steps: length of the chain; as in training by default.
        seed: of all noise.
        use_gpu: compute on this process's GPU.

    Raises:
        UserError: model, data set or mask cannot be had, or do not fit each other.
        InfusionError: an argument is out of range.
    """
    storage.check_reachable(destination)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    registered = registry.find(model_uri)
    model = model_package.load(registered).to(local_device(use_gpu))
    config = model.config
    check_images(config, dataset, manifest)
    available = manifest.rows(split)
    if not 1 <= num_images <= available:
        raise UserError(f"num_images must be from 1 to the {available} images of {dataset}'s {split} split")
    height, width, _ = config.image_shape
    mask = read_mask(known, height, width)
    device = model.prior_mean.device
    # The middle of a grey level's cell: what is known comes back as the same grey level.
    images = (load_rows(dataset, manifest, split, 0, num_images).to(device) + 0.5) / config.levels
    completed = inpaint(
        model, images, mask.to(device), seed, num_completions=num_completions, num_steps=num_steps
    ).clamp(0, 1)
    picture = storage.join(destination, "inpainting.png")
    storage.write_bytes(picture, png(inpainting_picture(images, mask, completed)))
    table = storage.join(destination, "inpainting.parquet")
    storage.write_bytes(table, _parquet(quantise(completed, config.levels)))
    return InpaintingResult(registered.uri, num_images, num_completions, mask.double().mean().item(), picture, table)


def read_mask(known: str, height: int, width: int) -> Tensor:
    """Returns which pixels are known, shape `(height, width)`.

    Args:
        known: a half of the image (`HALVES`); `Y0:Y1,X0:X1`, the rows and columns of a rectangle; or the address of a
            PNG of the images' size whose white pixels are known and whose black ones are not.
        height: of the images.
        width: of the images.

    Raises:
        UserError: it is none of these, or does not fit the images.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    if known in HALVES:
        rows, columns = slice(None), slice(None)
        if known in ("top", "bottom"):
            rows = slice(height // 2) if known == "top" else slice(height // 2, None)
        else:
            columns = slice(width // 2) if known == "left" else slice(width // 2, None)
        mask[rows, columns] = True
        return mask
    if rectangle := _RECTANGLE.fullmatch(known):
        y0, y1, x0, x1 = map(int, rectangle.groups())
        if not (y0 < y1 <= height and x0 < x1 <= width):
            raise UserError(f"rectangle {known} is empty or leaves the images, which have {height} × {width} pixels")
        mask[y0:y1, x0:x1] = True
        return mask
    if not known.lower().endswith(".png"):
        raise UserError(
            f"known part {known!r} is neither one of {', '.join(HALVES)}, nor a rectangle Y0:Y1,X0:X1, nor a .png file"
        )
    try:
        pixels = np.asarray(Image.open(io.BytesIO(storage.read_bytes(known))).convert("L"))
    except FileNotFoundError as error:
        raise UserError(f"{known}: there is no such file; give a mask that exists") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{known}: not a picture") from error
    if pixels.shape != (height, width):
        raise UserError(
            f"mask {known} has {pixels.shape[0]} × {pixels.shape[1]} pixels, but the images have {height} × {width}"
        )
    return torch.from_numpy(pixels > 127)


def _parquet(completed: Tensor) -> bytes:
    """Returns uint8 completions, shape `(B, K, C, H, W)`, as the content of a Parquet file."""
    images, completions = completed.shape[:2]
    pixels = completed.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1).cpu().numpy()
    columns = {
        "image": np.repeat(np.arange(images), completions),
        "completion": np.tile(np.arange(completions), images),
        "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel(), pa.uint8()), pixels.shape[1]),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return bytes(sink.getvalue())
