"""Successive halving: the stopping form against Ray Tune's scheduler, the promoting one against halving in lockstep."""

import json
import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from pipeline.errors import UserError
from pipeline.successive_halving import Decision, HalvingConfig, SuccessiveHalving

EPOCHS = 81


def names(count: int) -> list[str]:
    return [f"trial-{i}" for i in range(count)]


class Simulation:
    """Trials whose values are known beforehand, on a number of slots; a seed determines the order of their reports.

    They report at multiples of `stride` epochs, and at the end.
    """

    def __init__(self, halving: SuccessiveHalving, value, slots: int, seed: int, stride: int = 1) -> None:
        self.halving, self.value, self.slots, self.stride = halving, value, slots, stride
        self.random = random.Random(seed)
        self.fresh = list(halving.trials)
        self.running: list[str] = []
        self.epochs = dict.fromkeys(halving.trials, 0)
        self.finished: list[str] = []

    def step(self) -> bool:
        """Lets one running trial train to its next report; returns whether there was one."""
        while len(self.running) < self.slots and (trial := next(iter(self.fresh), None) or self.halving.promotable()):
            if trial in self.fresh:
                self.fresh.remove(trial)
            else:
                self.halving.promote(trial)
            self.running.append(trial)
        if not self.running:
            return False
        trial = self.random.choice(self.running)
        self.epochs[trial] = min(self.epochs[trial] + self.stride, EPOCHS)
        decision = self.halving.report(trial, self.epochs[trial], self.value(trial, self.epochs[trial]))
        if self.epochs[trial] == EPOCHS:
            self.finished.append(trial)
            decision = Decision.STOP
        if decision != Decision.GO_ON:
            self.running.remove(trial)
        if decision == Decision.STOP:
            self.halving.end(trial)
        for beaten in self.halving.beaten():
            self.halving.end(beaten)
        return True

    def run(self) -> None:
        while self.step():
            pass


def ranked(trial: str, epoch: int) -> float:
    """Values whose order is the same at every epoch, and not that of the names."""
    return (int(trial.removeprefix("trial-")) * 7 % 27) + epoch / 100


@pytest.mark.parametrize("seed", range(5))
def test_the_stopping_form_decides_as_ray_tunes_scheduler(seed: int) -> None:
    halving = SuccessiveHalving(
        HalvingConfig(halving="stopping", grace_epochs=2, reduction_factor=3), names(20), EPOCHS
    )
    oracle = AsyncHyperBandScheduler("epoch", "value", "max", max_t=EPOCHS, grace_period=2, reduction_factor=3)
    trials = {name: SimpleNamespace(trial_id=name) for name in halving.trials}
    for trial in trials.values():
        oracle.on_trial_add(None, trial)
    draw = random.Random(seed)
    epochs = dict.fromkeys(trials, 0)
    alive = list(trials)
    stopped = 0
    while alive:
        name = draw.choice(alive)
        epochs[name] += 1
        if epochs[name] == EPOCHS:
            alive.remove(name)
            continue
        value = draw.gauss()
        expected = oracle.on_trial_result(None, trials[name], {"epoch": epochs[name], "value": value})
        decision = halving.report(name, epochs[name], value)
        assert (decision == Decision.STOP) == (expected == TrialScheduler.STOP)
        assert decision != Decision.WAIT
        if decision == Decision.STOP:
            alive.remove(name)
            stopped += 1
    assert stopped > 5


@pytest.mark.parametrize(("slots", "excess"), [(1, 1.0), (2, 1.2), (5, 1.5), (27, 2.0)])
def test_few_slots_halve_in_lockstep_and_many_not_much_more(slots: int, excess: float) -> None:
    config = HalvingConfig(grace_epochs=3, reduction_factor=3)
    simulation = Simulation(SuccessiveHalving(config, names(27), EPOCHS), ranked, slots, seed=slots)
    simulation.run()
    best = sorted(simulation.halving.trials, key=lambda trial: ranked(trial, 0), reverse=True)
    assert best[0] in simulation.finished
    for count, epochs in ((27, 3), (9, 9), (3, 27), (1, 81)):
        assert all(simulation.epochs[trial] >= epochs for trial in best[:count])
    lockstep = 27 * 3 + 9 * (9 - 3) + 3 * (27 - 9) + 1 * (81 - 27)
    assert lockstep <= sum(simulation.epochs.values()) <= excess * lockstep


def test_the_first_to_come_passes_on_credit_only_where_trials_are_stopped() -> None:
    for halving, decision in (("stopping", Decision.GO_ON), ("promoting", Decision.WAIT)):
        state = SuccessiveHalving(HalvingConfig(halving=halving, grace_epochs=3), names(9), EPOCHS)
        assert state.report("trial-0", 2, 0.0) == Decision.GO_ON
        assert state.report("trial-0", 3, 0.0) == decision


@pytest.mark.parametrize("halving", ["promoting", "stopping"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 30])
@pytest.mark.parametrize("brackets", [1, 2])
@pytest.mark.parametrize(
    ("stride", "rounded"), [(1, True), (5, True), (15, True), (15, False), (50, True), (50, False)]
)
def test_every_search_ends_with_a_trial_that_was_trained_in_full(
    halving, count: int, brackets: int, stride: int, rounded: bool
) -> None:
    config = HalvingConfig(halving=halving, grace_epochs=4, reduction_factor=3, brackets=brackets)
    draw = random.Random(count)
    values = {name: draw.gauss() for name in names(count)}
    # Rungs that are not rounded are gone by: several fall before one report.
    state = SuccessiveHalving(config, names(count), EPOCHS, stride if rounded else 1)
    simulation = Simulation(state, lambda trial, _: values[trial] + draw.gauss() / 2, 3, seed=1, stride=stride)
    simulation.run()
    assert not simulation.fresh
    assert simulation.finished
    assert all(trial in simulation.halving._ended or trial in simulation.finished for trial in simulation.epochs)


def test_trials_that_fail_hold_nobody_up() -> None:
    state = SuccessiveHalving(HalvingConfig(grace_epochs=3), names(3), EPOCHS)
    state.report("trial-0", 3, 1.0)
    state.report("trial-1", 3, 2.0)
    assert state.promotable() is None
    state.end("trial-2")
    assert state.promotable() == "trial-1"
    state.promote("trial-1")
    assert state.promotable() is None
    assert state.beaten() == ["trial-0"]


def test_trials_that_failed_take_no_places() -> None:
    state = SuccessiveHalving(HalvingConfig(grace_epochs=3), names(7), EPOCHS)
    for i, value in enumerate([10.0, 9.0, 8.0, 7.0, 6.0, 5.0]):
        state.report(f"trial-{i}", 3, value)
        if i == 0:
            state.fail("trial-0")
    state.report("trial-6", 3, 4.0)
    # Of the six others, two pass.
    for expected in ("trial-1", "trial-2", None):
        assert state.promotable() == expected
        if expected:
            state.promote(expected)


def test_a_trial_that_too_many_have_beaten_is_not_kept_waiting() -> None:
    state = SuccessiveHalving(HalvingConfig(grace_epochs=3), names(6), EPOCHS)
    decisions = [state.report(f"trial-{i}", 3, 10.0 - i) for i in range(4)]
    # Two of six may pass at most; the third to come is the first that is known to be worse than two others.
    assert decisions == [Decision.WAIT, Decision.WAIT, Decision.STOP, Decision.STOP]


@pytest.mark.parametrize("halving", ["promoting", "stopping"])
def test_a_search_that_was_interrupted_prunes_as_if_it_had_not_been(halving) -> None:
    config = HalvingConfig(halving=halving, grace_epochs=3, reduction_factor=3)

    def noisy(trial: str, epoch: int) -> float:
        return random.Random(f"{trial} {epoch}").gauss() + ranked(trial, epoch) / 5

    undisturbed = Simulation(SuccessiveHalving(config, names(20), EPOCHS), noisy, 4, seed=3)
    undisturbed.run()
    disturbed = Simulation(SuccessiveHalving(config, names(20), EPOCHS), noisy, 4, seed=3)
    steps = 0
    while disturbed.step():
        steps += 1
        if steps % 10 == 0:
            kept = json.loads(json.dumps(disturbed.halving.to_json()))
            disturbed.halving = SuccessiveHalving(config, names(20), EPOCHS)
            disturbed.halving.restore(kept)
            # What runs goes on from its checkpoint, and says first where it is.
            for trial in disturbed.running:
                epoch = disturbed.epochs[trial]
                assert epoch == 0 or disturbed.halving.report(trial, epoch, noisy(trial, epoch)) == Decision.GO_ON
    assert disturbed.epochs == undisturbed.epochs
    assert disturbed.finished == undisturbed.finished


def test_values_of_an_earlier_search_spare_its_trainings() -> None:
    config = HalvingConfig(grace_epochs=3, reduction_factor=3)
    state = SuccessiveHalving(config, names(27), EPOCHS)
    best = sorted(state.trials, key=lambda trial: ranked(trial, 0), reverse=True)
    # Of the earlier search, the third best was trained in full, and others to the first or the second rung.
    known = {best[2]: EPOCHS, best[0]: 9, best[5]: 9, **dict.fromkeys(best[10:20], 3)}
    for trial, epochs in known.items():
        values = {epoch: ranked(trial, epoch) for epoch in range(1, epochs + 1)}
        assert state.replay(trial, values, finished=epochs == EPOCHS)
    state.end(best[2])
    simulation = Simulation(state, ranked, 2, seed=0)
    unknown = [trial for trial in state.trials if trial not in known]
    simulation.fresh = list(unknown)
    simulation.run()
    assert simulation.finished == best[:1]
    # Of those that are known, only the best has to be trained anew.
    assert {trial for trial, epochs in simulation.epochs.items() if epochs} == {*unknown, best[0]}


def test_values_that_come_to_no_rung_or_where_none_waits_are_of_no_use() -> None:
    for halving, epochs in (("promoting", 2), ("stopping", 9), ("none", 9)):
        state = SuccessiveHalving(HalvingConfig(halving=halving, grace_epochs=3), names(3), EPOCHS)
        assert not state.replay("trial-0", {epochs: 1.0}, finished=False)
        assert state.replay("trial-1", {EPOCHS: 1.0}, finished=True)


def test_without_halving_every_trial_is_trained_in_full() -> None:
    simulation = Simulation(SuccessiveHalving(HalvingConfig(halving="none"), names(4), EPOCHS), ranked, 2, seed=0)
    simulation.run()
    assert set(simulation.epochs.values()) == {EPOCHS}


def test_rungs_lie_where_trials_are_validated() -> None:
    config = HalvingConfig(grace_epochs=5, brackets=2)
    assert config.rungs(0, 180, 15) == [15, 45, 135]
    assert config.rungs(1, 180, 15) == [15, 45, 135]
    assert config.rungs(0, 130, 15) == [15, 45]
    assert config.rungs(0, 180, 7) == [7, 21, 49, 140]


def test_a_trial_has_passed_the_rungs_that_it_went_by() -> None:
    state = SuccessiveHalving(HalvingConfig(grace_epochs=3), names(3), EPOCHS)
    assert state.report("trial-0", 10, 1.0) == Decision.WAIT
    # One of three passes the first rung, and one has.
    assert state.report("trial-1", 3, 0.5) == Decision.STOP
    state.end("trial-1")
    assert state.report("trial-2", 3, 0.7) == Decision.STOP
    state.end("trial-2")
    assert state.promotable() == "trial-0"


def test_a_state_with_other_rungs_is_refused() -> None:
    state = SuccessiveHalving(HalvingConfig(grace_epochs=3), names(3), EPOCHS)
    with pytest.raises(
        UserError, match=r"started with rungs at \[\[3, 9, 27\]\] epochs, which are now at \[\[15, 30\]\]"
    ):
        SuccessiveHalving(HalvingConfig(grace_epochs=3), names(3), EPOCHS, 15).restore(state.to_json())


def test_brackets_are_compared_apart() -> None:
    config = HalvingConfig(grace_epochs=3, brackets=2)
    assert (config.rungs(0, EPOCHS), config.rungs(1, EPOCHS)) == ([3, 9, 27], [9, 27])
    state = SuccessiveHalving(config, names(6), EPOCHS)
    assert state.report("trial-0", 3, 1.0) == Decision.WAIT
    assert state.report("trial-1", 3, 1.0) == Decision.GO_ON
    assert state.report("trial-1", 9, 1.0) == Decision.WAIT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grace_epochs": 0}, "grace_epochs must be at least 1, not 0"),
        ({"reduction_factor": 1}, "reduction_factor must be at least 2, not 1"),
        ({"grace_epochs": 81}, "compared after 81 epochs first, but trials are trained for 81"),
        ({"grace_epochs": 10, "brackets": 3}, "compared after 90 epochs first"),
        ({"grace_epochs": 5, "validate_every": 90}, "validate_every 90 a bracket is compared after 90 epochs first"),
    ],
)
def test_rungs_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    validate_every = fields.pop("validate_every", 1)
    with pytest.raises(UserError, match=message):
        SuccessiveHalving(HalvingConfig(**fields), names(4), EPOCHS, validate_every)
