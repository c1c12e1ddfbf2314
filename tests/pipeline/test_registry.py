"""Runs, registered models and promotion on a real MLflow server with artifacts on a real S3 server."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig
from pipeline import model_package, registry, storage, tracking
from pipeline.errors import UserError
from pipeline.promotion import promote
from pipeline.sampling import sample

REPOSITORY = Path(__file__).parents[2]
CONFIG = ModelConfig(image_shape=(5, 4, 1), levels=17, num_steps=3, hidden_sizes=(8,), rate_increment=0.1)


def new_model(seed: int = 0) -> InfusionModel:
    torch.manual_seed(seed)
    prior = FactorialGaussian(torch.rand(1, 5, 4), torch.rand(1, 5, 4) * 0.1)
    return InfusionModel(CONFIG, prior).eval()


def register(
    name: str, bound: float, *, data: str = "d", model: InfusionModel | None = None
) -> registry.RegisteredModel:
    tags = {"valid/lower_bound": str(bound), "variance_floor": "0.0001", "dataset_fingerprint": data}
    with tracking.owned_run("tests", name, params={"a": 1}, tags={}) as run:
        return model_package.register(model or new_model(), name, run, tags)


def unique(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def status(run_id: str) -> str:
    return MlflowClient().get_run(run_id).info.status


def await_status(run_id: str, wanted: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while status(run_id) != wanted:
        assert time.monotonic() < deadline, f"run {run_id} is {status(run_id)}, not {wanted}"
        time.sleep(0.2)


@pytest.mark.usefixtures("client_env")
class TestRuns:
    def test_a_run_ends_finished_failed_or_killed(self) -> None:
        endings: list[tuple[type[BaseException] | None, str]] = [
            (None, "FINISHED"),
            (ValueError, "FAILED"),
            (KeyboardInterrupt, "KILLED"),
            (SystemExit, "KILLED"),
        ]
        for error, expected in endings:
            try:
                with tracking.owned_run("tests", "ends", params={}, tags={"a": "b"}) as run:
                    assert status(run.run_id) == "RUNNING"
                    if error is not None:
                        raise error
            except (ValueError, KeyboardInterrupt, SystemExit):
                pass
            assert status(run.run_id) == expected

    def test_the_run_of_a_process_that_was_killed_ends_killed(self, client_env: Mapping[str, str]) -> None:
        script = (
            "import sys\n"
            "from pipeline import tracking\n"
            "with tracking.owned_run('tests', 'killed', params={}, tags={}) as run:\n"
            "    print(run.run_id, flush=True)\n"
            "    sys.stdin.read()\n"
        )
        owner = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=REPOSITORY,
            env={**os.environ, **client_env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert owner.stdout is not None
        run_id = owner.stdout.readline().strip()
        assert status(run_id) == "RUNNING"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        await_status(run_id, "KILLED")

    def test_metrics_keep_their_steps_and_a_run_can_be_taken_up_again(self) -> None:
        with tracking.owned_run("tests", "metrics", params={"rate": 0.1}, tags={}) as run:
            run.log_metrics([(1, {"train/objective": 1.5, "x": float("nan")}), (2, {"train/objective": 2.5})])
            run.log_file("pictures/a.txt", b"content")
        with tracking.owned_run("tests", "metrics", params={"rate": 0.2}, tags={}, resume=run) as again:
            assert again == run
            assert status(run.run_id) == "RUNNING"
        client = MlflowClient()
        history = client.get_metric_history(run.run_id, "train/objective")
        assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 2.5)]
        assert client.get_run(run.run_id).data.params == {"rate": "0.1"}
        assert "x" not in client.get_run(run.run_id).data.metrics
        assert [file.path for file in client.list_artifacts(run.run_id, "pictures")] == ["pictures/a.txt"]
        assert status(run.run_id) == "FINISHED"


@pytest.mark.usefixtures("client_env")
class TestModels:
    def test_a_registered_model_is_found_by_alias_and_loaded_bit_for_bit(self) -> None:
        model, name = new_model(), unique("infusion-a")
        registered = register(name, 1.0, model=model)
        assert registered.uri == f"models:/{name}/1"
        assert registry.find(f"models:/{name}@challenger") == registered
        loaded = model_package.load(registered)
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key

    def test_predict_draws_what_the_sample_job_draws_without_pickle_or_this_repository(
        self, client_env: Mapping[str, str], tmp_path: Path
    ) -> None:
        registered = register(unique("infusion-b"), 1.0)
        script = (
            "import mlflow, numpy, pandas\n"
            f"model = mlflow.pyfunc.load_model({registered.uri!r})\n"
            "few = pandas.DataFrame({'num_samples': [3, 4]})\n"
            "numpy.save('a.npy', model.predict(few, params={'seed': 5, 'num_steps': 6}))\n"
            "numpy.save('b.npy', model.predict(few, params={'seed': 6, 'num_steps': 6}))\n"
        )
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {**client_env, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=300)
        drawn, others = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
        assert drawn.shape == (7, 5, 4, 1)
        assert drawn.dtype == np.float32
        assert not np.array_equal(drawn, others)

        result = sample(registered.uri, str(tmp_path), num_samples=7, num_steps=6, seed=5)
        table = pq.read_table(result.table)
        assert np.array_equal(np.array(table["image"].to_pylist(), np.float32).reshape(7, 5, 4, 1), drawn)
        assert table.schema.field("image").metadata == {b"shape": b"5,4,1"}
        assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("models:/no-such-model@champion", r"no model models:/no-such-model@champion; registered are: "),
            ("models:/no-such-model/3", r"no model models:/no-such-model/3"),
            ("no-such-model", r"no-such-model is not a model's address; write models:/NAME@ALIAS"),
        ],
    )
    def test_a_model_that_does_not_exist_is_named(self, uri: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            registry.find(uri)

    def test_a_missing_alias_is_named(self) -> None:
        registered = register(unique("infusion-c"), 1.0)
        with pytest.raises(UserError, match=r"no model models:/.*@champion"):
            registry.find(f"models:/{registered.name}@champion")


@pytest.mark.usefixtures("client_env")
class TestPromotion:
    def test_the_higher_bound_wins(self) -> None:
        name = unique("infusion-d")
        register(name, 10.0)
        first = promote(name)
        assert first.promoted
        assert first.reason == "there was no champion"
        assert registry.find(f"models:/{name}@champion").version == "1"
        assert not promote(name).promoted

        register(name, 9.0)
        worse = promote(name)
        assert not worse.promoted
        assert "9.00 nats at variance floor 0.0001, is not higher than the champion's, 10.00" in worse.reason
        assert registry.find(f"models:/{name}@champion").version == "1"

        register(name, 11.0)
        assert promote(name).promoted
        assert registry.find(f"models:/{name}@champion").version == "3"

    def test_bounds_of_different_data_are_not_compared(self) -> None:
        name = unique("infusion-e")
        register(name, 10.0)
        promote(name)
        register(name, 11.0, data="other")
        with pytest.raises(UserError, match="were validated on different data"):
            promote(name)
        assert registry.find(f"models:/{name}@champion").version == "1"

    def test_an_unknown_model_is_named(self) -> None:
        with pytest.raises(UserError, match="no model named 'no-such-model'"):
            promote("no-such-model")


def test_samples_go_to_s3(bucket_uri: str) -> None:
    registered = register(unique("infusion-f"), 1.0)
    result = sample(registered.uri, bucket_uri, num_samples=2)
    assert result.num_steps == CONFIG.num_steps
    for uri in (result.grid, result.chains, result.table):
        assert uri.startswith(bucket_uri)
        assert storage.exists(uri)
