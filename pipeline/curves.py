"""Curves of trainings over their epochs, laid out as the paper's figures."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plots the training objective and the validation lower bound over the epochs (Figure 3).

    Beside them stands the Parzen-window estimate, if any epoch has one.

    Args:
        history: the metrics of every epoch, named as in the tracking store, with `epoch`.
    """
    curves = [
        (title, points)
        for name, title in (
            ("train/objective", "Objective (training)"),
            ("valid/lower_bound", "Lower bound (validation)"),
            ("valid/parzen", "Parzen window (validation)"),
        )
        if (points := [(row["epoch"], row[name]) for row in history if name in row])
    ]
    figure = Figure(figsize=(4.5 * len(curves), 3.4), dpi=120, layout="constrained")
    for panel, (title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        panel.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3)
        panel.set(title=title, xlabel="epoch", ylabel="nats per image")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
    return figure


def rate_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], quantity: str) -> Figure:
    """Plots the validation bound over the epochs for each infusion rate, a panel for every number of steps (Figure 6).

    Args:
        curves: by title of the panel and by infusion rate, in the order in which they are to be named, points of epoch
            and bound.
        quantity: what the rate is: the rate increment ω of increasing schedules, or the rate α of constant ones.
    """
    figure = Figure(figsize=(5.2 * len(curves), 3.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, by_rate) in zip(panels, sorted(curves.items()), strict=True):
        # Rates are ordered, and a dozen of them are more than the default colours.
        colours = colormaps["viridis"](np.linspace(0, 0.95, len(by_rate)))
        for colour, (rate, points) in zip(colours, by_rate.items(), strict=True):
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=rate, color=colour)
        panel.set(title=title, xlabel="epoch", ylabel="lower bound (validation), nats per image")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.legend(title=quantity, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


ByRate = Mapping[int, Mapping[str, Sequence[tuple[float, float, bool]]]]
"""By number of steps and kind of schedule: infusion rate, bound, and whether the training was a whole one."""


def bounds_by_rate(bounds: ByRate, published: Mapping[int, float]) -> Figure:
    """Plots the bound over the infusion rate, a panel for every number of steps and a curve for every kind (Figure 7).

    Args:
        bounds: what was found.
        published: by number of steps, the best rate that has been published; a dashed line.
    """
    figure = Figure(figsize=(4.5 * len(bounds), 3.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(bounds), squeeze=False)[0]
    for panel, (num_steps, by_kind) in zip(panels, sorted(bounds.items()), strict=True):
        for kind, points in sorted(by_kind.items()):
            ordered = sorted(points)
            (line,) = panel.plot([rate for rate, *_ in ordered], [bound for _, bound, _ in ordered], label=kind)
            for rate, bound, whole in ordered:
                colour = line.get_color()
                panel.plot(rate, bound, "o", color=colour, markerfacecolor=colour if whole else "white", markersize=5)
        if num_steps in published:
            panel.axvline(published[num_steps], color="grey", linestyle="--", linewidth=1, label="the paper's best")
        panel.set(title=f"T = {num_steps}", xlabel="infusion rate", ylabel="lower bound (validation), nats per image")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def optimum_by_steps(bounds: ByRate, published: Mapping[int, float]) -> Figure:
    """Plots the infusion rate with the highest bound over the number of steps, a curve for every kind of schedule."""
    figure = Figure(figsize=(5, 3.6), dpi=120, layout="constrained")
    panel = figure.subplots()
    for kind in sorted({kind for by_kind in bounds.values() for kind in by_kind}):
        best = [
            (num_steps, max(by_kind[kind], key=lambda point: point[1])[0])
            for num_steps, by_kind in sorted(bounds.items())
            if kind in by_kind
        ]
        panel.plot(*zip(*best, strict=True), marker="o", label=kind)
    known = [(num_steps, rate) for num_steps, rate in sorted(published.items()) if num_steps in bounds]
    if known:
        panel.plot(*zip(*known, strict=True), "x", color="grey", label="the paper's")
    panel.set(xlabel="number of steps T", ylabel="best infusion rate", xticks=sorted(bounds))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    return figure


def bounds_by_sample_quality(judged: Sequence[tuple[str, float, float]]) -> Figure:
    """Plots the bound against the Parzen-window estimate, and rings what no other surpasses in both.

    Args:
        judged: name, bound, Parzen-window estimate.
    """
    figure = Figure(figsize=(6.5, 4.2), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.scatter([parzen for *_, parzen in judged], [bound for _, bound, _ in judged], s=22)
    front = [each for each in judged if each[0] in pareto_front(judged)]
    panel.scatter(
        [parzen for *_, parzen in front],
        [bound for _, bound, _ in front],
        s=90,
        facecolors="none",
        edgecolors="black",
        label="Pareto front",
    )
    middle = (min(parzen for *_, parzen in judged) + max(parzen for *_, parzen in judged)) / 2
    for name, bound, parzen in front:
        # Names are written towards the middle, where there is room for them.
        side, offset = ("left", 6) if parzen <= middle else ("right", -6)
        place = (offset, 6)
        panel.annotate(name, (parzen, bound), place, textcoords="offset points", ha=side, fontsize="x-small")
    panel.set(xlabel="Parzen-window estimate, nats per image", ylabel="lower bound (validation), nats per image")
    panel.margins(0.15)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="lower left")
    return figure


def pareto_front(judged: Sequence[tuple[str, float, float]]) -> set[str]:
    """Returns the names of those of whom no other is as good in both figures and better in one."""
    return {
        name
        for name, bound, quality in judged
        if not any(
            other_bound >= bound and other_quality >= quality and (other_bound, other_quality) != (bound, quality)
            for _, other_bound, other_quality in judged
        )
    }


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
