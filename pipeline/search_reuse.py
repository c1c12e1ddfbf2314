"""What a new search takes over from an earlier one: trials that train the same, on the same images.

A trial that was trained in full is not trained again. One that was pruned, or waited at a rung, is compared by the
bounds that it had there; only if it passes by them is it trained again.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient

from infusion_core.model import WEIGHTS_FILE
from pipeline import storage, tracking
from pipeline.errors import UserError
from pipeline.ray_training import read_json
from pipeline.search_grid import Point
from pipeline.search_state import (
    SAMPLES_FILE,
    SEARCH_FILE,
    TRIALS_FOLDER,
    Criterion,
    SearchState,
    Trial,
    read_state,
)
from pipeline.search_trial import BOUND
from pipeline.tracking import TrackedRun
from pipeline.train_worker import MODEL_FOLDER, OUTCOME_FILE

REUSED_TAG = "infusion.reused_from"
"""Tag of the MLflow run of a trial that was taken over: the run that it was trained in."""
_METRICS = ("train/", "valid/", "throughput/")


@dataclass(frozen=True)
class EarlierTrial:
    """A trial of an earlier search.

    Attributes:
        state: what became of it.
        folder: in which its files are.
        run: its MLflow run.
    """

    state: Trial
    folder: str
    run: TrackedRun


def earlier_trials(
    folder: str, points: Sequence[Point], dataset_fingerprint: str, criterion: Criterion
) -> dict[str, EarlierTrial]:
    """Returns what a new search has in common with the one in a folder, by the new one's names of trials.

    Trials whose models were deleted are among them only if a trial that is better by the criterion has its model still.

    Args:
        folder: the earlier search's.
        points: of the new search.
        dataset_fingerprint: of the images that it trains with.
        criterion: by which it chooses the best.

    Raises:
        UserError: there is no such search, or it has nothing in common with the new one.
    """
    record, state = read_json(storage.join(folder, SEARCH_FILE)), read_state(folder)
    if record is None or state is None:
        raise UserError(f"there is no search in {folder} to reuse")
    if record["dataset_fingerprint"] != dataset_fingerprint:
        raise UserError(f"the search in {folder} cannot be reused: it was on other images than these")
    found = {}
    for point in points:
        config = json.loads(json.dumps(point.config.to_json()))
        name = next((name for name, other in record["points"].items() if other == config), None)
        if name is not None:
            trial = Trial(**state["trials"][name])
            run = TrackedRun(**record["trial_runs"][name])
            found[point.name] = EarlierTrial(trial, storage.join(folder, TRIALS_FOLDER, name), run)
    if not found:
        raise UserError(f"the search in {folder} cannot be reused: it has no trial in common with this one")
    finished = {name: trial for name, trial in found.items() if trial.state.status == "finished"}
    kept = {name for name, trial in finished.items() if storage.exists(_weights(trial.folder))}
    best_kept = max((finished[name].state.score(criterion) for name in kept), default=-math.inf)
    return {
        name: trial
        for name, trial in found.items()
        if name not in finished or name in kept or trial.state.score(criterion) < best_kept
    }


def take_over(
    earlier: Mapping[str, EarlierTrial], state: SearchState, runs: Mapping[str, TrackedRun], folder: str
) -> None:
    """Takes over what can be: states, models and pictures, and the metrics in MLflow.

    Args:
        earlier: trials of the earlier search, by the new one's names.
        state: the new search's, which has not begun; it is left to the caller to save it.
        runs: MLflow runs of its trials.
        folder: the new search's.
    """
    for name, trial in earlier.items():
        metrics = _metrics(trial.run)
        bounds = {step: values[BOUND] for step, values in metrics.items() if BOUND in values}
        if not state.take_over(name, trial.state, bounds):
            continue
        for file in storage.list_files(trial.folder):
            path = file.removeprefix(f"{trial.folder}/")
            if path.startswith((f"{MODEL_FOLDER}/", OUTCOME_FILE, SAMPLES_FILE)):
                storage.write_bytes(storage.join(folder, TRIALS_FOLDER, name, path), storage.read_bytes(file))
        runs[name].log_metrics(list(metrics.items()))
        runs[name].set_tags({REUSED_TAG: trial.run.run_id})
    state.prune_beaten()


def _weights(folder: str) -> str:
    return storage.join(folder, MODEL_FOLDER, WEIGHTS_FILE)


def _metrics(run: TrackedRun) -> dict[int, dict[str, float]]:
    """Returns what a training logged as it went on, by epoch."""
    client = MlflowClient()
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    with tracking.mlflow_errors(f"read the metrics of run {run.run_id}"):
        for name in client.get_run(run.run_id).data.metrics:
            if name.startswith(_METRICS):
                for point in client.get_metric_history(run.run_id, name):
                    metrics[point.step][name] = point.value
    return metrics
