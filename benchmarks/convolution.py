"""Measures the convolutional operator at 32 × 32 against its convolutions and matrix product alone, and compiled."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.setup import THREADS, Add
from benchmarks.timing import in_turns, seconds_of
from infusion_core.chain import Operator
from infusion_core.convolutional import ConvolutionalOperator
from infusion_core.model import InfusionModel
from infusion_core.noise import GeneratorNoise
from infusion_core.objective import denoising_losses
from pipeline.presets import cifar10

BATCH = 128
NUM_STEPS = 3

Work = Callable[[], None]


def measure_convolution(add: Add) -> None:
    """Takes the measurements with the network of CIFAR-10 and a chain of a few steps."""
    torch.set_num_threads(THREADS)
    model = InfusionModel(replace(cifar10().model, num_steps=NUM_STEPS))
    operator = model.operator
    assert isinstance(operator, ConvolutionalOperator)
    eager = _training_step(model, operator)
    compiled = _training_step(model, torch.compile(operator))
    works = [eager, compiled, *_products(operator)]
    step, compiled_step, *alone = in_turns(*(partial(seconds_of, work) for work in works))
    products = NUM_STEPS * sum(alone)
    what = f"{BATCH} images of 32 × 32 × 3, T = {NUM_STEPS}, {THREADS} threads"
    note = f"{products:.2f} s for convolutions and matrix product alone, forward and backward, of {step:.2f} s; {what}"
    add("convolutional_products_over_step", products / step, "ratio", "", note)
    note = f"step by step {step:.2f} s, compiled {compiled_step:.2f} s; {what}"
    add("convolutional_compiled_over_eager", step / compiled_step, "ratio", "", note)


def _training_step(model: InfusionModel, operator: Operator) -> Work:
    optimizer = torch.optim.Adam(model.operator.parameters(), fused=True)
    noise = GeneratorNoise.from_seed(0)
    target = torch.rand(BATCH, *model.config.state_shape)

    def step() -> None:
        for loss in denoising_losses(model.prior, operator, model.schedule, target, noise):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _products(operator: ConvolutionalOperator) -> list[Work]:
    """Returns what runs each layer that has weights, forward and backward; the first one's input needs no gradient."""
    state = torch.rand(BATCH, *operator.event_shape)
    inputs = torch.rand(BATCH, *operator.grid)
    works = [_forward_and_backward(operator.linear, state.flatten(1))]
    for convolution in operator.convolutions:
        inputs = inputs.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        works.append(_forward_and_backward(convolution, inputs))
        inputs = convolution(inputs)
    return works


def _forward_and_backward(layer: nn.Module, inputs: Tensor) -> Work:
    parameters = list(layer.parameters())
    wanted = [*parameters, inputs] if inputs.requires_grad else parameters

    def work() -> None:
        output = layer(inputs)
        torch.autograd.grad(output, wanted, torch.ones_like(output))

    return work
