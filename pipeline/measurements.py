"""What an evaluation measured, as it is kept beside the run that trained the model.

The record is the artifact `evaluation/<dataset>-<split>.json` of that run: one measurement a judge. Evaluating again
replaces the measurements of the judges that were asked, and leaves the others.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from pipeline.errors import UserError

NATS = "nats per image"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure, by one judge.

    Attributes:
        judge: which judge: `lower_bound`, `importance_sampling`, …
        name: what the figure is called in a table.
        value: the figure.
        standard_error: of the value; `None` where it has none.
        unit: of the value.
        images: how many images, or samples, were judged.
        seed: of all noise.
        commit: of the code that measured.
        details: what the figure depends on or goes with, such as `variance_floor`, `num_chains`, `curve`.
    """

    judge: str
    name: str
    value: float
    standard_error: float | None
    unit: str
    images: int
    seed: int = 0
    commit: str = "unknown"
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """All measurements of a model on a split.

    Attributes:
        model: the registered version.
        dataset: address of the data set.
        dataset_fingerprint: of its content.
        split: the split.
        measurements: one a judge.
    """

    model: str
    dataset: str
    dataset_fingerprint: str
    split: str
    measurements: tuple[Measurement, ...]

    def with_measurements(self, measurements: Iterable[Measurement]) -> Self:
        """Returns the record with new measurements in the place of earlier ones by the same judges."""
        by_judge = {measurement.judge: measurement for measurement in (*self.measurements, *measurements)}
        return replace(self, measurements=tuple(by_judge.values()))

    def find(self, judge: str) -> Measurement | None:
        """Returns a judge's measurement, if there is one."""
        return next((measurement for measurement in self.measurements if measurement.judge == judge), None)

    def measurement(self, judge: str) -> Measurement:
        """Returns the measurement of a judge that was asked."""
        found = self.find(judge)
        assert found is not None, f"{judge} was not asked"
        return found

    def to_json(self) -> str:
        """Returns the record as JSON; what is not a finite number is `null`."""
        return json.dumps(_finite(asdict(self)), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """Returns the record that `to_json` was called on.

        Args:
            text: the JSON text.
            source: where it comes from, for the message.

        Raises:
            UserError: it is not such a record.
        """
        try:
            content = json.loads(text)
            measurements = tuple(_from_fields(Measurement, entry) for entry in content.pop("measurements"))
            record: Self = _from_fields(cls, {**content, "measurements": measurements})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source}: not the record of an evaluation: {error}; evaluate the model again") from error
        return record


def record_path(dataset_name: str, split: str) -> str:
    """Returns where a run's artifacts hold the record of an evaluation."""
    return f"evaluation/{dataset_name}-{split}.json"


def _from_fields(kind: Any, content: dict[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    if set(content) != known:
        raise ValueError(f"its fields are {', '.join(sorted(content))}, where {', '.join(sorted(known))} are expected")
    return kind(**content)


def _finite(value: Any) -> Any:
    """Returns a value with every number that JSON cannot hold replaced by `None`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
