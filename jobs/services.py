"""Starts and ends an S3 server, an MLflow server and a Ray head on this machine.

    python -m jobs.services up        start what is not up, and say where everything is
    python -m jobs.services status    say what is up
    python -m jobs.services down      end what was started; the data stay unless --delete-data is given
    eval "$(python -m jobs.services env)"      let this shell's commands, such as `ray job submit`, use the services

Ports that are not named have their default (S3 8333, MLflow 5000, dashboard 8265, Ray 6379) or, where that is taken,
any free port.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs._command import job_parser, run_job
from pipeline.errors import UserError
from pipeline.local_services import CHOOSABLE_PORTS, LocalServices

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / ".local"


@dataclass(frozen=True)
class ServicesState:
    """What is up, and where; addresses of what is not up are `None`."""

    s3: str
    s3_address: str | None
    mlflow: str
    mlflow_address: str | None
    ray: str
    ray_dashboard: str | None
    ray_token_file: str
    folder: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = job_parser("services", __doc__ or "")
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument(
        "--folder",
        type=Path,
        default=DEFAULT_FOLDER,
        help="where credentials, logs, data and state are kept (default: %(default)s)",
    )
    up = parser.add_argument_group("up")
    for name in CHOOSABLE_PORTS:
        up.add_argument(f"--{name}-port", type=int, metavar="PORT", help=f"the {name} port, and no other")
    up.add_argument("--num-cpus", type=int, metavar="N", help="CPUs that Ray may give to tasks (default: all)")
    down = parser.add_argument_group("down")
    down.add_argument("--delete-data", action="store_true", help="delete what the S3 and MLflow servers stored")
    args = parser.parse_args(argv)
    if args.action != "up" and (_asked_ports(args) or args.num_cpus):
        parser.error(f"ports and --num-cpus can be chosen with up, not with {args.action}")
    if args.action != "down" and args.delete_data:
        parser.error("--delete-data goes with down only")
    if args.action == "env":
        return _print_environment(args)
    return run_job(parser, _change_state, argv)


def _asked_ports(args: argparse.Namespace) -> dict[str, int]:
    asked = {name: getattr(args, f"{name}_port") for name in CHOOSABLE_PORTS}
    return {name: port for name, port in asked.items() if port is not None}


def _change_state(args: argparse.Namespace) -> ServicesState:
    services = LocalServices(args.folder, ports=_asked_ports(args), num_cpus=args.num_cpus)
    if args.action == "up":
        services.up()
    elif args.action == "down":
        services.down(delete_data=args.delete_data)
    s3, mlflow, ray = services.status()
    return ServicesState(
        s3.state,
        s3.address,
        mlflow.state,
        mlflow.address,
        ray.state,
        ray.address,
        str(services.ray_token_file),
        str(services.folder),
    )


def _print_environment(args: argparse.Namespace) -> int:
    try:
        variables = LocalServices(args.folder).env()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(variables))
    else:
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
