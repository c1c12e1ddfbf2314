"""Where a job's own process computes."""

import torch

from pipeline.errors import UserError


def local_device(use_gpu: bool) -> torch.device:
    """Returns this process's GPU, or its CPU.

    Raises:
        UserError: a GPU is asked for and this process has none.
    """
    if use_gpu and not torch.cuda.is_available():
        raise UserError(
            "--use-gpu: the job's process has no GPU; submit it with `ray job submit --entrypoint-num-gpus 1`, "
            "or leave --use-gpu out"
        )
    return torch.device("cuda" if use_gpu else "cpu")
