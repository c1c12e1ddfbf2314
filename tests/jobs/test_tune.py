"""Searches on a real cluster: how they end, what they leave, and that a killed one goes on as if it had not been."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ray import tune
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.common import ActorState

from infusion_core.model import ModelConfig
from pipeline import model_package, registry, sources, storage, tracking
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.search import SearchResult, TrialResources, search
from pipeline.search_grid import Grid, grid_points
from pipeline.search_reuse import REUSED_TAG
from pipeline.search_state import SEARCH_FILE, read_state
from pipeline.search_trial import FAILURE, GroupTrial, TrialSpec
from pipeline.staging import stage
from pipeline.successive_halving import HalvingConfig
from pipeline.training import TrainConfig, Training

REPOSITORY = Path(__file__).parents[2]
BASE = TrainConfig(
    model=ModelConfig(
        image_shape=(8, 8, 1), levels=17, num_steps=3, target_variance=2e-2, hidden_sizes=(32, 32), variance_floor=1e-3
    ),
    epochs=9,
    global_batch=128,
    learning_rate=2e-3,
    figures_every=9,
    parzen_bandwidth=0.2,
)
GRID = Grid((1, 3), (0.2,), (0.05, 0.3))
HALVING = HalvingConfig(grace_epochs=1, reduction_factor=3)
STORE = "s3://infusion/tests/tune"
LONG = 45


@pytest.fixture(scope="module")
def dataset(client_env: Mapping[str, str]) -> str:
    address = "s3://infusion/tests/tune/digits"
    stage(sources.digits(), address)
    return address


def statuses(experiment: str, search_run: str) -> dict[str, str]:
    """The status of every MLflow run below a search's."""
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{search_run}'")
    return {str(run.info.run_name): run.info.status for run in runs}


def run_id(result: SearchResult) -> str:
    return result.mlflow_run.rpartition("/")[2]


def run_of(result: SearchResult) -> Run:
    return MlflowClient().get_run(run_id(result))


def test_a_search_from_grid_to_challenger(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    points = grid_points(GRID, BASE)
    # With one slot, nothing is promoted before all have come: which trials are trained how far is known beforehand.
    one_slot = TrialResources(max_concurrent=1)
    result = search(points, dataset, bucket_uri, "whole", HALVING, one_slot)
    state = read_state(result.folder)
    assert state is not None
    by_status = {name: fields["status"] for name, fields in state["trials"].items()}
    assert sorted(by_status.values()) == ["finished", "pruned", "pruned", "pruned", "pruned", "pruned"]
    assert (result.finished, result.pruned, result.failed) == (1, 5, 0)
    # Six for an epoch, two for three, one for nine.
    assert result.epochs_trained == 6 * 1 + 2 * 2 + 1 * 6
    assert result.epochs_of_full_grid == 54
    ended = {"finished": "FINISHED", "pruned": "KILLED"}
    assert statuses("infusion-digits", run_id(result)) == {name: ended[status] for name, status in by_status.items()}
    # The winner is what the same training gives without Ray.
    manifest = Manifest.load(dataset)
    bare = Training(next(point.config for point in points if point.name == result.best), dataset, manifest)
    bounds = {report.epoch: report.metrics["valid/lower_bound"] for report in bare.epochs()}
    assert result.valid_lower_bound == pytest.approx(bare.finish().mean, rel=1e-6)
    client = MlflowClient()
    best_run = registry.find(result.challenger).run_id
    history = client.get_metric_history(best_run, "valid/lower_bound")
    assert {point.step: point.value for point in history} == pytest.approx(bounds, rel=1e-6)
    assert client.get_run(best_run).data.metrics["test/lower_bound"] == pytest.approx(bare.test().mean, rel=1e-6)
    assert client.get_run(best_run).data.params["num_steps"] == str(bare.config.model.num_steps)
    registered = registry.find(result.model)
    assert registered.tags["search"] == run_id(result)
    assert model_package.load(registered).config == bare.config.model
    # Pictures of all are kept, checkpoints and models of none but the best.
    files = storage.list_files(storage.join(result.folder, "trials"))
    for point in points:
        own = [file for file in files if f"/{point.name}/" in file]
        assert any(file.endswith("samples.png") for file in own)
        assert any(file.endswith(".safetensors") for file in own) == (point.name == result.best)
    events = [file for file in storage.list_files(result.tensorboard) if "tfevents" in file]
    assert {name for name in by_status if any(f"/{name}/" in file for file in events)} == set(by_status)
    # Asked again, it is done already; with another grid, it is refused.
    assert search(points, dataset, bucket_uri, "whole", HALVING, one_slot, resume=True) == result
    # So it is where its process was killed after the result was known; what was left undone is done.
    pruned = next(name for name in by_status if name != result.best)
    undone = storage.join(result.folder, "trials", pruned, "checkpoint.json")
    storage.write_bytes(undone, b"{}")
    tracking.set_status(tracking.TrackedRun.of(run_id(result)), "KILLED")
    assert search(points, dataset, bucket_uri, "whole", HALVING, one_slot, resume=True) == result
    assert run_of(result).info.status == "FINISHED"
    assert not storage.exists(undone)
    with pytest.raises(UserError, match=r"T3-constant-0\.3 is gone.*start a new search under another --name"):
        search(points[:-1], dataset, bucket_uri, "whole", HALVING, one_slot, resume=True)
    with pytest.raises(UserError, match="grace_epochs was 1 and is now 2"):
        search(points, dataset, bucket_uri, "whole", HalvingConfig(grace_epochs=2), one_slot, resume=True)
    html = storage.read_bytes(result.report).decode()
    assert all(point.name in html for point in points)
    assert "Figure 6" in html
    assert "Figure 7" in html


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, dataset: str) -> SearchResult:
    """A search of longer trainings."""
    points = grid_points(GRID, dataclasses.replace(BASE, epochs=LONG))
    return search(points, dataset, STORE, "undisturbed", HALVING, TrialResources(max_concurrent=1))


def test_the_best_is_found_for_a_part_of_the_full_grids_epochs(undisturbed: SearchResult, dataset: str) -> None:
    bounds = {}
    for point in grid_points(GRID, dataclasses.replace(BASE, epochs=LONG)):
        training = Training(point.config, dataset, Manifest.load(dataset))
        list(training.epochs())
        bounds[point.name] = training.finish().mean
    assert undisturbed.epochs_of_full_grid == 6 * LONG
    assert undisturbed.epochs_trained <= 0.4 * 6 * LONG
    best = max(bounds.values())
    assert undisturbed.valid_lower_bound >= best - 0.01 * abs(best)


def test_a_wider_search_takes_over_what_was_found(undisturbed: SearchResult, dataset: str) -> None:
    wider = Grid(GRID.num_steps, GRID.increasing, (*GRID.constant, 0.1))
    points = grid_points(wider, dataclasses.replace(BASE, epochs=LONG))
    one_slot = TrialResources(max_concurrent=1)
    afresh = search(points, dataset, STORE, "wider-afresh", HALVING, one_slot)
    result = search(points, dataset, STORE, "wider", HALVING, one_slot, reuse="undisturbed")
    assert (result.best, result.valid_lower_bound) == (afresh.best, afresh.valid_lower_bound)
    assert afresh.reused == 0
    trials, before = trials_of(result.folder), trials_of(undisturbed.folder)
    anew = {name for name, trial in trials.items() if trial["epoch"] > trial["reused"]}
    assert {name for name in trials if name not in before} <= anew
    assert result.reused == len(trials) - len(anew) >= 4
    assert result.epochs_trained == sum(trials[name]["epoch"] for name in anew) < afresh.epochs_trained
    # What was trained in full has its model and its curve, and is not trained again.
    assert trials[undisturbed.best]["reused"] == LONG
    client = MlflowClient()
    runs = {
        run.data.tags["mlflow.runName"]: run
        for run in client.search_runs(
            [run_of(result).info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id(result)}'"
        )
    }
    assert {name for name, run in runs.items() if REUSED_TAG in run.data.tags} >= set(trials) - anew
    taken = runs[undisturbed.best]
    earlier = taken.data.tags[REUSED_TAG]
    assert [
        (point.step, point.value) for point in client.get_metric_history(taken.info.run_id, "valid/lower_bound")
    ] == [(point.step, point.value) for point in client.get_metric_history(earlier, "valid/lower_bound")]
    assert statuses("infusion-digits", run_id(result)).keys() == trials.keys()
    assert "(taken over)" in storage.read_bytes(result.report).decode()


def test_trials_in_groups_of_workers(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    points = grid_points(Grid(constant=(0.05, 0.3)), dataclasses.replace(BASE, epochs=3))
    # A group is slow to start: in this form the first trial is trained in one stretch.
    halving = HalvingConfig(halving="stopping", grace_epochs=1, reduction_factor=3)
    result = search(points, dataset, bucket_uri, "groups", halving, TrialResources(num_workers=2))
    trials = trials_of(result.folder)
    assert result.best == "T3-constant-0.05"
    other = "T3-constant-0.3"
    assert {name: (trial["status"], trial["epoch"]) for name, trial in trials.items()} == {
        result.best: ("finished", 3),
        other: ("pruned", 1),
    }
    assert statuses("infusion-digits", run_id(result)) == {result.best: "FINISHED", other: "KILLED"}
    # The step of two workers is that of one, but for their noise.
    config = next(point.config for point in points if point.name == result.best)
    alone = Training(config, dataset, Manifest.load(dataset))
    list(alone.epochs())
    assert result.valid_lower_bound == pytest.approx(alone.finish().mean, abs=5)
    await_that(lambda: not live_placement_groups(), None, None)


def test_a_group_that_goes_on_says_first_where_it_is(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    ((point,), folder) = grid_points(Grid(constant=(0.1,)), BASE), f"{bucket_uri}/going-on"
    with tracking.owned_run("groups", "going-on", params={}, tags={}) as run:

        def epochs_reported(epochs: int) -> list[tuple[int, float]]:
            spec = TrialSpec(
                point=point.name,
                config=dataclasses.replace(point.config, epochs=epochs).to_json(),
                dataset=dataset,
                folder=folder,
                run=dataclasses.asdict(run),
                num_workers=2,
            )
            trial = tune.with_parameters(GroupTrial, specs={point.name: spec})({"point": point.name})
            reports = []
            while not (reports and reports[-1]["done"]):
                reports.append(trial.step())
            return [(report["epoch"], report["valid/lower_bound"]) for report in reports]

        first = epochs_reported(2)
        then = epochs_reported(4)
    assert [epoch for epoch, _ in first] == [1, 2]
    assert [epoch for epoch, _ in then] == [2, 3, 4]
    assert then[0] == first[-1]


def test_a_group_of_which_a_worker_dies_is_left_to_the_search(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    (point,) = grid_points(Grid(constant=(0.1,)), dataclasses.replace(BASE, epochs=1000))
    with tracking.owned_run("groups", "dying", params={}, tags={}) as run:
        spec = TrialSpec(
            point=point.name,
            config=point.config.to_json(),
            dataset=dataset,
            folder=f"{bucket_uri}/dying",
            run=dataclasses.asdict(run),
            num_workers=2,
        )
        trial = tune.with_parameters(GroupTrial, specs={point.name: spec})({"point": point.name})
        assert trial.step()["epoch"] == 1
        workers = live_actors("RayTrainWorker")
        psutil.Process(workers[0].pid).kill()
        # Which is heard of first: the worker that died, or the one that lost its connection to it.
        with pytest.raises(RuntimeError, match=r"ended before its trial: \w+Error: .*(died|Connection)"):
            list(iter(trial.step, None))


@pytest.mark.parametrize("diverges", [True, False])
def test_a_group_fails_by_divergence_and_dies_of_services(
    diverges: bool, ray_cluster: str, dataset: str, bucket_uri: str
) -> None:
    config = dataclasses.replace(BASE, learning_rate=1e30) if diverges else BASE
    spec = TrialSpec(
        point="a",
        config=config.to_json(),
        dataset=dataset,
        folder=f"{bucket_uri}/failing",
        # MLflow has no such run.
        run={"run_id": "0" * 32, "experiment_id": "0"},
        num_workers=2,
    )
    trial = tune.with_parameters(GroupTrial, specs={"a": spec})({"point": "a"})
    if diverges:
        assert "the training diverged" in trial.step()[FAILURE]
    else:
        with pytest.raises(RuntimeError, match="ended before its trial: ServiceError: cannot log metrics of run 000"):
            trial.step()


def test_the_best_by_the_parzen_window_estimate(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    # Validated with statistics of few images, other than those that the finished model has.
    base = dataclasses.replace(BASE, epochs=3, figures_every=1, statistics_images=128)
    points = grid_points(Grid(constant=(0.05, 0.3)), base)
    resources = TrialResources(criterion="parzen")
    result = search(points, dataset, bucket_uri, "parzen", HalvingConfig(halving="none"), resources)
    expected = {}
    for point in points:
        training = Training(point.config, dataset, Manifest.load(dataset))
        list(training.epochs())
        training.finish()
        expected[point.name] = training.parzen(0.2)
        assert training.history[-1]["valid/parzen"] != pytest.approx(expected[point.name], rel=1e-6)
    trials = trials_of(result.folder)
    assert {name: trial["parzen"] for name, trial in trials.items()} == pytest.approx(expected, rel=1e-6)
    assert result.best == max(expected, key=lambda name: expected[name])


def test_a_trial_that_diverges_fails_and_says_why(ray_cluster: str, dataset: str, bucket_uri: str) -> None:
    points = grid_points(Grid(over={"learning_rate": (1e-3, 1e30)}), dataclasses.replace(BASE, epochs=2))
    result = search(points, dataset, bucket_uri, "diverged", HalvingConfig(halving="none"), TrialResources())
    assert (result.finished, result.failed) == (1, 1)
    (failed,) = [trial for trial in trials_of(result.folder).values() if trial["status"] == "failed"]
    assert "the training diverged" in failed["reason"]
    by_run = statuses("infusion-digits", run_id(result))
    assert sorted(by_run.values()) == ["FAILED", "FINISHED"]


class TestKilled:
    """A search of which a trial's process is killed, then the driver, both with SIGKILL, and that is resumed."""

    def test_it_ends_as_one_that_was_not(
        self, client_env: Mapping[str, str], dataset: str, undisturbed: SearchResult, tmp_path: Path
    ) -> None:
        folder = f"{STORE}/killed"
        command = long_search(dataset, "killed")
        log = tmp_path / "log"
        with log.open("w") as output:
            driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            await_that(lambda: epochs_of(folder) >= 8, driver, log)
            await_that(kill_trial_process, driver, log)
            await_that(lambda: any(trial["deaths"] for trial in trials_of(folder).values()), driver, log)
            await_that(lambda: epochs_of(folder) >= 12, driver, log)
        finally:
            driver.kill()
            driver.wait()
        search_run = json.loads(storage.read_bytes(f"{folder}/{SEARCH_FILE}"))["mlflow_run"]["run_id"]
        ended = {"KILLED", "FINISHED"}
        await_that(lambda: set(statuses("infusion-digits", search_run).values()) <= ended, None, log)
        await_that(lambda: MlflowClient().get_run(search_run).info.status == "KILLED", None, log)
        await_that(lambda: not live_actors("Trainable"), None, log)

        before = trials_of(folder)
        resumed = subprocess.run([*command, "--resume"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert resumed.returncode == 0, resumed.stderr
        after = trials_of(folder)
        ended_before = [name for name, trial in before.items() if trial["status"] in ("finished", "pruned")]
        assert ended_before
        for name in ended_before:
            assert after[name] == before[name]
        for name, expected in trials_of(undisturbed.folder).items():
            for field in ("status", "epoch", "bound", "best_bound", "reason"):
                assert after[name][field] == expected[field], (name, field)
        by_run = statuses("infusion-digits", search_run)
        assert sorted(by_run.values()) == ["FINISHED"] + 5 * ["KILLED"]
        assert MlflowClient().get_run(search_run).info.status == "FINISHED"
        await_that(lambda: not live_actors("Trainable"), None, log)
        await_that(lambda: not live_placement_groups(), None, log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_search_that_is_interrupted_is_not_taken_for_finished(
    ray_cluster: str, dataset: str, undisturbed: SearchResult, tmp_path: Path, number: signal.Signals
) -> None:
    name = f"interrupted-by-{number.name}"
    folder, command, log = f"{STORE}/{name}", long_search(dataset, name), tmp_path / "log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Tests that are started in the background ignore it, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        await_that(lambda: epochs_of(folder) >= 3, driver, log)
        driver.send_signal(number)
        assert driver.wait(120) == 130, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert log.read_text().endswith("stopped before the end\n")
    record = json.loads(storage.read_bytes(f"{folder}/{SEARCH_FILE}"))
    assert "result" not in record
    ended = {
        name: MlflowClient().get_run(record["trial_runs"][name]["run_id"]).info.end_time
        for name, trial in trials_of(folder).items()
        if trial["status"] == "pruned"
    }
    assert ended
    assert MlflowClient().get_run(record["mlflow_run"]["run_id"]).info.status == "KILLED"
    assert "RUNNING" not in statuses("infusion-digits", record["mlflow_run"]["run_id"]).values()
    resumed = subprocess.run([*command, "--resume"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["best"] == undisturbed.best
    for name, end_time in ended.items():
        assert MlflowClient().get_run(record["trial_runs"][name]["run_id"]).info.end_time == end_time
    assert MlflowClient().get_run(record["mlflow_run"]["run_id"]).info.status == "FINISHED"


def long_search(dataset: str, name: str) -> list[str]:
    """The command of a search like `undisturbed`."""
    return [
        *(sys.executable, "-m", "jobs.tune", dataset, "--runs", STORE, "--name", name, "--json"),
        *("--preset", "digits", "--steps", "1,3", "--increasing", "0.2", "--constant", "0.05,0.3"),
        *("--grace-epochs", "1", "--max-concurrent", "1", "--epochs", str(LONG), "--validate-every", "1"),
        *("--hidden-sizes", "32,32", "--global-batch", "128", "--figures-every", "9", "--denoising-epochs", "0"),
        *("--objective", "denoising", "--synchronise-normalisation"),
    ]


def trials_of(folder: str) -> dict[str, Any]:
    """What a search knows of its trials."""
    state = read_state(folder)
    return dict(state["trials"]) if state else {}


def epochs_of(folder: str) -> int:
    return sum(trial["epoch"] for trial in trials_of(folder).values())


def live_actors(of_class: str) -> list[ActorState]:
    """The actors of the cluster that are not dead and whose class has this in its name.

    The dead ones are left out by Ray itself, which lists no more than a hundred.
    """
    return [actor for actor in list_actors(filters=[("state", "!=", "DEAD")]) if of_class in actor.class_name]


def live_placement_groups() -> list[Any]:
    return list_placement_groups(filters=[("state", "!=", "REMOVED")])


def kill_trial_process() -> bool:
    """Kills the process of the trial that is being trained; between two trials there may be none."""
    for actor in live_actors("Trainable"):
        with suppress(psutil.NoSuchProcess):
            if actor.pid:
                psutil.Process(actor.pid).kill()
                return True
    return False


def await_that(condition: Callable[[], bool], driver: subprocess.Popen[bytes] | None, log: Path | None) -> None:
    """Waits until something is so, for as long as the driver that should bring it about lives."""
    end = time.monotonic() + 120
    while not condition():
        words = log.read_text() if log is not None else ""
        assert driver is None or driver.poll() is None, words
        assert time.monotonic() < end, words
        time.sleep(0.1)
