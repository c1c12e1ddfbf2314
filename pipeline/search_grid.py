"""The grid of a search: numbers of steps, infusion schedules and any other fields, every combination a training.

A point of the grid has a name that says what it is: `T5-increasing-0.1`, `T1-constant-0.3-seed=2`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any

from infusion_core.errors import InfusionError
from infusion_core.model import ModelConfig
from pipeline.errors import UserError
from pipeline.training import TrainConfig

_SCHEDULE_FIELDS = ("num_steps", "initial_rate", "rate_increment")
# All trials are compared after the same epochs.
_COMMON_FIELDS = ("model", "epochs", "validate_every")


@dataclass(frozen=True)
class Grid:
    """What a search tries.

    Attributes:
        num_steps: numbers of steps T; that of the base configuration if there is none.
        increasing: increments ω of schedules that grow from 0.
        constant: rates α⁽⁰⁾ of schedules that do not grow.
        over: values of other fields of the training or the model, by name.
    """

    num_steps: tuple[int, ...] = ()
    increasing: tuple[float, ...] = ()
    constant: tuple[float, ...] = ()
    over: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A point of the grid.

    Attributes:
        name: what it is.
        config: the training that it stands for.
    """

    name: str
    config: TrainConfig


# Steps and kinds of schedules are those of the paper's Table 4; its list of rates has not been checked.
_RATES = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
PAPER_TABLE_4_STEPS = (1, 5, 10, 15)


def paper_table_4(base: TrainConfig) -> list[Point]:
    """Returns the grid of Table 4: a dozen rates for every T, as far as they stay within [0, 1]."""
    points: list[Point] = []
    for num_steps in PAPER_TABLE_4_STEPS:
        # A chain of one step infuses z⁽⁰⁾ alone, with the initial rate: it has no increment.
        growing = tuple(rate for rate in _RATES if num_steps > 1 and (num_steps - 1) * rate <= 1)
        points += grid_points(Grid((num_steps,), growing, _RATES), base)
    return points


GRIDS = MappingProxyType({"paper-table-4": paper_table_4})


def grid_points(grid: Grid, base: TrainConfig) -> list[Point]:
    """Returns every combination of a grid's values.

    Args:
        grid: what is tried.
        base: all other fields.

    Raises:
        UserError: there is nothing to try, a field does not exist, or points cannot be trained; all of them are named.
    """
    if not (grid.num_steps or grid.increasing or grid.constant or grid.over):
        raise UserError("the grid is empty; give --increasing, --constant, --steps or --over, or --grid")
    check_fields(grid.over)
    schedules: list[tuple[str, dict[str, float]]] = [
        *((f"-increasing-{rate:g}", {"initial_rate": 0.0, "rate_increment": rate}) for rate in grid.increasing),
        *((f"-constant-{rate:g}", {"initial_rate": rate, "rate_increment": 0.0}) for rate in grid.constant),
    ]
    points: list[Point] = []
    faults: list[str] = []
    for num_steps, (schedule, rates), values in product(
        grid.num_steps or (base.model.num_steps,), schedules or [("", {})], product(*grid.over.values())
    ):
        others = dict(zip(grid.over, values, strict=True))
        name = f"T{num_steps}{schedule}" + "".join(f"-{key}={value}" for key, value in others.items())
        try:
            points.append(Point(name, _with(base, {"num_steps": num_steps, **rates, **others})))
        except (InfusionError, UserError) as error:
            faults.append(f"{name}: {error}")
    if faults:
        total = len(points) + len(faults)
        raise UserError(f"{len(faults)} of {total} points of the grid cannot be trained: {'; '.join(faults)}")
    names = [point.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the grid has points more than once: {', '.join(repeated)}; give each value once")
    return points


def searchable_fields() -> dict[str, Any]:
    """Returns the fields that `Grid.over` may name, and their types."""
    fields = {each.name: each.type for config in (TrainConfig, ModelConfig) for each in dataclasses.fields(config)}
    excluded = (*_SCHEDULE_FIELDS, *_COMMON_FIELDS)
    return {name: kind for name, kind in fields.items() if name not in excluded and "tuple" not in str(kind)}


def check_fields(names: Iterable[str]) -> None:
    """Checks that fields may be searched over.

    Raises:
        UserError: one may not.
    """
    for name in names:
        if name in _SCHEDULE_FIELDS:
            raise UserError(f"{name} is searched by --steps, --increasing and --constant, not by --over")
        if name not in searchable_fields():
            raise UserError(f"there is no field {name!r} to search over; choose of {', '.join(searchable_fields())}")


def _with(base: TrainConfig, fields: Mapping[str, Any]) -> TrainConfig:
    of_model = {each.name for each in dataclasses.fields(ModelConfig)}
    model = replace(base.model, **{name: value for name, value in fields.items() if name in of_model})
    return replace(base, model=model, **{name: value for name, value in fields.items() if name not in of_model})
