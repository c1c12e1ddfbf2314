"""Profiles a training step and the bound, with the paper's network: where the time goes, and the two floors under it.

    python -m benchmarks.profile

One floor is arithmetic: the matrix products at the rate that the machine reaches with nothing else to do. The other is
bytes: all that the other operations read and write, at the rate at which the machine adds up arrays of a state's size.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.computation import training_flops_per_image
from benchmarks.forward import forward_flops
from benchmarks.setup import BATCH, THREADS, short
from benchmarks.timing import in_turns, matmul_rate, seconds_of
from infusion_core.bound import log_weight
from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise
from infusion_core.objective import OBJECTIVES
from infusion_core.pixels import dequantise

BOUND_IMAGES = 1000

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "random numbers": ("aten::normal_", "aten::uniform_", "aten::geometric_", "aten::bernoulli_", "aten::cumsum"),
    "batch normalisation and rectifiers": ("batch_norm", "threshold_backward", "clamp_min", "aten::relu"),
    "optimiser": ("adam", "Optimizer"),
}
OTHERS = "sums, densities, masks and all else"


def main() -> int:
    """Takes the profiles and prints them as Markdown tables; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(THREADS)
    config = short(1)
    model = InfusionModel(config.model)
    images = torch.randint(0, 256, (BOUND_IMAGES, *config.model.state_shape), dtype=torch.uint8)
    noise = GeneratorNoise.from_seed(0)
    optimizer = torch.optim.Adam(model.operator.parameters(), lr=config.learning_rate, fused=True)

    def step() -> None:
        target = dequantise(images[:BATCH], config.model.levels, noise)
        for loss in OBJECTIVES[config.objective](model.prior, model.operator, model.schedule, target, noise):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def bound() -> None:
        target = dequantise(images, config.model.levels, noise)
        log_weight(model.prior, model.operator, model.schedule, target, noise)

    _print_profile(f"a training step of {BATCH} images", step, BATCH * training_flops_per_image(config.model))
    model.eval()
    transitions = BOUND_IMAGES * config.model.num_steps
    _print_profile(f"the bound of {BOUND_IMAGES} images", bound, transitions * forward_flops(config.model))
    return 0


def _print_profile(what: str, work: Callable[[], None], flops: float) -> None:
    ceiling, seconds = in_turns(matmul_rate, lambda: seconds_of(work))
    with profile() as profiled:
        work()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[_part(event)] += event.self_cpu_time_total
    with Traffic() as traffic:
        work()
    print(f"\n| {what}: {1000 * seconds:.0f} ms | share of time |\n|---|---|")
    for part in (*PARTS, OTHERS):
        print(f"| {part} | {times[part] / times.total():.1%} |")
    arithmetic = f"{flops / 1e9:.0f} GFLOP at {ceiling / 1e9:.0f} GFLOP/s"
    print(f"| floor: arithmetic, {arithmetic} | {flops / ceiling / seconds:.1%} |")
    moved, rate = traffic.bytes, _adding_rate()
    print(f"| floor: bytes, {moved / 1e9:.1f} GB at {rate / 1e9:.0f} GB/s | {moved / rate / seconds:.1%} |", flush=True)


def _part(event: FunctionEventAvg) -> str:
    return next((part for part, names in PARTS.items() if any(name in str(event.key) for name in names)), OTHERS)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations other than matrix products read and write.

    Attributes:
        bytes: of all tensors that go in or come out, those of an operation in place twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes_view = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if not makes_view and func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.bytes += sum(
                leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)
            )
        return result


def _adding_rate() -> float:
    """Returns the bytes a second, read and written, of adding two arrays of a batch of states."""
    left, right, out = (torch.rand(BATCH, short(1).model.dimensions) for _ in range(3))
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.5:
        torch.add(left, right, out=out)
        rounds += 1
    return rounds * 3 * left.nbytes / elapsed


if __name__ == "__main__":
    raise SystemExit(main())
