"""What a report says of a search, from trials whose figures are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.presets import digits
from pipeline.report_page import NOT_MEASURED
from pipeline.search_grid import Grid, grid_points
from pipeline.search_report import ReportedSearch, ReportedTrial, search_sections
from pipeline.search_state import SEARCH_TAG, Trial

POINTS = grid_points(Grid((2, 4), (0.1, 0.2), (), {"seed": (0, 1)}), dataclasses.replace(digits(), epochs=10))


def reported(bounds: dict[str, tuple[str, int, float | None, float | None]], tags: dict[str, str]) -> ReportedSearch:
    """A search of which status, epochs, bound and Parzen-window estimate of some trials are given."""
    trials = []
    for point in POINTS:
        status, epoch, bound, parzen = bounds.get(point.name, ("pending", 0, None, None))
        history = [{"epoch": e, "valid/lower_bound": (bound or 0.0) - epoch + e} for e in range(1, epoch + 1)]
        if parzen is not None:
            history[-1]["valid/parzen"] = parzen
        state = Trial(status=status, epoch=epoch, best_bound=bound, seconds=2.0 * epoch)
        trials.append(ReportedTrial(point.name, point.config, state, tuple(history), None))
    run: Any = SimpleNamespace(
        info=SimpleNamespace(run_id="id", experiment_id="1", status="RUNNING"),
        data=SimpleNamespace(tags={SEARCH_TAG: "rates", "folder": "s3://b/rates", "num_workers": "3", **tags}),
    )
    record = {"halving": {"halving": "promoting"}, "dataset": "s3://b/digits", "points": {}}
    return ReportedSearch(run, record, "{}", tuple(trials))


@pytest.fixture(autouse=True)
def mlflow_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")


def test_trials_are_ranked_within_each_number_of_steps_and_spread_over_the_seeds() -> None:
    search = reported(
        {
            "T2-increasing-0.1-seed=0": ("finished", 10, 4.0, -1.0),
            "T2-increasing-0.1-seed=1": ("finished", 10, 6.0, -2.0),
            "T2-increasing-0.2-seed=0": ("pruned", 3, 5.0, None),
            "T4-increasing-0.2-seed=1": ("running", 5, 9.0, None),
        },
        {"best": "T2-increasing-0.1-seed=1", "model": "models:/infusion-digits/3"},
    )
    (section,) = search_sections(search)
    facts = dict(section.facts)
    assert facts["epochs"] == "28 trained, of 80 that the full grid would take (35%)"
    # 28 epochs of two seconds on three workers; the full grid would take eighty of them.
    assert (
        facts["device-hours"] == f"{28 * 2 * 3 / 3600:.2f} trained; the full grid would take about {80 * 6 / 3600:.2f}"
    )
    trials, seeds = section.tables
    rows = [dict(zip(trials.header, cells, strict=True)) for _, cells in trials.rows]
    assert [row["trial"] for row in rows[:3]] == [
        "T2-increasing-0.1-seed=1",
        "T2-increasing-0.2-seed=0",
        "T2-increasing-0.1-seed=0",
    ]
    assert rows[0]["bound"] == "6.00"
    assert rows[0]["Parzen"] == "-2.00"
    assert rows[0]["seed"] == "1"
    assert rows[1]["Parzen"] == NOT_MEASURED
    assert [ours for ours, _ in trials.rows].index(True) == 0
    assert [cells for _, cells in seeds.rows][:2] == [
        ["T2-increasing-0.1", "5.00 ± 1.41", "2"],
        ["T2-increasing-0.2", NOT_MEASURED, "0"],
    ]
    assert [picture.title.partition(":")[0] for picture in section.pictures] == [
        "Figure 6",
        "Figure 7",
        "The best rate by the number of steps",
        "Bound against sample quality",
    ]


def test_a_search_that_has_just_begun_has_a_page() -> None:
    (section,) = search_sections(reported({}, {}))
    assert section.pictures == []
    assert dict(section.facts)["best"] == "not known yet"
    assert all(cells[-1] == "pending" for _, cells in section.tables[0].rows)
