"""Measures how many small trainings are best packed on one machine: into processes, threads, and steps.

    python -m benchmarks.packing '{"threads": 1, "stacked": 1}'

takes training steps of the digits' model until it is told to stop, and prints how many it took a second. With `stacked`
above 1 it steps as many trainings together, by batched matrix products. Their infusion rates are the same: this is the
most that a search could gain by stepping trials together, whose rates differ.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setup import REPEATS, Add, spec_of_process
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.noise import GeneratorNoise
from infusion_core.objective import OBJECTIVES
from pipeline.presets import digits

SECONDS = 3.0
STACKED = 6


def measure_packing(add: Add) -> None:
    """Takes the measurements, in turns, with two cores' worth of processes and threads."""
    ways = {
        "1x2": Packing(processes=1, threads=2),
        "2x1": Packing(processes=2, threads=1),
        "4x1": Packing(processes=4, threads=1),
        "stacked_1x2": Packing(processes=1, threads=2, stacked=STACKED),
        "stacked_2x1": Packing(processes=2, threads=1, stacked=STACKED),
    }
    rounds = [{name: way.rate() for name, way in ways.items()} for _ in range(REPEATS)]
    rates = {name: median(rates[name] for rates in rounds) for name in ways}
    for name, over, goal, what in (
        ("2x1", "1x2", "≥ 1", "two processes × one thread, one trial each, over one × two"),
        ("4x1", "2x1", "", "four processes on two cores over two"),
        ("stacked_1x2", "2x1", "", f"one process × two threads that steps {STACKED} trials together, over two × one"),
        ("stacked_2x1", "2x1", "", f"two × one that step {STACKED} trials together, over two × one with one each"),
    ):
        note = f"{what}: {rates[name]:.0f} over {rates[over]:.0f} steps of a trial a second, digits"
        add(f"trials_{name}_over_{over}", rates[name] / rates[over], "ratio", goal, note)


@dataclass(frozen=True)
class Packing:
    """A way to run several small trainings at a time.

    Attributes:
        processes: how many there are.
        threads: of each.
        stacked: trainings that each steps together.
    """

    processes: int
    threads: int
    stacked: int = 1

    def rate(self) -> float:
        """Returns the steps of a training that are taken a second, over all processes and trainings."""
        spec = json.dumps({"threads": self.threads, "stacked": self.stacked})
        with ExitStack() as stack:
            processes = [
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.packing", spec],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        cwd=Path(__file__).parents[1],
                    )
                )
                for _ in range(self.processes)
            ]
            # All begin together, and are asked for their count while all of them still run.
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            return sum(float(process.communicate()[0]) for process in processes)


def main(spec: dict[str, Any]) -> None:
    """Takes steps for a while, after a line on standard input, and prints how many a second."""
    torch.set_num_threads(spec["threads"])
    step = _stacked_step(spec["stacked"]) if spec["stacked"] > 1 else _single_step()
    for _ in range(3):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        step()
        steps += spec["stacked"]
    print(steps / elapsed, flush=True)


def _single_step() -> Callable[[], None]:
    config = digits()
    model = InfusionModel(config.model)
    target = torch.rand(config.global_batch, *config.model.state_shape)
    return _step(model.operator, model.prior, model, target, 1.0)


def _step(
    operator: nn.Module, prior: FactorialGaussian, model: InfusionModel, target: Tensor, scale: float
) -> Callable[[], None]:
    config = digits()
    optimizer = torch.optim.Adam(operator.parameters(), lr=config.learning_rate, fused=True)
    noise = GeneratorNoise.from_seed(0)

    def step() -> None:
        for loss in OBJECTIVES[config.objective](prior, operator, model.schedule, target, noise):
            (scale * loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _stacked_step(trials: int) -> Callable[[], None]:
    config = digits()
    model = InfusionModel(config.model)
    target = torch.rand(config.global_batch, model.config.dimensions).expand(trials, -1, -1).contiguous()
    mean, variance = (
        moment.flatten().expand(config.global_batch, -1) for moment in (model.prior_mean, model.prior_variance)
    )
    # The losses are means over what comes first, here the trials.
    scale = trials / config.global_batch
    return _step(StackedOperators(trials, config.model), FactorialGaussian(mean, variance), model, target, scale)


class StackedOperators(nn.Module):
    """The perceptrons of several trials, whose states `(trials, B, D)` they map all at once; see `MLPOperator`."""

    def __init__(self, trials: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.dimensions, *config.hidden_sizes]

        def weight(inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(trials, inputs, outputs) / math.sqrt(inputs))

        self.linears = nn.ParameterList(weight(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.scales, self.shifts = (
            nn.ParameterList(
                nn.Parameter(torch.full((config.num_steps, trials * width), value)) for width in config.hidden_sizes
            )
            for value in (1.0, 0.0)
        )
        self.head = weight(widths[-1], 2 * config.dimensions)
        self.bias = nn.Parameter(torch.zeros(trials, 1, 2 * config.dimensions))

    def forward(self, state: Tensor, step: int) -> FactorialGaussian:
        """Returns the distributions of all trials' next states, each of shape `(trials, B, D)`."""
        features = state
        for linear, scales, shifts in zip(self.linears, self.scales, self.shifts, strict=True):
            features = torch.bmm(features, linear).transpose(0, 1)
            shape = features.shape
            features = functional.batch_norm(
                features.flatten(1), None, None, scales[step - 1], shifts[step - 1], training=True
            )
            features = torch.relu(features).view(shape).transpose(0, 1)
        mean, variance = torch.baddbmm(self.bias, features, self.head).sigmoid().chunk(2, -1)
        return FactorialGaussian(mean, self.config.variance_scale * variance + self.config.variance_floor)


if __name__ == "__main__":
    main(spec_of_process("benchmarks.packing", __doc__))
