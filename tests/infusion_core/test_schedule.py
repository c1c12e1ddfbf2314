import dataclasses
from fractions import Fraction

import pytest

from infusion_core.errors import InfusionError
from infusion_core.schedule import InfusionSchedule


@pytest.mark.parametrize(
    ("num_steps", "initial", "increment"),
    [(15, "0", "0.01"), (4, "0.1", "0.05"), (30, "0.02", "0.001"), (4, "0.6", "-0.2"), (1, "0.3", "0.9")],
)
def test_rates_grow_by_the_increment(num_steps, initial, increment):
    # α⁽ᵗ⁾ = α⁽⁰⁾ + t ω in exact arithmetic, for the states z⁽⁰⁾ … z⁽ᵀ⁻¹⁾.
    schedule = InfusionSchedule(
        num_steps=num_steps, initial_rate=float(initial), rate_increment=float(increment), target_variance=1e-3
    )
    exact = [float(Fraction(initial) + t * Fraction(increment)) for t in range(num_steps)]
    assert schedule.rates == tuple(exact)


@pytest.mark.parametrize("rate", [0.0, 0.05, 1.0])
def test_no_increment_is_a_constant_rate(rate):
    assert InfusionSchedule(num_steps=5, initial_rate=rate).rates == (rate,) * 5


@pytest.mark.parametrize(
    ("num_steps", "initial", "increment", "step", "rate"),
    [
        (12, 0.0, 0.1, 11, "1.1"),
        (100, 0.5, 0.25, 3, "1.25"),
        (7, 0.25, -0.125, 3, "-0.125"),
        (3, 1.5, -1.0, 0, "1.5"),
        (3, -0.1, 0.1, 0, "-0.1"),
        (3, float("nan"), 0.1, 0, "nan"),
        (3, 0.0, float("inf"), 0, "nan"),  # 0 × ∞
    ],
)
def test_schedule_that_leaves_0_1_is_refused_at_the_step_where_it_does(num_steps, initial, increment, step, rate):
    with pytest.raises(InfusionError, match=rf"at step {step} of {num_steps}: .* = {rate};"):
        InfusionSchedule(num_steps=num_steps, initial_rate=initial, rate_increment=increment)


def test_schedule_that_ends_exactly_at_1_is_accepted():
    # 0.1 × 3 is not 0.3 in floating point, and 1.1 - 0.1 × 1 might as well have been above 1.
    rates = InfusionSchedule(num_steps=11, rate_increment=0.1).rates
    assert rates == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize("initial", [0.0, 0.1, 0.7])
def test_rounding_neither_pushes_a_schedule_past_1_nor_admits_one_that_is(initial):
    for num_steps in range(2, 300):
        increment = (1 - initial) / (num_steps - 1)
        schedule = InfusionSchedule(num_steps=num_steps, initial_rate=initial, rate_increment=increment)
        assert schedule.rates[-1] == 1
        with pytest.raises(InfusionError, match=f"at step {num_steps} of"):
            InfusionSchedule(num_steps=num_steps + 1, initial_rate=initial, rate_increment=increment)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_chain_without_steps_is_refused(num_steps):
    with pytest.raises(InfusionError, match=f"num_steps = {num_steps}"):
        InfusionSchedule(num_steps=num_steps)


@pytest.mark.parametrize("variance", [0.0, -1e-4, float("nan")])
def test_target_component_without_width_is_refused(variance):
    with pytest.raises(InfusionError, match=f"positive variance, not {variance}"):
        InfusionSchedule(num_steps=3, target_variance=variance)


def test_schedule_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InfusionSchedule(num_steps=3).num_steps = 4
