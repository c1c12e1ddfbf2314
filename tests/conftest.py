"""Real services for the tests: one S3 server, MLflow server and Ray head for all of them, on free ports."""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import infusion_core
from pipeline import sources
from pipeline.local_servers import BUCKET
from pipeline.local_services import LocalServices
from pipeline.staging import stage

SECONDS_FOR_WORKERS = 300
WORKER_PROCESS = Path(__file__).with_name("worker_process.py")

_FOLDER = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Cuts the tests off from other services on this machine, before any test module is imported."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "RAY_"))]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="infusion-tests-"))
    config.stash[_FOLDER] = folder
    # Ray reads these once, when it is imported.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(LocalServices(folder).ray_token_file)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session")
def services(pytestconfig: pytest.Config) -> Iterator[LocalServices]:
    """The services, up."""
    local = LocalServices(pytestconfig.stash[_FOLDER], ports="free")
    try:
        local.up()
        yield local
    finally:
        local.down(delete_data=True)


@pytest.fixture(scope="session")
def client_env(services: LocalServices) -> Iterator[Mapping[str, str]]:
    """The environment variables of a client, set in this process from the first use to the end of all tests."""
    variables = services.env()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def bucket_uri(client_env: Mapping[str, str]) -> str:
    """An address on the S3 server below which nothing is stored yet."""
    return f"s3://{BUCKET}/tests/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster(client_env: Mapping[str, str]) -> Iterator[str]:
    """The address of the services' Ray cluster, which this process has joined."""
    import ray

    ray.init(address=client_env["RAY_ADDRESS"], logging_level="WARNING")
    try:
        yield client_env["RAY_ADDRESS"]
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict]]:
    """Calls a file's `worker(rank, **arguments)` in two processes that form a group; returns what each returned.

    The processes meet through a file: no port is needed, none can be taken.
    """

    def run(file: str, **arguments: object) -> list[dict]:
        folder = tmp_path_factory.mktemp("workers")
        torch.save(arguments, folder / "arguments.pt")
        package_root = Path(infusion_core.__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": str(package_root), "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        logs = [(folder / f"{rank}.log").open("w+") for rank in range(2)]
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER_PROCESS), file, str(rank), str(folder)],
                env=environment,
                stdout=logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]
        try:
            codes = [worker.wait(SECONDS_FOR_WORKERS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            output = []
            for log in logs:
                log.seek(0)
                output.append(log.read())
                log.close()
        assert codes == [0, 0], "\n".join(output)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run


@pytest.fixture(scope="session")
def staged_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a staged data set that is small, real and local: scikit-learn's digits in a folder."""
    folder = str(tmp_path_factory.mktemp("staged") / "digits")
    stage(sources.digits(), folder)
    return folder


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Networks start from the same weights, whatever was run before and in whatever order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and the order of a sum stays the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
