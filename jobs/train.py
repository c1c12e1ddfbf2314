"""Trains a model of a staged data set on the cluster, and registers it as `challenger`.

    python -m jobs.train s3://infusion/datasets/mnist --runs s3://infusion/runs --num-workers 2

Settings come from a preset; single fields of it are overridden by the options below. A run that was killed goes on from
its last checkpoint when it is submitted again with the same --name.
"""

import argparse
import dataclasses
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs._command import job_parser, run_job
from jobs._fields import add_fields, described, override

if TYPE_CHECKING:
    from pipeline.ray_training import TrainResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    from infusion_core.model import ModelConfig
    from pipeline.presets import PRESETS
    from pipeline.ray_training import Resources
    from pipeline.training import TrainConfig

    parser = job_parser("train", __doc__ or "")
    parser.add_argument("dataset", help="address of the staged data set")
    parser.add_argument(
        "--runs", required=True, metavar="URI", help="folder that holds runs, such as s3://infusion/runs"
    )
    parser.add_argument("--name", help="name of the run; submit it again to go on with it (default: a new one)")
    parser.add_argument(
        "--preset",
        metavar="{" + ",".join(PRESETS) + "}",
        help="settings to start from (default: the preset of the data set's name)",
    )
    add_fields(parser, TrainConfig, "training (overrides the preset)")
    add_fields(parser, ModelConfig, "model (overrides the preset)")
    add_fields(parser, Resources, "resources")
    return run_job(parser, _train, argv)


def _train(args: argparse.Namespace) -> "TrainResult":
    from pipeline.presets import preset
    from pipeline.ray_training import Resources, flat, train

    name_of_preset = args.preset or args.dataset.rstrip("/").rpartition("/")[2]
    config = preset(name_of_preset)
    config = override(dataclasses.replace(config, model=override(config.model, args)), args)
    resources = override(Resources(), args)
    name = args.name or f"{name_of_preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    print(f"run {name}", described({**flat(config), **dataclasses.asdict(resources)}), sep="\n", file=sys.stderr)
    return train(config, args.dataset, args.runs, name, resources)


if __name__ == "__main__":
    raise SystemExit(main())
