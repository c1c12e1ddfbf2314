r"""From grey levels to real numbers and back to bits.

A pixel u ∈ {0, …, L-1} becomes x = (u + U[0, 1)) / L: a density over x then bounds a probability over u from below, and
log-likelihoods of different models can be compared. All log-likelihoods are in nats per image of such pixels.
"""

import math

import torch
from torch import Tensor

from infusion_core.gaussian import FactorialGaussian
from infusion_core.noise import Noise

# The noise keeps this far from 0 and 1: closer, float32 may round a pixel into its neighbour's cell, or the last to 1.
_MARGIN = 2.0**-16


def dequantise(images: Tensor, levels: int, noise: Noise) -> Tensor:
    """Returns x = (u + U[0, 1)) / levels as float32 in [0, 1), for uint8 `images` of any shape."""
    pixels = images.float()
    return pixels.add_(noise.uniform_like(pixels).clamp_(_MARGIN, 1 - _MARGIN)).div_(levels)


def quantise(x: Tensor, levels: int) -> Tensor:
    """Returns the grey levels (uint8) whose cell each number lies in; numbers outside [0, 1) go to the nearest."""
    return (x * levels).floor().clamp(0, levels - 1).to(torch.uint8)


def fit_to_pixels(
    pixel_sum: Tensor, pixel_sum_of_squares: Tensor, count: int, levels: int, *, variance_floor: float = 0.0
) -> FactorialGaussian:
    r"""Fits a factorial Gaussian to dequantised images (Eq. 1), from sums over their grey levels.

    The expectation over the uniform noise is taken exactly: E[x] = (u + ½) / L and E[x²] = (u² + u + ⅓) / L².

    Args:
        pixel_sum: sum of the grey levels over the images, shape `(*event)`.
        pixel_sum_of_squares: sum of their squares, shape `(*event)`.
        count: number of images.
        levels: number of grey levels L.
        variance_floor: least variance per pixel.

    Raises:
        InfusionError: `count` is less than one.
    """
    first, second = pixel_sum.double(), pixel_sum_of_squares.double()
    return FactorialGaussian.from_sums(
        (first + count / 2) / levels,
        (second + first + count / 3) / levels**2,
        count,
        variance_floor=variance_floor,
    )


def bits_per_dimension(nats: float, dimensions: int, levels: int) -> float:
    """Returns log₂ L - nats / (D ln 2): bits per pixel value that a log-likelihood of `nats` per image amounts to."""
    return math.log2(levels) - nats / (dimensions * math.log(2))
