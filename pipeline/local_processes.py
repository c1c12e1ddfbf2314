"""Processes and ports of servers on this machine: choosing, recognising, and ending exactly what was started."""

import contextlib
import os
import random
import re
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pipeline.errors import UserError

HOST = "127.0.0.1"
# Below the ports that the kernel hands out for outgoing connections, which could otherwise take one of ours
# between the moment it is chosen and the moment it is bound.
FREE_PORTS = range(20000, 32000)
POLL_SECONDS = 0.1
KILL_SECONDS = 5.0
# The time of creation is derived from the time of boot, which the kernel may move when the clock is set.
CREATION_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True)
class ServerProcess:
    """A service that was started: what identifies its process, and where it listens."""

    pid: int
    created: float
    ports: dict[str, int]
    address: str
    # What it was started with, by name: addresses of other services, options. It must be started anew if these change.
    settings: dict[str, str]
    run_folder: str


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
                say(f"{purpose}: port {default} is taken by {port_holder(default)}; using port {port} instead")
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


def say(line: str) -> None:
    """Tells the user of the progress."""
    print(line, file=sys.stderr, flush=True)


def write_private(file: Path, text: str) -> None:
    """Writes a file that only its owner can read, so that a reader sees all of it or none."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    temporary.replace(file)


def _leader(record: ServerProcess) -> psutil.Process | None:
    """Returns the process that was started, or `None` if it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.created) <= CREATION_TOLERANCE_SECONDS:
            return process
    return None


def is_alive(record: ServerProcess | None) -> bool:
    """Whether the process that was started, and no other with its id, runs."""
    leader = None if record is None else _leader(record)
    with contextlib.suppress(psutil.Error):
        return leader is not None and leader.status() != psutil.STATUS_ZOMBIE
    return False


def _family(record: ServerProcess) -> set[psutil.Process]:
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


def listens(record: ServerProcess) -> bool:
    """Whether it is our process, or a descendant, that listens at the service's address."""
    port = int(record.address.rpartition(":")[2])
    for process in _family(record):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def end_processes(records: Iterable[ServerProcess], grace_seconds: float) -> None:
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


def await_closed(ports: Iterable[int]) -> None:
    """Waits until nobody listens on the ports, or for a while at most."""
    end = time.monotonic() + KILL_SECONDS
    for port in ports:
        while not is_free(port) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
