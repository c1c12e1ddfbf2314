"""Taking times: of some work, of several in turns, and of the machine's own matrix products."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from benchmarks.setup import REPEATS


def matmul_rate(
    seconds: float = 0.7, *, device: str = "cpu", dtype: torch.dtype = torch.float32, rows: int = 512
) -> float:
    """Returns a device's own rate, in FLOP/s, of the product that dominates training: `rows` × 1200 by 1200 × 1200."""
    left, right, out = (torch.randn(height, 1200, device=device, dtype=dtype) for height in (rows, 1200, rows))
    products = 5 if device == "cpu" else 500
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(products):
            torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize()
        rounds += products
    return rounds * 2 * rows * 1200 * 1200 / elapsed


def seconds_of(work: Callable[[], None]) -> float:
    """Returns how long some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(*measurements: Callable[[], float]) -> list[float]:
    """Returns the median of each of several measurements, taken in turns: the machine's speed drifts.

    The first turn warms up, and does not count.
    """
    rounds = [[measure() for measure in measurements] for _ in range(1 + REPEATS)]
    return [middle(values) for values in zip(*rounds, strict=True)]


def middle(values: Sequence[float]) -> float:
    """Returns the median of all but the first value, which pays for warming up."""
    return median(values[1:] if len(values) > 1 else values)
