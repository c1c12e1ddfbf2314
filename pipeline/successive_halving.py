r"""Asynchronous successive halving: which trials of a search go on (Li et al. 2018, arXiv:1810.05934).

Trials are compared at rungs, after :math:`r, r\eta, r\eta^2, \dots` epochs, r being the grace period and η the
reduction factor; about one in η passes each rung. A rung lies where trials are validated: in between, nothing is known
to compare them by. Two forms differ in what becomes of a trial that is not among the best yet:

- *promoting* (the paper's Algorithm 2): it waits at the rung, and goes on if it is among the best :math:`n/\eta` of the
  n trials that have come there. The first to come waits as well; nothing passes on credit. Unlike the paper, whose
  trials never run out, a free slot goes to a trial that has not begun, then to one that waits at the nearest rung:
  few slots halve in lockstep, and where there are many, none is left idle for the sake of a straggler.
- *stopping* (Ray Tune's `AsyncHyperBandScheduler`): it is stopped for good if it is worse than the best 1/η of those
  that came before it. The first to come always passes, and those that come early have few to be compared with.

A trial that fails leaves the ranking: it takes no place from others. Should all that passed fail, the best of the
stopped ones goes on (`spare`).

This module knows names, epochs and values, higher ones being better; what runs the trials is elsewhere. All that it
knows follows from what was recorded at the rungs, who has passed, and who has ended, which `to_json` returns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from pipeline.errors import UserError

Halving = Literal["promoting", "stopping", "none"]


class Decision(Enum):
    """What becomes of a trial that has reported."""

    GO_ON = "go on"
    WAIT = "wait"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class HalvingConfig:
    """How trials are compared and pruned.

    Attributes:
        halving: promoting, stopping, or none, which trains every trial in full.
        grace_epochs: epochs that every trial is trained for; the first rung, rounded up to a validation as all are.
        reduction_factor: η; one in so many passes a rung, and the next one is so many times as far.
        brackets: trials are dealt out to so many brackets, whose first rungs are η times as far from one to the next.

    Raises:
        UserError: a value is out of range.
    """

    halving: Halving = "promoting"
    grace_epochs: int = 5
    reduction_factor: int = 3
    brackets: int = 1

    def __post_init__(self) -> None:
        for name, least in (("grace_epochs", 1), ("reduction_factor", 2), ("brackets", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def rungs(self, bracket: int, epochs: int, validate_every: int = 1) -> list[int]:
        """Returns after how many epochs the trials of a bracket are compared.

        Args:
            bracket: its number.
            epochs: of a whole training.
            validate_every: epochs between two validations; of rungs that fall before the same one, one is left.
        """
        if self.halving == "none":
            return []
        rungs: list[int] = []
        rung = self.grace_epochs * self.reduction_factor**bracket
        while (validated := -(-rung // validate_every) * validate_every) < epochs:
            if validated not in rungs:
                rungs.append(validated)
            rung *= self.reduction_factor
        return rungs


class Rung:
    """A number of epochs at which trials are compared.

    Attributes:
        epoch: the number of epochs.
        recorded: by trial, its value when it came here.
        passed: trials that have gone on from here.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.recorded: dict[str, float] = {}
        self.passed: set[str] = set()

    def better_than(self, trial: str) -> int:
        """Returns how many trials rank before one; of equal ones, those that came first do."""
        names = list(self.recorded)
        own, place = self.recorded[trial], names.index(trial)
        return sum(value > own or (value == own and i < place) for i, value in enumerate(self.recorded.values()))


class SuccessiveHalving:
    """The state of a search's rungs.

    Args:
        config: how trials are compared.
        trials: names of all trials.
        epochs: of a whole training.
        validate_every: epochs between two validations.

    Raises:
        UserError: a bracket would have no rung.
    """

    def __init__(self, config: HalvingConfig, trials: Sequence[str], epochs: int, validate_every: int = 1) -> None:
        self.config = config
        self.trials = tuple(trials)
        self._rungs = [
            [Rung(epoch) for epoch in config.rungs(i, epochs, validate_every)] for i in range(config.brackets)
        ]
        if config.halving != "none" and not all(self._rungs):
            furthest = config.grace_epochs * config.reduction_factor ** (config.brackets - 1)
            furthest = -(-furthest // validate_every) * validate_every
            raise UserError(
                f"with grace_epochs {config.grace_epochs}, reduction_factor {config.reduction_factor}, brackets "
                f"{config.brackets} and validate_every {validate_every} a bracket is compared after {furthest} epochs "
                f"first, but trials are trained for {epochs}; choose a shorter grace period or fewer brackets, "
                "validate more often, train longer, or give --halving none"
            )
        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def begin(self, trial: str) -> None:
        """Notes that a trial has a slot."""
        self._begun.add(trial)

    def report(self, trial: str, epoch: int, value: float) -> Decision:
        """Records a trial's value after an epoch, and decides what becomes of the trial.

        A trial that reports between rungs, or once more at a rung, is told the same as before. It has passed the rungs
        that it went by without a report, as a group of workers may that trained on while it was decided upon.

        Args:
            trial: its name.
            epoch: how many epochs it has been trained for.
            value: the higher, the better; finite.
        """
        assert math.isfinite(value), "a trial that diverged has ended"
        self.begin(trial)
        reached = [rung for rung in self._of(trial) if rung.epoch <= epoch]
        for gone_by in reached[:-1]:
            gone_by.recorded.setdefault(trial, value)
            gone_by.passed.add(trial)
        rung = reached[-1] if reached else None
        if rung is None or trial in rung.passed:
            return Decision.GO_ON
        if trial not in rung.recorded:
            earlier = list(rung.recorded.values())
            rung.recorded[trial] = value
            if self.config.halving == "stopping":
                if earlier and value < np.percentile(earlier, 100 * (1 - 1 / self.config.reduction_factor)):
                    return Decision.STOP
                rung.passed.add(trial)
                return Decision.GO_ON
        if self.config.halving == "stopping":
            return Decision.STOP
        if self.promotable() == trial:
            rung.passed.add(trial)
            return Decision.GO_ON
        return Decision.STOP if self._beaten(trial, rung) else Decision.WAIT

    def replay(self, trial: str, values: Mapping[int, float], *, finished: bool) -> bool:
        """Records the values that another search had of a trial, which waits at the last rung that they reach.

        Args:
            trial: its name; it has not begun.
            values: by epoch.
            finished: whether it was trained in full, and waits nowhere.

        Returns:
            Whether it can be compared by them. A trial that waits cannot, where none waits or if it comes to no rung.
        """
        reached = [rung for rung in self._of(trial) if values and rung.epoch <= max(values)]
        if not finished and (self.config.halving != "promoting" or not reached):
            return False
        for rung in reached:
            rung.recorded[trial] = values[min(epoch for epoch in values if epoch >= rung.epoch)]
            rung.passed.add(trial)
        if not finished:
            reached[-1].passed.remove(trial)
        self.begin(trial)
        return True

    def end(self, trial: str) -> None:
        """Notes that a trial will report no more: it was stopped, or has finished."""
        self._ended.add(trial)

    def fail(self, trial: str) -> None:
        """Notes that a trial has failed, and forgets how it compared with others."""
        self.end(trial)
        for rung in self._of(trial):
            rung.recorded.pop(trial, None)
            rung.passed.discard(trial)

    def spare(self) -> str | None:
        """Returns the stopped trial that is to go on where no other is left, to be told by `revive`.

        It is the best of those that came furthest.
        """
        stopped = {
            trial: (rung.epoch, value)
            for rungs in self._rungs
            for rung in rungs
            for trial, value in rung.recorded.items()
            if trial not in rung.passed and trial in self._ended
        }
        return max(stopped, key=lambda trial: stopped[trial], default=None)

    def revive(self, trial: str) -> None:
        """Lets a stopped trial go on."""
        self._ended.remove(trial)
        self.promote(trial)

    def promotable(self) -> str | None:
        """Returns the waiting trial that a free slot should go to, to be told by `promote`.

        There is none while trials have not begun, which need the slot themselves.
        """
        if not self._begun | self._ended >= set(self.trials):
            return None
        waiting = [(rung, trial) for trial, rung in self._waiting()]
        waiting.sort(key=lambda pair: (pair[0].epoch, pair[0].better_than(pair[1])))
        for rung, trial in waiting:
            if rung.better_than(trial) < self._places(trial, rung):
                return trial
        return None

    def promote(self, trial: str) -> None:
        """Lets a waiting trial go on."""
        dict(self._waiting())[trial].passed.add(trial)

    def beaten(self) -> list[str]:
        """Returns the waiting trials that cannot go on any more, whatever others will report."""
        return [trial for trial, rung in self._waiting() if self._beaten(trial, rung)]

    def to_json(self) -> dict[str, Any]:
        """Returns the state as what JSON can hold."""
        return {
            "brackets": [
                [{"epoch": r.epoch, "recorded": r.recorded, "passed": sorted(r.passed)} for r in rungs]
                for rungs in self._rungs
            ],
            "begun": sorted(self._begun),
            "ended": sorted(self._ended),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `to_json` was called; trials that have ended since then are told so by `end`.

        Raises:
            UserError: the rungs were others, as they were in earlier versions where none was rounded up.
        """
        before = [[rung["epoch"] for rung in rungs] for rungs in state["brackets"]]
        now = [[rung.epoch for rung in rungs] for rungs in self._rungs]
        if before != now:
            raise UserError(
                f"the search was started with rungs at {before} epochs, which are now at {now}; start a new one under "
                "another --name, with --reuse for what it has found"
            )
        for rungs, kept in zip(self._rungs, state["brackets"], strict=True):
            for rung, fields in zip(rungs, kept, strict=True):
                rung.recorded, rung.passed = dict(fields["recorded"]), set(fields["passed"])
        self._begun, self._ended = set(state["begun"]), set(state["ended"])

    def _bracket(self, trial: str) -> int:
        return self.trials.index(trial) % self.config.brackets

    def _of(self, trial: str) -> list[Rung]:
        return self._rungs[self._bracket(trial)]

    def _members(self, trial: str) -> list[str]:
        """Returns the trials of a trial's bracket."""
        return [other for other in self.trials if self._bracket(other) == self._bracket(trial)]

    def _waiting(self) -> list[tuple[str, Rung]]:
        """Returns the trials that wait, and at which rung."""
        return [
            (trial, rung)
            for rungs in self._rungs
            for rung in rungs
            for trial in rung.recorded
            if trial not in rung.passed and trial not in self._ended
        ]

    def _places(self, trial: str, rung: Rung) -> int:
        """Returns how many of a rung's trials may pass by what is known now."""
        places = len(rung.recorded) // self.config.reduction_factor
        # Where nothing more will come, one passes however few there are: someone must win.
        return max(places, 1) if self._complete(trial, rung) else places

    def _complete(self, trial: str, rung: Rung) -> bool:
        """Whether no trial will come to a rung any more."""
        rungs = self._of(trial)
        number = rungs.index(rung)
        if number == 0:
            coming = set(self._members(trial))
        else:
            below = rungs[number - 1]
            if not self._complete(trial, below):
                return False
            places = max(len(below.recorded) // self.config.reduction_factor, 1)
            best = {other for other in below.recorded if below.better_than(other) < places}
            coming = below.passed | best
        return coming <= rung.recorded.keys() | self._ended

    def _beaten(self, trial: str, rung: Rung) -> bool:
        """Whether a trial at a rung cannot pass any more."""
        at_most = len(rung.recorded) if self._complete(trial, rung) else len(self._members(trial))
        return rung.better_than(trial) >= max(at_most // self.config.reduction_factor, 1)
