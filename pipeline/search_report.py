"""What a report says of a search: its trials, their curves, what the rate does to them, and what pruning saved.

It can be drawn while the search runs: all of it is read from the search's folder and from MLflow.
"""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline import storage, tracking
from pipeline.curves import bounds_by_rate, bounds_by_sample_quality, figure_png, optimum_by_steps, rate_curves
from pipeline.figures import png, stacked
from pipeline.paper import OPTIMAL_RATES
from pipeline.report_page import NOT_MEASURED, Listing, Picture, Section, Table, number, setting
from pipeline.search_state import SAMPLES_FILE, SEARCH_TAG, TRIALS_FOLDER, Trial, read_state
from pipeline.tracking import TrackedRun
from pipeline.training import TrainConfig


@dataclass(frozen=True)
class ReportedTrial:
    """A trial of a search.

    Attributes:
        name: the trial's name.
        config: the training that it is.
        state: what the search knows of it.
        history: the metrics of every epoch, with `epoch`.
        samples: means that its last checkpoint draws, if it came so far.
    """

    name: str
    config: TrainConfig
    state: Trial
    history: tuple[Mapping[str, float], ...]
    samples: Image.Image | None

    @property
    def kind(self) -> str:
        """What the schedule is called: increasing or constant."""
        return "increasing" if self.config.model.rate_increment else "constant"

    @property
    def rate(self) -> float:
        """What the schedule is searched by: its increment ω, or its constant rate α."""
        return self.config.model.rate_increment or self.config.model.initial_rate

    @property
    def bound(self) -> float | None:
        """The best validation bound, nats per image."""
        return self.state.best_bound

    @property
    def parzen(self) -> float | None:
        """The Parzen-window estimate of the finished model, or else the last that was made."""
        finished = self.state.parzen if self.state.status == "finished" else None
        return self.last("valid/parzen") if finished is None else finished

    def last(self, metric: str) -> float | None:
        """Returns the last value of a metric."""
        return next((row[metric] for row in reversed(self.history) if metric in row), None)


@dataclass(frozen=True)
class ReportedSearch:
    """A search and its trials.

    Attributes:
        run: as MLflow describes it.
        record: what was asked for.
        manifest: of the data set, as text.
        trials: its trials.
    """

    run: Run
    record: Mapping[str, Any]
    manifest: str
    trials: tuple[ReportedTrial, ...]

    @property
    def name(self) -> str:
        """The search's name."""
        return str(self.run.data.tags[SEARCH_TAG])

    @property
    def tracked(self) -> TrackedRun:
        """The run to write to."""
        return TrackedRun(self.run.info.run_id, self.run.info.experiment_id)


def gather_search(run_id: str) -> ReportedSearch | None:
    """Reads what is kept of a search; returns `None` if the run of that id is not a search's.

    Raises:
        UserError: there is no such run, or its files cannot be read.
    """
    if run_id.startswith("models:/"):
        return None
    client = MlflowClient()
    with tracking.mlflow_errors(f"look up run {run_id}"):
        run = client.get_run(run_id)
    if SEARCH_TAG not in run.data.tags:
        return None
    tracked, folder = TrackedRun.of(run_id), run.data.tags["folder"]
    record = json.loads(tracked.read_file("search.json") or b"{}")
    state = read_state(folder)
    known = state["trials"] if state else {}
    trials = []
    for name, fields in record["points"].items():
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        with tracking.mlflow_errors(f"read the metrics of trial {name}"):
            for metric in ("train/objective", "valid/lower_bound", "valid/parzen", "test/lower_bound"):
                for point in client.get_metric_history(record["trial_runs"][name]["run_id"], metric):
                    rows[point.step][metric] = point.value
        trials.append(
            ReportedTrial(
                name=name,
                config=TrainConfig.from_json(fields),
                state=Trial(**known.get(name, {})),
                history=tuple({"epoch": epoch, **metrics} for epoch, metrics in sorted(rows.items())),
                samples=_picture(storage.join(folder, TRIALS_FOLDER, name, SAMPLES_FILE)),
            )
        )
    return ReportedSearch(run, record, (tracked.read_file("manifest.json") or b"").decode(), tuple(trials))


def _picture(address: str) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(storage.read_bytes(address)))
    except FileNotFoundError:
        return None


def search_sections(search: ReportedSearch) -> list[Section]:
    """Returns what the page says of a search."""
    tags, halving = search.run.data.tags, search.record["halving"]
    epochs = max(trial.config.epochs for trial in search.trials)
    trained, full = sum(trial.state.epochs_trained for trial in search.trials), epochs * len(search.trials)
    seconds = sum(trial.state.seconds for trial in search.trials) * int(tags.get("num_workers", "1"))
    facts = [
        ("MLflow run", search.tracked.uri),
        ("status", search.run.info.status),
        ("best", f"{tags['best']}, registered as {tags['model']}" if "best" in tags else "not known yet"),
        ("data set", search.record["dataset"]),
        ("commit", tags.get("mlflow.source.git.commit", "unknown")),
        ("pruning", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in halving.items())),
        ("epochs", f"{trained:,} trained, of {full:,} that the full grid would take ({100 * trained / full:.0f}%)"),
        ("device-hours", f"{seconds / 3600:.2f} trained; the full grid would take about {_full_hours(search):.2f}"),
        ("curves", f"tensorboard --logdir {tags['folder']}/tune"),
    ]
    tables = [_trials_table(search), *_seeds_table(search)]
    listings = [Listing("What was asked for", json.dumps({**search.record, "trial_runs": "…"}, indent=2))]
    return [Section(f"Search {search.name}", facts, tables, _pictures(search), listings)]


def _full_hours(search: ReportedSearch) -> float:
    """Returns device-hours of the full grid, by the seconds an epoch of each T took."""
    workers = int(search.run.data.tags.get("num_workers", "1"))
    hours = 0.0
    for num_steps in {trial.config.model.num_steps for trial in search.trials}:
        same = [trial for trial in search.trials if trial.config.model.num_steps == num_steps]
        epochs = sum(trial.state.epochs_trained for trial in same)
        if epochs:
            seconds = sum(trial.state.seconds for trial in same) / epochs
            hours += workers * seconds * sum(trial.config.epochs for trial in same) / 3600
    return hours


def _trials_table(search: ReportedSearch) -> Table:
    """Returns every trial with its figures, the best first of each T (Table 4)."""
    schedule = ("num_steps", "initial_rate", "rate_increment")
    fields = [field for field in _searched_fields(search) if field not in schedule]
    ordered = sorted(search.trials, key=lambda trial: (trial.config.model.num_steps, -(trial.bound or -1e300)))
    best = search.run.data.tags.get("best")
    rows = []
    for trial in ordered:
        model, resolved = trial.config.model, _resolved(trial.config)
        status = " ".join(
            [trial.state.status, *filter(None, [trial.state.reason, "(taken over)" if trial.state.reused else ""])]
        )
        rows.append(
            (
                trial.name == best,
                [
                    trial.name,
                    str(model.num_steps),
                    setting(model.initial_rate),
                    setting(model.rate_increment),
                    *(str(resolved[field]) for field in fields),
                    number(trial.bound) or NOT_MEASURED,
                    number(trial.last("test/lower_bound")) or NOT_MEASURED,
                    number(trial.parzen) or NOT_MEASURED,
                    str(trial.state.epoch),
                    setting(model.variance_floor),
                    status,
                ],
            )
        )
    header = ("trial", "T", "α⁽⁰⁾", "ω", *fields, "bound", "test bound", "Parzen", "epochs", "variance floor", "status")
    paper = ", ".join(f"{rate:g} at T = {steps}" for steps, rate in OPTIMAL_RATES.items())
    note = (
        "Best lower bound of the validation split, nats per image, that of the test split for trials that were trained "
        "in full, and the Parzen-window estimate of the finished model, or else the last one. Trials that "
        "were pruned were trained for fewer epochs: their bounds are lower for that too. The paper's best rates: "
        f"{paper}; its bounds (Table 4) are not transcribed."
    )
    return Table("Trials", note, header, rows)


def _seeds_table(search: ReportedSearch) -> list[Table]:
    """Returns mean and spread over the seeds, if seeds were searched over."""
    if "seed" not in _searched_fields(search):
        return []
    groups: dict[str, list[ReportedTrial]] = defaultdict(list)
    for trial in search.trials:
        same = "-".join(part for part in trial.name.split("-") if not part.startswith("seed="))
        groups[same].append(trial)
    rows = []
    for name, trials in groups.items():
        bounds = [trial.bound for trial in trials if trial.bound is not None and trial.state.status == "finished"]
        spread = f" ± {number(stdev(bounds))}" if len(bounds) > 1 else ""
        rows.append((False, [name, f"{number(mean(bounds))}{spread}" if bounds else NOT_MEASURED, str(len(bounds))]))
    note = "Mean and standard deviation of the best validation bound over the seeds that were trained in full."
    return [Table("Over the seeds", note, ("point", "bound", "seeds"), rows)]


def _resolved(config: TrainConfig) -> dict[str, Any]:
    fields = config.to_json()
    return {**fields.pop("model"), **fields}


def _searched_fields(search: ReportedSearch) -> list[str]:
    """Returns the fields that differ among the trials."""
    resolved = [_resolved(trial.config) for trial in search.trials]
    return [field for field in resolved[0] if len({str(fields[field]) for fields in resolved}) > 1]


def _pictures(search: ReportedSearch) -> list[Picture]:
    pictures = []
    for kind, quantity in (("increasing", "ω"), ("constant", "α")):
        curves: dict[str, dict[str, Sequence[tuple[float, float]]]] = defaultdict(dict)
        for trial in _by_rate(search, kind):
            points = [(row["epoch"], row["valid/lower_bound"]) for row in trial.history if "valid/lower_bound" in row]
            if points:
                panel = f"T = {trial.config.model.num_steps}"
                label = f"{trial.rate:g}"
                curves[panel][label if label not in curves[panel] else trial.name] = points
        if curves:
            pictures.append(
                Picture(
                    f"Figure 6: the bound by infusion rate ({kind} schedules)",
                    "Lower bound of the validation split over the epochs; a curve that ends early was pruned.",
                    figure_png(rate_curves(curves, quantity)),
                    pixels=False,
                )
            )
    by_rate: dict[int, dict[str, list[tuple[float, float, bool]]]] = defaultdict(lambda: defaultdict(list))
    for kind in ("increasing", "constant"):
        for trial in _by_rate(search, kind):
            if trial.bound is not None:
                finished = trial.state.status == "finished"
                by_rate[trial.config.model.num_steps][kind].append((trial.rate, trial.bound, finished))
    if by_rate:
        pictures.append(
            Picture(
                "Figure 7: constant against increasing rates",
                "Best validation bound over the rate: ω of increasing schedules, α of constant ones. Hollow: pruned.",
                figure_png(bounds_by_rate(by_rate, OPTIMAL_RATES)),
                pixels=False,
            )
        )
    if len(by_rate) > 1:
        pictures.append(
            Picture(
                "The best rate by the number of steps",
                "The rate with the highest bound for each T; crosses: the paper's (Table 4).",
                figure_png(optimum_by_steps(by_rate, OPTIMAL_RATES)),
                pixels=False,
            )
        )
    judged = [
        (trial.name, trial.bound, parzen)
        for trial in search.trials
        if trial.bound is not None and (parzen := trial.parzen) is not None
    ]
    if judged:
        pictures.append(
            Picture(
                "Bound against sample quality",
                "The bound alone misleads at small T: beside it stands the Parzen-window estimate of the samples. "
                "Ringed: trials that no other beats in both (the Pareto front).",
                figure_png(bounds_by_sample_quality(judged)),
                pixels=False,
            )
        )
    samples = {
        f"{trial.name}: {number(trial.bound)} nats after {trial.state.epoch} epochs": trial.samples
        for trial in sorted(search.trials, key=lambda trial: (trial.config.model.num_steps, trial.kind, trial.rate))
        if trial.samples is not None
    }
    if samples:
        caption = "Means of the last step, by each trial's last checkpoint."
        pictures.append(Picture("Sample means by rate", caption, png(stacked(samples))))
    return pictures


def _by_rate(search: ReportedSearch, kind: str) -> list[ReportedTrial]:
    return sorted((trial for trial in search.trials if trial.kind == kind), key=lambda trial: trial.rate)
