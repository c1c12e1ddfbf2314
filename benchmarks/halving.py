r"""Compares successive halving with the full grid on the digits, and prints what it saves and what it costs.

For every seed, twelve rates are searched three times: trained in full, and pruned in either form. Then the curves of
the full grids are replayed: with trials in other orders and with more slots, what would have been trained, and found?

It takes half an hour on two cores. What was finished is not searched again when it is interrupted and run once more.
"""

import argparse
import dataclasses
import heapq
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from jobs.services import DEFAULT_FOLDER
from pipeline.local_services import LocalServices
from pipeline.presets import digits
from pipeline.search_grid import Grid, Point, grid_points
from pipeline.successive_halving import Decision, Halving, HalvingConfig, SuccessiveHalving

if TYPE_CHECKING:
    from pipeline.search import SearchResult

RATES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.14)
EPOCHS = 324
VALIDATE_EVERY = 18
# Lower rates are learnt faster, whether or not they end higher: comparing earlier picks them. Found with another seed,
# 100, than those that are compared here.
GRACE_EPOCHS = 54
FORMS: tuple[Halving, ...] = ("promoting", "stopping")
DATASET = "s3://infusion/datasets/digits"
STORE = "s3://infusion/runs"
ORDERS = 200
SLOTS = (2, 6, 12)

Curves = Mapping[str, Mapping[int, float]]
"""By trial and epoch, the validation lower bound."""


@dataclass(frozen=True)
class Replay:
    """What a search would have done.

    Attributes:
        epochs: trained by all trials.
        best: the best bound of those that were trained in full.
        duration: until the last slot was free, in epochs of one trial.
    """

    epochs: int
    best: float
    duration: int


def main() -> int:
    """Runs the searches and prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.halving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    seeds = range(parser.parse_args().seeds)
    services = LocalServices(DEFAULT_FOLDER)
    services.up()
    os.environ.update(services.env())
    # Ray reads its variables once, when it is imported.
    from pipeline.sources import open_source
    from pipeline.staging import stage

    stage(open_source("digits"), DATASET)
    results = {(form, seed): _search(form, seed) for seed in seeds for form in ("none", *FORMS)}
    _print_searches(results, seeds)
    _print_replays([_curves(results["none", seed]) for seed in seeds])
    return 0


def _points(seed: int) -> list[Point]:
    base = dataclasses.replace(
        digits(),
        seed=seed,
        epochs=EPOCHS,
        validate_every=VALIDATE_EVERY,
        figures_every=EPOCHS,
        denoising_epochs=0,
        parzen_bandwidth=None,
    )
    return grid_points(Grid(increasing=RATES), base)


def _halving(form: Halving) -> HalvingConfig:
    return HalvingConfig(halving=form, grace_epochs=GRACE_EPOCHS)


def _search(form: Halving, seed: int) -> "SearchResult":
    from pipeline import storage
    from pipeline.search import TrialResources, search
    from pipeline.search_state import SEARCH_FILE

    name = f"halving-{form}-seed-{seed}"
    begun = storage.exists(storage.join(STORE, name, SEARCH_FILE))
    return search(_points(seed), DATASET, STORE, name, _halving(form), TrialResources(), resume=begun)


def _curves(result: "SearchResult") -> Curves:
    from pipeline.search_report import gather_search

    found = gather_search(result.mlflow_run.rpartition("/")[2])
    assert found is not None, "it is the run of a search"
    bound = "valid/lower_bound"
    return {
        trial.name: {int(row["epoch"]): row[bound] for row in trial.history if bound in row} for trial in found.trials
    }


def _print_searches(results: Mapping[tuple[Halving, int], "SearchResult"], seeds: Sequence[int]) -> None:
    print("| seed | halving | best trial | its bound, nats | lost | epochs | asha_epochs_over_grid |")
    print("|---|---|---|---|---|---|---|")
    for seed in seeds:
        full = results["none", seed]
        for form in ("none", *FORMS):
            result = results[form, seed]
            lost = f"{1 - result.valid_lower_bound / full.valid_lower_bound:.1%}"
            epochs, share = f"{result.epochs_trained:,}", f"{result.epochs_trained / full.epochs_trained:.3f}"
            row = (seed, form, result.best, f"{result.valid_lower_bound:.2f}", lost, epochs, share)
            print(f"| {' | '.join(map(str, row))} |")
    print("\nReports:", *(result.report for result in results.values()), sep="\n", file=sys.stderr)


def _print_replays(grids: Sequence[Curves]) -> None:
    print("\n| order of trials | slots | form | epochs of the full grid | lost, mean | lost, most | slots in use |")
    print("|---|---|---|---|---|---|---|")
    for label, orders in (("lowest rate first", 0), ("highest rate first", 0), (f"{ORDERS} at random", ORDERS)):
        for slots in SLOTS:
            for form in FORMS:
                replays = [
                    (replay(curves, order, _halving(form), slots), curves)
                    for curves in grids
                    for order in _orders(list(curves), orders, reverse=label.startswith("highest"))
                ]
                lost = [1 - each.best / _best(curves.values()) for each, curves in replays]
                epochs = mean(each.epochs for each, _ in replays) / (len(RATES) * EPOCHS)
                in_use = mean(each.epochs / (slots * each.duration) for each, _ in replays)
                row = (label, slots, form, f"{epochs:.3f}", f"{mean(lost):.1%}", f"{max(lost):.1%}", f"{in_use:.0%}")
                print(f"| {' | '.join(map(str, row))} |")


def _orders(trials: list[str], count: int, *, reverse: bool) -> Iterator[list[str]]:
    if not count:
        yield trials[::-1] if reverse else trials
    draw = random.Random(0)
    for _ in range(count):
        yield draw.sample(trials, len(trials))


def _best(curves: Iterable[Mapping[int, float]]) -> float:
    return max(max(curve.values()) for curve in curves)


def replay(curves: Curves, order: Sequence[str], config: HalvingConfig, slots: int) -> Replay:
    """Returns what a search would have done with trials that take one unit of time an epoch.

    Args:
        curves: of all trials, trained in full.
        order: in which trials begin.
        config: how they are pruned.
        slots: trials at a time.
    """
    epochs = max(max(curve) for curve in curves.values())
    halving = SuccessiveHalving(config, order, epochs, VALIDATE_EVERY)
    stops = [*config.rungs(0, epochs, VALIDATE_EVERY), epochs]
    fresh, reached = list(order), dict.fromkeys(order, 0)
    finished: list[str] = []
    running: list[tuple[int, int, str]] = []
    now = 0
    while True:
        while len(running) < slots and (trial := fresh[0] if fresh else halving.promotable()):
            if fresh:
                fresh.pop(0)
                halving.begin(trial)
            else:
                halving.promote(trial)
            stop = next(epoch for epoch in stops if epoch > reached[trial])
            # Of those that end at the same time, the one that began first reports first.
            heapq.heappush(running, (now + stop - reached[trial], order.index(trial), trial))
        if not running:
            return Replay(sum(reached.values()), _best([curves[trial] for trial in finished]), now)
        now, _, trial = heapq.heappop(running)
        reached[trial] = next(epoch for epoch in stops if epoch > reached[trial])
        if reached[trial] == epochs:
            finished.append(trial)
            halving.end(trial)
            continue
        decision = halving.report(trial, reached[trial], curves[trial][reached[trial]])
        if decision == Decision.GO_ON:
            stop = next(epoch for epoch in stops if epoch > reached[trial])
            heapq.heappush(running, (now + stop - reached[trial], order.index(trial), trial))
        elif decision == Decision.STOP:
            halving.end(trial)
        for beaten in halving.beaten():
            halving.end(beaten)


if __name__ == "__main__":
    raise SystemExit(main())
