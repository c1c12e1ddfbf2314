"""Every job, submitted with `ray job submit` to a real cluster with a real S3 server and a real MLflow server."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from pipeline import demo, storage, tracking
from pipeline.manifest import Manifest
from pipeline.training import TrainConfig, Training, Worker

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--preset", "digits", "--hidden-sizes", "32,32", "--num-steps", "3", "--global-batch", "128"]

Submit = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def submit(client_env: Mapping[str, str]) -> Submit:
    """Submits a job as a user does, and returns the JSON object that it ended with."""

    def run(job: str, *words: str) -> dict[str, Any]:
        return demo.submit(
            f"{job}-{uuid.uuid4().hex}", job, REPOSITORY, ["python", "-m", f"jobs.{job}", *words, "--json"]
        )

    return run


@pytest.fixture(scope="module")
def dataset(submit: Submit) -> str:
    """The digits, staged by a submitted job."""
    address = f"s3://infusion/tests/{uuid.uuid4().hex}/digits"
    staged = submit("stage", "digits", address)
    assert staged["images"] == {"train": 1297, "valid": 250, "test": 250}
    assert storage.exists(staged["manifest"])
    return address


def test_from_staged_data_to_samples(submit: Submit, dataset: str, bucket_uri: str, tmp_path: Path) -> None:
    trained = submit(
        *("train", dataset, "--runs", bucket_uri, "--name", "whole", "--num-workers", "2"),
        *(*SMALL, "--epochs", "80", "--validate-every", "40", "--figures-every", "40"),
    )
    assert trained["challenger"] == "models:/infusion-digits@challenger"
    client = MlflowClient()
    version = client.get_model_version_by_alias("infusion-digits", "challenger")
    assert trained["model"] == f"models:/infusion-digits/{version.version}"
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_id in trained["mlflow_run"]
    assert run.data.params["hidden_sizes"] == "(32, 32)"
    assert run.data.tags["mlflow.source.git.commit"] == tracking.git_commit() != "unknown"
    objective = client.get_metric_history(run.info.run_id, "train/objective")
    assert [point.step for point in objective] == list(range(1, 81))
    bounds = client.get_metric_history(run.info.run_id, "valid/lower_bound")
    assert [point.step for point in bounds] == [40, 80]
    assert bounds[1].value > bounds[0].value
    assert any(name.startswith("system/") for name in run.data.metrics)
    startup = {name: value for name, value in run.data.metrics.items() if name.startswith("startup/")}
    assert set(startup) == {f"startup/{part}_seconds" for part in ("job", "workers", "images", "first_step")}
    assert min(startup.values()) > 0
    # But for the job's own start, which is earlier, all of it is time of the run.
    assert 1000 * (sum(startup.values()) - startup["startup/job_seconds"]) < run.info.end_time - run.info.start_time
    for kind in ("sampling_chains", "infusion_chains"):
        pictures = [file.path for file in client.list_artifacts(run.info.run_id, f"pictures/{kind}")]
        assert pictures == [f"pictures/{kind}/epoch-00040.png", f"pictures/{kind}/epoch-00080.png"]
    picture = client.download_artifacts(run.info.run_id, "pictures/sampling_chains/epoch-00080.png", str(tmp_path))
    assert Image.open(picture).size == (2 + 5 * 58, 16 + 2 + 8 * 58)
    assert {"config.json", "manifest.json", "curves.png"} <= {f.path for f in client.list_artifacts(run.info.run_id)}

    evaluated = submit("evaluate", trained["challenger"], dataset)
    assert evaluated["model"] == trained["model"]
    assert evaluated["images"] == 250
    assert evaluated["variance_floor"] == float(run.data.params["variance_floor"]) == 1e-3
    assert evaluated["baseline_log_likelihood"] > evaluated["baseline_at_model_floor"]
    assert evaluated["lower_bound_standard_error"] > 0
    logged = client.get_run(version.run_id).data.metrics
    assert logged["test/lower_bound"] == pytest.approx(evaluated["lower_bound"])
    assert logged["test/baseline_log_likelihood"] == pytest.approx(evaluated["baseline_log_likelihood"])

    promoted = submit("promote", "infusion-digits")
    assert promoted["promoted"]
    assert promoted["champion"] == trained["model"]
    assert client.get_model_version_by_alias("infusion-digits", "champion").version == version.version

    drawn = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        sampled = submit(
            *("sample", "models:/infusion-digits@champion", f"{bucket_uri}/{name}"),
            *("--num-samples", "12", "--num-steps", "7", "--seed", seed, "--neighbours-in", dataset),
        )
        assert sampled["num_steps"] == 7
        drawn[name] = pq.read_table(_fetched(sampled["table"], tmp_path / f"{name}.parquet"))["image"].to_pylist()
    assert len(drawn["a"]) == 12
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert Image.open(_fetched(sampled["grid"], tmp_path / "grid.png")).size == (2 + 10 * 58, 2 + 2 * 58)
    neighbours = Image.open(_fetched(sampled["neighbours"], tmp_path / "neighbours.png"))
    assert neighbours.size == (2 + 6 * 58, 16 + 2 + 10 * 58)
    assert Image.open(_fetched(sampled["chains"], tmp_path / "chains.png")).size == (2 + 9 * 58, 16 + 2 + 8 * 58)


def _fetched(uri: str, file: Path) -> Path:
    file.write_bytes(storage.read_bytes(uri))
    return file


def worker(rank: int, dataset: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """What one of two processes ends with that train without Ray and are not disturbed."""
    training = Training(TrainConfig.from_json(config), dataset, Manifest.load(dataset), Worker(rank, 2))
    list(training.epochs())
    training.finish()
    return training.model.state_dict()


def test_a_run_whose_worker_and_driver_were_killed_ends_as_one_that_was_not(
    client_env: Mapping[str, str], dataset: str, bucket_uri: str, run_workers: Any
) -> None:
    """First a worker is killed in the middle of an epoch, then the job's driver; both with SIGKILL."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    jobs = JobSubmissionClient(client_env["RAY_API_SERVER_ADDRESS"])
    words = [
        *("python", "-m", "jobs.train", dataset, "--runs", bucket_uri, "--name", "killed", "--num-workers", "2"),
        *(*SMALL, "--num-steps", "5", "--hidden-sizes", "128,128", "--global-batch", "64", "--json"),
        *("--epochs", "100", "--validate-every", "10"),
    ]

    def start() -> str:
        return jobs.submit_job(entrypoint=" ".join(words), runtime_env={"working_dir": str(REPOSITORY)})

    def await_that(condition: Callable[[], Any], job: str) -> Any:
        deadline = time.monotonic() + 180
        while not (found := condition()):
            assert jobs.get_job_status(job) in (JobStatus.PENDING, JobStatus.RUNNING), jobs.get_job_logs(job)
            assert time.monotonic() < deadline, jobs.get_job_logs(job)
            time.sleep(0.1)
        return found

    def logged(words: str) -> bool:
        return words in jobs.get_job_logs(job)

    def workers() -> list[psutil.Process]:
        return [process for process in _descendants_of_ray() if "RayTrainWorker" in _title(process)]

    folder = storage.join(bucket_uri, "killed")
    run_file = storage.join(folder, "run.json")
    client = MlflowClient()

    job = start()
    await_that(lambda: storage.exists(run_file), job)
    run_id = json.loads(storage.read_bytes(run_file))["mlflow_run"]["run_id"]
    snapshot = storage.join(folder, "checkpoint_manager_snapshot.json")
    await_that(lambda: storage.exists(snapshot) and json.loads(storage.read_bytes(snapshot))["checkpoint_results"], job)
    victims = workers()
    assert len(victims) == 2
    victims[0].send_signal(signal.SIGKILL)
    await_that(lambda: logged("going on after epoch"), job)
    assert not {process.pid for process in victims} & {process.pid for process in workers()}
    assert client.get_run(run_id).info.status == "RUNNING"
    (driver,) = [p for p in _descendants_of_ray() if _title(p).split()[1:4] == words[1:4]]
    driver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while client.get_run(run_id).info.status != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.1)

    job = start()
    while jobs.get_job_status(job) in (JobStatus.PENDING, JobStatus.RUNNING):
        time.sleep(0.2)
    logs = jobs.get_job_logs(job)
    assert jobs.get_job_status(job) == JobStatus.SUCCEEDED, logs
    assert "2 workers, images in cpu memory" in logs
    assert "going on after epoch" in logs
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = {point.step for point in client.get_metric_history(run_id, "train/objective")}
    assert steps == set(range(1, 101))

    config = json.loads(storage.read_bytes(run_file))["config"]
    expected = run_workers(__file__, dataset=dataset, config=config)[0]
    result = load(storage.read_bytes(storage.join(folder, "model", "model.safetensors")))
    for name, tensor in expected.items():
        assert tensor.equal(result[name]), name


def _descendants_of_ray() -> list[psutil.Process]:
    """The processes of this test run's Ray head."""
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == token and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_job_that_is_stopped_leaves_no_run_running(
    client_env: Mapping[str, str], dataset: str, bucket_uri: str
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    jobs = JobSubmissionClient(client_env["RAY_API_SERVER_ADDRESS"])
    words = ["python", "-m", "jobs.train", dataset, "--runs", bucket_uri, "--name", "stopped", "--epochs", "100000"]
    job = jobs.submit_job(entrypoint=" ".join(words), runtime_env={"working_dir": str(REPOSITORY)})
    file = storage.join(bucket_uri, "stopped", "run.json")
    deadline = time.monotonic() + 180
    while not storage.exists(file):
        assert time.monotonic() < deadline, jobs.get_job_logs(job)
        time.sleep(0.2)
    run_id = json.loads(storage.read_bytes(file))["mlflow_run"]["run_id"]
    client = MlflowClient()
    assert client.get_run(run_id).info.status == "RUNNING"
    jobs.stop_job(job)
    while client.get_run(run_id).info.status == "RUNNING":
        assert time.monotonic() < deadline, jobs.get_job_logs(job)
        time.sleep(0.2)
    assert client.get_run(run_id).info.status == "KILLED"
    while jobs.get_job_status(job) != JobStatus.STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.2)
