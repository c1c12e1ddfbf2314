"""Ends an MLflow run whose owner can no longer do it.

    python -m pipeline.run_guard RUN_ID

The owner holds the other end of this process's standard input. When that closes, by whatever death (SIGKILL and the
loss of the whole job included), the run is ended with the status that the owner wrote last, or as KILLED if it wrote
none. An owner that has ended the run itself writes `done`.

The process waits in `read` and imports nothing heavy before it is needed: it costs some 10 MB and no time.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from mlflow import MlflowClient

DONE = "done"


class RunGuard:
    """The owner's side: starts the guard of a run on entry; leaves it to its duty unless `dismiss` is called."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.run_guard", self._run_id],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )
        # What was started forks and ends at once (see `main`).
        self._process.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write("")

    def dismiss(self) -> None:
        """Tells the guard that the run has been ended."""
        self._write(DONE)

    def leave(self, status: str) -> None:
        """Tells the guard to end the run with `status` once this process is gone."""
        self._write(status)

    def _write(self, words: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        # Whoever killed the guard wants everything to end: that is no reason to fail.
        with contextlib.suppress(BrokenPipeError):
            if not pipe.closed:
                pipe.write(words)
                pipe.close()


def main(run_id: str) -> None:
    """Waits for the owner's end, then ends the run if need be."""
    # Ray ends a job with all that descends from it: the guard must not.
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    words = sys.stdin.read().split()
    status = words[-1] if words else "KILLED"
    if status == DONE:
        return
    from mlflow import MlflowClient

    client = MlflowClient()
    info = client.get_run(run_id).info
    end_nested_runs(client, run_id, info.experiment_id)
    if info.status == "RUNNING":
        client.set_terminated(run_id, status)


def end_nested_runs(client: "MlflowClient", run_id: str, experiment_id: str) -> None:
    """Ends as KILLED the runs below another one that have not ended."""
    token = None
    while True:
        page = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", page_token=token)
        for run in page:
            if run.info.status in ("SCHEDULED", "RUNNING"):
                # It announces the run's address on standard output.
                with contextlib.redirect_stdout(sys.stderr):
                    client.set_terminated(run.info.run_id, "KILLED")
        token = page.token
        if not token:
            return


if __name__ == "__main__":
    main(sys.argv[1])
