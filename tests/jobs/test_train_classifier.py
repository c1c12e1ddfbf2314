"""`jobs.train_classifier` as it is called, with a real MLflow server."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from jobs import train_classifier
from pipeline import registry
from pipeline.sources import ArraySource, Rows
from pipeline.staging import stage


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_classifier.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--epochs", "--batch", "--learning-rate", "--seed", "--json"))


def test_a_registered_classifier_is_what_it_prints(
    client_env: Mapping[str, str], staged_digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_classifier.main([staged_digits, "--epochs", "1", "--seed", "2", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    tags = registry.find(result["classifier"]).tags
    assert float(tags["valid/accuracy"]) == result["valid_accuracy"]
    assert float(tags["test/accuracy"]) == result["test_accuracy"]
    assert result["champion"].startswith("models:/infusion-classifier-digits/")
    assert "train classifier: 1,297 images" in printed.err


def test_bad_input_is_one_line(
    client_env: Mapping[str, str], staged_digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows(np.zeros((8, 4, 4, 1), np.uint8), np.full(8, -1))
    unlabelled = str(tmp_path / "unlabelled")
    stage(ArraySource("unlabelled", dict.fromkeys(("train", "valid", "test"), rows)), unlabelled)
    capsys.readouterr()
    for arguments, message in (
        ([unlabelled], f"{unlabelled} has no labels"),
        ([str(tmp_path / "none")], "not a staged data set"),
        ([staged_digits, "--epochs", "0"], "epochs must be at least 1, not 0"),
    ):
        assert train_classifier.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
