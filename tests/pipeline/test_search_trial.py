"""One trial in one process, without Tune: what it reports, what it raises, and what it keeps."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest

from infusion_core.model import ModelConfig
from pipeline.errors import ServiceError
from pipeline.manifest import Manifest
from pipeline.search_trial import FAILURE, DeviceTrial, TrialSpec
from pipeline.train_worker import final_metrics
from pipeline.training import TrainConfig, Training

CONFIG = TrainConfig(
    model=ModelConfig(image_shape=(8, 8, 1), levels=17, num_steps=2, hidden_sizes=(8,)), epochs=2, global_batch=512
)


def trial(*specs: TrialSpec) -> DeviceTrial:
    """The first trial, in a process that knows of the others."""
    opened = DeviceTrial.__new__(DeviceTrial)
    opened.setup({"point": specs[0].point}, {spec.point: spec for spec in specs})
    return opened


def spec(dataset: str, folder: Path, **fields: Any) -> TrialSpec:
    config = dataclasses.replace(CONFIG, **fields).to_json()
    return TrialSpec("a", config, dataset, str(folder), {"run_id": "0" * 32, "experiment_id": "1"})


@pytest.fixture
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's address is one where nothing answers, and it is asked once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_storage_that_fails_is_not_the_trials_failure(staged_digits: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match=r"cannot read .*checkpoint\.json"):
        trial(spec(staged_digits, tmp_path / "file" / "trial"))


def test_a_tracking_server_that_fails_is_not_the_trials_failure(
    no_mlflow: None, staged_digits: str, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match=r"on the MLflow server at http://127\.0\.0\.1:9"):
        trial(spec(staged_digits, tmp_path)).step()
    # What could not be logged is trained again.
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_trained_fails(no_mlflow: None, staged_digits: str, tmp_path: Path) -> None:
    assert "the training diverged" in trial(spec(staged_digits, tmp_path, learning_rate=1e39)).step()[FAILURE]
    assert "cannot be shared" in trial(spec(staged_digits, tmp_path, global_batch=1)).step()[FAILURE]


def test_a_trial_leaves_nothing_behind_in_its_process(staged_digits: str, tmp_path: Path) -> None:
    other = dataclasses.replace(spec(str(tmp_path / "none"), tmp_path), point="b")
    opened = trial(spec(staged_digits, tmp_path), other)
    next(opened._epochs)
    assert opened._training is not None
    images = weakref.ref(opened._training.images)
    # It is let go before the next one is built, which fails here.
    opened.reset_config({"point": "b"})
    assert "not a staged data set" in opened.step()[FAILURE]
    assert images() is None


def test_the_parzen_window_estimate_is_that_of_the_finished_model(staged_digits: str) -> None:
    config = dataclasses.replace(CONFIG, parzen_bandwidth=0.2, figures_every=1)
    training = Training(config, staged_digits, Manifest.load(staged_digits))
    epochs = training.epochs()
    first = next(epochs).metrics["valid/parzen"]
    # Whatever comes after the first epoch is worse.
    training.best_bound = float("inf")
    last = next(epochs).metrics["valid/parzen"]
    assert final_metrics(training, test=False)["valid/parzen"] == pytest.approx(first)
    assert last != pytest.approx(first)
