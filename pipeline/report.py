"""The report of one or several training runs and searches: what was measured, beside the paper, and what it looks like.

All of it is read from MLflow (parameters, curves, records of evaluations, pictures) and drawn from the registered model
and the staged data set, and put on one page that opens from disk (`pipeline.report_page`).
"""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from infusion_core.inpainting import inpaint
from infusion_core.noise import GeneratorNoise
from infusion_core.pixels import dequantise
from infusion_core.sampling import sample_batches
from pipeline import model_package, registry, storage, tracking
from pipeline.curves import estimate_curve, figure_png, rate_curves, training_curves
from pipeline.errors import UserError
from pipeline.figures import (
    infusion_chains_picture,
    inpainting_picture,
    neighbours_picture,
    png,
    samples_picture,
    sampling_chains_picture,
    stacked,
)
from pipeline.inpainting import read_mask
from pipeline.manifest import Manifest
from pipeline.measurements import EvaluationRecord, Measurement
from pipeline.nearest_neighbours import nearest_neighbours
from pipeline.paper import TABLES, PaperTable
from pipeline.registry import RegisteredModel
from pipeline.report_page import NOT_MEASURED, Listing, Picture, Section, Table, number, render, setting
from pipeline.search_report import gather_search, search_sections
from pipeline.shards import load_rows
from pipeline.tracking import TrackedRun
from pipeline.training import check_images

REPORT_FILE = "report.html"
ROWS = 8
SAMPLES = 50
NEIGHBOURS = 5
COMPLETIONS = 6
SCHEDULE_ROWS = 3
# Of the pictures that were logged during training, so many are shown, from the first to the last.
LOGGED_PICTURES = 4


@dataclass(frozen=True)
class ReportResult:
    """Where the report is.

    Attributes:
        report: the page.
        mlflow_run: the run that it was logged to, the first of those reported.
        runs: how many runs are on it.
    """

    report: str
    mlflow_run: str
    runs: int


@dataclass(frozen=True)
class ReportedRun:
    """A run, and what was kept with it.

    Attributes:
        run: as MLflow describes it.
        model: the version that it registered; `None` if it has not ended.
        records: of its evaluations.
        history: the metrics of every epoch, with `epoch`.
        config: `config.json` of the run, as text.
        manifest: `manifest.json` of the run's data set, as text.
    """

    run: Run
    model: RegisteredModel | None
    records: tuple[EvaluationRecord, ...]
    history: tuple[Mapping[str, float], ...]
    config: str
    manifest: str

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.info.run_name or self.run.info.run_id)

    @property
    def tracked(self) -> TrackedRun:
        """The run to write to."""
        return TrackedRun(self.run.info.run_id, self.run.info.experiment_id)


def report(runs: Sequence[str], destination: str, *, dataset: str | None = None, seed: int = 0) -> ReportResult:
    """Writes `report.html`, and logs it to the first run.

    Args:
        runs: ids of MLflow runs, of trainings or of searches, or models (`models:/NAME@ALIAS`, `models:/NAME/VERSION`)
            that trainings registered.
        destination: folder to write to, on S3 or local.
        dataset: address of the staged data set that pictures are drawn with; that of each run by default.
        seed: of the pictures.

    Raises:
        UserError: a run does not exist, was not a training, or its data set cannot be read.
    """
    storage.check_reachable(destination)
    tracking.check_reachable()
    searches = [search for spec in runs if (search := gather_search(spec)) is not None]
    searched = {search.tracked.run_id for search in searches}
    reported = [gather(spec) for spec in runs if spec not in searched]
    sections = [section for search in searches for section in search_sections(search)]
    if len(reported) > 1:
        sections.append(comparison(reported, seed))
    sections += [section for run in reported for section in run_sections(run, dataset, seed)]
    owner = (searches + reported)[0]
    names = ", ".join(each.name for each in searches + reported)
    lead = f"Infusion training of {names}; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    page = render(f"Report: {names}", lead, sections).encode()
    address = storage.join(destination, REPORT_FILE)
    storage.write_bytes(address, page)
    owner.tracked.log_file(REPORT_FILE, page)
    return ReportResult(address, owner.tracked.uri, len(runs))


def gather(spec: str) -> ReportedRun:
    """Reads what MLflow keeps of a run.

    Raises:
        UserError: there is no such run or model, or it is not a training's.
    """
    client = MlflowClient()
    run_id = registry.find(spec).run_id if spec.startswith("models:/") else spec
    with tracking.mlflow_errors(f"look up run {run_id}"):
        run = client.get_run(run_id)
    tracked = TrackedRun.of(run_id)
    config, manifest = tracked.read_file("config.json"), tracked.read_file("manifest.json")
    if config is None or manifest is None:
        raise UserError(
            f"run {tracked.uri} is not that of a training: it has no config.json; name a run of jobs.train or jobs.tune"
        )
    with tracking.mlflow_errors(f"read the metrics and artifacts of run {run_id}"):
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for metric in ("train/objective", "valid/lower_bound", "valid/parzen"):
            for point in client.get_metric_history(run_id, metric):
                rows[point.step][metric] = point.value
        paths = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    records = [
        EvaluationRecord.from_json(content, f"{path} of run {tracked.uri}")
        for path in sorted(paths)
        if (content := tracked.read_file(path)) is not None
    ]
    return ReportedRun(
        run=run,
        model=RegisteredModel.of(versions[0]) if versions else None,
        records=tuple(records),
        history=tuple({"epoch": epoch, **metrics} for epoch, metrics in sorted(rows.items())),
        config=config.decode(),
        manifest=manifest.decode(),
    )


def run_sections(reported: ReportedRun, dataset: str | None, seed: int) -> list[Section]:
    """Returns what the page says of a run: a section for the run itself, and one for each of its evaluations."""
    params, tags = reported.run.data.params, reported.run.data.tags
    pictures = []
    denoising = int(params.get("denoising_epochs", 0))
    changes = f" The objective is denoising up to epoch {denoising}, then {params['objective']}." if denoising else ""
    if reported.history:
        pictures.append(
            Picture(
                "Figure 3: training curves",
                "The training objective and the lower bound of the validation split, over the epochs." + changes,
                figure_png(training_curves(reported.history)),
                pixels=False,
            )
        )
    pictures += _drawn(reported, dataset or params["dataset"], seed)
    facts = [
        ("MLflow run", reported.tracked.uri),
        ("status", reported.run.info.status),
        ("model", reported.model.uri if reported.model else "not registered yet"),
        ("data set", params["dataset"]),
        ("commit", tags.get("mlflow.source.git.commit", "unknown")),
        ("epochs", params["epochs"]),
        ("objective", params.get("objective", "denoising")),
        (
            "chain",
            f"T = {params['num_steps']}, α⁽⁰⁾ = {params['initial_rate']}, ω = {params['rate_increment']}, "
            f"variance floor {params['variance_floor']}, target variance {params['target_variance']}",
        ),
    ]
    listings = [
        Listing("Resolved configuration", reported.config),
        Listing("Manifest of the data set", _without_long_lists(reported.manifest)),
    ]
    tables = [table for record in reported.records for table in (measured(record), *repetitions(record))]
    manifest = Manifest.from_json(reported.manifest)
    # Only the test split of the run's own data is what the paper's tables are of.
    own = [
        measurement
        for record in reported.records
        if record.split == "test" and record.dataset_fingerprint == manifest.origin.fingerprint
        for measurement in record.measurements
    ]
    tables += [beside_the_paper(table, manifest.name, own) for table in TABLES]
    for record in reported.records:
        if estimate := record.find("importance_sampling"):
            pictures.append(
                Picture(
                    f"Importance sampling, {record.split} split",
                    "The estimate over the number of chains an image, and how many weights it rests on in effect.",
                    figure_png(estimate_curve(estimate.details["curve"])),
                    pixels=False,
                )
            )
    return [Section(reported.name, facts, tables, pictures, listings)]


def measured(record: EvaluationRecord) -> Table:
    """Returns the table of an evaluation's figures."""
    rows = [
        (
            False,
            [
                measurement.name,
                _figure(measurement),
                number(measurement.details.get("bits_per_dimension")),
                setting(measurement.details.get("variance_floor")),
                setting(measurement.details.get("output_variance")),
                f"{measurement.images:,}",
                number(measurement.details.get("real_data")),
            ],
        )
        for measurement in record.measurements
    ]
    return Table(
        f"Evaluation of the {record.split} split",
        f"{record.model} on {record.dataset}; {_measured_by(record)}. Log-likelihoods are in nats per image of "
        "dequantised pixels, ± the standard error over the images, or over the repetitions of Table 2's protocol. Each "
        "stands beside the variance floor that it was reached with, which caps it, as the output variance does where "
        "there is one for all pixels. An importance-sampling estimate is itself a lower bound in expectation.",
        ("figure", "value", "bits per dimension", "variance floor", "output variance", "images", "real data"),
        rows,
    )


def repetitions(record: EvaluationRecord) -> list[Table]:
    """Returns the table of an evaluation by Table 2's protocol, if there was one."""
    measurement = record.find("table_2")
    if measurement is None:
        return []
    details = measurement.details
    rows = [
        (
            False,
            [
                str(row["estimate"]).replace("_", " "),
                str(row["split"]),
                f"{row['images']:,}",
                f"{number(row['mean'])} ± {number(row['deviation'])}",
            ],
        )
        for row in details["rows"]
    ]
    note = (
        f"Mean and standard deviation over {details['repetitions']} repetitions with new noise; importance sampling "
        f"with k = {details['num_chains']:,}; variance floor {setting(details['variance_floor'])}, or output variance "
        f"{setting(details['output_variance'])} where isotropic. Nats per image."
    )
    return [Table("Table 2's protocol", note, ("estimate", "split", "images", "mean"), rows)]


def _measured_by(record: EvaluationRecord) -> str:
    """Says by which seeds and commits the figures of a record came about."""
    seeds = sorted({measurement.seed for measurement in record.measurements})
    commits = sorted({measurement.commit for measurement in record.measurements})
    return f"seed {', '.join(map(str, seeds))}, commit {', '.join(commits)}"


def beside_the_paper(table: PaperTable, data: str, measurements: Sequence[Measurement]) -> Table:
    """Returns a table of the paper with our figures below the published ones."""
    rows: list[tuple[bool, list[str]]] = [(False, [row.model, row.figure, "", ""]) for row in table.published]
    found = [measurement for measurement in measurements if measurement.judge in table.judges]
    rows += [
        (
            True,
            [
                f"this run on {data}: {measurement.name}",
                _figure(measurement),
                setting(measurement.details.get("variance_floor")),
                f"{measurement.images:,}",
            ],
        )
        for measurement in found
    ]
    if not found:
        rows.append((True, [f"this run on {data}", NOT_MEASURED, "", ""]))
    note = table.note if data == table.data else f"{table.note} This run is of other data: its figures do not compare."
    return Table(table.title, note, ("model", "figure", "variance floor", "images"), rows)


def comparison(reported: Sequence[ReportedRun], seed: int) -> Section:
    """Returns what is to be seen of several runs side by side.

    That is their bounds, curves by infusion rate (Figure 6), and chains of different schedules (Figure 7).
    """
    rows = []
    curves: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = defaultdict(lambda: defaultdict(dict))
    for run in sorted(reported, key=_rates):
        params = run.run.data.params
        bounds = [(row["epoch"], row["valid/lower_bound"]) for row in run.history if "valid/lower_bound" in row]
        tests = [m for record in run.records if record.split == "test" and (m := record.find("lower_bound"))]
        increment, initial = _rates(run)
        rows.append(
            (
                False,
                [
                    run.name,
                    params["num_steps"],
                    setting(initial),
                    setting(increment),
                    number(max((bound for _, bound in bounds), default=None)),
                    _figure(tests[0]) if tests else NOT_MEASURED,
                    setting(float(params["variance_floor"])),
                ],
            )
        )
        if bounds:
            quantity, rate = ("ω", increment) if increment else ("α", initial)
            # Bounds of other data or another floor do not compare.
            panel = f"{run.run.data.params['dataset'].rpartition('/')[2]}, T = {params['num_steps']}, "
            panel += f"floor {float(params['variance_floor']):g}"
            label = f"{rate:g}" if f"{rate:g}" not in curves[quantity][panel] else f"{rate:g}, {run.name}"
            curves[quantity][panel][label] = bounds
    pictures = [
        Picture(
            f"Figure 6: the bound by infusion rate ({'increasing' if quantity == 'ω' else 'constant'} schedules)",
            "Lower bound of the validation split over the epochs, a panel for every number of steps and floor.",
            figure_png(rate_curves(by_steps, quantity)),
            pixels=False,
        )
        for quantity, by_steps in curves.items()
    ]
    pictures += _schedules(reported, seed)
    header = ("run", "T", "α⁽⁰⁾", "ω", "best validation bound", "test bound", "variance floor")
    note = "Nats per image; bounds of different variance floors do not compare."
    return Section("Runs side by side", tables=[Table("Bounds", note, header, rows)], pictures=pictures)


def _rates(reported: ReportedRun) -> tuple[float, float]:
    """Returns rate increment and initial rate."""
    params = reported.run.data.params
    return float(params["rate_increment"]), float(params["initial_rate"])


def _schedules(reported: Sequence[ReportedRun], seed: int) -> list[Picture]:
    """Returns sampling chains of the runs that have a model (Figure 7); nothing if all have the same schedule."""
    models = [(run.name, model_package.load(run.model)) for run in reported if run.model is not None]
    if len({(model.config.initial_rate, model.config.rate_increment) for _, model in models}) < 2:
        return []
    pictures = []
    for name, model in models:
        initial, increment = model.config.initial_rate, model.config.rate_increment
        schedule = f"increasing rates, ω = {increment:g}" if increment else f"a constant rate, α = {initial:g}"
        pictures.append(
            Picture(
                f"Figure 7: {schedule}",
                f"Sampling chains of {name}, drawn with one seed for all runs; the last column is the mean of the last "
                "step.",
                png(sampling_chains_picture(model, GeneratorNoise.from_seed(seed), chains=SCHEDULE_ROWS)),
            )
        )
    return pictures


@torch.no_grad()
def _drawn(reported: ReportedRun, dataset: str, seed: int) -> list[Picture]:
    """Returns pictures drawn from the model and its data, and those that were logged during training."""
    pictures = []
    if reported.model is not None:
        model = model_package.load(reported.model)
        manifest = Manifest.load(dataset)
        config = model.config
        check_images(config, dataset, manifest)
        split = "test" if manifest.rows("test") else "valid"
        images = load_rows(dataset, manifest, split, 0, min(ROWS, manifest.rows(split)))
        middle = (images + 0.5) / config.levels
        samples = torch.cat(list(sample_batches(model, SAMPLES, seed))).clamp(0, 1)
        noise = GeneratorNoise.from_seed(seed)
        near = nearest_neighbours(samples[:ROWS], dataset, manifest, count=NEIGHBOURS)
        known = read_mask("top", config.image_shape[0], config.image_shape[1])
        completed = inpaint(model, middle, known, seed, num_completions=COMPLETIONS)
        target = dequantise(images, config.levels, noise)
        pictures = [
            Picture(
                "Figure 1: sampling chains",
                "A chain a row, from the prior's noise on the left; the last column is the mean of the last step.",
                png(sampling_chains_picture(model, noise, chains=ROWS)),
            ),
            Picture("Samples", "Means of the last step of as many chains.", png(samples_picture(samples))),
            Picture(
                "Figure 4: samples and their nearest training images",
                "If a sample were its neighbour, the model would have learnt its data by heart.",
                png(neighbours_picture(samples[:ROWS], (near.images + 0.5) / config.levels)),
            ),
            Picture(
                "Figure 5: inpainting",
                f"Images of the {split} split, what was known of them, and what the model made of the rest.",
                png(inpainting_picture(middle, known, completed)),
            ),
            Picture(
                "Figure 8: infusion chains with their targets",
                f"Chains towards images of the {split} split: what is infused of the target grows on the way.",
                png(infusion_chains_picture(model, target, noise)),
            ),
        ]
    if logged := _logged(reported.tracked, "infusion_chains"):
        pictures.append(
            Picture(
                "Figure 2: infusion chains over the epochs",
                "The same targets and the same noise, as training goes on.",
                png(stacked(logged)),
            )
        )
    return pictures


def _logged(run: TrackedRun, kind: str) -> dict[str, Image.Image]:
    """Returns some of the pictures of a kind that were logged during training, by epoch."""
    with tracking.mlflow_errors(f"list the pictures of run {run.run_id}"):
        paths = sorted(file.path for file in MlflowClient().list_artifacts(run.run_id, f"pictures/{kind}"))
    if len(paths) > LOGGED_PICTURES:
        step = (len(paths) - 1) / (LOGGED_PICTURES - 1)
        paths = [paths[round(i * step)] for i in range(LOGGED_PICTURES)]
    pictures: dict[str, Image.Image] = {}
    for path in paths:
        content = run.read_file(path)
        if content is not None:
            epoch = int(path.rpartition("-")[2].removesuffix(".png"))
            pictures[f"after epoch {epoch}"] = Image.open(io.BytesIO(content))
    return pictures


def _figure(measurement: Measurement) -> str:
    """Returns a figure with its standard error, to as many digits as the error leaves."""
    if measurement.standard_error is None:
        return number(measurement.value)
    return f"{number(measurement.value)} ± {number(measurement.standard_error)}"


def _without_long_lists(text: str) -> str:
    """Returns JSON with its long lists, the sums over every pixel, cut short."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [*map(cut, value[:8]), f"… {len(value) - 8} more"] if len(value) > 8 else list(map(cut, value))
        return value

    return json.dumps(cut(json.loads(text)), indent=2, ensure_ascii=False)
