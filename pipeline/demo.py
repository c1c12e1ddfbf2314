"""The main jobs from end to end on local services, each submitted to the Ray head as a user would."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.local_services import LocalServices
from pipeline.progress import format_duration
from pipeline.tracking import git_commit

DATASET = "s3://infusion/datasets/digits"
RUNS = "s3://infusion/runs"
SAMPLES = "s3://infusion/samples"
REPORTS = "s3://infusion/reports"
REGISTERED_MODEL = "infusion-digits"
# Six trials, of which two are trained in full. They are compared by the lower bound, which is therefore the objective
# from the start, and not too early: fewer steps and lower rates are learnt faster, whether or not they end higher.
SEARCH = (
    *("--increasing", "0.04,0.06,0.08,0.1,0.12,0.14", "--epochs", "162", "--denoising-epochs", "0"),
    *("--validate-every", "18", "--grace-epochs", "54", "--figures-every", "54"),
)

# What `ray job submit` says of itself, as `2026-01-01 00:00:00,000 INFO cli.py:42 -- …`.
_RAY_CLIENT_LINE = re.compile(r"\b(INFO|SUCC|WARNING) \w+\.py:\d+ -- ")


def run_demo(services: LocalServices, repository: Path, folder: Path) -> dict[str, Any]:
    """Stages the digits, searches, evaluates, promotes, samples and reports; writes what is to be seen to `folder`.

    Args:
        services: they are started if they are not up, and left up.
        repository: the folder that the jobs' code is submitted from.
        folder: gets `samples.png`, `chains.png`, `report.html` and `summary.json`.

    Returns:
        The summary: figures, addresses, and seconds a stage.

    Raises:
        UserError: a service did not start, or a job failed.
    """
    seconds: dict[str, float] = {}
    start = time.monotonic()
    services.up()
    seconds["services"] = time.monotonic() - start
    os.environ.update(services.env())
    name = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"

    def job(stage: str, *words: str) -> dict[str, Any]:
        began = time.monotonic()
        result = submit(f"{name}-{stage}", stage, repository, ["python", "-m", f"jobs.{stage}", *words, "--json"])
        seconds[stage] = time.monotonic() - began
        say(stage, f"done in {format_duration(seconds[stage])}")
        return result

    staged = job("stage", "digits", DATASET)
    searched = job("tune", DATASET, "--runs", RUNS, "--name", name, *SEARCH)
    model = searched["model"]
    with ThreadPoolExecutor() as pool:
        # These three do not need one another.
        evaluating = pool.submit(job, "evaluate", model, DATASET, "--judges", "importance_sampling")
        sampling = pool.submit(job, "sample", model, f"{SAMPLES}/{name}")
        promoting = pool.submit(job, "promote", REGISTERED_MODEL)
    evaluated, sampled, promoted = evaluating.result(), sampling.result(), promoting.result()
    search_run = searched["mlflow_run"].rpartition("/")[2]
    reported = job("report", f"{REPORTS}/{name}", search_run, model)

    folder.mkdir(parents=True, exist_ok=True)
    for picture in ("samples", "chains"):
        (folder / f"{picture}.png").write_bytes(
            storage.read_bytes(sampled["grid" if picture == "samples" else picture])
        )
    figures = ("variance_floor", "images", "lower_bound", "lower_bound_standard_error", "bits_per_dimension")
    baseline = (
        "baseline_variance_floor",
        "baseline_log_likelihood",
        "baseline_standard_error",
        "baseline_bits_per_dimension",
        "baseline_at_model_floor",
    )
    (folder / "report.html").write_bytes(storage.read_bytes(reported["report"]))
    summary = {
        "figures": {
            **{f"test_{key}": evaluated[key] for key in (*figures, *baseline)},
            "valid_lower_bound": searched["valid_lower_bound"],
            "best_of_the_search": searched["best"],
            "epochs_trained": searched["epochs_trained"],
            "epochs_of_full_grid": searched["epochs_of_full_grid"],
            "promotion": promoted["reason"],
        },
        "uris": {
            "dataset": staged["manifest"],
            "search": searched["folder"],
            "tensorboard": searched["tensorboard"],
            "mlflow_run": searched["mlflow_run"],
            "model": model,
            "champion": f"models:/{REGISTERED_MODEL}@champion",
            "registry": f"{os.environ['MLFLOW_TRACKING_URI']}/#/models/{REGISTERED_MODEL}",
            "samples": sampled["table"],
            "report": reported["report"],
            "ray_dashboard": os.environ["RAY_API_SERVER_ADDRESS"],
        },
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "commit": git_commit(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def submit(submission_id: str, stage: str, repository: Path, words: list[str]) -> dict[str, Any]:
    """Submits a job with `ray job submit`, shows its output, and returns the JSON object that it ended with.

    Raises:
        UserError: the job failed.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    command = [
        str(Path(sys.executable).with_name("ray")),
        *("job", "submit", "--submission-id", submission_id, "--working-dir", str(repository)),
        *("--runtime-env-json", json.dumps({"env_vars": {"GIT_COMMIT": git_commit()}})),
        *("--", *words),
    ]
    say(stage, f"$ ray job submit --working-dir . -- {shlex.join(words)}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() and not _RAY_CLIENT_LINE.search(line):
                say(stage, line.rstrip())
    # What the command printed may have been cut short; the job's status and whole output are asked for.
    client = JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"])
    while not (info := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(0.5)
    if info.status != JobStatus.SUCCEEDED:
        raise UserError(f"job {submission_id} ended {info.status}: {info.message}; its output is above")
    last_line = client.get_job_logs(submission_id).rstrip().splitlines()[-1]
    result: dict[str, Any] = json.loads(last_line)
    return result


def say(stage: str, line: str) -> None:
    """Shows a line of a stage."""
    sys.stderr.write(f"{stage:<8} │ {line}\n")
