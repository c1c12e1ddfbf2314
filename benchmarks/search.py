"""Measures what a search costs beside its trainings: how soon a trial takes its first step."""

import dataclasses

from benchmarks.setup import Add
from pipeline.local_servers import BUCKET
from pipeline.presets import digits
from pipeline.search import TrialResources, search
from pipeline.search_grid import Grid, grid_points
from pipeline.successive_halving import HalvingConfig

TRIALS = 10
GROUP_TRIALS = 3


def measure_search(dataset: str, add: Add) -> None:
    """Takes the measurements, one after the other; S3, MLflow and Ray are up.

    Args:
        dataset: few images of 28 × 28, so that reading them is no part of it.
        add: takes the rows.
    """
    base = digits()
    base = dataclasses.replace(
        base,
        epochs=2,
        validate_every=1,
        parzen_bandwidth=None,
        model=dataclasses.replace(base.model, image_shape=(28, 28, 1), levels=256),
    )
    for name, resources, trials, goal, note in (
        ("trial_start_seconds", TrialResources(), TRIALS, "≤ 1.5", "one process each, two at a time"),
        ("ddp_trial_start_seconds", TrialResources(num_workers=2), GROUP_TRIALS, "", "two workers each, one at a time"),
    ):
        points = grid_points(Grid(over={"seed": tuple(range(trials))}), base)
        result = search(points, dataset, f"s3://{BUCKET}/bench/runs", name, HalvingConfig(halving="none"), resources)
        assert result.trial_start_seconds is not None, "there are more trials than slots"
        add(
            name,
            result.trial_start_seconds,
            "s",
            goal,
            f"from a trial being scheduled, and its slot free, to its first step; {trials} trials, {note}",
        )
