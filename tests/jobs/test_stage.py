import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.stage import main
from pipeline import storage
from pipeline.manifest import Manifest


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a job prints on bad input."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_digits_are_staged_and_then_found(bucket_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    destination = storage.join(bucket_uri, "digits")
    assert main(["digits", destination, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["dataset"] == destination
    assert result["manifest"] == f"{destination}/manifest.json"
    assert result["images"] == {"train": 1297, "valid": 250, "test": 250}
    assert result["images_staged"] == 1797
    assert result["images_per_second"] > 0
    assert "1,797 images" in captured.err
    assert Manifest.load(destination).name == "digits"
    assert len(Manifest.load(destination).splits["train"][0].row_groups) >= 8

    assert main(["digits", destination]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_options_reach_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, test_images=images)
    assert main([f"npz:{tmp_path / 'a.npz'}", str(tmp_path / "a"), "--valid-fraction", "0.25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == {"train": 15, "valid": 5, "test": 20}


def test_a_folder_is_staged_on_the_cluster(
    ray_cluster, bucket_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(20):
        Image.fromarray(np.full((9, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    destination = storage.join(bucket_uri, "pictures")
    arguments = [f"folder:{tmp_path}", destination, "--size", "4", "--channels", "1", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == {"train": 16, "valid": 2, "test": 2}
    assert Manifest.load(destination).image_shape == (4, 4, 1)

    (tmp_path / "7.png").write_bytes(b"no image")
    assert main([*arguments, "--overwrite"]) == 1
    assert f"error: {tmp_path / '7.png'}: cannot be decoded as an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("imagenet", "imagenet: no such source; there are digits"),
        ("npz:/nowhere.npz", "npz:/nowhere.npz: there is no such file"),
        ("torchvision:MNIST", "needs --root"),
        ("folder:/nowhere", "needs --size"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    assert main([source, str(tmp_path / "out")]) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_other_data_at_the_destination_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, test_images=images)
    arguments = [f"npz:{tmp_path / 'a.npz'}", str(tmp_path / "a")]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--valid-fraction", "0.2"]) == 1
    assert "holds different data (parameters {'valid_fraction': 0.1}, not {'valid_fraction': 0.2}" in error_line(capsys)
    assert main([*arguments, "--valid-fraction", "0.2", "--overwrite"]) == 0


def test_a_bucket_that_does_not_exist_is_one_line(client_env, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits", "s3://no-such-bucket/digits"]) == 1
    assert "there is no bucket s3://no-such-bucket" in error_line(capsys)


def test_an_s3_server_that_does_not_answer_is_one_line(
    client_env, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert main(["digits", "s3://infusion/digits"]) == 1
    assert time.monotonic() - start < 30
    line = error_line(capsys)
    assert "cannot reach s3://infusion (S3 server: http://127.0.0.1:9): failed after" in line


def test_help_lists_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for source in ("digits", "torchvision:MNIST", "npz:PATH", "folder:PATH", "--overwrite"):
        assert source in text
