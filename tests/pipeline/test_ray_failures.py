"""What is told of failures that come wrapped in others."""

import pytest
from ray.train import ControllerError, WorkerGroupError

from infusion_core.errors import InfusionError
from pipeline.errors import ServiceError, UserError
from pipeline.ray_failures import first_cause, user_error


def wrapped(error: Exception) -> Exception:
    """As it comes from Ray: raised from others."""
    outer = RuntimeError("Training failed")
    outer.__cause__ = ControllerError(WorkerGroupError("on worker 1", {1: error}))
    return outer


def test_the_first_cause_is_told_in_a_line() -> None:
    error = OSError("Traceback (most recent call last):\n  somewhere\nthe worker process died\n")
    assert first_cause(wrapped(error)) == "OSError: the worker process died"
    assert first_cause(wrapped(MemoryError())) == "MemoryError"


@pytest.mark.parametrize(
    ("error", "expected"), [(UserError, UserError), (ServiceError, ServiceError), (InfusionError, UserError)]
)
def test_what_a_user_can_mend_is_found_and_keeps_its_kind(error: type[Exception], expected: type[Exception]) -> None:
    found = user_error(wrapped(error("this is wrong")))
    assert type(found) is expected
    assert str(found) == "this is wrong"


def test_other_failures_are_not_the_users_to_mend() -> None:
    assert user_error(wrapped(OSError("the worker process died"))) is None
