"""Measures what a search costs beside its trainings: how soon a trial takes its first step."""

import dataclasses
from pathlib import Path

from benchmarks.setup import Add, random_images
from pipeline.local_servers import BUCKET
from pipeline.presets import digits
from pipeline.search import TrialResources, search
from pipeline.search_grid import Grid, grid_points
from pipeline.sources import open_source
from pipeline.staging import stage
from pipeline.successive_halving import HalvingConfig

TRIALS = 10
GROUP_TRIALS = 3


def measure_search(folder: Path, add: Add) -> None:
    """Takes the measurements, one after the other; S3, MLflow and Ray are up."""
    dataset = stage(open_source(random_images(folder / "small.npz", 1024, 128)), f"s3://{BUCKET}/bench/small").dataset
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
