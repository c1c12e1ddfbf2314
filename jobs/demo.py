"""Runs the main jobs end to end on local services, which are started if they are not up and left up.

Each job (stage, tune, evaluate, promote, sample, report) is submitted with `ray job submit`. Pictures, the report and
a summary are written to `demo/`. End the services with `make down`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs._command import job_parser, run_job
from jobs.services import DEFAULT_FOLDER


@dataclass(frozen=True)
class DemoResult:
    """Where to look."""

    samples: str
    chains: str
    report: str
    summary: str
    mlflow_run: str
    registered_model: str
    ray_dashboard: str
    ray_token_file: str
    test_lower_bound: float
    baseline: float
    variance_floor: float
    baseline_variance_floor: float
    baseline_at_model_floor: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    parser = job_parser("demo", __doc__ or "")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="gets what is to be looked at")
    return run_job(parser, _demo, argv)


def _demo(args: argparse.Namespace) -> DemoResult:
    from pipeline.demo import run_demo
    from pipeline.local_services import LocalServices

    services = LocalServices(DEFAULT_FOLDER)
    summary = run_demo(services, Path(__file__).resolve().parents[1], args.folder)
    figures, uris = summary["figures"], summary["uris"]
    return DemoResult(
        samples=str(args.folder / "samples.png"),
        chains=str(args.folder / "chains.png"),
        report=str(args.folder / "report.html"),
        summary=str(args.folder / "summary.json"),
        mlflow_run=uris["mlflow_run"],
        registered_model=uris["registry"],
        ray_dashboard=uris["ray_dashboard"],
        ray_token_file=str(services.ray_token_file),
        test_lower_bound=figures["test_lower_bound"],
        baseline=figures["test_baseline_log_likelihood"],
        variance_floor=figures["test_variance_floor"],
        baseline_variance_floor=figures["test_baseline_variance_floor"],
        baseline_at_model_floor=figures["test_baseline_at_model_floor"],
    )


if __name__ == "__main__":
    raise SystemExit(main())
