"""Curves of trainings over their epochs, laid out as the paper's figures."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plots the training objective and the validation lower bound over the epochs (Figure 3).

    Args:
        history: the metrics of every epoch, named as in the tracking store, with `epoch`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, title in (
        (panels[0], "train/objective", "Objective (training)"),
        (panels[1], "valid/lower_bound", "Lower bound (validation)"),
    ):
        points = [(row["epoch"], row[name]) for row in history if name in row]
        panel.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3)
        panel.set(title=title, xlabel="epoch", ylabel="nats per image")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
    return figure


def rate_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], quantity: str) -> Figure:
    """Plots the validation bound over the epochs for each infusion rate, a panel for every number of steps (Figure 6).

    Args:
        curves: by title of the panel and by infusion rate, points of epoch and bound.
        quantity: what the rate is: the rate increment ω of increasing schedules, or the rate α of constant ones.
    """
    figure = Figure(figsize=(4.5 * len(curves), 3.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, by_rate) in zip(panels, sorted(curves.items()), strict=True):
        for rate, points in sorted(by_rate.items()):
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=rate)
        panel.set(title=title, xlabel="epoch", ylabel="lower bound (validation), nats per image")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.legend(title=quantity, fontsize="small")
    return figure


def estimate_curve(curve: Sequence[tuple[float, float, float]]) -> Figure:
    """Plots the importance-sampling estimate over the number of chains, and the effective sample size.

    Args:
        curve: number of chains k, estimate in nats per image, mean effective sample size.
    """
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    chains, estimates, sizes = zip(*curve, strict=True)
    for panel, values, title, unit in zip(
        figure.subplots(1, 2),
        (estimates, sizes),
        ("Importance-sampling estimate", "Effective sample size"),
        ("nats per image", "chains"),
        strict=True,
    ):
        panel.plot(chains, values, marker="o", markersize=4)
        panel.set(title=title, xlabel="chains k", ylabel=unit, xscale="log")
        panel.grid(alpha=0.3)
    return figure


def figure_png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
