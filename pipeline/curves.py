"""Curves of a training over its epochs."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def training_curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plots the denoising objective and the validation lower bound over the epochs.

    Args:
        history: the metrics of every epoch, named as in the tracking store, with `epoch`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, title in (
        (panels[0], "train/objective", "Denoising objective (training)"),
        (panels[1], "valid/lower_bound", "Lower bound (validation)"),
    ):
        points = [(row["epoch"], row[name]) for row in history if name in row]
        panel.plot(*zip(*points, strict=True), marker="o" if len(points) <= 30 else None, markersize=3)
        panel.set(title=title, xlabel="epoch", ylabel="nats per image")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    return figure


def figure_png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
