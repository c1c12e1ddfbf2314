import pytest

from infusion_core.schedule import InfusionSchedule
from pipeline.errors import UserError
from pipeline.presets import digits, mnist
from pipeline.search_grid import Grid, Point, grid_points, paper_table_4


def test_every_combination_is_a_training() -> None:
    grid = Grid((1, 5), (0.1,), (0.2, 0.3), {"seed": (0, 1)})
    points = {point.name: point.config for point in grid_points(grid, digits())}
    assert len(points) == 2 * 3 * 2
    config = points["T5-constant-0.3-seed=1"]
    assert (config.model.num_steps, config.model.initial_rate, config.model.rate_increment) == (5, 0.3, 0.0)
    assert config.seed == 1
    growing = points["T1-increasing-0.1-seed=0"].model
    assert (growing.num_steps, growing.initial_rate, growing.rate_increment) == (1, 0.0, 0.1)
    # All else is the preset's.
    assert config.model.hidden_sizes == digits().model.hidden_sizes
    assert config.learning_rate == digits().learning_rate


def test_fields_of_training_and_model_can_be_searched_without_a_schedule() -> None:
    points = grid_points(Grid(over={"learning_rate": (1e-3, 1e-2), "variance_floor": (1e-4,)}), digits())
    assert [point.config.learning_rate for point in points] == [1e-3, 1e-2]
    assert all(point.config.model.variance_floor == 1e-4 for point in points)
    assert all(point.config.model.rate_increment == digits().model.rate_increment for point in points)


def schedule(point: Point) -> dict:
    model = point.config.model
    return {name: getattr(model, name) for name in ("num_steps", "initial_rate", "rate_increment")}


def test_the_papers_grid_stays_within_the_rates_that_can_be() -> None:
    points = paper_table_4(mnist())
    assert len({point.name for point in points}) == len(points) > 50
    assert all(max(InfusionSchedule(**schedule(point)).rates) <= 1 for point in points)
    assert "T1-constant-0.3" in {point.name for point in points}
    assert {point.config.model.num_steps for point in points} == {1, 5, 10, 15}


def test_all_points_that_cannot_be_trained_are_named_at_once() -> None:
    with pytest.raises(UserError, match="3 of 4 points of the grid cannot be trained") as refusal:
        grid_points(Grid((4, 15), (0.3, 0.4)), digits())
    assert all(name in str(refusal.value) for name in ("T4-increasing-0.4", "T15-increasing-0.3", "T15-increasing-0.4"))
    assert "leaves [0, 1] at step 3 of 4" in str(refusal.value)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(), "the grid is empty; give --increasing"),
        (Grid(over={"learning_speed": (1.0,)}), "no field 'learning_speed' to search over; choose of .*learning_rate"),
        (Grid(over={"num_steps": (1,)}), "num_steps is searched by --steps"),
        (Grid(over={"epochs": (1,)}), "no field 'epochs'"),
        (Grid(constant=(0.1, 0.1)), "points more than once: T8-constant-0.1"),
        (
            Grid(over={"learning_rate": (0.1, -1.0)}),
            "1 of 2 points.*learning_rate=-1.0: learning_rate must be positive",
        ),
    ],
)
def test_grids_that_cannot_be_searched(grid: Grid, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid_points(grid, digits())
