import io

from PIL import Image

from pipeline.curves import (
    bounds_by_rate,
    bounds_by_sample_quality,
    estimate_curve,
    figure_png,
    optimum_by_steps,
    pareto_front,
    rate_curves,
    training_curves,
)


def test_curves_and_png() -> None:
    history = [
        {"epoch": e, "train/objective": e * 1.0} | ({"valid/lower_bound": 2.0} if e % 2 else {}) for e in range(6)
    ]
    figure = training_curves(history)
    objective, bound = (panel.lines[0].get_xydata().tolist() for panel in figure.axes)
    assert objective == [[e, e] for e in range(6)]
    assert bound == [[e, 2] for e in (1, 3, 5)]
    history[3]["valid/parzen"] = 7.0
    *_, parzen = training_curves(history).axes
    assert parzen.lines[0].get_xydata().tolist() == [[3, 7]]
    assert Image.open(io.BytesIO(figure_png(figure))).format == "PNG"


def test_a_panel_for_every_number_of_steps_and_a_curve_for_every_rate() -> None:
    curves = {"T = 5": {"0.1": [(1.0, 3.0), (2.0, 4.0)], "0.01": [(1.0, 1.0)]}, "T = 15": {"0": [(1.0, 7.0)]}}
    figure = rate_curves(curves, "ω")
    drawn = {
        panel.get_title(): {str(line.get_label()): line.get_xydata().tolist() for line in panel.lines}
        for panel in figure.axes
    }
    assert drawn == {
        title: {rate: [list(point) for point in points] for rate, points in by_rate.items()}
        for title, by_rate in curves.items()
    }


BY_RATE = {
    1: {"constant": [(0.3, 5.0, True), (0.1, 2.0, False), (0.5, 4.0, True)]},
    5: {"constant": [(0.1, 8.0, True), (0.3, 6.0, False)], "increasing": [(0.2, 7.0, True), (0.05, 7.5, True)]},
}


def test_bounds_by_rate_in_order_with_pruned_trials_hollow() -> None:
    figure = bounds_by_rate(BY_RATE, {1: 0.25})
    first, second = figure.axes
    assert first.lines[0].get_xydata().tolist() == [[0.1, 2], [0.3, 5], [0.5, 4]]
    hollow = [line.get_xydata().tolist() for line in first.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[0.1, 2.0]]]
    assert [line.get_label() for line in second.lines if not str(line.get_label()).startswith("_")] == [
        "constant",
        "increasing",
    ]
    # The published rate is marked where there is one.
    assert first.lines[-1].get_xdata() == [0.25, 0.25]
    assert "the paper's best" not in [line.get_label() for line in second.lines]


def test_the_best_rate_of_every_number_of_steps() -> None:
    (panel,) = optimum_by_steps(BY_RATE, {1: 0.25, 10: 0.01}).axes
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in panel.lines}
    assert drawn == {"constant": [[1, 0.3], [5, 0.1]], "increasing": [[5, 0.05]], "the paper's": [[1, 0.25]]}


def test_the_pareto_front_is_what_nothing_else_surpasses() -> None:
    judged = [("a", 5.0, 1.0), ("b", 4.0, 3.0), ("c", 4.0, 2.0), ("d", 1.0, 9.0), ("e", 5.0, 0.5), ("f", 4.0, 3.0)]
    assert pareto_front(judged) == {"a", "b", "d", "f"}
    (panel,) = bounds_by_sample_quality(judged).axes
    assert sorted(text.get_text() for text in panel.texts) == ["a", "b", "d", "f"]


def test_epochs_are_whole_even_if_there_is_only_one() -> None:
    for figure in (training_curves([{"epoch": 1, "train/objective": 2.0}]), rate_curves({"T": {"0.1": [(1, 2)]}}, "ω")):
        figure.canvas.draw()
        assert all(tick == round(tick) for panel in figure.axes for tick in panel.get_xticks())


def test_estimates_over_the_number_of_chains() -> None:
    figure = estimate_curve([(1, -10.0, 1.0), (10, -8.0, 4.5)])
    estimates, sizes = (panel.lines[0].get_xydata().tolist() for panel in figure.axes)
    assert estimates == [[1, -10], [10, -8]]
    assert sizes == [[1, 1], [10, 4.5]]
    assert {panel.get_xscale() for panel in figure.axes} == {"log"}
