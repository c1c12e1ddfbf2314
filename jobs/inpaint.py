"""Completes images of which a part is known.

    python -m jobs.inpaint models:/infusion-mnist@champion s3://infusion/datasets/mnist s3://infusion/inpainting

Takes the first images of a split, keeps what `--known` names, lets the model fill in the rest several times, and writes
`inpainting.png` and `inpainting.parquet` to a folder on S3 or on a local disk.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job

if TYPE_CHECKING:
    from pipeline.inpainting import InpaintingResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("inpaint", __doc__ or "")
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("dataset", help="address of the staged data set")
    parser.add_argument("destination", help="folder to write to")
    parser.add_argument(
        "--known",
        default="top",
        metavar="MASK",
        help="what is kept: top, bottom, left or right half, a rectangle Y0:Y1,X0:X1 of rows and columns, or a PNG "
        "whose white pixels are kept (default: top)",
    )
    parser.add_argument("--split", default="test", choices=["train", "valid", "test"], help="default: test")
    parser.add_argument("--num-images", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("--num-completions", type=int, default=5, metavar="N", help="of each image (default: 5)")
    parser.add_argument("--num-steps", type=int, metavar="N", help="length of the chain (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (default: 0)")
    parser.add_argument("--use-gpu", action="store_true", help="compute on the GPU that the job was given")
    return run_job(parser, _inpaint, argv)


def _inpaint(args: argparse.Namespace) -> "InpaintingResult":
    from pipeline.inpainting import inpaint_images

    return inpaint_images(
        args.model,
        args.dataset,
        args.destination,
        known=args.known,
        split=args.split,
        num_images=args.num_images,
        num_completions=args.num_completions,
        num_steps=args.num_steps,
        seed=args.seed,
        use_gpu=args.use_gpu,
    )


if __name__ == "__main__":
    raise SystemExit(main())
