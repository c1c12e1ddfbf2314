"""Measures how the cost of training grows with images, steps, width, workers and trials, at three sizes each.

    python -m benchmarks.growth

prints a Markdown table; it takes some ten minutes on two cores. A cost of a row over that of the row above, beside the
same for the matrix products, says whether anything grows faster than the arithmetic.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.bare import run_bare
from benchmarks.computation import training_flops_per_image
from benchmarks.setup import STEPS_PER_EPOCH, THREADS, random_images, short, stage_epoch
from benchmarks.timing import middle
from pipeline.local_servers import BUCKET
from pipeline.local_services import LocalServices
from pipeline.training import TrainConfig

EPOCHS = 3
BATCHES = (20, 40, 80)
CHAIN_STEPS = (5, 15, 45)
WIDTHS = (600, 1200, 2400)
WORKERS = (1, 2, 4)
TRIALS = (4, 8, 16)


@dataclass(frozen=True)
class Cost:
    """What one size costs.

    Attributes:
        size: in words.
        seconds: of an epoch, or of a search.
        work: that is done in them, in any unit that is the same for the sizes that are compared.
    """

    size: str
    seconds: float
    work: float


def main() -> int:
    """Takes the measurements; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| grows | size | seconds | × the size before | work × |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="infusion-growth-") as name:
        folder = Path(name)
        _print("images of an epoch, T = 1", _images(folder))
        _print("T", _chain_steps(folder))
        _print("width of both hidden layers", _widths(folder))
        _print("workers of one thread, two cores", _workers(folder))
        services = LocalServices(folder, ports="free")
        try:
            services.up()
            os.environ.update(services.env())
            _print("trials of a search, two at a time", _trials(folder))
        finally:
            services.down(delete_data=True)
    return 0


def _print(what: str, costs: Iterator[Cost]) -> None:
    before: Cost | None = None
    for cost in costs:
        growth = ("", "") if before is None else (cost.seconds / before.seconds, cost.work / before.work)
        columns = [what, cost.size, f"{cost.seconds:.1f}", *(f"{value:.2f}" if value else "" for value in growth)]
        print(f"| {' | '.join(columns)} |", flush=True)
        before = cost


def _epoch(
    folder: Path,
    config: TrainConfig,
    size: str,
    batches: int = STEPS_PER_EPOCH,
    workers: int = 1,
    threads: int = THREADS,
) -> Cost:
    """Trains epochs of so many batches; the work is their matrix products."""
    images = batches * config.global_batch
    dataset = stage_epoch(folder, str(folder / f"{batches}-batches"), batches)
    rates = run_bare(config, dataset, workers=workers, threads=threads)["images_per_second"]
    return Cost(size, images / middle(rates), images * training_flops_per_image(config.model))


def _images(folder: Path) -> Iterator[Cost]:
    config = short(EPOCHS, num_steps=1)
    for batches in BATCHES:
        yield _epoch(folder, config, f"{batches * config.global_batch:,}", batches)


def _chain_steps(folder: Path) -> Iterator[Cost]:
    for steps in CHAIN_STEPS:
        yield _epoch(folder, short(EPOCHS, num_steps=steps), str(steps))


def _widths(folder: Path) -> Iterator[Cost]:
    config = short(EPOCHS)
    for width in WIDTHS:
        wide = replace(config, model=replace(config.model, hidden_sizes=(width, width)))
        yield _epoch(folder, wide, str(width))


def _workers(folder: Path) -> Iterator[Cost]:
    config = replace(short(EPOCHS), synchronise_normalisation=False)
    for workers in WORKERS:
        yield _epoch(folder, config, str(workers), workers=workers, threads=1)


def _trials(folder: Path) -> Iterator[Cost]:
    # Ray reads its variables once, when it is imported.
    import ray

    from pipeline import cluster
    from pipeline.presets import digits
    from pipeline.search import TrialResources, search
    from pipeline.search_grid import Grid, grid_points
    from pipeline.sources import open_source
    from pipeline.staging import stage
    from pipeline.successive_halving import HalvingConfig

    dataset = stage(open_source(random_images(folder / "small.npz", 1024, 128)), f"s3://{BUCKET}/growth/small").dataset
    base = digits()
    model = replace(base.model, image_shape=(28, 28, 1), levels=256)
    base = replace(base, epochs=30, validate_every=15, parzen_bandwidth=None, model=model)
    cluster.connect()
    try:
        for trials in TRIALS:
            points = grid_points(Grid(over={"seed": tuple(range(trials))}), base)
            halving, store = HalvingConfig(halving="none"), f"s3://{BUCKET}/growth/runs"
            start = time.perf_counter()
            search(points, dataset, store, f"trials-{trials}", halving, TrialResources())
            yield Cost(str(trials), time.perf_counter() - start, trials)
    finally:
        # A process that is still joined to a cluster ends with it.
        ray.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
