r"""Searches a grid of infusion rates, pruned by successive halving, and registers the best model as `challenger`.

    python -m jobs.tune s3://infusion/datasets/mnist --runs s3://infusion/runs --name rates \
        --steps 5,10 --increasing 0.01,0.05,0.1 --constant 0.1,0.3 --epochs 81 --grace-epochs 3

Every combination of the grid's values is a trial: a training as `jobs.train` runs it. Trials are compared on the
validation lower bound at rungs, and about one in `--reduction-factor` goes on from each. Settings that are not searched
over come from a preset; single fields of it are overridden by the options below. A search that was killed goes on when
the same command is submitted with --resume. A search of another grid takes over what it has in common with an earlier
one with --reuse.

To watch its curves: `tensorboard --logdir URI`, with the address that the search prints, or the runs nested under the
search's run in MLflow.
"""

import argparse
import dataclasses
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs._command import job_parser, run_job
from jobs._fields import add_fields, described, numbers, override, parse_values

if TYPE_CHECKING:
    from pipeline.search import SearchResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    from infusion_core.model import ModelConfig
    from pipeline.presets import PRESETS
    from pipeline.search import TrialResources
    from pipeline.search_grid import GRIDS
    from pipeline.successive_halving import HalvingConfig
    from pipeline.training import TrainConfig

    parser = job_parser("tune", __doc__ or "")
    parser.add_argument("dataset", help="address of the staged data set")
    parser.add_argument(
        "--runs", required=True, metavar="URI", help="folder that holds runs and searches, such as s3://infusion/runs"
    )
    parser.add_argument("--name", help="name of the search (default: a new one)")
    parser.add_argument("--resume", action="store_true", help="go on with the search of that name")
    parser.add_argument(
        "--reuse", metavar="NAME", help="take over from an earlier search of that name the trials that both have"
    )
    parser.add_argument(
        "--preset",
        metavar="{" + ",".join(PRESETS) + "}",
        help="settings to start from (default: the preset of the data set's name)",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument("--grid", choices=list(GRIDS), help="a grid by name, instead of the options below")
    grid.add_argument("--steps", type=numbers(int), default=(), metavar="N,N,…", help="numbers of steps T")
    grid.add_argument(
        "--increasing", type=numbers(float), default=(), metavar="X,X,…", help="increments ω of rates that grow from 0"
    )
    grid.add_argument("--constant", type=numbers(float), default=(), metavar="X,X,…", help="rates that do not grow")
    grid.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=X,X,…",
        help="values of another field of the training or the model, such as learning_rate or seed; may be repeated",
    )
    add_fields(parser, HalvingConfig, "pruning")
    add_fields(parser, TrainConfig, "training (overrides the preset)")
    add_fields(parser, ModelConfig, "model (overrides the preset)")
    add_fields(parser, TrialResources, "resources of a trial")
    return run_job(parser, _search, argv)


def _search(args: argparse.Namespace) -> "SearchResult":
    from pipeline.errors import UserError
    from pipeline.presets import preset
    from pipeline.search import TrialResources, search
    from pipeline.search_grid import GRIDS, Grid, grid_points
    from pipeline.successive_halving import HalvingConfig

    name_of_preset = args.preset or args.dataset.rstrip("/").rpartition("/")[2]
    base = preset(name_of_preset)
    base = override(dataclasses.replace(base, model=override(base.model, args)), args)
    grid = Grid(args.steps, args.increasing, args.constant, _over(args.over))
    if args.grid is None:
        points = grid_points(grid, base)
    elif grid != Grid():
        raise UserError(f"--grid {args.grid} is a whole grid: leave out --steps, --increasing, --constant and --over")
    else:
        points = GRIDS[args.grid](base)
    if args.resume and args.name is None:
        raise UserError("--resume goes on with a search by its name: give --name")
    halving, resources = override(HalvingConfig(), args), override(TrialResources(), args)
    name = args.name or f"{name_of_preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    print(
        f"search {name}: {len(points)} trials of {base.epochs} epochs",
        *(f"  {point.name}" for point in points),
        described({**dataclasses.asdict(halving), **dataclasses.asdict(resources)}),
        sep="\n",
        file=sys.stderr,
    )
    return search(points, args.dataset, args.runs, name, halving, resources, resume=args.resume, reuse=args.reuse)


def _over(texts: Sequence[str]) -> Mapping[str, tuple[Any, ...]]:
    from pipeline.errors import UserError
    from pipeline.search_grid import check_fields, searchable_fields

    over: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--over {text}: write FIELD=VALUE,VALUE,…, such as learning_rate=1e-3,3e-4")
        check_fields([field])
        if field in over:
            raise UserError(f"--over {field} is given twice; give all of its values at once")
        try:
            over[field] = parse_values(values, searchable_fields()[field])
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--over {text}: {error}") from None
    return over


if __name__ == "__main__":
    raise SystemExit(main())
