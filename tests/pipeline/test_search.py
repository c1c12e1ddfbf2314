"""What a search does by itself, without a cluster."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from pipeline.errors import ServiceError, UserError
from pipeline.search import TrialResources, _check_resumable, _delete_dropped, _Feed, _Slots, _slots, _Trials
from pipeline.search_state import SearchState
from pipeline.search_trial import BOUND, EPOCH
from pipeline.successive_halving import HalvingConfig
from pipeline.train_worker import FIRST_STEP_AT


def opened(folder: Path) -> SearchState:
    return SearchState.new(str(folder), HalvingConfig(halving="none"), ["a", "b"], 8)


def test_what_goes_wrong_on_the_driver_ends_the_search_and_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = opened(tmp_path / "file" / "search")
    trials = _Trials(state, {}, TrialResources(), slots=2)
    assert state.next() == "a"
    # The state cannot be written.
    assert not trials.report("a", {EPOCH: 1, BOUND: 5.0, "time_this_iter_s": 1.0, "pid": 1})
    assert isinstance(trials.error, ServiceError)
    assert "cannot write" in str(trials.error)
    assert trials.next() is None
    assert _Feed(trials).suggest("tune's name") == Searcher.FINISHED
    # What follows from it is not what is told.
    first = trials.error
    trials.died("a", "killed")
    assert trials.error is first


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_workers", 2, "other settings: num_workers was 1 and is now 2; resume it with the same ones"),
        ("criterion", "parzen", "other settings: criterion was lower_bound and is now parzen; resume it with"),
    ],
)
def test_a_search_is_resumed_with_what_its_trials_depend_on(field: str, value: object, message: str) -> None:
    before: dict[str, Any] = {
        "points": {},
        "halving": {},
        "dataset_fingerprint": "these",
        "num_workers": 1,
        "criterion": "lower_bound",
    }
    _check_resumable(before, before, "rates", resume=True)
    with pytest.raises(UserError, match=message):
        _check_resumable(before, {**before, field: value}, "rates", resume=True)


@pytest.mark.parametrize("processes_are_reused", [True, False])
def test_a_trials_start_has_nothing_to_do_with_who_leaves_another_slot(processes_are_reused: bool) -> None:
    slots = _Slots(2, processes_are_reused=processes_are_reused)
    for name in ("a", "b"):
        slots.take(name)
    assert not slots
    slots.note_first_step("a", {FIRST_STEP_AT: time.time(), "pid": 1})
    assert slots.start_seconds is None
    slots.note_end("a", {"pid": 1})
    slots.leave("a")
    slots.take("c")
    first_step_at = slots._scheduled_at["c"]
    # Before this is reported, the other slot is left.
    slots.note_end("b", {"pid": 2})
    slots.leave("b")
    slots.note_first_step("c", {FIRST_STEP_AT: first_step_at, "pid": 1})
    assert slots.start_seconds == 0


@pytest.mark.parametrize(
    ("most_workers", "num_workers", "max_concurrent", "expected"),
    [(7, 1, None, 7), (7, 2, None, 3), (7, 1, 4, 4), (50, 2, None, 12), (math.inf, 2, None, 12), (math.inf, 2, 5, 5)],
)
def test_as_many_trials_run_as_the_cluster_can_hold(
    most_workers: float, num_workers: int, max_concurrent: int | None, expected: int
) -> None:
    resources = TrialResources(num_workers=num_workers, max_concurrent=max_concurrent)
    assert _slots(most_workers, 12, resources) == expected


@pytest.mark.parametrize(("keep", "kept"), [("best", ["a"]), ("none", []), ("all", ["a", "b"])])
def test_checkpoints_and_models_are_kept_of_those_that_were_asked_for(
    keep: Any, kept: list[str], tmp_path: Path
) -> None:
    files = ("checkpoint.json", "checkpoint-00003/optimizer.pt", "model/model.safetensors")
    pictures = ("samples.png", "outcome.json")
    for name in ("a", "b"):
        for file in (*files, *pictures):
            address = tmp_path / "trials" / name / file
            address.parent.mkdir(parents=True, exist_ok=True)
            address.touch()
    _delete_dropped(str(tmp_path), ["a", "b"], "a", keep)
    for name in ("a", "b"):
        left = {str(path.relative_to(tmp_path / "trials" / name)) for path in tmp_path.glob(f"trials/{name}/**/*")}
        assert set(pictures) <= left
        assert (set(files) <= left) == (name in kept)
        assert name in kept or not left & set(files)
