"""A search over a grid of trainings, pruned by successive halving on the validation lower bound, on Ray Tune.

A search has a name and a folder, `STORAGE/NAME`. In it lie `search.json` (what was asked for, and the outcome once
there is one), `state.json` (what is known of the trials), a folder for each trial, and Tune's own files, with the
events that TensorBoard shows. It can be resumed from there and MLflow alone.

A trial is trained in stretches: to Ray Tune, a stretch is a trial of its own that ends at a rung, so that a slot is
never held by a training that waits, and the next stretch takes over a process in which everything is imported.
"""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from tensorboardX import SummaryWriter

from pipeline import cluster, registry, storage, tracking
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.ray_training import check_name, flat, read_json, register, write_json
from pipeline.report import REPORT_FILE, report
from pipeline.search_grid import Point
from pipeline.search_reuse import earlier_trials, take_over
from pipeline.search_state import (
    ENDED,
    SAMPLES_FILE,
    SEARCH_FILE,
    SEARCH_TAG,
    TRIALS_FOLDER,
    Criterion,
    SearchState,
)
from pipeline.search_trial import (
    BOUND,
    EPOCH,
    FAILURE,
    PARZEN,
    DeviceTrial,
    GroupTrial,
    TrialSpec,
    resources_per_worker,
)
from pipeline.successive_halving import HalvingConfig
from pipeline.tracking import TrackedRun
from pipeline.train_worker import FIRST_STEP_AT, OUTCOME_FILE
from pipeline.training import TrainConfig, check_fit

TUNE_FOLDER = "tune"
REPORT_EVERY_SECONDS = 60

Keep = Literal["best", "none", "all"]

# A group's checkpoints are not those of a single worker, and each worker draws its own noise.
_LASTING = ("num_workers", "criterion")
"""Fields of `TrialResources` that stay the same when a search is resumed."""


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """What every trial runs on, and what is kept of it.

    Attributes:
        num_workers: DDP workers of a trial; one trains in the trial's own process.
        threads_per_worker: CPU threads that a worker computes with, and CPUs that are reserved for it.
        gpus_per_worker: share of a GPU that a worker has; below 1, several trials share one.
        max_concurrent: trials at a time; as many as the cluster can hold by default.
        max_failures: how often a trial whose process or workers died is started again from its last checkpoint.
        shard_memory_mib: MiB of memory that a worker's images may occupy before they are streamed instead; by default
            half of what is free.
        keep: of which trials checkpoints and models are kept in the search's folder: of the best, of none, or of all.
        criterion: by what the best is chosen of the trials that were trained in full: the validation lower bound, or
            the Parzen-window estimate of their finished models. Pruning goes by the bound.

    Raises:
        UserError: a value is out of range.
    """

    num_workers: int = 1
    threads_per_worker: int = 1
    gpus_per_worker: float = 0.0
    max_concurrent: int | None = None
    max_failures: int = 3
    shard_memory_mib: int | None = None
    keep: Keep = "best"
    criterion: Criterion = "lower_bound"

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("threads_per_worker", 1), ("max_failures", 0), ("gpus_per_worker", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise UserError(f"max_concurrent must be at least 1, not {self.max_concurrent}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise UserError(f"gpus_per_worker must be below 1 or a whole number, not {self.gpus_per_worker}")

    @property
    def per_worker(self) -> dict[str, float]:
        """The Ray resources of one worker."""
        return resources_per_worker(self.threads_per_worker, self.gpus_per_worker)


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and where it is.

    Attributes:
        search: its name.
        best: the trial that the criterion chose of those that were trained in full.
        model: address of its registered model.
        challenger: the alias that points at it.
        valid_lower_bound: of that model, nats per image.
        variance_floor: that the bound was reached with.
        trials: how many there were.
        finished: trained in full.
        pruned: stopped at a rung.
        failed: diverged, or died too often; they take no place from others at the rungs.
        reused: of all these, those that were taken over from an earlier search.
        epochs_trained: by all trials.
        epochs_of_full_grid: what training all of them in full would have taken.
        device_seconds: that trials have trained for, all workers added up.
        trial_start_seconds: mean time from a stretch of training being scheduled to its first step, after each slot's
            first; `None` if there was no other.
        mlflow_run: the search in the browser; its trials are nested under it.
        folder: state, trials and TensorBoard's events.
        tensorboard: the folder of the events.
        report: the page that shows all this, and was there from the first minute.
    """

    search: str
    best: str
    model: str
    challenger: str
    valid_lower_bound: float
    variance_floor: float
    trials: int
    finished: int
    pruned: int
    failed: int
    reused: int
    epochs_trained: int
    epochs_of_full_grid: int
    device_seconds: float
    trial_start_seconds: float | None
    mlflow_run: str
    folder: str
    tensorboard: str
    report: str


def search(
    points: Sequence[Point],
    dataset: str,
    store: str,
    name: str,
    halving: HalvingConfig,
    resources: TrialResources,
    *,
    resume: bool = False,
    reuse: str | None = None,
) -> SearchResult:
    """Trains the points of a grid as far as successive halving lets them, and registers the best as `challenger`.

    Args:
        points: what to try; all trained for the same number of epochs, and validated after the same ones.
        dataset: address of the staged data set.
        store: where searches are kept.
        name: of the search.
        halving: how trials are compared and pruned.
        resources: what every trial runs on.
        resume: go on with the search of that name.
        reuse: name of an earlier search in the same place, from which trials of the same configuration are taken over.

    Raises:
        UserError: something that the user can mend is wrong; nothing was started, or what there is can be resumed.
    """
    check_name(name, "search")
    dataset, store = storage.absolute(dataset), storage.absolute(store)
    for uri in (dataset, store):
        storage.check_reachable(uri)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    if resources.criterion == "parzen" and any(point.config.parzen_bandwidth is None for point in points):
        raise UserError("the criterion parzen needs Parzen-window estimates: give --parzen-bandwidth")
    _check_points(points, dataset, manifest, resources.num_workers)
    folder = storage.join(store, name)
    earlier = read_json(storage.join(folder, SEARCH_FILE))
    data = {"dataset": dataset, "dataset_fingerprint": manifest.origin.fingerprint}
    asked: dict[str, Any] = {
        "points": {point.name: point.config.to_json() for point in points},
        "halving": asdict(halving),
        **{field: getattr(resources, field) for field in _LASTING},
        **data,
    }
    # As it will be read again: JSON has no tuples.
    asked = json.loads(json.dumps(asked))
    if earlier is None and resume:
        raise UserError(f"there is no search {name} in {store} to resume; leave --resume out to start it")
    if earlier is not None:
        _check_resumable(earlier, asked, name, resume)
        if "result" in earlier:
            result = SearchResult(**earlier["result"])
            run = TrackedRun(**earlier["mlflow_run"])
            if run.status() != "FINISHED":
                # It was interrupted after it had found its result.
                _delete_dropped(folder, asked["points"], result.best, resources.keep)
                tracking.set_status(run, "FINISHED")
                _write_report(run, folder)
            return result
    common = points[0].config
    state = SearchState.new(folder, halving, [point.name for point in points], common.epochs, common.validate_every)
    in_common = {}
    if earlier is not None:
        state.restore()
    elif reuse is not None:
        in_common = earlier_trials(storage.join(store, reuse), points, data["dataset_fingerprint"], resources.criterion)
    cluster.connect()
    cluster.check_capacity(resources.num_workers, resources.per_worker)
    slots = _slots(cluster.most_workers(resources.per_worker), len(points), resources)
    # A folder that cannot be written to is found out before anything is started.
    state.save()
    with tracking.owned_run(
        registry.model_name(manifest.name),
        name,
        params={
            **data,
            "points": len(points),
            "epochs": common.epochs,
            **asdict(halving),
        },
        tags={
            SEARCH_TAG: name,
            **_source_tags(),
            "folder": folder,
            **{key: str(value) for key, value in asdict(resources).items()},
        },
        resume=TrackedRun(**earlier["mlflow_run"]) if earlier else None,
    ) as run:
        runs = _trial_runs(points, run, folder, data, earlier)
        take_over(in_common, state, runs, folder)
        state.save()
        record = {**asked, "mlflow_run": asdict(run), "trial_runs": {name: asdict(run) for name, run in runs.items()}}
        write_json(storage.join(folder, SEARCH_FILE), record)
        run.log_file("search.json", json.dumps(record, indent=2).encode())
        run.log_file("manifest.json", manifest.to_json().encode())
        trials = _Trials(state, runs, resources, slots)
        specs = {
            point.name: TrialSpec(
                point=point.name,
                config=point.config.to_json(),
                dataset=dataset,
                folder=storage.join(folder, TRIALS_FOLDER, point.name),
                run=asdict(runs[point.name]),
                num_workers=resources.num_workers,
                threads_per_worker=resources.threads_per_worker,
                gpus_per_worker=resources.gpus_per_worker,
                memory_limit=None if resources.shard_memory_mib is None else resources.shard_memory_mib * 2**20,
            )
            for point in points
        }
        trials.settle_ended()
        with _reported(run, folder):
            if not state.ended:
                _tune(trials, specs, resources, folder)
            result = _conclude(trials, specs, manifest, name, run, folder, resources)
        write_json(storage.join(folder, SEARCH_FILE), {**record, "result": asdict(result)})
        _delete_dropped(folder, state.trials, result.best, resources.keep)
    _write_report(run, folder)
    return result


def _slots(most_workers: float, points: int, resources: TrialResources) -> int:
    """Returns how many trials are trained at a time."""
    # A cluster that may grow without limit holds infinitely many workers.
    trials = min(most_workers, points * resources.num_workers) // resources.num_workers
    return min(int(trials), resources.max_concurrent or points)


def _delete_dropped(folder: str, trials: Iterable[str], best: str, keep: Keep) -> None:
    """Deletes what is not kept of trials when a search has its result."""
    for trial in trials:
        if keep == "none" or (keep == "best" and trial != best):
            _delete_checkpoints(folder, trial)


def _check_points(points: Sequence[Point], dataset: str, manifest: Manifest, num_workers: int) -> None:
    compared = {(point.config.epochs, point.config.validate_every) for point in points}
    assert len(compared) == 1, "trials are compared after the same epochs"
    faults = []
    for point in points:
        try:
            check_fit(point.config, dataset, manifest, num_workers)
        except UserError as error:
            faults.append(f"{point.name}: {error}")
    if len(faults) == len(points) and len({fault.partition(": ")[2] for fault in faults}) == 1:
        raise UserError(faults[0].partition(": ")[2])
    if faults:
        raise UserError(f"{len(faults)} of {len(points)} points cannot be trained: {'; '.join(faults)}")


def _check_resumable(earlier: Mapping[str, Any], asked: Mapping[str, Any], name: str, resume: bool) -> None:
    before, now = earlier["points"], asked["points"]
    in_points = {
        point: _differences(before[point], now[point])
        for point in now
        if point in before and before[point] != now[point]
    }
    changed = [f"{point} is new" for point in now if point not in before]
    changed += [f"{point} is gone" for point in before if point not in now]
    common = set.intersection(*map(set, in_points.values())) if in_points else set()
    changed += sorted(common)
    for point, differences in in_points.items():
        if own := [difference for difference in differences if difference not in common]:
            changed.append(f"{point}: {', '.join(own)}")
    changed += _differences(earlier["halving"], asked["halving"])
    lasting = [field for field in _LASTING if field in earlier]
    changed += _differences({field: earlier[field] for field in lasting}, {field: asked[field] for field in lasting})
    if earlier["dataset_fingerprint"] != asked["dataset_fingerprint"]:
        changed.append("the data set holds other images than then")
    if changed:
        raise UserError(
            f"search {name} was started with another grid or other settings: {'; '.join(changed)}; resume it with the "
            f"same ones, or start a new search under another --name, with --reuse {name} for what both have in common"
        )
    if not resume and "result" not in earlier:
        raise UserError(f"search {name} was begun already; give --resume to go on with it, or choose another --name")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    differences = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new)
        elif old != new:
            differences.append(f"{key} was {old} and is now {new}")
    return differences


def _source_tags() -> dict[str, str]:
    return {"mlflow.source.git.commit": tracking.git_commit(), "mlflow.source.name": "jobs.tune"}


def _trial_runs(
    points: Sequence[Point],
    parent: TrackedRun,
    folder: str,
    data: Mapping[str, str],
    earlier: Mapping[str, Any] | None,
) -> dict[str, TrackedRun]:
    """Returns the MLflow run of every trial, nested under the search's; they are created before any trial begins.

    Args:
        points: the trials.
        parent: the search's run.
        folder: the search's folder.
        data: what is to be known of the data set.
        earlier: what was asked for, if the search is resumed.
    """
    if earlier is not None:
        return {name: TrackedRun(**fields) for name, fields in earlier["trial_runs"].items()}
    return {
        point.name: tracking.nested_run(
            parent,
            point.name,
            params={**flat(point.config), **data},
            tags={**_source_tags(), "folder": storage.join(folder, TRIALS_FOLDER, point.name)},
        )
        for point in points
    }


class _Slots:
    """Who has which slot, and how long trials take from getting one to their first step.

    Args:
        count: how many there are.
        processes_are_reused: whether a trial takes over the process of the one before, or has processes of its own.
    """

    def __init__(self, count: int, *, processes_are_reused: bool) -> None:
        self._free = set(range(count))
        self._processes_are_reused = processes_are_reused
        self._slot_of: dict[str, int] = {}
        self._scheduled_at: dict[str, float] = {}
        self._free_since: dict[int, float] = {}
        self._starts: list[float] = []

    def __bool__(self) -> bool:
        """Whether one is free."""
        return bool(self._free)

    def take(self, trial: str) -> None:
        """Gives a free slot to a trial."""
        slot = self._slot_of[trial] = min(self._free)
        self._free.remove(slot)
        self._scheduled_at[trial] = time.time()

    def note_first_step(self, trial: str, result: Mapping[str, Any]) -> None:
        """Notes what a report says of when the trial took its first step."""
        if not result.get(FIRST_STEP_AT) or trial not in self._scheduled_at:
            return
        scheduled_at, free_since = self._scheduled_at.pop(trial), self._free_since.get(self._key(trial, result))
        if free_since is not None:
            self._starts.append(result[FIRST_STEP_AT] - max(scheduled_at, free_since))

    def note_end(self, trial: str, result: Mapping[str, Any]) -> None:
        """Notes that a report was the trial's last."""
        self._free_since[self._key(trial, result)] = time.time()

    def leave(self, trial: str) -> None:
        """Takes a trial's slot back."""
        self._free.add(self._slot_of.pop(trial))

    def _key(self, trial: str, result: Mapping[str, Any]) -> int:
        # Where the cluster holds fewer trials than there are slots, it is a process that they wait for.
        return int(result["pid"]) if self._processes_are_reused else self._slot_of[trial]

    @property
    def start_seconds(self) -> float | None:
        """See `SearchResult.trial_start_seconds`."""
        return mean(self._starts) if self._starts else None


class _Trials:
    """What joins a search's state to Ray Tune and to MLflow: it is asked for trials, and told what becomes of them.

    It is called from within Tune, which would bury what it raised in a traceback of its own, or take it for the failure
    of a trial: instead, the first error is kept in `error`, and ends the search.
    """

    def __init__(
        self, state: SearchState, runs: Mapping[str, TrackedRun], resources: TrialResources, slots: int
    ) -> None:
        self.state = state
        self.runs = runs
        self.keep = resources.keep
        self.max_failures = resources.max_failures
        self.slots = _Slots(slots, processes_are_reused=resources.num_workers == 1)
        self.error: Exception | None = None
        total = len(state.trials) * state.epochs
        done = state.epochs_trained + state.epochs_saved
        self._progress = Progress("search", total, "epochs trained or saved", done=done, interval=10)

    def next(self) -> str | None:
        """Returns the trial that a free slot should train; `None` if there is none now."""
        if self.over or not self.slots:
            return None
        name = None
        with self._keeping_errors():
            name = self.state.next()
            if name is not None:
                tracking.set_status(self.runs[name], "RUNNING")
                self.state.save()
                self.slots.take(name)
        return name if self.error is None else None

    @property
    def over(self) -> bool:
        """Whether no trial is to be trained any more."""
        return self.error is not None or self.state.ended

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def report(self, name: str, result: Mapping[str, Any]) -> bool:
        """Notes what a trial reports; returns whether it is to be trained on."""
        with self._keeping_errors():
            before = self.state.epochs_trained + self.state.epochs_saved
            self.slots.note_first_step(name, result)
            if FAILURE in result:
                ended = self.state.fail(name, result[FAILURE])
            else:
                seconds = result["time_this_iter_s"]
                ended = self.state.report(name, result[EPOCH], result[BOUND], seconds, self._parzen(name, result))
            self._settle(ended)
            self._progress.advance(self.state.epochs_trained + self.state.epochs_saved - before, self._note())
        goes_on = self.error is None and self.state.trials[name].status == "running"
        if not goes_on:
            self.slots.note_end(name, result)
        return goes_on

    def _parzen(self, name: str, result: Mapping[str, Any]) -> float | None:
        """Returns the Parzen-window estimate that belongs to a report, if there is one.

        The last report's own is that of the last epoch's weights, which need not be those of the finished model.
        """
        metrics = result if result[EPOCH] < self.state.epochs else self._outcome(name)["metrics"]
        parzen = metrics.get(PARZEN)
        return None if parzen is None else float(parzen)

    def died(self, name: str, reason: str) -> None:
        """Notes that a trial's processes died."""
        sys.stderr.write(f"{name}: its process died: {reason}\n")
        with self._keeping_errors():
            self._settle(self.state.die(name, reason, self.max_failures))

    def settle_ended(self) -> None:
        """Does what may be undone for trials that ended before this: in another search, or before an interruption."""
        self._settle([name for name, trial in self.state.trials.items() if trial.status in ENDED])

    def _settle(self, names: Sequence[str]) -> None:
        """Writes the state, then does what follows from it for trials that have ended; all of it can be repeated."""
        self.state.save()
        for name in names:
            trial = self.state.trials[name]
            status = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}[trial.status]
            if trial.reason:
                self.runs[name].set_tags({"reason": trial.reason})
            if trial.status == "finished":
                self._log_outcome(name)
            if self.runs[name].status() != status:
                # Set once more, it would end anew.
                tracking.set_status(self.runs[name], status)
            if trial.status == "failed":
                sys.stderr.write(f"{name} failed: {trial.reason}\n")
            # Until a trial was trained in full, one that was pruned may be taken up again.
            if trial.status == "pruned" and self.keep != "all" and self.state.count("finished"):
                _delete_checkpoints(self.state.folder, name)

    def _log_outcome(self, name: str) -> None:
        """Logs the finished model's figures of the test split."""
        outcome = self._outcome(name)
        metrics = {key: value for key, value in outcome["metrics"].items() if key.startswith("test/")}
        self.runs[name].log_metrics([(outcome["best_epoch"], metrics)])

    def _outcome(self, name: str) -> dict[str, Any]:
        """Returns what was found of a finished model."""
        outcome = read_json(storage.join(self.state.folder, TRIALS_FOLDER, name, OUTCOME_FILE))
        assert outcome is not None, "a trial writes its outcome before it reports its last epoch"
        return outcome

    def _note(self) -> str:
        state = self.state
        parts = [
            f"{state.count('running')} running, {state.count('waiting')} waiting, {state.count('pending')} not begun, "
            f"{state.count('pruned')} pruned, {state.count('finished')} finished, {state.count('failed')} failed of "
            f"{len(state.trials)} trials",
            f"{state.epochs_trained:,} epochs trained, {state.epochs_saved:,} saved",
        ]
        if state.best:
            bound, name = state.best
            parts.append(f"best {bound:.2f} nats by {name}")
        return "; ".join(parts)

    def close(self) -> None:
        """Prints the last line of progress."""
        sys.stderr.write(f"search: {self._note()}\n")


def _delete_checkpoints(folder: str, name: str) -> None:
    """Deletes all that a trial needs to go on, and its model; its picture and curves are kept."""
    trial = storage.join(folder, TRIALS_FOLDER, name)
    for file in storage.list_files(trial):
        if file not in (storage.join(trial, SAMPLES_FILE), storage.join(trial, OUTCOME_FILE)):
            storage.delete_file(file)


class _Feed(Searcher):
    """Gives Ray Tune the next stretch of training."""

    def __init__(self, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """Returns the configuration of the next stretch, `None` if there is none now, or that the search is over."""
        if self._trials.over:
            return Searcher.FINISHED
        name = self._trials.next()
        if name is None:
            return None
        self._names[trial_id] = name
        return {"point": name}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Notes that a stretch is over; Tune may say so twice."""
        if (name := self._names.pop(trial_id, None)) is not None:
            self._trials.slots.leave(name)

    def save(self, checkpoint_path: str) -> None:
        """Keeps nothing in Tune's files: a search is resumed from its own state."""
        with open(checkpoint_path, "wb"):  # noqa: PTH123
            pass

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Judge(FIFOScheduler):
    """Tells Ray Tune whether a stretch of training goes on."""

    _supports_buffered_results = False

    def __init__(self, trials: _Trials) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Decides after every report."""
        goes_on = self._trials.report(trial.config["point"], result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ARG002
        """Notes the last report of a trial, which Tune does not ask the scheduler about."""
        name = trial.config["point"]
        if self._trials.state.trials[name].status == "running":
            self._trials.report(name, result)


class _Obituaries(tune.Callback):
    """Notes trials whose processes died. Tune itself retries none: it does not if they die while they are set up."""

    def __init__(self, trials: _Trials) -> None:
        self._trials = trials

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Called where Tune gives a stretch up."""
        lines = str(trial.get_error() or "killed").strip().splitlines()
        self._trials.died(trial.config["point"], f"{lines[-1]:.300}")


class _Events(tune.Callback):
    """Writes what trials report as events for TensorBoard, one curve a trial in however many stretches it is trained.

    They are written to where Tune collects its files, and go to the search's folder with them.
    """

    def __init__(self) -> None:
        self._writers: dict[str, SummaryWriter] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:  # noqa: ARG002
        """Called for every report."""
        name = trial.config["point"]
        if name not in self._writers:
            self._writers[name] = SummaryWriter(Path(trial.storage.experiment_driver_staging_path, "curves", name))
        for metric, value in result.items():
            if "/" in metric and isinstance(value, float):
                self._writers[name].add_scalar(metric, value, result[EPOCH])
        self._writers[name].flush()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Called before Tune copies its files for the last time."""
        for writer in self._writers.values():
            writer.close()


@contextlib.contextmanager
def _reported(run: TrackedRun, folder: str) -> Iterator[None]:
    """Keeps the search's report up to date while the block runs."""
    ended = threading.Event()

    def keep_writing() -> None:
        while not ended.wait(REPORT_EVERY_SECONDS):
            _write_report(run, folder)

    writer = threading.Thread(target=keep_writing, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def _write_report(run: TrackedRun, folder: str) -> None:
    try:
        report([run.run_id], folder)
    except Exception as error:
        # Whatever is wrong with a picture is no reason to lose a search.
        sys.stderr.write(f"the report cannot be written now: {error}\n")


def _tune(trials: _Trials, specs: Mapping[str, TrialSpec], resources: TrialResources, folder: str) -> None:
    trainable: Any = DeviceTrial if resources.num_workers == 1 else GroupTrial
    # The workers of a group bring resources of their own: what is reserved for them twice is never free. Tune wants
    # something to reserve, and a byte of memory is always to be had.
    reserved = resources.per_worker if resources.num_workers == 1 else {"memory": 1.0}
    with _quiet():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, specs=dict(specs)), reserved),
            param_space={},
            tune_config=tune.TuneConfig(
                search_alg=_Feed(trials),
                scheduler=_Judge(trials),
                num_samples=-1,
                reuse_actors=resources.num_workers == 1,
                trial_name_creator=_point_name,
                trial_dirname_creator=_point_name,
            ),
            run_config=tune.RunConfig(
                name=f"{TUNE_FOLDER}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
                storage_path=storage.join(folder, TUNE_FOLDER),
                callbacks=[_Obituaries(trials), _Events()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()
    trials.close()
    if trials.error is not None:
        raise trials.error
    if not trials.state.ended:
        # Tune takes some signals for a wish to end, and returns as if all had been done.
        raise KeyboardInterrupt


def _point_name(trial: Any) -> str:
    return str(trial.config["point"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Tune from drawing tables, from writing CSV and JSON files of every result, and from taking Ctrl-C."""
    # It misses those files when it looks back, and says so of every trial.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _conclude(
    trials: _Trials,
    specs: Mapping[str, TrialSpec],
    manifest: Manifest,
    name: str,
    run: TrackedRun,
    folder: str,
    resources: TrialResources,
) -> SearchResult:
    state = trials.state
    finished = {
        trial: score
        for trial, known in state.trials.items()
        if known.status == "finished" and math.isfinite(score := known.score(resources.criterion))
    }
    if not finished:
        reasons = "; ".join(f"{trial}: {known.reason}" for trial, known in state.trials.items() if known.reason)
        raise UserError(f"no trial of search {name} was trained in full: {reasons}")
    best = max(finished, key=lambda trial: finished[trial])
    spec = specs[best]
    best_run = TrackedRun(**spec.run)
    # As jobs.train leaves them with its runs, for reports.
    best_run.log_file("config.json", json.dumps({"config": spec.config, "dataset": spec.dataset}, indent=2).encode())
    best_run.log_file("manifest.json", manifest.to_json().encode())
    trained = register(
        TrainConfig.from_json(spec.config), manifest, spec.folder, best, best_run, {"search": run.run_id}
    )
    result = SearchResult(
        search=name,
        best=best,
        model=trained.model,
        challenger=trained.challenger,
        valid_lower_bound=trained.valid_lower_bound,
        variance_floor=trained.variance_floor,
        trials=len(state.trials),
        finished=state.count("finished"),
        pruned=state.count("pruned"),
        failed=state.count("failed"),
        reused=sum(trial.reused > 0 for trial in state.trials.values()),
        epochs_trained=state.epochs_trained,
        epochs_of_full_grid=len(state.trials) * state.epochs,
        device_seconds=resources.num_workers * sum(trial.seconds for trial in state.trials.values()),
        trial_start_seconds=trials.slots.start_seconds,
        mlflow_run=run.uri,
        folder=folder,
        tensorboard=storage.join(folder, TUNE_FOLDER),
        report=storage.join(folder, REPORT_FILE),
    )
    run.log_metrics(
        [
            (
                0,
                {
                    "search/epochs_trained": float(result.epochs_trained),
                    "search/epochs_over_grid": result.epochs_trained / result.epochs_of_full_grid,
                    "search/device_seconds": result.device_seconds,
                    "search/trial_start_seconds": result.trial_start_seconds or math.nan,
                    "valid/lower_bound": result.valid_lower_bound,
                },
            )
        ]
    )
    run.set_tags({"best": best, "model": result.model})
    return result
