"""Evaluates a registered model on a staged data set.

    python -m jobs.evaluate models:/infusion-mnist@challenger s3://infusion/datasets/mnist

Gives the lower bound in nats per image and in bits per dimension, with its standard error and the variance floor that
it was reached with, beside the log-likelihood of a Gaussian that has learnt means and variances only. `--judges` asks
for more. The figures are logged to the MLflow run that trained the model, and kept with it as a record. On a cluster
whose head has no GPU, submit it with `ray job submit --entrypoint-num-gpus 1 … --use-gpu`, or let `--num-workers` share
out the images.
"""

import argparse
from collections.abc import Sequence

from jobs._command import job_parser, run_job
from jobs._fields import add_fields, override
from pipeline.evaluation import EvaluationResult, EvaluationWorkers, evaluate
from pipeline.judges import JUDGES, JudgeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("evaluate", __doc__ or "")
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("dataset", help="address of the staged data set")
    parser.add_argument(
        "--judges",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,NAME,…",
        help=f"what else to measure, of {', '.join(JUDGES)} (default: nothing)",
    )
    add_fields(parser, JudgeConfig, "how thoroughly")
    add_fields(parser, EvaluationWorkers, "who does the work")
    return run_job(parser, _evaluate, argv)


def _evaluate(args: argparse.Namespace) -> EvaluationResult:
    config, workers = override(JudgeConfig(), args), override(EvaluationWorkers(), args)
    return evaluate(args.model, args.dataset, args.judges, config, workers)


if __name__ == "__main__":
    raise SystemExit(main())
