"""Stages a data set: Parquet and a manifest, on S3 or in a folder."""

import argparse
import sys
from collections.abc import Sequence

from jobs._command import job_parser, run_job
from pipeline import storage
from pipeline.sources import ImageFileSource, SourceOptions, open_source
from pipeline.staging import StagingResult, stage

DESCRIPTION = """\
Writes images as Parquet files with a manifest, which training and evaluation read.

sources:
  digits               scikit-learn's 1,797 scans of digits, 8 × 8 pixels, 17 grey levels
  torchvision:MNIST    also FashionMNIST, CIFAR10, CelebA; from --root, downloaded with --download
  npz:PATH             arrays train_images, test_images, (N, H, W) or (N, H, W, C) uint8,
                       and, where there are labels, train_labels, test_labels
  folder:PATH          image files; sub-folders are classes; train, valid and test sub-folders are splits

Running it again does nothing if the same data is there, and finishes what a killed run left.

example:
  python -m jobs.stage torchvision:MNIST s3://infusion/datasets/mnist --root ~/data --download
"""


def parser() -> argparse.ArgumentParser:
    """Returns the job's command line."""
    result = job_parser("stage", DESCRIPTION)
    result.add_argument("source", metavar="SOURCE", help="where the images come from, see above")
    result.add_argument(
        "destination", metavar="DEST", help="s3://bucket/prefix/NAME or a folder; NAME is the data set's name"
    )
    result.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    result.add_argument("--root", metavar="PATH", help="torchvision: the folder in which it keeps its data sets")
    result.add_argument("--download", action="store_const", const=True, help="torchvision: fetch what is missing")
    result.add_argument(
        "--size", type=int, metavar="PIXELS", help="folder, CelebA: height and width to scale to (CelebA: 64)"
    )
    result.add_argument(
        "--crop",
        type=int,
        metavar="PIXELS",
        help="folder, CelebA: side of the centre square cut out before scaling (the shorter side; CelebA: 140)",
    )
    result.add_argument("--channels", type=int, choices=(1, 3), help="folder: 1 for grey, 3 for RGB (3)")
    result.add_argument(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="npz, folder: the part of the training images that becomes the validation split (0.1)",
    )
    result.add_argument(
        "--test-fraction",
        type=float,
        metavar="F",
        help="folder: the part of all images that becomes the test split (0.1)",
    )
    return result


def work(args: argparse.Namespace) -> StagingResult:
    """Opens the source and stages it."""
    storage.check_reachable(args.destination)
    source = open_source(
        args.source,
        SourceOptions(
            root=args.root,
            download=args.download,
            size=args.size,
            crop=args.crop,
            channels=args.channels,
            valid_fraction=args.valid_fraction,
            test_fraction=args.test_fraction,
        ),
    )
    if isinstance(source, ImageFileSource):
        # Imported here because importing Ray takes longer than staging most data sets that need no decoding.
        from pipeline import cluster

        cluster.connect()
    return stage(source, args.destination, overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job(parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
