import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from pipeline import storage
from pipeline.errors import UserError
from pipeline.local_processes import choose_port, is_free, last_meaningful_line
from pipeline.local_services import LocalServices

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}


def pids(services: LocalServices) -> dict[str, int | None]:
    return {status.name: status.pid for status in services.status()}


def states(services: LocalServices) -> dict[str, str]:
    return {status.name: status.state for status in services.status()}


def family(pids: Mapping[str, int | None]) -> list[psutil.Process]:
    leaders = [psutil.Process(pid) for pid in pids.values()]
    return [process for leader in leaders for process in (leader, *leader.children(recursive=True))]


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    process.wait(timeout=10)


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def run_command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # Would not return before the services end, if they kept its output open.
    return subprocess.run(
        [sys.executable, "-m", "jobs.services", *arguments, "--folder", str(folder), "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )


# What the services are to their users


def test_mlflow_passes_artifacts_to_the_s3_server(client_env: Mapping[str, str]) -> None:
    import mlflow

    client = mlflow.MlflowClient(client_env["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("artifacts of the services"))
    client.log_text(run.info.run_id, "content", "folder/note.txt")

    [stored] = [uri for uri in storage.list_files("s3://infusion/mlflow") if run.info.run_id in uri]
    assert storage.read_bytes(stored) == b"content"


def test_s3_refuses_a_wrong_key(client_env: Mapping[str, str]) -> None:
    client = boto3.client("s3", aws_access_key_id=client_env["AWS_ACCESS_KEY_ID"], aws_secret_access_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client.list_objects_v2(Bucket="infusion")


def test_a_mistyped_bucket_is_an_error_and_not_a_new_bucket(client_env: Mapping[str, str]) -> None:
    client = boto3.client("s3")
    with pytest.raises(ClientError, match="AccessDenied"):
        client.put_object(Bucket="infusoin", Key="key", Body=b"")
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["infusion"]


def test_data_are_not_served_past_the_s3_gateway(client_env: Mapping[str, str], services: LocalServices) -> None:
    filer_port = json.loads((services.folder / "state.json").read_text())["s3"]["ports"]["filer"]
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"http://127.0.0.1:{filer_port}/buckets/infusion/")
    assert refusal.value.code == 401


def test_ray_refuses_a_request_without_the_token(client_env: Mapping[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{client_env['RAY_API_SERVER_ADDRESS']}/api/jobs/")
    assert refusal.value.code == 401


def test_a_driver_joins_the_cluster_whose_workers_know_the_services(
    ray_cluster: str, client_env: Mapping[str, str]
) -> None:
    import ray

    environment = ray.get(ray.remote(lambda: dict(os.environ)).remote())

    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"):
        assert environment[name] == client_env[name]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_job_is_submitted_with_the_token(client_env: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "entry.py").write_text(
        "import os, ray\n"
        "ray.init()\n"
        "print('nodes', len(ray.nodes()), os.environ['AWS_ENDPOINT_URL'], os.environ['MLFLOW_TRACKING_URI'])\n"
    )
    submission = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(tmp_path)),
            *("--address", client_env["RAY_API_SERVER_ADDRESS"], "--", "python", "-m", "entry"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert submission.returncode == 0, submission.stderr
    assert f"nodes 1 {client_env['AWS_ENDPOINT_URL']} {client_env['MLFLOW_TRACKING_URI']}" in submission.stdout


def test_everything_listens_on_loopback_only(services: LocalServices) -> None:
    listeners = listening(family(pids(services)))
    assert {ip for ip, _ in listeners} <= LOOPBACK
    assert len(listeners) > 10


def test_only_the_owner_can_read_credentials(services: LocalServices) -> None:
    assert services.folder.stat().st_mode & 0o777 == 0o700
    for name in ("credentials.json", "s3-identities.json", "ray-token", "state.json"):
        assert (services.folder / name).stat().st_mode & 0o777 == 0o600, name
    secret = services.env()["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in argument for process in family(pids(services)) for argument in process.cmdline())


# Starting


def test_up_leaves_alone_what_is_up(services: LocalServices, capsys: pytest.CaptureFixture[str]) -> None:
    before = pids(services)
    services.up()
    assert pids(services) == before
    assert capsys.readouterr().err.count("already up at http://127.0.0.1:") == 3


def test_up_restarts_only_what_died(services: LocalServices, bucket_uri: str) -> None:
    storage.write_bytes(f"{bucket_uri}/kept", b"content")
    before, environment = pids(services), services.env()
    kill(before["s3"])

    assert states(services) == {"s3": "down", "mlflow": "up", "ray": "up"}
    with pytest.raises(UserError, match="not up: S3 server; start the local services"):
        services.env()

    services.up()
    after = pids(services)
    assert after.pop("s3") != before.pop("s3")
    assert after == before
    assert services.env() == environment
    assert storage.read_bytes(f"{bucket_uri}/kept") == b"content"


def test_up_refuses_to_change_what_is_up(services: LocalServices) -> None:
    with pytest.raises(UserError, match=r"S3 server: already up with s3 port \d+; to move it to port 1234, end"):
        LocalServices(services.folder, ports={"s3": 1234}).up()
    with pytest.raises(UserError, match="Ray head: already up with all CPUs; to give it 3, end"):
        LocalServices(services.folder, num_cpus=3).up()


def test_a_service_that_cannot_start_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3" / "filerldb2").write_text("not the folder that the server expects")
    services = LocalServices(tmp_path, ports="free")
    before = set(psutil.Process().children(recursive=True))

    with pytest.raises(UserError) as failure:
        services.up()

    message = str(failure.value)
    assert message.startswith("the S3 server at http://127.0.0.1:")
    assert "ended with exit status 255 after" in message
    assert f"its log is {tmp_path / 'logs' / 's3.log'} and says:" in message
    assert message.endswith("filerldb2 Writable: Not a valid folder!")
    assert "\n" not in message
    assert set(psutil.Process().children(recursive=True)) <= before
    assert set(states(services).values()) == {"down"}


def test_a_taken_port_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with taken_port() as port, pytest.raises(UserError) as failure:
        LocalServices(tmp_path, ports={"s3": port}).up()
    assert f"port {port}, asked for as s3 port, is taken by process {os.getpid()} (" in str(failure.value)


def test_a_taken_default_port_is_replaced_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    with taken_port() as port:
        replacement = choose_port(port, "S3 server")
    assert is_free(replacement)
    line = capsys.readouterr().err
    assert line.startswith(f"S3 server: port {port} is taken by process {os.getpid()} (")
    assert line.endswith(f"using port {replacement} instead\n")


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ({"ftp": 21}, "there is no port ftp to choose"),
        ({"s3": 70000}, "70000 cannot be the s3 port"),
        ({"s3": 9000, "gcs": 9000}, "two services cannot have the same port"),
    ],
)
def test_impossible_ports_are_refused(tmp_path: Path, ports: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LocalServices(tmp_path, ports=ports)


# Ending


def test_down_ends_all_that_up_started(tmp_path: Path) -> None:
    names = ("s3", "mlflow", "dashboard", "gcs")
    ports = {name: str(choose_port(None, name)) for name in names}
    up = run_command(*["up"] + [part for name in names for part in (f"--{name}-port", ports[name])], folder=tmp_path)
    assert up.returncode == 0, up.stderr
    started = json.loads(up.stdout)
    assert (started["s3"], started["s3_address"]) == ("up", f"http://127.0.0.1:{ports['s3']}")
    assert started["ray_dashboard"] == f"http://127.0.0.1:{ports['dashboard']}"

    services = LocalServices(tmp_path)
    record = json.loads((tmp_path / "state.json").read_text())
    processes = family(pids(services))
    addresses = listening(processes)
    # The rest of Ray loses its parent, and some of it lives on for a while.
    kill(record["ray"]["pid"])
    assert json.loads(run_command("status", folder=tmp_path).stdout)["ray"] == "down"

    down = run_command("down", folder=tmp_path)
    assert down.returncode == 0, down.stderr
    assert not [process for process in processes if process.is_running()]
    assert all(is_free(port) for _, port in addresses)
    assert not any(Path(service["run_folder"]).exists() for service in record.values())
    assert not [*Path("/tmp").glob(f"seaweedfs-*-{record['s3']['ports']['master_grpc']}.sock")]
    assert (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "s3").exists()

    again = run_command("down", "--delete-data", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing was up" in again.stderr
    assert not [*tmp_path.glob("mlflow.db*")]
    assert not (tmp_path / "s3").exists()


def test_a_process_that_inherited_a_recorded_id_is_neither_trusted_nor_ended(
    services: LocalServices, tmp_path: Path
) -> None:
    record = json.loads((services.folder / "state.json").read_text())["s3"]
    record["ports"] = {purpose: choose_port(None, purpose) for purpose in record["ports"]}
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        try:
            record |= {"pid": stranger.pid, "run_folder": str(tmp_path / "run")}
            (tmp_path / "state.json").write_text(json.dumps({"s3": record}))
            old = LocalServices(tmp_path)

            assert states(old)["s3"] == "down"
            old.down()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_an_unreadable_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        LocalServices(tmp_path).status()


# The command


def test_options_that_an_action_would_ignore_are_refused(tmp_path: Path) -> None:
    refusal = run_command("down", "--s3-port", "9000", folder=tmp_path)
    assert refusal.returncode == 2
    assert "can be chosen with up, not with down" in refusal.stderr


def test_env_of_services_that_are_down_is_one_clear_line(tmp_path: Path) -> None:
    refusal = run_command("env", folder=tmp_path)
    assert refusal.returncode == 1
    assert refusal.stderr == ("error: not up: S3 server, MLflow server, Ray head; start the local services: make up\n")


def test_env_can_be_evaluated_by_a_shell(services: LocalServices) -> None:
    command = f"{sys.executable} -m jobs.services env --folder '{services.folder}'"
    printed = subprocess.run(
        ["sh", "-c", f'eval "$({command})" && printf %s "$AWS_SECRET_ACCESS_KEY"'],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert printed.stdout == services.env()["AWS_SECRET_ACCESS_KEY"]


def test_the_line_of_a_log_that_is_quoted_speaks_of_the_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\n\x1b[31mError: address already in use\x1b[0m\n\nbye\n\n")
    assert last_meaningful_line(log) == "Error: address already in use"
    log.write_text("Traceback\n  File\nDatabaseError: not a database\n(Background on this error at: url)\n")
    assert last_meaningful_line(log) == "DatabaseError: not a database"
    log.write_text("starting\nbye\n\n")
    assert last_meaningful_line(log) == "bye"
