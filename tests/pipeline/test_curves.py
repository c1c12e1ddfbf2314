import io

from PIL import Image

from pipeline.curves import figure_png, training_curves


def test_curves_and_png() -> None:
    history = [
        {"epoch": e, "train/objective": e * 1.0} | ({"valid/lower_bound": 2.0} if e % 2 else {}) for e in range(6)
    ]
    figure = training_curves(history)
    objective, bound = (panel.lines[0].get_xydata().tolist() for panel in figure.axes)
    assert objective == [[e, e] for e in range(6)]
    assert bound == [[e, 2] for e in (1, 3, 5)]
    assert Image.open(io.BytesIO(figure_png(figure))).format == "PNG"
