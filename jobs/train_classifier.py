"""Trains a classifier of a staged data set's labels, by which samples are judged, and registers it.

    python -m jobs.train_classifier s3://infusion/datasets/mnist --epochs 5

Its scores are called classifier score, classifier Fréchet distance and so on: they are not those of Inception v3. The
newest classifier with the best validation accuracy is `models:/infusion-classifier-<dataset>@champion`. On a cluster
whose head has no GPU, submit it with `ray job submit --entrypoint-num-gpus 1 … --use-gpu`.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job
from jobs._fields import add_fields, override

if TYPE_CHECKING:
    from pipeline.classifier_training import ClassifierResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    from pipeline.classifier_training import ClassifierTrainConfig

    parser = job_parser("train_classifier", __doc__ or "")
    parser.add_argument("dataset", help="address of the staged data set, which must have labels")
    parser.add_argument("--use-gpu", action="store_true", help="compute on the GPU that the job was given")
    add_fields(parser, ClassifierTrainConfig, "training")
    return run_job(parser, _train_classifier, argv)


def _train_classifier(args: argparse.Namespace) -> "ClassifierResult":
    from pipeline.classifier_training import ClassifierTrainConfig, train_classifier

    return train_classifier(args.dataset, override(ClassifierTrainConfig(), args), use_gpu=args.use_gpu)


if __name__ == "__main__":
    raise SystemExit(main())
