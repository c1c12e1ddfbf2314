"""One of two processes that `run_workers` starts: calls a test file's `worker` beside the other, saves the result."""

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main(file: str, rank: int, folder: Path) -> None:
    """Calls `worker(rank, **arguments)` of a file inside a process group of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    torch.save(runpy.run_path(file)["worker"](rank, **arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    # A DDP module that still refers to the group keeps gloo's threads alive, and one of them that wants the
    # interpreter while it shuts down aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
