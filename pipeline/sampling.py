"""Samples of a registered model, as a picture and as a table."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from infusion_core.model import ModelConfig
from infusion_core.noise import GeneratorNoise
from infusion_core.sampling import LastStep, sample_batches
from pipeline import model_package, registry, storage, tracking
from pipeline.devices import local_device
from pipeline.figures import neighbours_picture, png, samples_picture, sampling_chains_picture
from pipeline.manifest import Manifest
from pipeline.nearest_neighbours import nearest_neighbours
from pipeline.progress import Progress
from pipeline.training import check_images

GRID_SAMPLES = 100
GRID_COLUMNS = 10
NEIGHBOUR_SAMPLES = 10
NEIGHBOURS = 5


@dataclass(frozen=True)
class SamplingResult:
    """What was drawn, and where it is.

    Attributes:
        model: the version that was drawn from.
        samples: how many were drawn.
        num_steps: length of the chain.
        grid: picture of the first samples (PNG).
        chains: picture of some whole chains (PNG).
        neighbours: picture of the first samples beside the training images nearest to them (PNG), if asked for.
        table: all samples (Parquet): `image`, float32 values in height × width × channel order.
        samples_per_second: while drawing.
    """

    model: str
    samples: int
    num_steps: int
    grid: str
    chains: str
    neighbours: str | None
    table: str
    samples_per_second: float


def sample(
    model_uri: str,
    destination: str,
    *,
    num_samples: int = GRID_SAMPLES,
    num_steps: int | None = None,
    seed: int = 0,
    last_step: LastStep = "mean",
    neighbours_in: str | None = None,
    use_gpu: bool = False,
) -> SamplingResult:
    """Draws samples from a registered model and writes what `SamplingResult` names.

    The same arguments give the same samples on the same kind of device, in the registered model's `predict` too.

    Args:
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        destination: folder to write to, on S3 or local.
        num_samples: how many.
        num_steps: length of the chain; as in training by default.
        seed: of all noise.
        last_step: what is taken of the last transition: its mean, or a draw from it.
        neighbours_in: address of the staged data set in whose training split the nearest images are looked for; none
            are by default.
        use_gpu: compute on this process's GPU.

    Raises:
        UserError: the model cannot be had, or the destination cannot be written.
        InfusionError: an argument is out of range.
    """
    storage.check_reachable(destination)
    tracking.check_reachable()
    registered = registry.find(model_uri)
    model = model_package.load(registered).to(local_device(use_gpu))
    steps = model.config.num_steps if num_steps is None else num_steps
    batches = sample_batches(model, num_samples, seed, num_steps=steps, last_step=last_step)
    with Progress("sample", num_samples, "samples") as progress:
        images = []
        for batch in batches:
            images.append(batch.clamp(0, 1).cpu())
            progress.advance(len(batch))
    samples = torch.cat(images)
    table = storage.join(destination, "samples.parquet")
    storage.write_bytes(table, _parquet(samples))
    grid = storage.join(destination, "samples.png")
    storage.write_bytes(grid, png(samples_picture(samples[:GRID_SAMPLES], GRID_COLUMNS)))
    chains = storage.join(destination, "chains.png")
    noise = GeneratorNoise.from_seed(seed, device=model.prior_mean.device)
    storage.write_bytes(chains, png(sampling_chains_picture(model, noise, num_steps=steps)))
    neighbours = None
    if neighbours_in is not None:
        neighbours = storage.join(destination, "neighbours.png")
        storage.write_bytes(neighbours, png(_neighbours(samples[:NEIGHBOUR_SAMPLES], neighbours_in, model.config)))
    return SamplingResult(registered.uri, len(samples), steps, grid, chains, neighbours, table, progress.rate)


def _neighbours(samples: torch.Tensor, dataset: str, config: ModelConfig) -> Image.Image:
    manifest = Manifest.load(dataset)
    check_images(config, dataset, manifest)
    found = nearest_neighbours(samples, dataset, manifest, count=NEIGHBOURS)
    return neighbours_picture(samples, (found.images + 0.5) / config.levels)


def _parquet(samples: torch.Tensor) -> bytes:
    pixels = samples.permute(0, 2, 3, 1).flatten(1).contiguous().numpy()
    values = pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel(), pa.float32()), pixels.shape[1])
    shape = ",".join(str(size) for size in (*samples.shape[2:], samples.shape[1]))
    schema = pa.schema([pa.field("image", values.type, metadata={"shape": shape})])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([values], schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())
