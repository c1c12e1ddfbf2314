"""A small classifier of a data set's images, whose features and predictions judge samples of the same kind of images.

It is kept as `classifier.json` (the configuration) beside `classifier.safetensors` (the weights); neither can carry
code. In the registry it is `infusion-classifier-<dataset>`, and `champion` is the version to judge samples with.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline import registry
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.registry import RegisteredModel
from pipeline.tracking import TrackedRun, mlflow_errors

CONFIG_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"

_ARTIFACT = "classifier"
_COARSEST_GRID = 7
_FIRST_CHANNELS = 32
_MOST_CHANNELS = 128


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that determines a classifier but its weights.

    Attributes:
        image_shape: height, width, channels.
        levels: number of grey levels of the pixels.
        class_names: what the classes 0, 1, … mean.
        channels: of each block of convolution, batch normalisation and pooling, which halves height and width.
        num_features: width of the penultimate layer.
    """

    image_shape: tuple[int, int, int]
    levels: int
    class_names: tuple[str, ...]
    channels: tuple[int, ...]
    num_features: int = 64

    @classmethod
    def for_images(cls, image_shape: tuple[int, int, int], levels: int, class_names: tuple[str, ...]) -> Self:
        """Returns a network whose blocks, each of twice the channels, lead images of any size to a small grid.

        That is one block for 8 × 8, three for 28 × 28, 32 × 32 and 48 × 48, four for 64 × 64.
        """
        side, channels = min(image_shape[:2]), [_FIRST_CHANNELS]
        while (side := -(-side // 2)) >= _COARSEST_GRID:
            channels.append(min(2 * channels[-1], _MOST_CHANNELS))
        return cls(image_shape=image_shape, levels=levels, class_names=class_names, channels=tuple(channels))

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the configuration that `to_json` was called on.

        Raises:
            KeyError, TypeError, ValueError: `fields` is not such a configuration.
        """
        height, width, channels = (int(size) for size in fields["image_shape"])
        return cls(
            image_shape=(height, width, channels),
            levels=int(fields["levels"]),
            class_names=tuple(str(name) for name in fields["class_names"]),
            channels=tuple(int(width) for width in fields["channels"]),
            num_features=int(fields["num_features"]),
        )


class Classifier(nn.Module):
    """A convolutional network with a penultimate layer of few features.

    Args:
        config: what to build.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        height, width, channels = config.image_shape
        layers: list[nn.Module] = []
        for out_channels in config.channels:
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
            height, width, channels = -(-height // 2), -(-width // 2), out_channels
        self.trunk = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(height * width * channels, config.num_features), nn.ReLU()
        )
        self.head = nn.Linear(config.num_features, len(config.class_names))

    def features(self, x: Tensor) -> Tensor:
        """Returns the penultimate layer, shape `(B, num_features)`, of images `(B, C, H, W)` with pixels in [0, 1]."""
        features: Tensor = self.trunk(x - 0.5)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Returns unnormalised log probabilities of the classes, shape `(B, classes)`, from `features`."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images; see `features`."""
        return self.logits(self.features(x))

    def pixels(self, images: Tensor) -> Tensor:
        """Returns uint8 grey levels as what the classifier takes: the middle of each level's cell in [0, 1]."""
        return (images.float() + 0.5) / self.config.levels


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Writes the classifier's two files into an existing folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(classifier.config.to_json(), indent=2) + "\n")


def load_classifier(folder: Path) -> Classifier:
    """Reads a classifier that `save_classifier` wrote; it is returned in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: a file is damaged, or the weights do not fit the configuration.
    """
    try:
        config = ClassifierConfig.from_json(json.loads((folder / CONFIG_FILE).read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{CONFIG_FILE} is not a classifier's configuration ({type(error).__name__}: {error}); train it again"
        ) from error
    classifier = Classifier(config)
    try:
        classifier.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{WEIGHTS_FILE} does not hold the weights of {CONFIG_FILE} ({reason}); train it again"
        ) from error
    return classifier.eval()


def classifier_name(dataset_name: str) -> str:
    """Returns the name under which classifiers of a data set are registered."""
    return f"infusion-classifier-{dataset_name}"


def register(
    classifier: Classifier, manifest: Manifest, run: TrackedRun, accuracies: Mapping[str, float]
) -> RegisteredModel:
    """Registers a classifier as the newest version of its data set's, and as `champion` if none is better.

    Better is a champion of the same data with a higher validation accuracy.

    Args:
        classifier: that was trained.
        manifest: of the data set that it was trained on.
        run: the run that trained it; the files go to its artifacts.
        accuracies: `valid/accuracy`, and others that are to be noted with it.
    """
    name = classifier_name(manifest.name)
    tags = {
        "dataset_fingerprint": manifest.origin.fingerprint,
        "classes": str(len(classifier.config.class_names)),
        **{metric: str(value) for metric, value in accuracies.items()},
    }
    with tempfile.TemporaryDirectory() as temporary, mlflow_errors(f"log the files of {name}"):
        save_classifier(classifier, Path(temporary))
        MlflowClient().log_artifacts(run.run_id, temporary, _ARTIFACT)
    registered = registry.create_version(name, run, _ARTIFACT, tags)
    champion = registry.find_alias(name, registry.CHAMPION)
    same_data = champion is not None and champion.tags.get("dataset_fingerprint") == tags["dataset_fingerprint"]
    if champion is None or not same_data or float(champion.tags["valid/accuracy"]) <= accuracies["valid/accuracy"]:
        registry.set_alias(registered, registry.CHAMPION)
    return registered


def load(registered: RegisteredModel) -> Classifier:
    """Downloads a registered classifier and returns it, in evaluation mode.

    Raises:
        UserError: it is something else than a classifier, or its files are damaged or cannot be had.
    """
    with tempfile.TemporaryDirectory() as temporary, mlflow_errors(f"download {registered.uri}"):
        folder = Path(download_artifacts(artifact_uri=registered.uri, dst_path=temporary))
        try:
            return load_classifier(folder)
        except FileNotFoundError as error:
            raise UserError(
                f"{registered.uri} is not a classifier; train one with `python -m jobs.train_classifier DATASET`"
            ) from error
        except UserError as error:
            raise UserError(f"{registered.uri}: {error}") from error


def check_fit(classifier: Classifier, registered: RegisteredModel, dataset: str, manifest: Manifest) -> None:
    """Checks that a classifier was trained on a data set: only then do its features mean something there.

    Raises:
        UserError: image shape, grey levels, classes or the data differ.
    """
    config = classifier.config
    for what, ours, theirs in (
        ("images of shape", _by(manifest.image_shape), _by(config.image_shape)),
        ("grey levels:", manifest.levels, config.levels),
        ("labels", _names(manifest.class_names), _names(config.class_names)),
        ("the data of fingerprint", manifest.origin.fingerprint, registered.tags.get("dataset_fingerprint")),
    ):
        if ours != theirs:
            raise UserError(
                f"{dataset} has {what} {ours}, but classifier {registered.uri} is for {theirs}; "
                f"train one with `python -m jobs.train_classifier {dataset}`"
            )


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _names(class_names: tuple[str, ...] | None) -> str:
    return "none" if class_names is None else ", ".join(class_names)
