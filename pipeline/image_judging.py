"""Figures of single images under a model, shared out among workers.

A split is cut into units of a fixed number of images, and a unit's noise is determined by the seed and the unit's
number. Figures are kept by image, in the split's order, and added up only then: the result does not depend on how many
workers shared the units out, bit for bit if all compute with the same number of threads. Finished units can be kept, so
that long work goes on where it was interrupted.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from infusion_core.errors import InfusionError
from infusion_core.model import InfusionModel
from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.shards import load_rows

Figures = dict[str, Tensor]
"""Figures by name: the first dimension is that of the images."""


class ImageJudge(Protocol):
    """What is computed of images: a frozen dataclass that says all that the figures depend on but model and images."""

    @property
    def images_per_unit(self) -> int:
        """How many images are judged at a time."""
        ...

    def judge(self, model: InfusionModel, images: Tensor, unit: int) -> Figures:
        """Returns figures of uint8 images of shape `(n, C, H, W)` on the model's device; `unit` is for the noise."""
        ...


@dataclass(frozen=True)
class Judging:
    """Who judges which images. Used as a context manager, it ends the Ray workers that it has started.

    Attributes:
        model: in evaluation mode; where there is one worker, on the device to work on.
        identity: what identifies the model and the code that judges it, for partial results.
        dataset: address of the staged data set.
        manifest: its manifest.
        num_workers: Ray workers; with one, the work is done in this process.
        threads_per_worker: CPU threads of each of several workers.
        use_gpu: whether each of several workers computes on a GPU.
        partial_results: folder in which finished units are kept; `None` keeps none.
    """

    model: InfusionModel
    identity: str
    dataset: str
    manifest: Manifest
    num_workers: int = 1
    threads_per_worker: int = 1
    use_gpu: bool = False
    partial_results: str | None = None
    _actors: list[Any] = field(default_factory=list, init=False, repr=False)

    def __enter__(self) -> "Judging":
        return self

    def __exit__(self, *error: object) -> None:
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
            self._actors.clear()

    def run(self, title: str, judge: ImageJudge, split: str, images: int | None = None) -> Figures:
        """Judges the first `images` images of a split, or all of it.

        Args:
            title: of the progress that is shown.
            judge: what to compute.
            split: the split.
            images: how many images; all by default.

        Raises:
            UserError: there are no images, they cannot be read, or the cluster cannot hold the workers.
        """
        rows = self.manifest.rows(split) if images is None else min(images, self.manifest.rows(split))
        if rows == 0:
            raise UserError(f"{self.dataset} has no images in its {split} split; name another split or data set")
        units = range(math.ceil(rows / judge.images_per_unit))
        folder = self._folder(judge, split)
        results: dict[int, Figures] = {}
        if folder is not None:
            results = {unit: kept for unit in units if (kept := _kept(_unit_file(folder, unit, rows))) is not None}
        todo = [unit for unit in units if unit not in results]

        def bounds(unit: int) -> tuple[int, int]:
            return unit * judge.images_per_unit, min((unit + 1) * judge.images_per_unit, rows)

        done = sum(bounds(unit)[1] - bounds(unit)[0] for unit in results)
        with Progress(title, rows, "images", done=done) as progress:
            work = self._in_process if self.num_workers == 1 else self._on_ray
            for unit, figures in work(judge, split, [(unit, *bounds(unit)) for unit in todo]):
                results[unit] = figures
                if folder is not None:
                    storage.write_bytes(_unit_file(folder, unit, rows), save_tensors(figures))
                progress.advance(bounds(unit)[1] - bounds(unit)[0])
        return {name: torch.cat([results[unit][name] for unit in units]) for name in results[0]}

    def _folder(self, judge: ImageJudge, split: str) -> str | None:
        if self.partial_results is None:
            return None
        settings = {**asdict(judge), "images_per_unit": judge.images_per_unit}  # type: ignore[call-overload]
        device = "cuda" if self.use_gpu else self.model.prior_mean.device.type
        identity = [self.identity, device, self.manifest.origin.fingerprint, split, type(judge).__name__, settings]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=12).hexdigest()
        return storage.join(self.partial_results, digest)

    def _in_process(
        self, judge: ImageJudge, split: str, units: list[tuple[int, int, int]]
    ) -> Iterator[tuple[int, Figures]]:
        worker = _Worker(self.model, self.dataset, self.manifest)
        for unit in units:
            yield unit[0], worker.judge(judge, split, *unit)

    def _on_ray(
        self, judge: ImageJudge, split: str, units: list[tuple[int, int, int]]
    ) -> Iterator[tuple[int, Figures]]:
        if not units:
            return
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        if not self._actors:
            self._actors.extend(self._start_actors())

        def judge_unit(actor: Any, unit: tuple[int, int, int]) -> Any:
            return actor.judge.remote(judge, split, *unit)

        try:
            yield from ActorPool(self._actors).map_unordered(judge_unit, units)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | InfusionError):
                raise type(error.cause)(*error.cause.args) from error
            raise
        except RayActorError as error:
            kept = "; what is finished is kept, start it again to go on" if self.partial_results else ""
            raise UserError(f"a worker died while judging the {split} split{kept}: {error.error_msg:.200}") from error

    def _start_actors(self) -> list[Any]:
        import ray

        from pipeline import cluster

        assert self.model.prior_mean.device.type == "cpu", "each worker moves its copy to its own device"
        cluster.connect()
        per_worker = {"CPU": float(self.threads_per_worker), "GPU": float(self.use_gpu)}
        cluster.check_capacity(self.num_workers, per_worker)
        remote = ray.remote(num_cpus=per_worker["CPU"], num_gpus=per_worker["GPU"])(_RayWorker)
        model = ray.put(self.model)
        return [
            remote.remote(model, self.dataset, self.manifest, self.threads_per_worker, self.use_gpu)
            for _ in range(self.num_workers)
        ]


def _kept(file: str) -> Figures | None:
    """Returns what a finished unit's file holds, or `None` if it is missing or damaged."""
    try:
        return load_tensors(storage.read_bytes(file))
    except (FileNotFoundError, SafetensorError):
        return None


def _unit_file(folder: str, unit: int, rows: int) -> str:
    # A last unit that is cut short by the number of images is not that of a longer run.
    return storage.join(folder, f"{rows}-images", f"unit-{unit:05}.safetensors")


class _Worker:
    """Judges units of a split."""

    def __init__(self, model: InfusionModel, dataset: str, manifest: Manifest) -> None:
        self.model = model
        self.dataset = dataset
        self.manifest = manifest

    @torch.no_grad()
    def judge(self, judge: ImageJudge, split: str, unit: int, start: int, stop: int) -> Figures:
        images = load_rows(self.dataset, self.manifest, split, start, stop).to(self.model.prior_mean.device)
        return {name: figure.cpu() for name, figure in judge.judge(self.model, images, unit).items()}


class _RayWorker(_Worker):
    """The same in a process of its own."""

    def __init__(self, model: InfusionModel, dataset: str, manifest: Manifest, threads: int, use_gpu: bool) -> None:
        torch.set_num_threads(threads)
        super().__init__(model.to("cuda" if use_gpu else "cpu").eval(), dataset, manifest)

    def judge(self, judge: ImageJudge, split: str, unit: int, start: int, stop: int) -> Any:
        return unit, super().judge(judge, split, unit, start, stop)
