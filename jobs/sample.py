"""Draws samples from a registered model.

    python -m jobs.sample models:/infusion-mnist@champion s3://infusion/samples/mnist --num-samples 1000

Writes `samples.png` (the first hundred), `chains.png` (some whole chains) and `samples.parquet` (all) to a folder on S3
or on a local disk.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job

if TYPE_CHECKING:
    from pipeline.sampling import SamplingResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("sample", __doc__ or "")
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("destination", help="folder to write to")
    parser.add_argument("--num-samples", type=int, default=100, metavar="N", help="how many (default: 100)")
    parser.add_argument(
        "--num-steps", type=int, metavar="N", help="length of the chain (default: as in training, which it may exceed)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (default: 0)")
    parser.add_argument(
        "--last-step",
        choices=["mean", "sample"],
        default="mean",
        help="what is taken of the last transition: its mean, as in the paper, or a draw from it (default: mean)",
    )
    parser.add_argument(
        "--neighbours-in",
        metavar="DATASET",
        help="also find the training images nearest to some samples, in this staged data set (neighbours.png)",
    )
    parser.add_argument("--use-gpu", action="store_true", help="compute on the GPU that the job was given")
    return run_job(parser, _sample, argv)


def _sample(args: argparse.Namespace) -> "SamplingResult":
    from pipeline.sampling import sample

    return sample(
        args.model,
        args.destination,
        num_samples=args.num_samples,
        num_steps=args.num_steps,
        seed=args.seed,
        last_step=args.last_step,
        neighbours_in=args.neighbours_in,
        use_gpu=args.use_gpu,
    )


if __name__ == "__main__":
    raise SystemExit(main())
