"""Measures training and its memory."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.bare import run_bare
from benchmarks.setup import REPEATS, STEPS_PER_EPOCH, THREADS, Add, short, stage_epoch
from benchmarks.timing import middle
from infusion_core.model import ModelConfig


def training_flops_per_image(model: ModelConfig) -> float:
    """Counts the matrix products of a training step: forward, and backward to weights and to inputs.

    The first layer's input needs no gradient.
    """
    widths = [model.dimensions, *model.hidden_sizes, 2 * model.dimensions]
    weights = [inputs * outputs for inputs, outputs in pairwise(widths)]
    return model.num_steps * 2 * (3 * sum(weights) - weights[0])


@contextmanager
def _wakeups() -> Iterator[None]:
    """Runs a process that takes 0.08 of a core, a little at a time."""
    code = (
        "import time\nwhile True:\n start = time.perf_counter()\n"
        " while time.perf_counter() < start + 4e-4: pass\n time.sleep(5e-3)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_computation(folder: Path, add: Add) -> float:
    """Measures what needs no services; returns the images per second of a bare training."""
    dataset = stage_epoch(folder, str(folder / "small"), STEPS_PER_EPOCH)
    bare = run_bare(short(5), dataset, threads=THREADS, matmul_rounds=1)
    rate, ceiling = middle(bare["images_per_second"]), median(bare["matmul_rates"])
    achieved = rate * training_flops_per_image(short(1).model)
    add(
        "train_flops_over_matmul_ceiling",
        achieved / ceiling,
        "ratio",
        "≥ 0.85",
        f"{achieved / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s with {THREADS} threads; {rate:.0f} images/s",
    )

    for synchronise, suffix, goal in ((False, "", "≥ 0.97"), (True, "_synchronised", "")):
        config = dataclasses.replace(short(3), synchronise_normalisation=synchronise)
        # Alternating, so that a machine whose speed drifts slows both.
        pairs = [(run_bare(config, dataset, workers=2), run_bare(config, dataset, threads=2)) for _ in range(REPEATS)]
        two, one = (median(middle(run["images_per_second"]) for run in runs) for runs in zip(*pairs, strict=True))
        add(
            f"ddp_2x1_over_1x2{suffix}",
            two / one,
            "ratio",
            goal,
            f"two workers × one thread over one × two: {two:.0f} over {one:.0f} images/s, "
            f"batch normalisation by {'common' if synchronise else 'each its own'} moments",
        )

    plain, compiled = (
        middle(run_bare(dataclasses.replace(short(4), compiled=value), dataset, threads=THREADS)["images_per_second"])
        for value in (False, True)
    )
    add(
        "train_compiled_over_eager",
        compiled / plain,
        "ratio",
        "",
        f"{compiled:.0f} over {plain:.0f} images/s with {THREADS} threads; the first epoch, which compiles, left out",
    )

    epochs: dict[bool, list[float]] = {True: [], False: []}
    for disturbed in (True, False) * REPEATS:
        with _wakeups() if disturbed else nullcontext():
            epochs[disturbed].append(middle(run_bare(short(3), dataset, threads=THREADS)["epoch_seconds"]))
    beside, alone = (median(epochs[disturbed]) for disturbed in (True, False))
    add(
        "epoch_beside_wakeups_over_alone",
        beside / alone,
        "ratio",
        "",
        f"{beside:.2f} over {alone:.2f} s with {THREADS} threads, beside a process that takes 0.08 of a core, 0.4 ms "
        "at a time, as all of Ray's together do",
    )

    grown = {steps: run_bare(short(1, num_steps=steps), dataset, threads=THREADS)["grown_bytes"] for steps in (15, 60)}
    add(
        "peak_memory_T60_over_T15",
        grown[60] / grown[15],
        "ratio",
        "≤ 1.1",
        f"growth by training: {grown[60] / 2**20:.0f} over {grown[15] / 2**20:.0f} MiB",
    )

    return rate
