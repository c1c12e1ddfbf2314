"""The Ray cluster that a job runs on: joining it, and what it can hold."""

import logging
import math
import os
import time
from collections.abc import Mapping

import ray
from ray._private.state import state

from pipeline.errors import UserError


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job's is set), or starts a local one if there is none.

    Raises:
        UserError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    start = time.monotonic()
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        seconds = time.monotonic() - start
        address = os.environ.get("RAY_ADDRESS", "the local machine")
        reason = " ".join(str(error).split())
        raise UserError(f"no Ray cluster at {address} (RAY_ADDRESS) after {seconds:.1f} s: {reason}") from error


def most_workers(per_worker: Mapping[str, float]) -> float:
    """Returns how many workers the cluster could ever hold at once: on its nodes, or on those it may grow to.

    Args:
        per_worker: resources of one worker, all of which must be on one node.
    """

    def fitting(node: Mapping[str, float]) -> int:
        amounts = [int(node.get(name, 0.0) / amount + 1e-9) for name, amount in per_worker.items() if amount > 0]
        return min(amounts, default=0)

    now = sum(fitting(node["Resources"]) for node in ray.nodes() if node["Alive"])
    # Private, but the only place that knows the limits of an autoscaled cluster; Ray Train asks it too.
    config = state.get_cluster_config()
    kinds = config.node_group_configs if config else []
    grown = sum(
        fitting(kind.resources) * (kind.max_count if kind.max_count >= 0 else math.inf)
        for kind in kinds
        if fitting(kind.resources)
    )
    return max(now, grown)


def check_capacity(num_workers: int, per_worker: Mapping[str, float]) -> None:
    """Checks that the cluster could hold a group of workers, however long one waits.

    Raises:
        UserError: it never can; the message says how many it could hold.
    """
    most = most_workers(per_worker)
    if num_workers > most:
        each = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items() if amount > 0)
        raise UserError(
            f"{num_workers} workers with {each} each can never run: the cluster holds {most:g} such workers at most; "
            "lower --num-workers or --threads-per-worker, or enlarge the cluster"
        )
