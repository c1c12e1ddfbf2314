"""Makes a registered model's challenger its champion, if its validation bound is higher or there is none.

python -m jobs.promote infusion-mnist
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job

if TYPE_CHECKING:
    from pipeline.promotion import PromotionResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    parser = job_parser("promote", __doc__ or "")
    parser.add_argument("name", help="name of the registered model, such as infusion-mnist")
    return run_job(parser, _promote, argv)


def _promote(args: argparse.Namespace) -> "PromotionResult":
    from pipeline.promotion import promote

    return promote(args.name)


if __name__ == "__main__":
    raise SystemExit(main())
