"""Evaluates a registered model on a staged data set.

    python -m jobs.evaluate models:/infusion-mnist@challenger s3://infusion/datasets/mnist

Gives the lower bound in nats per image and in bits per dimension, with its standard error and the variance floor that
it was reached with, beside the log-likelihood of a Gaussian that has learnt means and variances only. The figures are
logged to the MLflow run that trained the model. On a cluster whose head has no GPU, submit it with
`ray job submit --entrypoint-num-gpus 1 … --use-gpu`.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job

if TYPE_CHECKING:
    from pipeline.evaluation import EvaluationResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("evaluate", __doc__ or "")
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("dataset", help="address of the staged data set")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test", help="(default: test)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (default: 0)")
    parser.add_argument("--use-gpu", action="store_true", help="compute on the GPU that the job was given")
    return run_job(parser, _evaluate, argv)


def _evaluate(args: argparse.Namespace) -> "EvaluationResult":
    from pipeline.evaluation import evaluate

    return evaluate(args.model, args.dataset, split=args.split, seed=args.seed, use_gpu=args.use_gpu)


if __name__ == "__main__":
    raise SystemExit(main())
