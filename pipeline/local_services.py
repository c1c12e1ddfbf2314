"""An S3 server, an MLflow server and a Ray head on this machine: started, watched and ended as one.

They stand in for the services of a cluster, so that the same jobs run on a laptop. All of them listen on loopback
only and ask for generated credentials; the MLflow server, which has none, answers to this machine alone.

Everything lives in one folder (mode 700): credentials, logs, the data of the S3 and MLflow servers, and `state.json`,
which says what was started. A process is known by its id *and* its time of creation: after a reboot, an id in
the state file may belong to somebody else's process, which must be neither trusted nor ended.
"""

import contextlib
import fcntl
import json
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from pipeline.errors import UserError
from pipeline.local_processes import (
    HOST,
    POLL_SECONDS,
    ServerProcess,
    await_closed,
    choose_port,
    end_processes,
    is_alive,
    is_free,
    last_meaningful_line,
    listens,
    port_holder,
    say,
    write_private,
)
from pipeline.local_servers import (
    RAY_TOKEN_FILE,
    REQUEST_SECONDS,
    SERVICES,
    Credentials,
    Launch,
    MLflowServer,
    NotReadyError,
    RayHead,
    S3Server,
    Service,
    proxy_exemption,
    ray_environment,
    s3_environment,
)

START_ATTEMPTS = 3
# A unix socket's path may hold 107 bytes (103 on macOS), of which 90 are taken by Ray's names and that of our folder.
MAX_TEMPORARY_FOLDER_LENGTH = 13


@dataclass(frozen=True)
class ServiceStatus:
    """What is known of one service: its name, `up`, `not answering` or `down`, its address and process id."""

    name: str
    state: Literal["up", "not answering", "down"]
    address: str | None
    pid: int | None


class _StartError(UserError):
    """A service could not be started."""

    def __init__(self, service: str, message: str) -> None:
        super().__init__(message)
        self.service = service


class _PortLostError(UserError):
    """A port was free when it was chosen, and taken by another program when it was to be bound."""


# Ray before the others, so that a job that is told to end can still say so in its MLflow run.
_END_ORDER: tuple[tuple[type[Service], ...], ...] = ((RayHead,), (MLflowServer, S3Server))
CHOOSABLE_PORTS = tuple(purpose for service in SERVICES for purpose, default in service.ports.items() if default)


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
                    say(f"{error}; trying again")
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
                say(f"nothing was up in {self.folder}")
            if delete_data:
                shutil.rmtree(self.folder / "s3", ignore_errors=True)
                for database in self.folder.glob("mlflow.db*"):
                    database.unlink()
                say(f"deleted the data in {self.folder}")

    def status(self) -> list[ServiceStatus]:
        """Returns the state of every service.

        Raises:
            UserError: the state file cannot be read.
        """
        records = self._read_state() if self.folder.exists() else {}
        return [self._status_of(kind, records.get(kind.name)) for kind in SERVICES]

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
        missing = [kind.title for kind in SERVICES if not is_alive(records.get(kind.name))]
        if missing:
            raise UserError(f"not up: {', '.join(missing)}; start the local services: make up")
        return {
            **s3_environment(records["s3"].address, self._credentials()),
            "MLFLOW_TRACKING_URI": records["mlflow"].address,
            "RAY_API_SERVER_ADDRESS": records["ray"].address,
            "RAY_ADDRESS": f"{HOST}:{records['ray'].ports['gcs']}",
            **ray_environment(self.ray_token_file),
            **proxy_exemption(),
        }

    def _start_missing(self) -> None:
        start = time.monotonic()
        records = self._read_state()
        credentials = self._credentials()
        services = [kind(self.folder, credentials) for kind in SERVICES]
        started: dict[str, Service] = {}
        try:
            for service in services:
                settings = {name: records[name].address for name in service.depends_on}
                if isinstance(service, RayHead):
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

    def _is_kept(self, service: Service, record: ServerProcess, settings: Mapping[str, str]) -> bool:
        """Whether a service that was started earlier is left as it is."""
        if not is_alive(record):
            say(f"{service.title}: was started as process {record.pid}, which is gone")
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
            say(f"{service.title}: has to be started anew, for a service that it uses has moved")
            return False
        end = time.monotonic() + REQUEST_SECONDS
        while True:
            try:
                service.check(record.ports)
            except NotReadyError as error:
                if time.monotonic() > end:
                    say(f"{service.title}: does not answer at {record.address} ({error})")
                    return False
                time.sleep(POLL_SECONDS)
            else:
                say(f"{service.title}: already up at {record.address}")
                return True

    def _choose_ports(
        self, service: Service, previous: ServerProcess | None, records: Iterable[ServerProcess]
    ) -> dict[str, int]:
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

    def _launch(self, service: Service, ports: dict[str, int], settings: dict[str, str]) -> ServerProcess:
        run_folder = Path(tempfile.mkdtemp(prefix=f"infusion-{service.name}-", dir=_short_temporary_folder()))
        launch = Launch(ports, settings, run_folder)
        address = service.address(ports)
        try:
            command, environment = service.command(launch), service.environment(launch)
            say(f"{service.title}: starting at {address}")
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
        return ServerProcess(child.pid, created, ports, address, settings, str(run_folder))

    def _await_healthy(
        self, started: Mapping[str, Service], records: Mapping[str, ServerProcess], start: float
    ) -> None:
        cancelled = threading.Event()
        with ThreadPoolExecutor(max_workers=len(SERVICES)) as pool:
            waits = [
                pool.submit(self._await_one, service, records[name], start, cancelled)
                for name, service in started.items()
            ]
            try:
                for wait in as_completed(waits):
                    wait.result()
            finally:
                cancelled.set()

    def _await_one(self, service: Service, record: ServerProcess, start: float, cancelled: threading.Event) -> None:
        while not cancelled.is_set():
            code = self._children[record.pid].poll()
            seconds = time.monotonic() - start
            if code is not None:
                raise self._start_error(service, record, f"ended with exit status {code} after {seconds:.1f} s")
            try:
                service.set_up(record.ports)
                service.check(record.ports)
                # Somebody else may have been quicker to bind the port, and answer in the same way.
                if not listens(record):
                    raise NotReadyError("another program answers there")
            except NotReadyError as error:
                if seconds > self._deadline:
                    raise self._start_error(
                        service, record, f"did not answer within {seconds:.0f} s ({error})"
                    ) from error
                cancelled.wait(POLL_SECONDS)
            else:
                say(f"{service.title}: up at {record.address} after {seconds:.1f} s")
                return

    def _start_error(self, service: Service, record: ServerProcess, what: str) -> _StartError:
        log = self._log(service)
        return _StartError(
            service.name,
            f"the {service.title} at {record.address} {what}; its log is {log} and says: {last_meaningful_line(log)}",
        )

    def _end(self, records: Mapping[str, ServerProcess]) -> None:
        for kinds in _END_ORDER:
            group = [(kind, records[kind.name]) for kind in kinds if kind.name in records]
            alive = [kind.title for kind, record in group if is_alive(record)]
            start = time.monotonic()
            end_processes([record for _, record in group], max(kind.grace_seconds for kind in kinds))
            for kind, record in group:
                child = self._children.pop(record.pid, None)
                if child is not None:
                    child.wait()
                await_closed(record.ports.values())
                shutil.rmtree(record.run_folder, ignore_errors=True)
                for file in kind.leftovers:
                    Path(file.format(**record.ports)).unlink(missing_ok=True)
            for title in alive:
                say(f"{title}: ended after {time.monotonic() - start:.1f} s")

    def _status_of(self, kind: type[Service], record: ServerProcess | None) -> ServiceStatus:
        if record is None or not is_alive(record):
            return ServiceStatus(kind.name, "down", None, None)
        try:
            kind(self.folder, self._credentials()).check(record.ports)
        except NotReadyError:
            return ServiceStatus(kind.name, "not answering", record.address, record.pid)
        return ServiceStatus(kind.name, "up", record.address, record.pid)

    def _log(self, service: Service) -> Path:
        return self.folder / "logs" / f"{service.name}.log"

    @property
    def ray_token_file(self) -> Path:
        """The file with the token that the Ray dashboard asks for."""
        return self.folder / RAY_TOKEN_FILE

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.json"

    def _read_state(self) -> dict[str, ServerProcess]:
        try:
            content = json.loads(self._state_file.read_text())
            return {name: ServerProcess(**fields) for name, fields in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._state_file} cannot be read ({error}); end what it may have started by hand, then delete it"
            ) from error

    def _write_state(self, records: Mapping[str, ServerProcess]) -> None:
        content = {name: asdict(record) for name, record in records.items()}
        write_private(self._state_file, json.dumps(content, indent=2))

    def _credentials(self) -> Credentials:
        """Returns the generated credentials; generates them the first time."""
        file = self.folder / "credentials.json"
        try:
            credentials = Credentials(**json.loads(file.read_text()))
        except FileNotFoundError:
            credentials = Credentials(*[secrets.token_hex(length) for length in (10, 32, 10, 32, 32)])
            write_private(file, json.dumps(asdict(credentials), indent=2))
            write_private(self.ray_token_file, credentials.ray_token)
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
                say(f"waiting for another process that starts or ends the services in {self.folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= MAX_TEMPORARY_FOLDER_LENGTH else "/tmp"
