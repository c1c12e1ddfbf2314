"""What every job's command line shares: help, one clear line on bad input, and results as text or JSON."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from infusion_core.errors import InfusionError
from pipeline.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def job_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser for `python -m jobs.NAME` with the options that all jobs have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")
    return parser


def run_job(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], "DataclassInstance"],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line, does the work, prints what it made, and returns the exit status.

    The result's fields are printed in order, one a line, or as a JSON object with `--json`.
    """
    args = parser.parse_args(argv)
    try:
        result = work(args)
    except (UserError, InfusionError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped before the end", file=sys.stderr, flush=True)
        return 130
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if args.json:
        print(json.dumps(fields), flush=True)
    else:
        width = max(len(name) for name in fields)
        for name, value in fields.items():
            print(f"{name.replace('_', ' '):<{width}}  {_shown(value)}", flush=True)
    return 0


def _shown(value: object) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:g}" if 0 < abs(value) < 0.01 else f"{value:,.4f}".rstrip("0").rstrip(".")
