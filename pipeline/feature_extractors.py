"""What samples are judged by: features and class predictions of images, from a registered classifier or Inception v3.

Scores of a classifier are named after it, for they cannot be compared with those of Inception v3. Nor are scores of
torchvision's Inception v3 exactly those of the paper, which took the weights that came with TensorFlow in 2015.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3

from pipeline import classifier, registry, storage
from pipeline.classifier import Classifier
from pipeline.errors import UserError
from pipeline.manifest import Manifest

INCEPTION = "inception"
INCEPTION_SIDE = 299

# Images at a time, which bounds memory; Inception v3 needs some 10 MB for each.
CLASSIFIER_BATCH = 500
INCEPTION_BATCH = 50


@dataclass(frozen=True)
class ScoreNames:
    """What scores are called that rest on certain features; the fields are those of `sample_scores.Scores`."""

    score: str
    frechet_distance: str
    kernel_distance: str
    precision: str
    recall: str


CLASSIFIER_NAMES = ScoreNames(
    score="classifier score",
    frechet_distance="classifier Fréchet distance",
    kernel_distance="classifier kernel distance",
    precision="classifier precision",
    recall="classifier recall",
)
INCEPTION_NAMES = ScoreNames(
    score="Inception score",
    frechet_distance="FID",
    kernel_distance="KID",
    precision="Inception precision",
    recall="Inception recall",
)


class FeatureExtractor(Protocol):
    """Features and class predictions of images.

    Attributes:
        names: what scores of these features are called.
        description: which network, with which weights.
    """

    names: ScoreNames
    description: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features `(B, F)` and logits `(B, K)` of uint8 images `(B, C, H, W)`, float32 on the CPU."""
        ...


class ClassifierFeatures:
    """The penultimate layer and the predictions of a classifier."""

    names = CLASSIFIER_NAMES

    def __init__(self, network: Classifier, description: str) -> None:
        self.network = network
        self.description = description

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureExtractor`."""
        device = self.network.head.weight.device
        parts = [self.network.features(self.network.pixels(part.to(device))) for part in images.split(CLASSIFIER_BATCH)]
        features = torch.cat(parts)
        return features.cpu(), self.network.logits(features).cpu()


class InceptionFeatures:
    """The 2,048 pooled features of torchvision's Inception v3, and its predictions.

    Images are resized to 299 × 299 pixels bilinearly, and grey ones are given three equal channels.

    Args:
        weights: state dictionary of torchvision's `inception_v3`.
        levels: number of grey levels of the images; the first is black, the last white.
        description: which weights they are.
        device: where to compute.
    """

    names = INCEPTION_NAMES

    def __init__(
        self, weights: Mapping[str, Tensor], levels: int, description: str, device: torch.device | str = "cpu"
    ) -> None:
        # The auxiliary head serves training alone.
        trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("AuxLogits.")}
        network = inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=len(weights["fc.bias"]))
        network.load_state_dict(trunk)
        self._head: nn.Module = network.fc.to(device)
        network.fc = nn.Identity()
        self._trunk: nn.Module = network.eval().to(device)
        self._levels = levels
        self._device = device
        self.description = description

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureExtractor`."""
        features = torch.cat([self._trunk(self._prepared(part)) for part in images.split(INCEPTION_BATCH)])
        return features.cpu(), self._head(features).cpu()

    def _prepared(self, images: Tensor) -> Tensor:
        """Returns what the network was trained on: three channels, 299 × 299, black at -1 and white at 1."""
        pixels = images.to(self._device).float() / (self._levels - 1) * 2 - 1
        resized = nn.functional.interpolate(pixels, (INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", antialias=True)
        return resized.expand(-1, 3, -1, -1)


def open_feature_extractor(
    spec: str, dataset: str, manifest: Manifest, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Makes ready what samples of a data set are to be judged by.

    Args:
        spec: `models:/infusion-classifier-…` for a registered classifier; `inception` for Inception v3 with
            torchvision's standard weights, which are downloaded unless they were before; `inception:PATH` for
            Inception v3 with weights from a file on S3 or local, as torchvision's `inception_v3_google-….pth`.
        dataset: address of the staged data set.
        manifest: its manifest.
        device: where to compute.

    Raises:
        UserError: it is none of these, cannot be had, or does not fit the data set.
    """
    if spec.startswith("models:/"):
        registered = registry.find(spec)
        network = classifier.load(registered)
        classifier.check_fit(network, registered, dataset, manifest)
        return ClassifierFeatures(network.to(device), registered.uri)
    kind, _, path = spec.partition(":")
    if kind != INCEPTION or (path == "") != (spec == INCEPTION):
        raise UserError(
            f"{spec!r} names no features; write models:/NAME@ALIAS for a classifier, {INCEPTION} or {INCEPTION}:PATH"
        )
    if manifest.image_shape[2] not in (1, 3):
        raise UserError(
            f"{dataset} has images of {manifest.image_shape[2]} channels, but Inception v3 takes 1 or 3; "
            "use a classifier (`python -m jobs.train_classifier`)"
        )
    weights = _read_weights(path) if path else _standard_weights()
    description = f"Inception v3 with the weights {path or Inception_V3_Weights.IMAGENET1K_V1}"
    try:
        return InceptionFeatures(weights, manifest.levels, description, device)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path or INCEPTION}: not the weights of torchvision's inception_v3: {reason:.200}") from error


def _read_weights(path: str) -> Mapping[str, Tensor]:
    try:
        weights = torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the weights of torchvision's inception_v3") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a file of weights as torch.save writes it") from error
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: not a state dictionary; give the weights of torchvision's inception_v3")
    return weights


def _standard_weights() -> Mapping[str, Tensor]:
    try:
        weights: Mapping[str, Tensor] = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        # A RuntimeError says that the file is not the one that its name promises.
        raise UserError(
            f"cannot download {Inception_V3_Weights.IMAGENET1K_V1.url} ({error}); "
            f"name a file that holds these weights with {INCEPTION}:PATH"
        ) from error
    return weights
