"""A training step as a CUDA graph: recorded once, then replayed without Python or kernel launches in between.

A step of a small network is hundreds of kernels of a few microseconds, which a GPU finishes faster than a process can
launch them. What is recorded are kernels and addresses: the step may neither wait for the device nor allocate what
outlives it, its input is copied to where the recorded one lay, and its random numbers come from a generator that the
graph knows of, whose state lives on the device. Steps drawn from one stream of noise are the same, recorded or not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Eager ones come first, in which libraries choose kernels and allocate, and compilers compile, what is then recorded.
EAGER_STEPS = 3

Step = Callable[[Tensor], Tensor]
"""Takes a training step on a batch of images, and returns its loss."""


class StepGraph:
    """Takes steps, and records them on the way: the first few are eager, all others are replayed.

    Args:
        step: what is recorded. Batches have the shape and type of the first, and are on its device, a GPU.
        generator: source of all of the step's random numbers.
    """

    def __init__(self, step: Step, generator: torch.Generator) -> None:
        self._step = step
        self._generator = generator
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Takes a step; its loss is to be read, on the device, before the next one is taken."""
        if self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            return self._on_side_stream(images)
        if self._graph is None:
            self._record(images)
        assert self._graph is not None, "it has been recorded"
        self._images.copy_(images)
        self._graph.replay()
        return self._loss

    def _on_side_stream(self, images: Tensor) -> Tensor:
        # What is recorded must not depend on work of the default stream, nor be allocated for it.
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self._step(images)
        current.wait_stream(side)
        return loss

    def _record(self, images: Tensor) -> None:
        self._images = images.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        # Other threads, such as those that upload a checkpoint, may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = self._step(self._images)
