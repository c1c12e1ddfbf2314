"""Which failures of a training's workers are worth another try, and which are the user's to mend."""

from typing import Any

from ray.train import ControllerError, UserCallback

from infusion_core.errors import InfusionError
from pipeline.errors import UserError


class StopAtUserError(UserCallback):
    """Ends a training whose workers failed for a reason that starting them again would not mend."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raises the worker's `UserError`, if it is one, in Ray Train's controller, which then tries no more."""
        for error in worker_exceptions.values():
            if cause := user_error(error):
                raise ControllerError(cause)


def user_error(error: BaseException | None) -> UserError | None:
    """Returns the error in the user's words that an exception from a worker is, wraps or was raised from."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, InfusionError):
            return UserError(*error.args)
        inner = _inner(error)
        for failure in getattr(error, "worker_failures", {}).values():
            inner = inner or user_error(failure)
        error = inner
    return None


def first_cause(error: BaseException) -> str:
    """Returns in one line what an exception from a group of workers began with."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if inner := _inner(error) or next(iter(failures), None):
        return first_cause(inner)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def _inner(error: BaseException) -> BaseException | None:
    return getattr(error, "cause", None) or getattr(error, "controller_failure", None) or error.__cause__
