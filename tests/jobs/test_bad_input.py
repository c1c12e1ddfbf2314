"""What is wrong outside of the program is one clear line and a non-zero exit."""

import json
import re
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient

from pipeline import sources, storage
from pipeline.manifest import Manifest
from pipeline.staging import stage

JOBS = (
    *("stage", "train", "evaluate", "sample", "inpaint", "promote", "report", "train_classifier", "tune"),
    *("services", "demo"),
)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound, so that nobody else takes it, and that does not listen."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def error_of(job: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a job that must fail, and returns the line that it printed."""
    assert import_module(f"jobs.{job}").main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    # What Ray forwards of its workers' logs has a coloured prefix; the job's own words are judged.
    own = [line for line in captured.err.splitlines() if not line.startswith("\x1b[")]
    assert not any("Traceback" in line for line in own)
    assert [line for line in own if line.startswith("error: ")] == own[-1:]
    return own[-1]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_explains_itself(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        import_module(f"jobs.{job}").main(["--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_grid_of_the_helps_example_can_be_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import tune

    (example,) = re.findall(r"^    python -m jobs\.tune (.*?)\n\n", tune.__doc__ or "", re.MULTILINE | re.DOTALL)
    words = shlex.split(example.replace("\\\n", ""))
    assert words[0].endswith("/mnist")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # What is missing is known only after the grid was made.
    line = error_of("tune", ["/missing/mnist", "--runs", "/missing", *words[3:]], capsys)
    assert "MLFLOW_TRACKING_URI is not set" in line


def test_unknown_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of("stage", ["floppy:A", str(tmp_path / "x")], capsys)
    assert "floppy:A" in line
    assert "digits" in line
    assert "npz:" in line


@pytest.mark.usefixtures("client_env")
class TestTrain:
    def test_missing_manifest(self, bucket_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [f"{bucket_uri}/none", "--runs", bucket_uri, "--preset", "digits"]
        line = error_of("train", arguments, capsys)
        assert f"{bucket_uri}/none" in line
        assert "jobs.stage" in line

    def test_unknown_preset(self, staged_digits: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = error_of("train", [staged_digits, "--runs", bucket_uri, "--preset", "imagenet"], capsys)
        assert "no preset 'imagenet'; choose one of mnist, tfd, cifar10, celeba, digits" in line

    def test_image_shape_of_another_data_set(
        self, staged_digits: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = error_of("train", [staged_digits, "--runs", bucket_uri, "--preset", "mnist"], capsys)
        assert "8 × 8 × 1" in line
        assert "28 × 28 × 1" in line

    def test_schedule_past_one(self, staged_digits: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [staged_digits, "--runs", bucket_uri, "--num-steps", "15", "--rate-increment", "0.1"]
        line = error_of("train", arguments, capsys)
        assert "leaves [0, 1] at step 11 of 15" in line

    def test_more_workers_than_the_cluster_can_hold(
        self, ray_cluster: str, staged_digits: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cpus = int(ray.cluster_resources()["CPU"])
        line = error_of("train", [staged_digits, "--runs", bucket_uri, "--num-workers", "128"], capsys)
        assert "128 workers with 1 CPU each can never run" in line
        assert f"holds {cpus} such workers at most" in line
        line = error_of("train", [staged_digits, "--runs", bucket_uri, "--threads-per-worker", str(cpus + 1)], capsys)
        assert f"1 workers with {cpus + 1} CPU each can never run: the cluster holds 0 such workers at most" in line
        assert storage.list_files(bucket_uri) == []

    def test_damaged_parquet_file(self, ray_cluster: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        dataset = f"{bucket_uri}/data/digits"
        stage(sources.digits(), dataset)
        part = Manifest.load(dataset).splits["train"][0]
        content = bytearray(storage.read_bytes(storage.join(dataset, part.path)))
        content[len(content) // 2] ^= 1
        storage.write_bytes(storage.join(dataset, part.path), bytes(content))
        line = error_of("train", [dataset, "--runs", f"{bucket_uri}/runs", "--name", "damaged"], capsys)
        assert storage.join(dataset, part.path) in line
        assert part.sha256 in line
        assert "--overwrite" in line
        run_id = json.loads(storage.read_bytes(f"{bucket_uri}/runs/damaged/run.json"))["mlflow_run"]["run_id"]
        assert MlflowClient().get_run(run_id).info.status == "FAILED"

    def test_other_settings_under_the_name_of_an_earlier_run(
        self, ray_cluster: str, staged_digits: str, bucket_uri: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dataset = f"{bucket_uri}/again"
        stage(sources.digits(), dataset)
        base = [dataset, "--runs", bucket_uri, "--name", "a", "--preset", "digits", "--hidden-sizes", "8"]
        arguments = [*base, "--epochs", "1", "--json"]
        results = []
        for _ in range(2):
            assert import_module("jobs.train").main(arguments) == 0
            results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert results[0] == results[1]
        assert results[0]["model"] == "models:/infusion-again/1"
        line = error_of("train", [*base, "--epochs", "2", "--seed", "4"], capsys)
        assert "epochs was 1 and is now 2" in line
        assert "seed was 0 and is now 4" in line


class TestTune:
    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            ([], ["the grid is empty; give --increasing"]),
            (
                ["--steps", "4,15", "--increasing", "0.3,0.4"],
                [
                    "3 of 4 points",
                    "T4-increasing-0.4: the infusion rate leaves",
                    "T15-increasing-0.3",
                    "T15-increasing-0.4",
                ],
            ),
            (["--over", "learning_speed=1"], ["there is no field 'learning_speed'", "learning_rate"]),
            (["--over", "learning_rate"], ["--over learning_rate: write FIELD=VALUE"]),
            (["--over", "learning_rate=fast"], ["--over learning_rate=fast: could not convert"]),
            (["--over", "synchronise_normalisation=yes"], ["'yes' is neither true nor false"]),
            (["--over", "seed=1", "--over", "seed=2"], ["--over seed is given twice"]),
            (["--grid", "paper-table-4", "--constant", "0.1"], ["--grid paper-table-4 is a whole grid"]),
            (["--constant", "0.1", "--resume"], ["give --name"]),
            (["--constant", "0.1", "--grace-epochs", "0"], ["grace_epochs must be at least 1, not 0"]),
            (["--constant", "0.1", "--gpus-per-worker", "1.5"], ["gpus_per_worker must be below 1 or a whole number"]),
        ],
    )
    def test_searches_that_cannot_be(
        self, arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["s3://bucket/digits", "--runs", "s3://bucket/runs", *arguments]
        line = error_of("tune", words, capsys)
        assert all(message in line for message in messages)

    def test_what_the_data_the_cluster_or_the_folder_does_not_allow(
        self, ray_cluster: str, client_env: Mapping[str, str], staged_digits: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = [staged_digits, "--constant", "0.1,0.2", "--runs"]
        before = {run.info.run_id for run in MlflowClient().search_runs(experiment_ids())}
        for rest, message in (
            (["s3://infusion/x", "--name", "none", "--resume"], "there is no search none in s3://infusion/x to resume"),
            (["s3://infusion/x", "--name", "a/b"], "'a/b' cannot be the name of a search"),
            (["s3://infusion/x", "--image-shape", "28,28,1"], "28 × 28 × 1; choose another data set"),
            (["s3://infusion/x", "--grace-epochs", "500"], "compared after 510 epochs first"),
            (["s3://infusion/x", "--threads-per-worker", "1000"], "can never run: the cluster holds 0 such workers"),
            (["/dev/null/x"], "/dev/null/x/"),
            (["s3://infusion/x", "--reuse", "none"], "there is no search in s3://infusion/x/none to reuse"),
            (["s3://no-such-bucket/x"], "there is no bucket s3://no-such-bucket"),
            (["s3://infusion/x", "--preset", "cifar10", "--criterion", "parzen"], "give --parzen-bandwidth"),
        ):
            assert message in error_of("tune", [*base, *rest], capsys)
        assert {run.info.run_id for run in MlflowClient().search_runs(experiment_ids())} == before


def experiment_ids() -> list[str]:
    return [experiment.experiment_id for experiment in MlflowClient().search_experiments()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judges", "importance_sampling", "--num-chains", "0"], "num_chains must be numbers of at least 1"),
        (["--judges", "fid"], "there is no judge 'fid'"),
        (["--judges", "sample_scores"], "give --features"),
        (["--judges", "parzen", "--num-samples", "0"], "num_samples must be at least 1"),
        (["--num-workers", "0"], "num_workers must be at least 1"),
    ],
)
def test_judges_that_cannot_judge(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of("evaluate", ["models:/a@champion", "s3://bucket/digits", *arguments], capsys)


@pytest.mark.usefixtures("client_env")
class TestRegistered:
    def test_name_that_does_not_exist(
        self, staged_digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for job, rest in (
            ("evaluate", [staged_digits]),
            ("sample", [str(tmp_path)]),
            ("inpaint", [staged_digits, str(tmp_path)]),
        ):
            line = error_of(job, ["models:/infusion-nothing@champion", *rest], capsys)
            assert "no model models:/infusion-nothing@champion" in line
        assert "no model named 'infusion-nothing'" in error_of("promote", ["infusion-nothing"], capsys)


class TestUnreachable:
    def test_s3(self, closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        address = f"http://127.0.0.1:{closed_port}"
        for name, value in (("ENDPOINT_URL", address), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(f"AWS_{name}", value)
        for job, arguments in (
            ("stage", ["digits", "s3://bucket/digits"]),
            ("train", ["s3://bucket/digits", "--runs", "s3://bucket/runs"]),
            ("evaluate", ["models:/a@champion", "s3://bucket/digits"]),
        ):
            line = error_of(job, arguments, capsys)
            assert f"S3 server: {address}" in line
            assert "failed after" in line

    def test_mlflow(
        self,
        staged_digits: str,
        closed_port: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        address = f"http://127.0.0.1:{closed_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        line = error_of("train", [staged_digits, "--runs", str(tmp_path)], capsys)
        assert f"MLflow server at {address} (MLFLOW_TRACKING_URI) did not answer within" in line
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert "MLFLOW_TRACKING_URI is not set" in error_of("promote", ["infusion-digits"], capsys)
