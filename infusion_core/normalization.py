"""Batch normalisation with parameters and statistics of its own for every step of the chain (Section 4).

The states of a chain are distributed differently at every step, so that one set of statistics would fit none of them.
While training, a batch is normalised by its own moments; otherwise by statistics that were estimated beforehand
(`collect_statistics`). No running average is kept: training leaves no trace in the statistics, which are a function of
weights and data alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class StepBatchNorm(nn.Module):
    """Batch normalisation of `(B, F, *)` features with a row of parameters and statistics per step.

    Steps beyond the last that has parameters use those of the last.

    Args:
        num_steps: T, the number of rows.
        num_features: F.
        epsilon: added to the variance.
        synchronise: normalise by the moments of the global batch when `torch.distributed` is initialised, so that
            several workers compute what one would with all their examples.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_steps: int, num_features: int, *, epsilon: float = 1e-5, synchronise: bool = True) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.synchronise = synchronise
        self.weight = nn.Parameter(torch.ones(num_steps, num_features))
        self.bias = nn.Parameter(torch.zeros(num_steps, num_features))
        self.register_buffer("running_mean", torch.zeros(num_steps, num_features))
        self.register_buffer("running_var", torch.ones(num_steps, num_features))
        self._sums: Tensor | None = None

    def forward(self, features: Tensor, step: int) -> Tensor:
        """Normalises the features of step `step` (counted from 1)."""
        row = min(step, len(self.weight)) - 1
        weight, bias = self.weight[row], self.bias[row]
        if not self.training:
            mean, variance = self.running_mean[row], self.running_var[row]
            return functional.batch_norm(features, mean, variance, weight, bias, training=False, eps=self.epsilon)
        if self._sums is not None:
            self._sums[row] += _moment_sums(features.detach())
        if self.synchronise and dist.is_initialized() and dist.get_world_size() > 1:
            return _SynchronisedBatchNorm.apply(features, weight, bias, self.epsilon)  # type: ignore[no-any-return]
        return functional.batch_norm(features, None, None, weight, bias, training=True, eps=self.epsilon)

    def start_collecting(self) -> None:
        """Forgets what was collected, and collects the moments of all that passes while training."""
        self._sums = torch.zeros(len(self.weight), 3, self.weight.shape[1], dtype=torch.float64).to(self.weight.device)

    def finish_collecting(self) -> None:
        """Makes the moments collected, over all workers, the statistics of the steps that were seen."""
        assert self._sums is not None, "start_collecting comes first"
        sums, self._sums = self._sums, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = _summed_over_workers(sums)
        seen = sums[:, 0, 0] > 0
        mean, variance = _mean_and_variance(sums[seen])
        self.running_mean[seen] = mean.to(self.running_mean)
        self.running_var[seen] = variance.to(self.running_var)


@contextmanager
def collect_statistics(module: nn.Module) -> Iterator[None]:
    """Replaces the statistics of every `StepBatchNorm` by the moments of what passes through `module` inside.

    The module is in training mode inside, so that each batch is normalised by its own moments, and returns to the
    mode that it was in. Statistics are replaced only when the block ends without an exception.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, StepBatchNorm)]
    was_training = module.training
    module.train()
    for layer in layers:
        layer.start_collecting()
    try:
        with torch.no_grad():
            yield
            for layer in layers:
                layer.finish_collecting()
    finally:
        module.train(was_training)
        for layer in layers:
            layer._sums = None


def _moment_sums(features: Tensor) -> Tensor:
    """Returns what can be added up over batches and workers: count, sum and sum of squares, float64 `(3, F)`."""
    dims = [d for d in range(features.dim()) if d != 1]
    features = features.to(torch.promote_types(features.dtype, torch.float32))  # moments of bfloat16 are not bfloat16
    # Not torch.var_mean, which takes twenty times as long to reduce rows on a CPU.
    centre = features.mean(dims, keepdim=True)
    variance, mean = (features - centre).square_().mean(dims).double(), centre.flatten().double()
    count = torch.full_like(mean, features.numel() / features.shape[1])
    return torch.stack([count, count * mean, count * (variance + mean.square())])


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance, `(*, F)`, from sums of the shape `(*, 3, F)`."""
    count, total, total_of_squares = sums.unbind(-2)
    mean = total / count
    return mean, (total_of_squares / count - mean.square()).clamp(min=0)


def _summed_over_workers(values: Tensor) -> Tensor:
    # Gathering takes one exchange, and for a few kilobytes less than half the time of gloo's all-reduce, which takes
    # several; the sum is in rank order everywhere, and so the same to the bit.
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values.contiguous())
    return torch.stack(gathered).sum(0)


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Batch normalisation by the moments of all workers' examples; one exchange forward, one backward.

    `torch.nn.SyncBatchNorm` does the same on GPUs only.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        sums = _summed_over_workers(_moment_sums(features))
        # Moments have the parameters' precision: under autocast, features are of less.
        mean, variance = (moment.to(weight.dtype) for moment in _mean_and_variance(sums))
        ctx.save_for_backward(features, weight, mean, variance)
        ctx.epsilon, ctx.count = epsilon, sums[0, 0].to(weight.dtype)
        return functional.batch_norm(features, mean, variance, weight, bias, training=False, eps=epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (gradient,) = gradients
        features, weight, mean, variance = ctx.saved_tensors
        inverse_std = (variance + ctx.epsilon).rsqrt()
        # With the moments held constant, as at evaluation: dx = g · w / σ, dw = Σ g x̂, db = Σ g.
        direct, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, features, weight, mean, variance, mean, inverse_std, False, ctx.epsilon, [True, True, True]
        )
        sums = _summed_over_workers(torch.stack([d_weight, d_bias]))
        mean_of_gx, mean_of_g = sums / ctx.count
        # What the moments add: dx -= w / σ · (mean g + x̂ · mean(g x̂)), written as one affine map of x.
        slope = weight * inverse_std.square() * mean_of_gx
        offset = weight * inverse_std * mean_of_g - slope * mean
        shape = [1, -1] + [1] * (features.dim() - 2)
        d_features = torch.addcmul(direct - offset.view(shape), features, slope.view(shape), value=-1)
        return d_features.to(features.dtype), d_weight, d_bias, None
