"""What of an earlier search a new one may take over."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infusion_core.model import WEIGHTS_FILE
from pipeline.errors import UserError
from pipeline.presets import digits
from pipeline.search_grid import Grid, grid_points
from pipeline.search_reuse import earlier_trials
from pipeline.search_state import SEARCH_FILE, STATE_FILE, Trial
from pipeline.train_worker import MODEL_FOLDER

POINTS = grid_points(Grid(constant=(0.1, 0.2, 0.3)), digits())
NAMES = [point.name for point in POINTS]


def written(folder: Path, trials: Mapping[str, Trial], with_model: tuple[str, ...] = ()) -> str:
    """A search's folder as it would have been left."""
    configs = {point.name: point.config.to_json() for point in POINTS}
    record: dict[str, Any] = {
        "points": {name: configs[name] for name in trials},
        "dataset_fingerprint": "these",
        "trial_runs": {name: {"run_id": f"run of {name}", "experiment_id": "1"} for name in trials},
    }
    folder.joinpath(SEARCH_FILE).write_text(json.dumps(record))
    state = {"trials": {name: dataclasses.asdict(trial) for name, trial in trials.items()}}
    folder.joinpath(STATE_FILE).write_text(json.dumps(state))
    for name in with_model:
        file = folder / "trials" / name / MODEL_FOLDER / WEIGHTS_FILE
        file.parent.mkdir(parents=True)
        file.touch()
    return str(folder)


def test_trials_are_recognised_by_what_they_train_and_not_by_their_names(tmp_path: Path) -> None:
    folder = written(tmp_path, {name: Trial(status="pruned", epoch=5) for name in NAMES})
    longer = grid_points(Grid(constant=(0.1,)), dataclasses.replace(digits(), epochs=1000))
    renamed = dataclasses.replace(POINTS[1], name="other")
    found = earlier_trials(folder, [*longer, renamed], "these", "lower_bound")
    assert longer[0].name == NAMES[0]
    assert list(found) == ["other"]
    assert found["other"].run.run_id == f"run of {NAMES[1]}"
    assert found["other"].folder.endswith(f"/trials/{NAMES[1]}")


@pytest.mark.parametrize(
    ("kept", "criterion", "reusable"),
    [
        ((0, 1, 2), "lower_bound", (0, 1, 2)),
        # The best one's model is there: the others can only lose to it.
        ((1,), "lower_bound", (0, 1, 2)),
        ((1,), "parzen", (1,)),
        ((2,), "lower_bound", (2,)),
        ((), "lower_bound", ()),
    ],
)
def test_a_model_that_was_deleted_must_not_be_the_best_one(
    kept: tuple[int, ...], criterion: Any, reusable: tuple[int, ...], tmp_path: Path
) -> None:
    trials = {
        name: Trial(status="finished", best_bound=bound, parzen=-bound)
        for name, bound in zip(NAMES, (2.0, 3.0, 1.0), strict=True)
    }
    folder = written(tmp_path, trials, tuple(NAMES[i] for i in kept))
    assert list(earlier_trials(folder, POINTS, "these", criterion)) == [NAMES[i] for i in reusable]


def test_searches_that_cannot_be_reused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no search in .*/none to reuse"):
        earlier_trials(str(tmp_path / "none"), POINTS, "these", "lower_bound")
    folder = written(tmp_path, {name: Trial() for name in NAMES})
    with pytest.raises(UserError, match="it was on other images than these"):
        earlier_trials(folder, POINTS, "others", "lower_bound")
    with pytest.raises(UserError, match="it has no trial in common with this one"):
        earlier_trials(folder, grid_points(Grid(constant=(0.5,)), digits()), "these", "lower_bound")
