"""What a search keeps of its trials: written, read again, and the same afterwards."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.search_state import STATE_FILE, SearchState, Trial, read_state
from pipeline.successive_halving import HalvingConfig

NAMES = ["a", "b", "c", "d"]
CONFIG = HalvingConfig(grace_epochs=2, reduction_factor=2)


def opened(folder: Path) -> SearchState:
    return SearchState.new(str(folder), CONFIG, NAMES, 8)


def resumed_from(folder: Path) -> SearchState:
    state = opened(folder)
    state.restore()
    return state


def test_trials_begin_in_the_grids_order_and_wait_until_all_have_come(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert [state.next() for _ in range(3)] == ["a", "b", "c"]
    assert state.report("a", 2, 5.0, 1.0) == []
    assert state.report("b", 2, 7.0, 1.0) == []
    assert [state.trials[name].status for name in NAMES] == ["waiting", "waiting", "running", "pending"]
    assert state.next() == "d"
    assert state.next() == "b"
    # Two of four may pass: once two better ones have come, a trial is out.
    assert state.report("d", 2, 6.0, 1.0) == ["a"]
    assert state.trials["a"].reason == "after epoch 2"
    assert state.report("c", 2, 4.0, 1.0) == ["c"]
    assert state.best == (7.0, "b")
    assert (state.epochs_trained, state.epochs_saved) == (8, 12)


def test_a_resumed_search_gives_slots_first_to_what_was_being_trained(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert [state.next() for _ in range(2)] == ["a", "b"]
    state.report("a", 1, 5.0, 1.5)
    state.report("b", 2, 3.0, 1.0)
    state.save()
    resumed = resumed_from(tmp_path)
    assert resumed.trials == state.trials
    assert [resumed.next() for _ in range(4)] == ["a", "c", "d", None]
    # It says where it is before it goes on; what it says a second time counts once.
    resumed.report("a", 2, 6.0, 0.0)
    assert resumed.report("a", 2, 6.0, 0.0) == []
    assert resumed.trials["b"].status == "waiting"


def test_a_trial_whose_process_dies_goes_on_first_until_it_has_died_too_often(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert state.next() == "a"
    assert state.die("a", "killed", max_deaths=1) == []
    assert state.next() == "a"
    assert state.die("a", "killed", max_deaths=1) == ["a"]
    assert state.trials["a"].status == "failed"
    assert state.trials["a"].reason == "its processes died 2 times, the last time so: killed"
    assert state.next() == "b"


@pytest.mark.parametrize("halving", ["promoting", "stopping"])
@pytest.mark.parametrize("brackets", [1, 2])
@pytest.mark.parametrize("often", [0.0, 0.05, 0.3])
def test_where_trials_fail_another_is_trained_in_full(
    halving: Any, brackets: int, often: float, tmp_path: Path
) -> None:
    taken_up_again = 0
    for seed in range(30):
        draw = random.Random(seed)
        names = [f"trial-{i}" for i in range(draw.randint(1, 20))]
        config = HalvingConfig(halving=halving, grace_epochs=2, reduction_factor=3, brackets=brackets)
        state = SearchState.new(str(tmp_path), config, names, 40)
        sound, slots = draw.choice(names), draw.randint(1, 4)
        running: list[str] = []
        while True:
            while len(running) < slots and (name := state.next()) is not None:
                taken_up_again += state.trials[name].reason != ""
                running.append(name)
            if not running:
                break
            name = draw.choice(running)
            if name != sound and draw.random() < often:
                state.fail(name, "diverged")
            else:
                state.report(name, state.trials[name].epoch + 1, draw.gauss(), 1.0)
            running = [name for name in running if state.trials[name].status == "running"]
        assert state.ended
        assert state.count("finished")
    assert (taken_up_again > 0) == (often > 0)


def test_only_a_trial_that_runs_can_die(tmp_path: Path) -> None:
    state = opened(tmp_path)
    for _ in range(4):
        state.next()
    state.report("a", 2, 5.0, 1.0)
    state.report("b", 8, 7.0, 1.0)
    for name, status in (("a", "waiting"), ("b", "finished")):
        assert state.die(name, "killed", max_deaths=0) == []
        assert (state.trials[name].status, state.trials[name].deaths) == (status, 0)
    assert state.next() is None


def test_a_search_is_over_when_all_have_ended(tmp_path: Path) -> None:
    state = opened(tmp_path)
    while (name := state.next()) is not None:
        for epoch in range(state.trials[name].epoch + 1, 9):
            state.report(name, epoch, float(NAMES.index(name)), 1.0)
            if state.trials[name].status != "running":
                break
    assert state.ended
    assert {name: trial.status for name, trial in state.trials.items()} == {
        "a": "pruned",
        "b": "pruned",
        "c": "pruned",
        "d": "finished",
    }
    assert state.epochs_trained == 2 + 2 + 4 + 8


def test_a_search_in_which_trials_wait_for_nothing_says_so(tmp_path: Path) -> None:
    state = opened(tmp_path)
    for name in NAMES:
        state.trials[name].status = "waiting"
        state.halving.begin(name)
    with pytest.raises(RuntimeError, match="is stuck: a, b, c, d wait at rungs, for nothing"):
        state.next()


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    assert read_state(str(tmp_path)) is None
    (tmp_path / STATE_FILE).write_text('{"trials": ')
    with pytest.raises(UserError, match=f"{STATE_FILE} is not JSON"):
        resumed_from(tmp_path)


def test_a_trial_that_was_taken_over_counts_as_trained_only_when_it_is(tmp_path: Path) -> None:
    state = opened(tmp_path)
    assert state.take_over(
        "a", Trial(status="finished", epoch=8, best_bound=1.0, seconds=9.0), {2: 1.0, 4: 1.0, 8: 1.0}
    )
    assert state.take_over("b", Trial(status="pruned", epoch=2, reason="after epoch 2"), {1: 0.0, 2: 5.0})
    assert not state.take_over("c", Trial(status="failed", epoch=4), {4: 1.0})
    assert (state.epochs_trained, state.epochs_saved) == (0, 8)
    assert [state.trials[name].status for name in NAMES] == ["finished", "waiting", "pending", "pending"]
    assert state.trials["a"].seconds == 0
    for name in ("c", "d"):
        assert state.next() == name
        state.report(name, 2, -1.0, 1.0)
    assert state.next() == "b"
    assert (state.trials["b"].epoch, state.trials["b"].reused) == (0, 0)
    state.report("b", 1, 0.0, 1.0)
    state.report("b", 2, 5.0, 1.0)
    assert state.trials["b"].status == "running"
    assert (state.epochs_trained, state.trials["a"].reused) == (2 * 3, 8)
