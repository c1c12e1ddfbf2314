"""Measures staging and reading of images: how fast, in how much memory, and whether training waits for them.

    python -m benchmarks.images '{"work": "stage", "source": "npz:…", "dataset": "s3://…"}'

does one piece of work in a process of its own, and prints one JSON object with what it measured.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.setup import (
    BATCH,
    IMAGE_BYTES,
    REPEATS,
    STEPS_PER_EPOCH,
    THREADS,
    Add,
    peak_memory,
    random_images,
    short,
    spec_of_process,
    stage_epoch,
)
from benchmarks.timing import middle
from pipeline import storage
from pipeline.local_servers import BUCKET
from pipeline.manifest import Manifest
from pipeline.shards import load_rows, stream_batches
from pipeline.sources import open_source
from pipeline.staging import PART_BYTES, WRITER_THREADS, stage

MILLION = 1_000_000
QUARTER = MILLION // 4
RAW_PARTS = 24
# One step of the chain instead of fifteen: nothing trains faster, so nothing waits sooner for its images.
FAST_STEPS_PER_EPOCH = 60
EPOCHS = 4


def measure_images(folder: Path, train_rate: float, add: Add) -> None:
    """Takes the measurements, one after the other; S3 is up."""
    _measure_seventy_thousand(folder, train_rate, add)
    _measure_million(folder, add)
    for suffix, num_steps, steps, goal in (
        ("", 15, STEPS_PER_EPOCH, "≥ 0.98"),
        ("_T1", 1, FAST_STEPS_PER_EPOCH, ""),
    ):
        dataset = stage_epoch(folder, f"s3://{BUCKET}/bench/{steps}-steps", steps)
        rates = _in_own_process("train", dataset=dataset, num_steps=num_steps)
        streamed, resident = middle(rates["streamed"]), middle(rates["resident"])
        ratio = middle([one / other for one, other in zip(rates["streamed"], rates["resident"], strict=True)])
        add(
            f"streamed_training{suffix}_over_resident",
            ratio,
            "ratio",
            goal,
            f"T = {num_steps}, epochs of {steps} steps: {streamed:,.0f} images/s streamed from S3, "
            f"{resident:,.0f} from memory",
        )


def _measure_seventy_thousand(folder: Path, train_rate: float, add: Add) -> None:
    source = random_images(folder / "large.npz", 60_000, 10_000)
    start = time.perf_counter()
    staged = stage(open_source(source), f"s3://{BUCKET}/bench/large")
    seconds = time.perf_counter() - start
    add("stage_images_per_second", 70_000 / seconds, "images/s", "", "28 × 28, from .npz to S3 with manifest")
    manifest = Manifest.load(staged.dataset)
    start = time.perf_counter()
    load_rows(staged.dataset, manifest, "train", 0, manifest.rows("train"))
    read_rate = manifest.rows("train") / (time.perf_counter() - start)
    add("shard_read_over_training", read_rate / train_rate, "ratio", "≥ 10", f"{read_rate:,.0f} images/s read from S3")


def _measure_million(folder: Path, add: Add) -> None:
    staging, streaming = {}, {}
    for images in (QUARTER, MILLION):
        file, dataset = folder / f"{images}.npz", f"s3://{BUCKET}/bench/{images}"
        source = random_images(file, images)
        ceiling = _raw_write_rate(f"s3://{BUCKET}/bench/raw")
        staging[images] = _in_own_process("stage", source=source, dataset=dataset)
        file.unlink()
        # What is freed late or early by chance is a tenth of what streaming takes.
        runs = [_in_own_process("stream", dataset=dataset) for _ in range(REPEATS)]
        streaming[images] = {name: median(run[name] for run in runs) for name in runs[0]}
    loading = _in_own_process("load", dataset=dataset)

    def rate(name: str, measured: dict[str, Any], note: str) -> None:
        per_second = measured["images"] / measured["seconds"]
        note = f"{measured['images']:,} images of 28 × 28, {per_second * IMAGE_BYTES / 1e6:,.0f} MB/s; {note}"
        add(f"million_{name}_images_per_second", per_second, "images/s", "", note)

    def memory(name: str, measured: dict[int, dict[str, Any]]) -> None:
        large, small = (measured[images]["grown_bytes"] for images in (MILLION, QUARTER))
        note = f"growth: {large / 2**20:.0f} MiB with {MILLION:,} images over {small / 2**20:.0f} with {QUARTER:,}"
        add(f"million_{name}_memory_over_quarter", large / small, "ratio", "≤ 1.1", note)

    rate("stage", staging[MILLION], f"the S3 server alone takes {ceiling / 1e6:,.0f} MB/s")
    memory("stage", staging)
    rate("read", loading, "from S3 into memory")
    rate("stream", streaming[MILLION], "shuffled batches from S3 with nothing else to do")
    memory("stream", streaming)


def _raw_write_rate(folder: str) -> float:
    """Returns how many bytes per second the storage takes when nothing but writing is done, as staging writes."""
    content = os.urandom(PART_BYTES)
    start = time.perf_counter()
    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        list(pool.map(lambda i: storage.write_bytes(storage.join(folder, str(i)), content), range(RAW_PARTS)))
    seconds = time.perf_counter() - start
    storage.delete_folder(folder)
    return RAW_PARTS * PART_BYTES / seconds


def _in_own_process(work: str, **spec: Any) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.images", json.dumps({"work": work, **spec})],
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def _stage(spec: dict[str, Any]) -> int:
    return sum(stage(open_source(spec["source"]), spec["dataset"]).images.values())


def _load(spec: dict[str, Any]) -> int:
    manifest = Manifest.load(spec["dataset"])
    return len(load_rows(spec["dataset"], manifest, "train", 0, manifest.rows("train")))


def _stream(spec: dict[str, Any]) -> int:
    manifest = Manifest.load(spec["dataset"])
    return sum(map(len, stream_batches(spec["dataset"], manifest, "train", 0, manifest.rows("train"), BATCH, seed=0)))


def _train(spec: dict[str, Any]) -> dict[str, list[float]]:
    """Trains with images from memory and with streamed ones by turns, so that a machine whose speed drifts slows both.

    Returns:
        images per second of every epoch, by where the images were; validation is left out.
    """
    import torch

    from pipeline.training import Training

    torch.set_num_threads(THREADS)
    config = dataclasses.replace(short(EPOCHS + 1, spec["num_steps"]), validate_every=EPOCHS + 1)
    manifest = Manifest.load(spec["dataset"])
    trainings = {
        placement: Training(config, spec["dataset"], manifest, memory_limit=memory_limit)
        for placement, memory_limit in (("resident", None), ("streamed", 0))
    }
    for _ in islice(zip(*(training.epochs() for training in trainings.values()), strict=True), EPOCHS):
        pass
    return {
        placement: [epoch["throughput/train_images_per_second"] for epoch in training.history]
        for placement, training in trainings.items()
    }


def main(spec: dict[str, Any]) -> None:
    """Does one piece of work, and prints what was measured."""
    if spec["work"] == "train":
        print(json.dumps(_train(spec)))
        return
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    images = {"stage": _stage, "load": _load, "stream": _stream}[spec["work"]](spec)
    seconds = time.perf_counter() - start
    print(json.dumps({"images": images, "seconds": seconds, "grown_bytes": peak_memory() - before}))


if __name__ == "__main__":
    main(spec_of_process("benchmarks.images", __doc__))
