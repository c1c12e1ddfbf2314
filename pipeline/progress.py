"""Progress of long work as plain lines: how far, how fast, how long still.

Jobs are mostly read through a log (`ray job submit`, `ray job logs`), where a bar that redraws itself
turns into garbage. A line is therefore printed at most once per interval, and once at the end.
"""

import sys
import time
from types import TracebackType
from typing import Self, TextIO


def format_duration(seconds: float) -> str:
    """Returns seconds as `9 s`, `3 min 05 s` or `2 h 04 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Counts finished units and prints lines such as `stage train: 512/1,297 images (39%), 4,310/s, 1 s left`.

    Args:
        label: what is being done.
        total: how many units there are, or `None` where that is not known beforehand.
        unit: the name of a unit, in the plural.
        done: units finished by an earlier, interrupted run; they count as done but not towards the rate.
        interval: seconds between two lines.
        stream: where the lines go; standard error by default.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        interval: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self._already_done = done
        self._interval = interval
        self._stream = stream
        self._start = self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units as done; `note` is appended to the line if one is due."""
        self.done += count
        now = time.monotonic()
        if now - self._last_line >= self._interval:
            self._last_line = now
            self._print(self.line(note))

    @property
    def rate(self) -> float:
        """Units per second since the start, those of an earlier run not counted."""
        elapsed = time.monotonic() - self._start
        return (self.done - self._already_done) / elapsed if elapsed > 0 else 0.0

    def line(self, note: str = "") -> str:
        """Returns the line that describes the state now."""
        rate = self.rate
        parts = [f"{self.done:,} {self.unit}"]
        if self.total is not None:
            percent = 100 * self.done / self.total if self.total else 100.0
            parts = [f"{self.done:,}/{self.total:,} {self.unit} ({percent:.0f}%)"]
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s")
        if self.total is not None and rate > 0:
            parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        return f"{self.label}: {', '.join(parts)}{f'; {note}' if note else ''}"

    def close(self) -> None:
        """Prints the closing line."""
        duration = format_duration(time.monotonic() - self._start)
        self._print(f"{self.label}: {self.done:,} {self.unit} in {duration} ({self.rate:,.1f} {self.unit}/s)")

    def _print(self, line: str) -> None:
        # Not `print`, which Ray Train's workers replace by one that shows every line twice.
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
