"""What a search does by itself, without a cluster."""

from pathlib import Path

from ray.tune.search import Searcher

from pipeline.errors import ServiceError
from pipeline.search import TrialResources, _Feed, _Trials
from pipeline.search_state import SearchState
from pipeline.search_trial import BOUND, EPOCH
from pipeline.successive_halving import HalvingConfig


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
