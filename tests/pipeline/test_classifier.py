"""The classifier, its files and its place in a real registry."""

import dataclasses
import json
import uuid
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from infusion_core.model import InfusionModel, ModelConfig
from pipeline import classifier, model_package, registry, tracking
from pipeline.classifier import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Classifier,
    ClassifierConfig,
    check_fit,
    load_classifier,
    save_classifier,
)
from pipeline.errors import UserError
from pipeline.manifest import Manifest

NAMES = tuple("abc")
CONFIG = ClassifierConfig.for_images((9, 5, 2), 17, NAMES)


def new_classifier(config: ClassifierConfig = CONFIG, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = Classifier(config)
    # Statistics that differ from those of a new network.
    network(torch.rand(20, *_state_shape(config)))
    return network.eval()


def _state_shape(config: ClassifierConfig) -> tuple[int, int, int]:
    height, width, channels = config.image_shape
    return channels, height, width


class TestNetwork:
    @pytest.mark.parametrize(
        ("shape", "channels"),
        [
            ((8, 8, 1), (32,)),
            ((28, 28, 1), (32, 64, 128)),
            ((32, 32, 3), (32, 64, 128)),
            ((48, 48, 1), (32, 64, 128)),
            ((64, 64, 3), (32, 64, 128, 128)),
            ((1, 3, 1), (32,)),
        ],
    )
    def test_it_is_as_deep_as_the_images_are_large(
        self, shape: tuple[int, int, int], channels: tuple[int, ...]
    ) -> None:
        config = ClassifierConfig.for_images(shape, 256, NAMES)
        assert config.channels == channels
        network = Classifier(config).eval()
        x = torch.rand(2, *_state_shape(config))
        assert network.features(x).shape == (2, 64)
        assert network(x).shape == (2, 3)
        assert torch.equal(network.logits(network.features(x)), network(x))

    def test_it_takes_the_middles_of_the_grey_levels_cells(self) -> None:
        middles = new_classifier().pixels(torch.tensor([0, 8, 16], dtype=torch.uint8))
        assert middles.tolist() == pytest.approx([1 / 34, 0.5, 33 / 34])


class TestFiles:
    def test_a_classifier_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        network = new_classifier()
        save_classifier(network, tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
        loaded = load_classifier(tmp_path)
        assert loaded.config == network.config
        assert not loaded.training
        x = torch.rand(4, 2, 9, 5)
        assert torch.equal(loaded(x), network(x))

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"image_shape": 3}'])
    def test_damaged_configuration(self, text: str, tmp_path: Path) -> None:
        save_classifier(new_classifier(), tmp_path)
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(UserError, match=r"classifier\.json is not a classifier's configuration"):
            load_classifier(tmp_path)

    def test_damaged_weights(self, tmp_path: Path) -> None:
        save_classifier(new_classifier(), tmp_path)
        content = (tmp_path / WEIGHTS_FILE).read_bytes()
        (tmp_path / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"classifier\.safetensors does not hold the weights"):
            load_classifier(tmp_path)
        save_file({"head.weight": torch.zeros(3, 64)}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(UserError, match=r"Missing key.*head\.bias") as caught:
            load_classifier(tmp_path)
        assert "\n" not in str(caught.value)

    def test_weights_of_another_configuration(self, tmp_path: Path) -> None:
        save_classifier(new_classifier(), tmp_path)
        fields = json.loads((tmp_path / CONFIG_FILE).read_text())
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**fields, "class_names": ["a", "b"]}))
        with pytest.raises(UserError, match=r"size mismatch for head\.weight"):
            load_classifier(tmp_path)


@pytest.mark.usefixtures("client_env")
class TestRegistry:
    def manifest(self, digits: tuple[str, Manifest], fingerprint: str = "f") -> Manifest:
        """Of a data set of a new name, so that nothing is registered for it yet."""
        _, manifest = digits
        origin = dataclasses.replace(manifest.origin, fingerprint=fingerprint)
        return dataclasses.replace(manifest, name=f"data-{uuid.uuid4().hex[:8]}", origin=origin)

    def register(self, manifest: Manifest, accuracy: float, seed: int = 0) -> registry.RegisteredModel:
        accuracies = {"valid/accuracy": accuracy, "test/accuracy": 0.5}
        with tracking.owned_run("tests", "classifier", params={}, tags={}) as run:
            return classifier.register(new_classifier(seed=seed), manifest, run, accuracies)

    def test_a_registered_classifier_is_found_and_loaded_bit_for_bit(self, digits: tuple[str, Manifest]) -> None:
        manifest = self.manifest(digits)
        self.register(manifest, 0.9)
        registered = registry.find(f"models:/infusion-classifier-{manifest.name}@champion")
        assert registered.version == "1"
        assert registered.tags == {
            "dataset_fingerprint": "f",
            "classes": "3",
            "valid/accuracy": "0.9",
            "test/accuracy": "0.5",
        }
        expected = new_classifier()
        loaded = classifier.load(registered)
        assert loaded.config == expected.config
        for name, tensor in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_the_newest_of_the_best_is_champion(self, digits: tuple[str, Manifest]) -> None:
        manifest = self.manifest(digits)
        changed = dataclasses.replace(manifest, origin=dataclasses.replace(manifest.origin, fingerprint="g"))
        champions = []
        for of, accuracy in ((manifest, 0.8), (manifest, 0.7), (manifest, 0.8), (manifest, 0.9), (changed, 0.1)):
            registered = self.register(of, accuracy)
            champions.append(registry.find(f"models:/{registered.name}@champion").version)
        assert champions == ["1", "1", "3", "4", "5"]

    def test_an_infusion_model_is_not_a_classifier(self) -> None:
        model = InfusionModel(ModelConfig(image_shape=(5, 4, 1), num_steps=2, hidden_sizes=(4,)))
        with tracking.owned_run("tests", "model", params={}, tags={}) as run:
            registered = model_package.register(model, f"infusion-{uuid.uuid4().hex[:8]}", run, {})
        with pytest.raises(UserError, match=rf"{registered.uri} is not a classifier; .*jobs\.train_classifier"):
            classifier.load(registered)

    def test_damaged_files_are_named_with_the_version(self, digits: tuple[str, Manifest]) -> None:
        registered = self.register(self.manifest(digits), 0.5)
        run = tracking.TrackedRun.of(registered.run_id)
        run.log_file(f"classifier/{CONFIG_FILE}", b"{}")
        with pytest.raises(UserError, match=rf"^{registered.uri}: classifier\.json is not"):
            classifier.load(registered)
        assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


class TestFit:
    def check(self, digits: tuple[str, Manifest], fingerprint: str | None = None, **changes: object) -> None:
        dataset, manifest = digits
        config = ClassifierConfig.for_images(manifest.image_shape, manifest.levels, manifest.class_names or ())
        network = Classifier(dataclasses.replace(config, **changes))
        tags = {"dataset_fingerprint": fingerprint or manifest.origin.fingerprint}
        check_fit(network, registry.RegisteredModel("c", "7", "r", tags), dataset, manifest)

    def test_a_classifier_of_the_data_set_fits(self, digits: tuple[str, Manifest]) -> None:
        self.check(digits)

    def test_one_of_other_data_does_not(self, digits: tuple[str, Manifest]) -> None:
        for changes, message in (
            ({"image_shape": (28, 28, 1)}, r"images of shape 8 × 8 × 1, but classifier models:/c/7 is for 28 × 28 × 1"),
            ({"levels": 256}, r"grey levels: 17, but .* is for 256"),
            ({"class_names": ("cat", "dog")}, r"labels 0, 1, .*, 9, but .* is for cat, dog"),
            ({"fingerprint": "other"}, r"the data of fingerprint .*, but .* is for other"),
        ):
            with pytest.raises(UserError, match=message):
                self.check(digits, **changes)  # type: ignore[arg-type]

    def test_none_fits_data_without_labels(self, digits: tuple[str, Manifest]) -> None:
        dataset, manifest = digits
        with pytest.raises(UserError, match="has labels none, but"):
            self.check((dataset, dataclasses.replace(manifest, class_names=None)), class_names=("0", "1"))
