"""MLflow runs: who owns them, what is written to them, and how they end.

A run belongs to the process that started the job (`owned_run`), never to a worker: workers are killed without notice,
and a run that was theirs would stay RUNNING for ever. Workers write to it by its id (`TrackedRun`). Should the owner
itself be killed, a small process that outlives it ends the run (`pipeline.run_guard`).
"""

import contextlib
import http.client
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.errors import ServiceError, UserError
from pipeline.run_guard import RunGuard, end_nested_runs

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
REACHABLE_WITHIN_SECONDS = 10.0


def tracking_uri() -> str:
    """Returns the address of the MLflow server.

    Raises:
        UserError: `MLFLOW_TRACKING_URI` is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "MLFLOW_TRACKING_URI is not set; set it to the address of an MLflow server (`make up` starts one)"
        )
    return uri


def check_reachable() -> None:
    """Checks that the MLflow server answers, before work is put into what could not be recorded.

    Raises:
        UserError: it does not, with its address and how long was waited.
    """
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}, but jobs and workers need a server: set an http(s):// address")
    start = time.monotonic()
    while True:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACHABLE_WITHIN_SECONDS / 2).close()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                return  # it answers, if only that it has no such page
            seconds = time.monotonic() - start
            if seconds > REACHABLE_WITHIN_SECONDS / 2:
                reason = getattr(error, "reason", error)
                raise UserError(
                    f"the MLflow server at {uri} (MLFLOW_TRACKING_URI) did not answer within {seconds:.1f} s: {reason}"
                ) from error
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def mlflow_errors(action: str) -> Iterator[None]:
    """Turns MLflow's errors into one line that says what could not be done, and at which server.

    Raises:
        ServiceError: there was such an error.
    """
    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise ServiceError(f"cannot {action} on the MLflow server at {tracking_uri()}: {reason}") from error


@dataclass(frozen=True)
class TrackedRun:
    """A run to write to, from any process.

    Attributes:
        run_id: its id.
        experiment_id: its experiment's id.
    """

    run_id: str
    experiment_id: str

    @classmethod
    def of(cls, run_id: str) -> "TrackedRun":
        """Returns the run of that id.

        Raises:
            UserError: the server has none, or does not answer.
        """
        with mlflow_errors(f"look up run {run_id}"):
            return cls(run_id, MlflowClient().get_run(run_id).info.experiment_id)

    @property
    def uri(self) -> str:
        """Where the run is to be seen in a browser."""
        return f"{tracking_uri().rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def status(self) -> str:
        """Returns whether the run waits, runs or has ended, and how; see `set_status`."""
        with mlflow_errors(f"look up run {self.run_id}"):
            return str(MlflowClient().get_run(self.run_id).info.status)

    def log_metrics(self, by_step: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Writes metrics at several steps at once; values that are not finite are left out."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for step, values in by_step
            for name, value in values.items()
            if math.isfinite(value)
        ]
        with mlflow_errors(f"log metrics of run {self.run_id}"):
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                MlflowClient().log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])

    def log_file(self, path: str, content: bytes) -> None:
        """Writes an artifact at `path` below the run's artifacts."""
        folder, _, name = path.rpartition("/")
        with mlflow_errors(f"log {path} to run {self.run_id}"), tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / name).write_bytes(content)
            MlflowClient().log_artifact(self.run_id, str(Path(temporary) / name), folder or None)

    def read_file(self, path: str) -> bytes | None:
        """Returns the artifact at `path` below the run's artifacts, or `None` if there is none."""
        folder = path.rpartition("/")[0]
        client = MlflowClient()
        with mlflow_errors(f"read {path} of run {self.run_id}"), tempfile.TemporaryDirectory() as temporary:
            if path not in {file.path for file in client.list_artifacts(self.run_id, folder or None)}:
                return None
            return Path(client.download_artifacts(self.run_id, path, temporary)).read_bytes()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        with mlflow_errors(f"tag run {self.run_id}"):
            MlflowClient().log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


@contextlib.contextmanager
def owned_run(
    experiment: str,
    name: str,
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    resume: TrackedRun | None = None,
) -> Iterator[TrackedRun]:
    """Creates a run, or takes an earlier one up again, and ends it when the block ends.

    It ends FINISHED, or FAILED if the block raises, or KILLED if the process is interrupted, told to stop or killed.

    Args:
        experiment: name of the experiment; it is created if need be.
        name: the run's name.
        params: written once, when the run is created: MLflow does not let them change.
        tags: written each time.
        resume: the run to take up again.
    """
    client = MlflowClient()
    with mlflow_errors(f"open run {name}"):
        if resume is None:
            experiment_id = _experiment_id(client, experiment)
            run = TrackedRun(client.create_run(experiment_id, run_name=name).info.run_id, experiment_id)
        else:
            run = resume
            client.update_run(run.run_id, status="RUNNING")
    status = "FAILED"
    with RunGuard(run.run_id) as guard:
        try:
            if resume is None:
                _log_params(client, run, params)
            run.set_tags(tags)
            yield run
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            try:
                # The client announces the run's address; standard output belongs to the job's result.
                with mlflow_errors(f"end run {run.run_id} as {status}"):
                    end_nested_runs(client, run.run_id, run.experiment_id)
                set_status(run, status)
                guard.dismiss()
            except UserError:
                guard.leave(status)
                # Otherwise the error that is under way is the one to be seen.
                if status == "FINISHED":
                    raise


def nested_run(parent: TrackedRun, name: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> TrackedRun:
    """Creates a run below another one, which has yet to begin; it ends with the other one at the latest.

    Args:
        parent: the other one, owned by this process.
        name: the run's name.
        params: written once.
        tags: written once.
    """
    client = MlflowClient()
    with mlflow_errors(f"create run {name}"):
        run_id = client.create_run(
            parent.experiment_id, run_name=name, tags={**tags, MLFLOW_PARENT_RUN_ID: parent.run_id}
        ).info.run_id
        client.update_run(run_id, status="SCHEDULED")
    run = TrackedRun(run_id, parent.experiment_id)
    _log_params(client, run, params)
    return run


def set_status(run: TrackedRun, status: str) -> None:
    """Says that a run waits (SCHEDULED), runs (RUNNING) or has ended (FINISHED, FAILED, KILLED)."""
    client = MlflowClient()
    # The client announces the address of a run that ends; standard output belongs to the job's result.
    with mlflow_errors(f"set run {run.run_id} to {status}"), contextlib.redirect_stdout(sys.stderr):
        if status in ("SCHEDULED", "RUNNING"):
            client.update_run(run.run_id, status=status)
        else:
            client.set_terminated(run.run_id, status)


def _experiment_id(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            # Another job may have created it since.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def _log_params(client: MlflowClient, run: TrackedRun, params: Mapping[str, object]) -> None:
    entries = [Param(name, str(value)) for name, value in params.items()]
    with mlflow_errors(f"log parameters of run {run.run_id}"):
        for start in range(0, len(entries), PARAMS_PER_REQUEST):
            client.log_batch(run.run_id, params=entries[start : start + PARAMS_PER_REQUEST])


def git_commit() -> str:
    """Returns the commit of the code that runs: that of the checkout, or what `GIT_COMMIT` says, or `unknown`.

    A job submitted with `--working-dir .` runs from a copy without `.git`, so its submitter passes `GIT_COMMIT` on.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    here = Path(__file__).parent
    answer = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"
