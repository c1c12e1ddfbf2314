"""Training of one model by one or several workers, without regard to who started them.

A worker runs `Training.epochs`; where `torch.distributed` is initialised the workers train together, each with its
share of the images. Nothing here knows of Ray or MLflow: the same loop runs bare, under Ray Train and in a Tune trial.

Whatever is random in an epoch is determined by the seed, the epoch and the worker's rank, so that a run that goes on
from a checkpoint computes what an uninterrupted one would have, bit for bit where the arithmetic is deterministic.
"""

import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infusion_core.chain import Operator, infusion_chain
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig, load_model, save_model
from infusion_core.noise import GeneratorNoise, Noise, derive_seed
from infusion_core.normalization import collect_statistics
from infusion_core.objective import OBJECTIVES, ObjectiveName
from infusion_core.parzen import parzen_estimate
from infusion_core.pixels import bits_per_dimension, dequantise, fit_to_pixels
from infusion_core.sampling import sample_batches
from pipeline.bound_evaluation import CHUNK_IMAGES, BoundSums, Chunk, chunk_share, load_chunks, sum_bound
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.shards import load_rows
from pipeline.step_graph import Step, StepGraph
from pipeline.training_images import TrainingImages, open_training_images

RESIDENT_VALIDATION_BYTES = 512 * 2**20
PARZEN_IMAGES = 1000
PARZEN_SAMPLES = 10_000

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that determines what a training computes.

    Attributes:
        model: the model to train.
        epochs: passes over the training split.
        global_batch: images per step, over all workers.
        learning_rate: of Adam.
        objective: what is maximised: denoising, or the lower bound with its states held constant (lower_bound) or
            with gradients through the chain (reparametrised_lower_bound, whose memory grows with the number of steps).
        denoising_epochs: epochs that begin with the denoising objective, before another takes over.
        seed: of initial weights, order of images, and noise.
        synchronise_normalisation: whether batch normalisation uses the moments of the global batch, so that the number
            of workers does not matter, or those of each worker's part, which saves 4 T exchanges among workers a step.
        precision: of matrix products: float32, tf32 (on GPUs that have it), or bfloat16.
        compiled: whether training steps are compiled, and, where a GPU is trained on alone, recorded and replayed as a
            whole. It changes no more than rounding, is meant for GPUs, and delays the first step.
        validate_every: epochs between two validations; each makes a checkpoint.
        figures_every: epochs between two sets of pictures; rounded up to a validation.
        parzen_bandwidth: σ of the Parzen-window estimate that is made of validation images with every set of pictures,
            and of the finished model; none by default.
        statistics_images: training images that batch statistics are estimated from before a validation; the final
            model's are estimated from all whole batches.

    Raises:
        UserError: a value is out of range.
    """

    model: ModelConfig
    epochs: int
    global_batch: int = 512
    learning_rate: float = 1e-3
    objective: ObjectiveName = "denoising"
    denoising_epochs: int = 0
    seed: int = 0
    synchronise_normalisation: bool = True
    precision: Precision = "float32"
    compiled: bool = False
    validate_every: int = 1
    figures_every: int = 5
    parzen_bandwidth: float | None = None
    statistics_images: int = 5120

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "validate_every", "figures_every", "statistics_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "parzen_bandwidth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, not {value}")
        for name in ("seed", "denoising_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, as {getattr(self, name)} is")

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TrainConfig":
        """Returns the configuration that `to_json` was called on."""
        return cls(**{**fields, "model": ModelConfig.from_json(fields["model"])})


@dataclass(frozen=True)
class Worker:
    """One worker's place in its group.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: where it computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to.

    Attributes:
        epoch: its number, from 1.
        metrics: named as in the tracking store (`train/…`, `valid/…`, `throughput/…`).
        validated: whether `valid/…` is among them and a checkpoint is due.
        pictures_due: whether sampling and infusion chains are to be drawn.
    """

    epoch: int
    metrics: dict[str, float]
    validated: bool
    pictures_due: bool


class _Stream(IntEnum):
    """What a random stream is for; each purpose draws from a stream of its own."""

    WEIGHTS = 0
    ORDER = 1
    NOISE = 2
    STATISTICS_ORDER = 3
    STATISTICS_NOISE = 4
    VALIDATION = 5
    PICTURES = 6
    PARZEN = 7
    TEST = 8


def check_fit(config: TrainConfig, dataset: str, manifest: Manifest, world_size: int) -> None:
    """Checks that model, data set and group of workers fit each other.

    Raises:
        UserError: they do not.
    """
    check_images(config.model, dataset, manifest)
    if config.global_batch % world_size or config.global_batch < 2 * world_size:
        raise UserError(
            f"global_batch {config.global_batch} cannot be shared equally by {world_size} workers, 2 each at least"
        )
    if config.global_batch > manifest.rows("train"):
        raise UserError(
            f"global_batch {config.global_batch} is more than the {manifest.rows('train')} training images of {dataset}"
        )


def check_images(model: ModelConfig, dataset: str, manifest: Manifest) -> None:
    """Checks that a model is of images as those of a data set.

    Raises:
        UserError: shape or grey levels differ.
    """
    if model.image_shape != manifest.image_shape:
        raise UserError(
            f"{dataset} holds images of shape {_by(manifest.image_shape)} (height × width × channels), but the model "
            f"is for {_by(model.image_shape)}; choose another data set, or another model or preset"
        )
    if model.levels != manifest.levels:
        raise UserError(
            f"{dataset} has {manifest.levels} grey levels, but the model is for {model.levels}; "
            "choose another data set, or another model or preset"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


class Training:
    """A training in progress, as one worker sees it.

    Args:
        config: what to compute.
        dataset: address of the staged data set.
        manifest: its manifest.
        worker: this worker's place.
        memory_limit: bytes of memory that this worker's images may occupy; see `open_training_images`.

    Raises:
        UserError: configuration and data set do not fit, or the data set cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: str,
        manifest: Manifest,
        worker: Worker | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.worker = worker or Worker()
        check_fit(config, dataset, manifest, self.worker.world_size)
        self.config = config
        self.dataset = dataset
        self.manifest = manifest
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_bound = -math.inf
        self._best_weights: dict[str, Tensor] = {}
        self.model = new_model(config, manifest).to(self.worker.device)
        self._optimizer = torch.optim.Adam(
            self.model.operator.parameters(), lr=config.learning_rate, fused=True, capturable=self._on_gpu
        )
        self._operator = _distributed(
            _compiled(self.model.operator) if config.compiled else self.model.operator,
            config.model.num_steps,
            self.worker,
        )
        self._generator = torch.Generator(self.worker.device)
        self._step_graphs: dict[ObjectiveName, StepGraph] = {}
        self.images = self._open_images(memory_limit)
        self._resident_validation: list[Chunk] | None = None
        self._batch = config.global_batch // self.worker.world_size
        self.steps_per_epoch = manifest.rows("train") // self.worker.world_size // self._batch
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")

    @property
    def _on_gpu(self) -> bool:
        return self.worker.device.type == "cuda"

    def _open_images(self, memory_limit: int | None) -> TrainingImages:
        worker = self.worker
        return open_training_images(
            self.dataset, self.manifest, "train", worker.rank, worker.world_size, worker.device, memory_limit
        )

    def epochs(self, on_step: Callable[[], None] | None = None) -> Iterator[EpochReport]:
        """Trains to the last epoch, from the first or from where `restore` left off; yields after every epoch.

        Args:
            on_step: called after every training step.

        Raises:
            UserError: the training diverged.
        """
        while self.epoch < self.config.epochs:
            self.epoch += 1
            last = self.epoch == self.config.epochs
            metrics = self._train_epoch(on_step or (lambda: None))
            validated = last or self.epoch % self.config.validate_every == 0
            if validated:
                self.estimate_statistics(self.config.statistics_images)
                bound = self.validate()
                self._check_finite("validation lower bound", bound.mean)
                metrics |= bound_metrics("valid", bound, self.config.model)
                if bound.mean > self.best_bound:
                    self.best_bound, self.best_epoch = bound.mean, self.epoch
                    self._best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            pictures_due = validated and self._pictures_due(last)
            if pictures_due and self.config.parzen_bandwidth is not None and self.worker.rank == 0:
                metrics["valid/parzen"] = self.parzen(self.config.parzen_bandwidth)
            self.history.append({"epoch": self.epoch, **metrics})
            yield EpochReport(self.epoch, metrics, validated, pictures_due)

    def finish(self) -> BoundSums:
        """Makes `model` the best one that was validated, with statistics of the whole training split.

        Returns:
            Its validation bound.
        """
        self.model.load_state_dict(self._best_weights)
        self.estimate_statistics(self.manifest.rows("train"))
        return self.validate()

    def _pictures_due(self, last: bool) -> bool:
        every = self.config.figures_every
        previous = self.epoch - self.config.validate_every
        return last or self.epoch // every > max(previous, 0) // every

    def _train_epoch(self, on_step: Callable[[], None]) -> dict[str, float]:
        config, worker = self.config, self.worker
        self._generator.manual_seed(derive_seed((config.seed, _Stream.NOISE, self.epoch, worker.rank)))
        step = self._step()
        objective = torch.zeros((), dtype=torch.float64, device=worker.device)
        self.model.train()
        start = _now(worker.device)
        batches = self.images.batches(self._batch, config.seed, _Stream.ORDER, self.epoch, worker.rank)
        for images in islice(batches, self.steps_per_epoch):
            objective -= step(images)
            on_step()
        mean = float(_all_reduced(objective)) / (self.steps_per_epoch * worker.world_size)
        seconds = _now(worker.device) - start
        self._check_finite("objective", mean)
        images_per_epoch = self.steps_per_epoch * config.global_batch
        return {
            "train/objective": mean,
            "train/images_seen": float(self.epoch * images_per_epoch),
            "throughput/train_images_per_second": images_per_epoch / seconds,
        }

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the training diverged: the {name} is {value} in epoch {self.epoch}; lower --learning-rate "
                f"(now {self.config.learning_rate:g}) or raise --variance-floor "
                f"(now {self.config.model.variance_floor:g})"
            )

    def _step(self) -> Step:
        """Returns what takes a training step of the current epoch, with noise from its generator."""
        name, noise = self._objective, GeneratorNoise(self._generator)

        def step(images: Tensor) -> Tensor:
            return self.train_step(images, noise)

        # Workers of a group meet in every step, which a graph of one of them cannot hold.
        if not (self.config.compiled and self._on_gpu and self.worker.world_size == 1):
            return step
        return self._step_graphs.setdefault(name, StepGraph(step, self._generator))

    def train_step(self, images: Tensor, noise: Noise) -> Tensor:
        """Takes one step; returns the batch's loss, a constant."""
        target = dequantise(images, self.config.model.levels, noise)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        with self._autocast():
            objective = OBJECTIVES[self._objective]
            for loss in objective(self.model.prior, self._operator, self.model.schedule, target, noise):
                loss.backward()
                total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    @property
    def _objective(self) -> ObjectiveName:
        """The objective of the current epoch."""
        return "denoising" if self.epoch <= self.config.denoising_epochs else self.config.objective

    def estimate_statistics(self, images: int) -> None:
        """Re-estimates the batch statistics of every step from `images` training images, shared by the workers."""
        config, worker = self.config, self.worker
        count = min(max(images // config.global_batch, 1), self.steps_per_epoch)
        batches = self.images.batches(self._batch, config.seed, _Stream.STATISTICS_ORDER, worker.rank)
        noise = GeneratorNoise.from_seed(config.seed, _Stream.STATISTICS_NOISE, worker.rank, device=worker.device)
        with self._autocast():
            estimate_statistics(self.model, islice(batches, count), noise)

    def validate(self) -> BoundSums:
        """Returns the sums of the lower bound over the validation split, over all workers."""
        return self._bound(self._validation_chunks(), _Stream.VALIDATION)

    def test(self) -> BoundSums:
        """Returns the sums of the lower bound over the test split, over all workers."""
        numbers = chunk_share(self.manifest.rows("test"), self.worker.rank, self.worker.world_size)
        return self._bound(load_chunks(self.dataset, self.manifest, "test", numbers), _Stream.TEST)

    def _bound(self, chunks: Iterable[Chunk], stream: _Stream) -> BoundSums:
        self.model.eval()
        with self._autocast():
            sums = sum_bound(self.model, chunks, derive_seed((self.config.seed, stream)))
        return BoundSums(_all_reduced(sums.values.to(self.worker.device)).cpu())

    def parzen(self, bandwidth: float) -> float:
        """Returns the Parzen-window estimate of the first validation images, by means of the last step (Figure 3)."""
        self.model.eval()
        seed, device = derive_seed((self.config.seed, _Stream.PARZEN)), self.worker.device
        rows = min(PARZEN_IMAGES, self.manifest.rows("valid"))
        images = load_rows(self.dataset, self.manifest, "valid", 0, rows).to(device)
        examples = dequantise(images, self.manifest.levels, GeneratorNoise.from_seed(seed, device=device))
        samples = (batch.clamp(0, 1) for batch in sample_batches(self.model, PARZEN_SAMPLES, seed))
        return parzen_estimate(examples, samples, bandwidth).mean

    def _validation_chunks(self) -> Iterable[Chunk]:
        """Returns this worker's chunks of the validation split, kept on its device if they are small enough."""
        if self._resident_validation is not None:
            return self._resident_validation
        numbers = chunk_share(self.manifest.rows("valid"), self.worker.rank, self.worker.world_size)
        chunks = load_chunks(self.dataset, self.manifest, "valid", numbers)
        if len(numbers) * CHUNK_IMAGES * self.manifest.image_bytes > RESIDENT_VALIDATION_BYTES:
            return chunks
        self._resident_validation = [(number, images.to(self.worker.device)) for number, images in chunks]
        return self._resident_validation

    def picture_noise(self) -> GeneratorNoise:
        """Returns the noise that pictures are drawn with: the same at every epoch, so that they can be compared."""
        return GeneratorNoise.from_seed(self.config.seed, _Stream.PICTURES, device=self.worker.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision != "bfloat16":
            return nullcontext()
        # Cached casts would be shared by the graphs of several steps, each of which is freed by its own backward.
        return torch.autocast(self.worker.device.type, torch.bfloat16, cache_enabled=False)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint: all that an exact resumption needs, and the best model so far."""
        (folder / "last").mkdir()
        save_model(self.model, folder / "last")
        torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")
        if self._best_weights:
            (folder / "best").mkdir()
            best = InfusionModel(self.config.model)
            best.load_state_dict(self._best_weights)
            save_model(best, folder / "best")
        state = {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_bound": self.best_bound,
            "streamed": self.images.streamed,
        }
        (folder / "state.json").write_text(json.dumps({**state, "history": self.history}))

    def restore(self, folder: Path) -> None:
        """Goes back to where `save` was called.

        Images that were streamed are streamed again, since that decides on their order. Should images that were kept in
        memory no longer fit, the run goes on with streamed ones, and a warning says that its bits will differ.
        """
        state = json.loads((folder / "state.json").read_text())
        if state["streamed"] and not self.images.streamed:
            self.images = self._open_images(0)
        elif self.images.streamed and not state["streamed"]:
            warnings.warn("images that were in memory are streamed now, in another order than before", stacklevel=2)
        self.epoch, self.history = state["epoch"], state["history"]
        self.best_epoch, self.best_bound = state["best_epoch"], state["best_bound"]
        self.model.load_state_dict(load_model(folder / "last").state_dict())
        optimizer = torch.load(folder / "optimizer.pt", map_location=self.worker.device, weights_only=True)
        self._optimizer.load_state_dict(optimizer)
        # The setting is the device's, not that of the device that the checkpoint was made on.
        for group in self._optimizer.param_groups:
            group["capturable"] = self._on_gpu
        # What was recorded refers to the optimiser's former state.
        self._step_graphs.clear()
        if (folder / "best").exists():
            self._best_weights = load_model(folder / "best", self.worker.device).state_dict()


def new_model(config: TrainConfig, manifest: Manifest) -> InfusionModel:
    """Builds a model with initial weights that the seed determines, and the prior of the training split."""
    prior = training_gaussian(manifest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed((config.seed, _Stream.WEIGHTS)))
        return InfusionModel(config.model, prior, synchronise=config.synchronise_normalisation)


def training_gaussian(manifest: Manifest, variance_floor: float = 0.0) -> FactorialGaussian:
    """Fits a factorial Gaussian to the training split (Eq. 1): the chain's prior, and the baseline of its bound."""
    total, total_of_squares = (
        torch.tensor(sums).view(manifest.image_shape).permute(2, 0, 1)
        for sums in (manifest.pixel_sum, manifest.pixel_sum_of_squares)
    )
    return fit_to_pixels(
        total, total_of_squares, manifest.rows("train"), manifest.levels, variance_floor=variance_floor
    )


def estimate_statistics(model: InfusionModel, batches: Iterator[Tensor], noise: Noise) -> None:
    """Re-estimates the batch statistics of every step on infusion chains towards uint8 `batches`."""
    with collect_statistics(model.operator):
        for images in batches:
            target = dequantise(images, model.config.levels, noise)
            for _ in infusion_chain(model.prior, model.operator, model.schedule, target, noise):
                pass


def bound_metrics(split: str, bound: BoundSums, model: ModelConfig) -> dict[str, float]:
    """Returns the lower bound over a split as metrics."""
    return {
        f"{split}/lower_bound": bound.mean,
        f"{split}/lower_bound_standard_error": bound.standard_error,
        f"{split}/bits_per_dimension": bits_per_dimension(bound.mean, model.dimensions, model.levels),
        **{f"{split}/lower_bound_{name}": value for name, value in bound.addends.items()},
    }


def _compiled(operator: nn.Module) -> nn.Module:
    """Returns the operator, compiled when it is first called.

    Raises:
        UserError: there is no compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compiled needs a C++ compiler wherever workers run, and there is no {compiler} on "
            f"{platform.node()}; install one, name one in the variable CXX, or leave --compiled out"
        )
    return cast("nn.Module", torch.compile(operator))


def _distributed(operator: nn.Module, num_steps: int, worker: Worker) -> Operator:
    """Returns the operator such that gradients are averaged over the workers once a training step.

    The T backward passes of a step add up locally; the last one's all-reduce carries the sum.
    """
    if worker.world_size == 1:
        return operator
    devices = [worker.device] if worker.device.type == "cuda" else None
    # The statistics, its only buffers, are the same everywhere: they come from all-reduced sums.
    with warnings.catch_warnings():
        # The name that newer versions of torch want for `broadcast_buffers` is unknown to older ones.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(
            operator, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def call(state: Tensor, step: int) -> FactorialGaussian:
        # What `no_sync` does, decided per call: the chain, not this function, holds the loop over steps.
        parallel.require_backward_grad_sync = step == num_steps
        return parallel(state, step)  # type: ignore[no-any-return]

    return call


def _all_reduced(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _now(device: torch.device) -> float:

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
