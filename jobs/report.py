"""Writes the report of training runs or searches: one HTML page that opens from disk.

    python -m jobs.report s3://infusion/reports/mnist models:/infusion-mnist@champion

It holds the figures that `jobs.evaluate` measured, beside the paper's, the curves of the training, pictures drawn from
the registered model, the resolved configuration, the data set's manifest and the commit. It is logged to MLflow too.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job

if TYPE_CHECKING:
    from pipeline.report import ReportResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("report", __doc__ or "")
    parser.add_argument("destination", help="folder to write report.html to")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, or the id of a training's or search's MLflow run",
    )
    parser.add_argument("--dataset", help="staged data set that pictures are drawn with (default: that of the run)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pictures (default: 0)")
    return run_job(parser, _report, argv)


def _report(args: argparse.Namespace) -> "ReportResult":
    from pipeline.report import report

    return report(args.runs, args.destination, dataset=args.dataset, seed=args.seed)


if __name__ == "__main__":
    raise SystemExit(main())
