"""Features of images: a registered classifier's, and those of Inception v3 with random weights from a real file."""

import dataclasses
import io
import uuid
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.transforms.functional import normalize, resize

from pipeline import classifier, feature_extractors, tracking
from pipeline.classifier import Classifier, ClassifierConfig
from pipeline.errors import UserError
from pipeline.feature_extractors import CLASSIFIER_NAMES, INCEPTION_NAMES, open_feature_extractor
from pipeline.manifest import Manifest

Digits = tuple[str, Manifest]
STANDARD_FILE = Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's, with random weights, where torch.hub keeps what it has downloaded."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, num_classes=7)
    # Of such a size that the images, and where black and white lie, tell in the features.
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    file = tmp_path_factory.mktemp("hub") / "hub" / "checkpoints" / STANDARD_FILE
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return file


def torchvision_inception(weights: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features and logits as torchvision computes them of pixels that are normalised as its weights ask for."""
    network = inception_v3(weights=None, init_weights=False, transform_input=True, num_classes=7)
    network.load_state_dict(torch.load(weights, weights_only=True))
    pooled: list[Tensor] = []
    network.eval().avgpool.register_forward_hook(lambda _, inputs, output: pooled.append(output.flatten(1)))
    preset = Inception_V3_Weights.IMAGENET1K_V1.transforms()
    coloured = images.expand(-1, 3, -1, -1)
    with torch.no_grad():
        logits = network(normalize(resize(coloured, [299, 299]), preset.mean, preset.std))
    return pooled[0], logits


class TestClassifier:
    @pytest.mark.usefixtures("client_env")
    def test_features_are_those_of_the_registered_classifier(
        self, digits: Digits, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset, manifest = digits
        manifest = dataclasses.replace(manifest, name=f"data-{uuid.uuid4().hex[:8]}")
        config = ClassifierConfig.for_images(manifest.image_shape, manifest.levels, manifest.class_names or ())
        network = Classifier(config).eval()
        with tracking.owned_run("tests", "classifier", params={}, tags={}) as run:
            registered = classifier.register(network, manifest, run, {"valid/accuracy": 0.1})
        extractor = open_feature_extractor(f"models:/{registered.name}@champion", dataset, manifest)
        assert extractor.names == CLASSIFIER_NAMES
        assert extractor.description == registered.uri
        monkeypatch.setattr(feature_extractors, "CLASSIFIER_BATCH", 3)
        images = torch.randint(17, (8, 1, 8, 8), dtype=torch.uint8)
        features, logits = extractor(images)
        with torch.no_grad():
            expected = network.features((images + 0.5) / 17)
            assert torch.allclose(features, expected, atol=1e-6)
            assert torch.allclose(logits, network((images + 0.5) / 17), atol=1e-6)
        other = dataclasses.replace(manifest, class_names=("cat", "dog"))
        with pytest.raises(UserError, match=rf"labels cat, dog, but classifier {registered.uri} is for 0, 1"):
            open_feature_extractor(registered.uri, dataset, other)


class TestInception:
    def test_features_are_torchvisions(
        self, digits: Digits, inception_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        extractor = open_feature_extractor(f"inception:{inception_weights}", *digits)
        assert extractor.names == INCEPTION_NAMES
        assert str(inception_weights) in extractor.description
        monkeypatch.setattr(feature_extractors, "INCEPTION_BATCH", 1)
        images = torch.randint(17, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        features, logits = extractor(images)
        assert features.shape == (2, 2048)
        expected_features, expected_logits = torchvision_inception(inception_weights, images / 16)
        difference = (expected_features[0] - expected_features[1]).abs().max()
        assert (features - expected_features).abs().max() < 1e-3 * difference
        assert torch.allclose(logits, expected_logits, rtol=1e-3, atol=1e-3 * float(expected_logits.std()))

    def test_standard_weights_are_those_that_torch_hub_has(
        self, digits: Digits, inception_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(inception_weights.parents[2]))
        extractor = open_feature_extractor("inception", *digits)
        assert "IMAGENET1K_V1" in extractor.description
        images = torch.randint(17, (1, 1, 8, 8), dtype=torch.uint8)
        from_file = open_feature_extractor(f"inception:{inception_weights}", *digits)
        assert torch.equal(extractor(images)[0], from_file(images)[0])

    def test_standard_weights_that_cannot_be_downloaded(
        self, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        # Nothing listens on the discard port.
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match=rf"cannot download .*{STANDARD_FILE} .*inception:PATH"):
            open_feature_extractor("inception", *digits)

    def test_files_that_hold_no_such_weights(self, digits: Digits, tmp_path: Path) -> None:
        file = tmp_path / "weights.pth"
        spec = f"inception:{file}"
        with pytest.raises(UserError, match=rf"{file}: there is no such file"):
            open_feature_extractor(spec, *digits)
        for content, message in (
            (b"", "not a file of weights"),
            (b"garbage", "not a file of weights"),
            (_saved(Path("code")), "not a file of weights"),
            (_saved(torch.zeros(3)), "not a state dictionary"),
            (_saved({"a": 1}), "not a state dictionary"),
            (_saved({"a": torch.zeros(3)}), r"not the weights of torchvision's inception_v3: 'fc.bias'"),
            (_saved(OrderedDict({"fc.bias": torch.zeros(3)})), r"not the weights .* Missing key"),
        ):
            file.write_bytes(content)
            with pytest.raises(UserError, match=rf"^{file}: {message}") as caught:
                open_feature_extractor(spec, *digits)
            assert "\n" not in str(caught.value)

    def test_two_channels_are_no_colours(self, digits: Digits, inception_weights: Path) -> None:
        dataset, manifest = digits
        other = dataclasses.replace(manifest, image_shape=(8, 8, 2))
        with pytest.raises(UserError, match="images of 2 channels, but Inception v3 takes 1 or 3"):
            open_feature_extractor(f"inception:{inception_weights}", dataset, other)


@pytest.mark.parametrize("spec", ["", "inceptionv3", "inception:", "resnet:weights.pth", "classifier"])
def test_what_names_no_features(spec: str, digits: Digits) -> None:
    with pytest.raises(UserError, match=r"names no features; write models:/NAME@ALIAS"):
        open_feature_extractor(spec, *digits)


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
