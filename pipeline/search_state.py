"""What a search knows of its trials: who is to train next, who has ended and how, kept so that it can be resumed.

The state lies in the search's folder (`state.json`) and is written whenever a trial comes to a rung, begins or ends. A
search that is resumed from it prunes as if it had not stopped: trials that were being trained go on from their
checkpoints, which are never older than what is written here.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline import storage
from pipeline.errors import UserError
from pipeline.successive_halving import Decision, HalvingConfig, SuccessiveHalving

SEARCH_FILE = "search.json"
STATE_FILE = "state.json"
TRIALS_FOLDER = "trials"
_READ_ATTEMPTS = 10
SAMPLES_FILE = "samples.png"
SEARCH_TAG = "infusion.search"
"""Tag of a search's MLflow run: the search's name."""

Status = Literal["pending", "running", "waiting", "pruned", "finished", "failed"]
ENDED = ("pruned", "finished", "failed")
Criterion = Literal["lower_bound", "parzen"]


@dataclass
class Trial:
    """What is known of a trial.

    Attributes:
        status: pending (not begun), running, waiting at a rung, pruned, finished (trained in full) or failed.
        epoch: how many epochs it has been trained for.
        bound: the last validation lower bound, nats per image; `None` before the first.
        best_bound: the best one.
        parzen: the last Parzen-window estimate of validation images, if any was made; that of the finished model, if
            it was trained in full.
        seconds: for how long it has been trained, as far as is known.
        deaths: how often its processes died.
        reason: why it failed, where it was pruned, or why it was taken up again.
        reused: how many of its epochs another search had trained it for.
    """

    status: Status = "pending"
    epoch: int = 0
    bound: float | None = None
    best_bound: float | None = None
    parzen: float | None = None
    seconds: float = 0.0
    deaths: int = 0
    reason: str = ""
    reused: int = 0

    @property
    def epochs_trained(self) -> int:
        """How many epochs it has been trained for by this search."""
        return self.epoch - self.reused

    def score(self, criterion: Criterion) -> float:
        """Returns what trials that were trained in full are compared by; -∞ if it was not measured."""
        score = self.parzen if criterion == "parzen" else self.best_bound
        return -math.inf if score is None else score


@dataclass
class SearchState:
    """The state of a search.

    Attributes:
        folder: the search's folder.
        halving: its rungs.
        epochs: of a whole training.
        trials: by name, in the grid's order.
    """

    folder: str
    halving: SuccessiveHalving
    epochs: int
    trials: dict[str, Trial]
    _interrupted: list[str] = field(default_factory=list)

    @classmethod
    def new(
        cls, folder: str, config: HalvingConfig, names: Iterable[str], epochs: int, validate_every: int = 1
    ) -> "SearchState":
        """Returns the state of a search that has not begun.

        Args:
            folder: the search's folder.
            config: how trials are compared.
            names: of the trials, in the grid's order.
            epochs: of a whole training.
            validate_every: epochs between two validations.

        Raises:
            UserError: a trial of so few epochs cannot be compared as told.
        """
        trials = {name: Trial() for name in names}
        return cls(folder, SuccessiveHalving(config, list(trials), epochs, validate_every), epochs, trials)

    def restore(self) -> None:
        """Goes back to the state that was kept in the folder.

        Raises:
            UserError: the folder cannot be read, or the search had other rungs.
        """
        kept = read_state(self.folder)
        assert kept is not None, "the state is written before what tells that there is a search"
        self.halving.restore(kept["halving"])
        for name, fields in kept["trials"].items():
            self.trials[name] = Trial(**fields)
        self._interrupted = [name for name, trial in self.trials.items() if trial.status == "running"]

    def take_over(self, name: str, earlier: Trial, bounds: Mapping[int, float]) -> bool:
        """Takes over what another search knows of a trial that has not begun.

        Args:
            name: the trial.
            earlier: what is known of it.
            bounds: its validation lower bounds, by epoch.

        Returns:
            Whether it is of use: the trial was trained in full, or can be compared by the bounds that it had at rungs.
        """
        finished = earlier.status == "finished"
        if not finished and earlier.status not in ("pruned", "waiting"):
            return False
        if not self.halving.replay(name, bounds, finished=finished):
            return False
        known = replace(earlier, seconds=0.0, deaths=0, reused=earlier.epoch)
        if finished:
            self.trials[name] = known
            self.halving.end(name)
        else:
            self.trials[name] = replace(known, status="waiting", reason="")
        return True

    def save(self) -> None:
        """Writes the state."""
        trials = {name: asdict(trial) for name, trial in self.trials.items()}
        content = {"written": time.time(), "halving": self.halving.to_json(), "trials": trials}
        storage.write_bytes(storage.join(self.folder, STATE_FILE), json.dumps(content, indent=1).encode())

    @property
    def ended(self) -> bool:
        """Whether all trials have ended, and one was trained in full, unless all have failed."""
        ended = all(trial.status in ENDED for trial in self.trials.values())
        return ended and (self.count("finished") > 0 or not self.count("pruned"))

    def next(self) -> str | None:
        """Returns the trial that a free slot should train, which runs from now on; `None` if there is none now.

        Raises:
            RuntimeError: nothing is being trained or can be, and yet trials wait: without this, they would for ever.
        """
        name = next(iter(self._interrupted), None)
        if name is not None:
            self._interrupted.remove(name)
        else:
            name = next((name for name, trial in self.trials.items() if trial.status == "pending"), None)
        if name is None and (name := self.halving.promotable()) is not None:
            self.halving.promote(name)
        if name is None:
            if self.ended or self.count("running"):
                return None
            name = self._take_up_again()
        trial = self.trials[name]
        if trial.reused:
            # It is known by its bounds only, and trained anew.
            trial.epoch = trial.reused = 0
        trial.status = "running"
        self.halving.begin(name)
        return name

    def _take_up_again(self) -> str:
        """Returns the pruned trial that goes on, since all that were preferred to it have failed."""
        if self.count("waiting"):
            waiting = ", ".join(name for name, trial in self.trials.items() if trial.status == "waiting")
            raise RuntimeError(f"the search in {self.folder} is stuck: {waiting} wait at rungs, for nothing")
        name = self.halving.spare()
        assert name is not None, "a trial is pruned at a rung"
        self.halving.revive(name)
        self.trials[name].reason = "taken up again, since all others that went on have failed"
        return name

    def report(self, name: str, epoch: int, bound: float, seconds: float, parzen: float | None = None) -> list[str]:
        """Notes what a running trial reports after an epoch.

        Returns:
            The trials that have ended by it: this one, others that it has beaten, or none. The trial is to be trained
            on as long as its status is running.
        """
        trial = self.trials[name]
        trial.epoch, trial.bound = epoch, bound
        trial.best_bound = bound if trial.best_bound is None else max(trial.best_bound, bound)
        trial.parzen = trial.parzen if parzen is None else parzen
        trial.seconds += seconds
        if epoch >= self.epochs:
            self._end(name, "finished", trial.reason)
            return [name, *self.prune_beaten()]
        decision = self.halving.report(name, epoch, bound)
        if decision == Decision.WAIT:
            trial.status = "waiting"
        elif decision == Decision.STOP:
            self._end(name, "pruned", f"after epoch {epoch}")
        return [*([name] if decision == Decision.STOP else []), *self.prune_beaten()]

    def fail(self, name: str, reason: str) -> list[str]:
        """Notes that a trial has failed for good; returns the trials that have ended by it."""
        self._end(name, "failed", reason)
        self.halving.fail(name)
        return [name, *self.prune_beaten()]

    def die(self, name: str, reason: str, max_deaths: int) -> list[str]:
        """Notes that a trial's processes died; it goes on from its checkpoint as soon as a slot is free.

        A trial that was not running, since it has ended or waits, needs none.

        Returns:
            The trials that have ended by it, should it have died more often than `max_deaths` times.
        """
        trial = self.trials[name]
        if trial.status != "running":
            return []
        trial.deaths += 1
        if trial.deaths > max_deaths:
            return self.fail(name, f"its processes died {trial.deaths} times, the last time so: {reason}")
        self._interrupted.append(name)
        return []

    def _end(self, name: str, status: Status, reason: str = "") -> None:
        self.trials[name].status, self.trials[name].reason = status, reason
        self.halving.end(name)

    def prune_beaten(self) -> list[str]:
        """Ends the waiting trials that cannot go on any more; returns them."""
        beaten = self.halving.beaten()
        for name in beaten:
            self._end(name, "pruned", f"after epoch {self.trials[name].epoch}")
        return beaten

    def count(self, *statuses: Status) -> int:
        """Returns how many trials are in one of these states."""
        return sum(trial.status in statuses for trial in self.trials.values())

    @property
    def epochs_trained(self) -> int:
        """Epochs that all trials have been trained for by this search."""
        return sum(trial.epochs_trained for trial in self.trials.values())

    @property
    def epochs_saved(self) -> int:
        """Epochs that trials which have ended were not trained for."""
        return sum(self.epochs - trial.epochs_trained for trial in self.trials.values() if trial.status in ENDED)

    @property
    def best(self) -> tuple[float, str] | None:
        """The best validation bound so far, and the trial that has it."""
        known = [(trial.best_bound, name) for name, trial in self.trials.items() if trial.best_bound is not None]
        return max(known, default=None)


def read_state(folder: str) -> Mapping[str, Any] | None:
    """Returns what is kept of a search's state, for reports; `None` if there is nothing yet."""
    address = storage.join(folder, STATE_FILE)
    for _ in range(_READ_ATTEMPTS):
        try:
            content: dict[str, Any] = json.loads(storage.read_bytes(address))
        except FileNotFoundError:
            return None
        except ValueError:
            # It was replaced by a longer or shorter one between the question for its size and that for its content.
            continue
        return content
    raise UserError(f"{address} is not JSON; it is damaged, or something else writes to it")
