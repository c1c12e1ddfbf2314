"""The report of real runs: figures, pictures and text on one page that needs nothing else."""

import base64
import dataclasses
import io
import json
import uuid
from collections.abc import Mapping
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from infusion_core.noise import GeneratorNoise
from infusion_core.sampling import sample_batches
from pipeline import model_package, registry, storage, tracking
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.figures import infusion_chains_picture, png, samples_picture, sampling_chains_picture
from pipeline.judges import JudgeConfig
from pipeline.manifest import Manifest
from pipeline.measurements import EvaluationRecord, Measurement, record_path
from pipeline.presets import digits as digits_preset
from pipeline.ray_training import flat
from pipeline.report import beside_the_paper, comparison, gather, measured, report
from pipeline.report_page import NOT_MEASURED, Listing, Picture, Section, Table, render
from pipeline.tracking import TrackedRun
from pipeline.training import TrainConfig, Training

Digits = tuple[str, Manifest]
EPOCHS = 4


class Page(HTMLParser):
    """What a page holds: its words, its pictures, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[Image.Image] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)
        source = attributes.get("src", "")
        if source.startswith("data:image/png;base64,"):
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        elif source or tag in ("script", "link", "iframe"):
            self.fetched.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def short(epochs: int) -> TrainConfig:
    """The preset of the digits with three steps and a small network."""
    config = digits_preset()
    model = dataclasses.replace(config.model, num_steps=3, hidden_sizes=(16,))
    return dataclasses.replace(config, epochs=epochs, validate_every=1, model=model)


@pytest.fixture(scope="module")
def trained(client_env: Mapping[str, str], digits: Digits) -> tuple[TrackedRun, str]:
    """A short training with an increasing rate; the run and its model."""
    return train_bare("<b>hostile</b>", digits, short(EPOCHS))


@pytest.fixture(scope="module")
def trained_at_constant_rate(client_env: Mapping[str, str], digits: Digits) -> tuple[TrackedRun, str]:
    """A short training with a constant rate; the run and its model."""
    config = short(1)
    model = dataclasses.replace(config.model, initial_rate=0.3, rate_increment=0.0)
    return train_bare("constant", digits, dataclasses.replace(config, model=model))


def train_bare(run_name: str, digits: Digits, config: TrainConfig) -> tuple[TrackedRun, str]:
    """Trains by the bare loop, logs and registers as a job does; returns the run and its model."""
    address, manifest = digits
    name = f"infusion-{uuid.uuid4().hex[:8]}"
    with tracking.owned_run("tests", run_name, params={**flat(config), "dataset": address}, tags={}) as run:
        training = Training(config, address, manifest)
        for epoch in training.epochs():
            run.log_metrics([(epoch.epoch, epoch.metrics)])
            picture = infusion_chains_picture(training.model.eval(), torch.rand(2, 1, 8, 8), training.picture_noise())
            run.log_file(f"pictures/infusion_chains/epoch-{epoch.epoch:05}.png", png(picture))
        run.log_file("config.json", json.dumps(config.to_json()).encode())
        run.log_file("manifest.json", manifest.to_json().encode())
        tags = {"dataset_fingerprint": manifest.origin.fingerprint, "best_epoch": str(training.best_epoch)}
        model = model_package.register(training.model.eval(), name, run, tags)
    return run, model.uri


def test_report_of_a_run(trained: tuple[TrackedRun, str], digits: Digits, bucket_uri: str) -> None:
    run, model = trained
    evaluated = evaluate(model, digits[0], ["importance_sampling"], JudgeConfig(images=20, num_chains=(1, 5)))
    result = report([model], bucket_uri, seed=3)
    assert (result.runs, result.mlflow_run) == (1, run.uri)
    content = storage.read_bytes(result.report)
    assert content == run.read_file("report.html")
    page = Page(content.decode())
    assert page.fetched == []
    assert "<b>hostile</b>" in page.text
    record = EvaluationRecord.from_json(run.read_file(record_path("digits", "test")) or b"", "record")
    estimate = record.measurement("importance_sampling")
    for figure in (
        f"{evaluated.lower_bound:,.2f} ± {evaluated.lower_bound_standard_error:,.2f}",
        f"{estimate.value:,.2f} ± {estimate.standard_error:,.2f}",
        f"{evaluated.baseline_log_likelihood:,.2f}",
        f"{evaluated.bits_per_dimension:,.2f}",
        "0.001",
        "importance sampling, k = 5",
        "1350",
        NOT_MEASURED,
        "This run is of other data",
        digits[1].origin.fingerprint,
        '"rate_increment": 0.1',
        run.uri,
    ):
        assert figure in page.text
    # Figures 1, 2, 4, 5 and 8, the samples and two sets of curves; the samples are the model's own, pixel by pixel.
    titles = [title for title in page.words if title.startswith("Figure ")]
    assert [title.partition(":")[0] for title in titles] == [f"Figure {n}" for n in (3, 1, 4, 5, 8, 2)]
    assert len(page.pictures) == 8
    registered = model_package.load(registry.find(model))
    samples = torch.cat(list(sample_batches(registered, 50, 3))).clamp(0, 1)
    expected = np.asarray(samples_picture(samples))
    assert any(np.array_equal(np.asarray(picture.convert("RGB")), expected) for picture in page.pictures)
    # The epochs' infusion chains, one below the other.
    assert any(picture.height == EPOCHS * (22 + 16 + 2 + 2 * 58) for picture in page.pictures)


def test_report_of_several_runs_compares_them(
    trained: tuple[TrackedRun, str],
    trained_at_constant_rate: tuple[TrackedRun, str],
    bucket_uri: str,
) -> None:
    models = [trained[1], trained_at_constant_rate[1]]
    result = report(models, bucket_uri, seed=5)
    page = Page(storage.read_bytes(result.report).decode())
    assert result.runs == 2
    assert "Runs side by side" in page.text
    assert sum(title.startswith("Figure 6") for title in page.words) == 2
    for title, model in zip(
        ("Figure 7: increasing rates, ω = 0.1", "Figure 7: a constant rate, α = 0.3"), models, strict=True
    ):
        assert page.words.count(title) == 1
        loaded = model_package.load(registry.find(model))
        chains = np.asarray(sampling_chains_picture(loaded, GeneratorNoise.from_seed(5), chains=3))
        assert any(np.array_equal(np.asarray(picture.convert("RGB")), chains) for picture in page.pictures)


def test_runs_of_one_schedule_are_not_compared_by_schedule(trained: tuple[TrackedRun, str]) -> None:
    run, model = trained
    pictures = comparison([gather(model), gather(run.run_id)], 0).pictures
    assert [picture.title.partition(":")[0] for picture in pictures] == ["Figure 6"]


def test_runs_that_cannot_be_reported_are_refused(client_env: Mapping[str, str], bucket_uri: str) -> None:
    with pytest.raises(UserError, match="look up run 00000000000000000000000000000000"):
        report(["0" * 32], bucket_uri)
    with tracking.owned_run("tests", "other", params={}, tags={}) as run:
        pass
    with pytest.raises(UserError, match="is not that of a training"):
        report([run.run_id], bucket_uri)
    assert MlflowClient().list_artifacts(run.run_id) == []


def test_page_escapes_what_it_shows() -> None:
    hostile = '"><script>alert(1)</script>&'
    section = Section(
        hostile,
        facts=[(hostile, hostile)],
        tables=[Table(hostile, hostile, (hostile,), [(True, [hostile])])],
        pictures=[Picture(hostile, hostile, png(Image.new("RGB", (3, 2))))],
        listings=[Listing(hostile, hostile)],
    )
    page = Page(render(hostile, hostile, [section]))
    assert page.fetched == []
    assert page.text.count(hostile) == 14
    assert page.pictures[0].size == (3, 2)


def test_our_figures_stand_below_the_papers() -> None:
    from pipeline.paper import TABLES

    ours = Measurement(
        judge="parzen", name="Parzen", value=301.5, standard_error=2.25, unit="nats per image", images=10_000
    )
    table = beside_the_paper(TABLES[0], "mnist", [ours])
    assert [cells[:2] for mine, cells in table.rows if mine] == [["this run on mnist: Parzen", "301.50 ± 2.25"]]
    assert ["infusion training (the paper, unchecked)", "312 ± 1.7"] in [
        list(cells[:2]) for mine, cells in table.rows if not mine
    ]
    (missing,) = [cells for mine, cells in beside_the_paper(TABLES[2], "cifar10", [ours]).rows if mine]
    assert missing[1] == NOT_MEASURED


def test_rates_and_variances_keep_their_digits() -> None:
    measurement = Measurement(
        judge="isotropic_lower_bound",
        name="isotropic",
        value=-253.9,
        standard_error=None,
        unit="nats per image",
        images=100,
        details={"variance_floor": 1.3e-6, "output_variance": 0.0323},
    )
    record = EvaluationRecord(
        model="m", dataset="d", dataset_fingerprint="f", split="test", measurements=(measurement,)
    )
    table = measured(record)
    ((_, cells),) = table.rows
    row = dict(zip(table.header, cells, strict=True))
    assert (row["variance floor"], row["output variance"], row["value"]) == ("1.3e-06", "0.0323", "-253.90")


def test_a_damaged_record_is_refused() -> None:
    for text in ("{", '{"model": "m"}', '{"measurements": [{}]}', "[]"):
        with pytest.raises(UserError, match=r"here: not the record of an evaluation: .*; evaluate the model again"):
            EvaluationRecord.from_json(text, "here")
