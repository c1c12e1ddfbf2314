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


def capacity() -> dict[str, float]:
    """Returns the most of each resource that the cluster can ever have: what it has, or may grow to."""
    now = dict(ray.cluster_resources())
    # Private, but the only place that knows the limits of an autoscaled cluster; Ray Train asks it too.
    limits = state.get_max_resources_from_cluster_config() or {}
    return {name: max(now.get(name, 0.0), float(limits.get(name, 0.0))) for name in now.keys() | limits.keys()}


def check_capacity(num_workers: int, per_worker: Mapping[str, float]) -> None:
    """Checks that the cluster could hold a group of workers, however long one waits.

    Raises:
        UserError: it never can; the message says how many it could hold.
    """
    most = capacity()
    for resource, amount in per_worker.items():
        if amount > 0 and num_workers * amount > most.get(resource, 0.0) + 1e-9:
            fitting = math.floor(most.get(resource, 0.0) / amount + 1e-9)
            raise UserError(
                f"{num_workers} workers with {amount:g} {resource} each need {num_workers * amount:g} {resource}, but "
                f"the cluster can never have more than {most.get(resource, 0.0):g}: that holds {fitting} such workers; "
                "lower --num-workers (or --threads-per-worker), or enlarge the cluster"
            )
