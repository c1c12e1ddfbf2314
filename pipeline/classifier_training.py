"""Training of the classifier that judges samples, on the labels of a staged data set."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn

from infusion_core.noise import derive_seed
from pipeline import registry, storage, tracking
from pipeline.classifier import Classifier, ClassifierConfig, classifier_name, register
from pipeline.devices import local_device
from pipeline.errors import UserError
from pipeline.manifest import SPLITS, Manifest
from pipeline.progress import Progress
from pipeline.shards import load_labels, load_rows

EVALUATION_BATCH = 500


class _Stream(IntEnum):
    """What a random stream is for; each purpose draws from a stream of its own."""

    WEIGHTS = 0
    ORDER = 1


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainConfig:
    """How a classifier is trained; its network follows from the data set.

    Attributes:
        epochs: passes over the training split.
        batch: most images per step.
        learning_rate: of Adam at first; it falls to 0 along a cosine.
        seed: of initial weights and order of images.

    Raises:
        UserError: a value is out of range.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, not {self.learning_rate}")


@dataclass(frozen=True)
class ClassifierResult:
    """What a training made, and where it is.

    Attributes:
        classifier: address of the registered classifier.
        champion: the version that samples are to be judged with; an earlier one where that is better.
        dataset: the data set.
        classes: how many there are.
        train_images: how many it was trained on.
        valid_accuracy: share of the validation images that it names rightly.
        test_accuracy: share of the test images; nothing if there are none.
        mlflow_run: the run in the browser.
    """

    classifier: str
    champion: str
    dataset: str
    classes: int
    train_images: int
    valid_accuracy: float
    test_accuracy: float | None
    mlflow_run: str


@dataclass(frozen=True)
class LabelledImages:
    """Images and the numbers of their classes.

    Attributes:
        images: uint8 grey levels, shape `(N, C, H, W)`.
        labels: int64 class numbers, shape `(N,)`.
    """

    images: Tensor
    labels: Tensor


def train_classifier(
    dataset: str, config: ClassifierTrainConfig | None = None, *, use_gpu: bool = False
) -> ClassifierResult:
    """Trains a classifier on a data set's labels and registers it (`pipeline.classifier.register`).

    The splits are held in memory. On a CPU the weights are determined by data, configuration and number of threads.

    Args:
        dataset: address of the staged data set.
        config: how to train; the defaults if not given.
        use_gpu: compute on this process's GPU.

    Raises:
        UserError: the data set cannot be had or has no labels, or MLflow does not answer.
    """
    config = config or ClassifierTrainConfig()
    storage.check_reachable(dataset)
    tracking.check_reachable()
    manifest = Manifest.load(dataset)
    splits = load_labelled(dataset, manifest)
    classifier = new_classifier(manifest, config.seed).to(local_device(use_gpu))
    name = classifier_name(manifest.name)
    params = {**asdict(config), **classifier.config.to_json(), "dataset": dataset}
    with tracking.owned_run(
        name,
        f"seed-{config.seed}",
        params={**params, "dataset_fingerprint": manifest.origin.fingerprint},
        tags={"mlflow.source.git.commit": tracking.git_commit(), "mlflow.source.name": "jobs.train_classifier"},
    ) as run:
        train = splits.pop("train")
        with Progress("train classifier", config.epochs * len(train.labels), "images") as progress:
            for epoch, loss in enumerate(fit(classifier, train, config, progress), 1):
                figures = {"train/cross_entropy": loss, "valid/accuracy": accuracy(classifier, splits["valid"])}
                run.log_metrics([(epoch, figures)])
        accuracies = {f"{split}/accuracy": accuracy(classifier, labelled) for split, labelled in splits.items()}
        run.log_metrics([(config.epochs, {name: accuracies[name] for name in accuracies if name != "valid/accuracy"})])
        registered = register(classifier, manifest, run, accuracies)
    return ClassifierResult(
        classifier=registered.uri,
        champion=registry.find(f"models:/{name}@{registry.CHAMPION}").uri,
        dataset=dataset,
        classes=len(classifier.config.class_names),
        train_images=len(train.labels),
        valid_accuracy=accuracies["valid/accuracy"],
        test_accuracy=accuracies.get("test/accuracy"),
        mlflow_run=run.uri,
    )


def load_labelled(dataset: str, manifest: Manifest) -> dict[str, LabelledImages]:
    """Reads all splits that have images, with their labels.

    Raises:
        UserError: there are no labels, fewer than two classes, or no images to train on or to validate with.
    """
    if manifest.class_names is None:
        raise UserError(f"{dataset} has no labels, from which a classifier would learn; use a data set with labels")
    if len(manifest.class_names) < 2:
        raise UserError(f"{dataset} has one class alone, {manifest.class_names[0]!r}; a classifier needs two or more")
    rows = {split: manifest.rows(split) for split in SPLITS}
    for split in ("train", "valid"):
        if rows[split] == 0:
            raise UserError(f"{dataset} has no images in its {split} split; stage it with some")
    return {
        split: LabelledImages(
            load_rows(dataset, manifest, split, 0, count), load_labels(dataset, manifest, split, 0, count)
        )
        for split, count in rows.items()
        if count
    }


def new_classifier(manifest: Manifest, seed: int) -> Classifier:
    """Builds a classifier for a data set with labels, with initial weights that the seed determines."""
    config = ClassifierConfig.for_images(manifest.image_shape, manifest.levels, manifest.class_names or ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed((seed, _Stream.WEIGHTS)))
        return Classifier(config)


def fit(
    classifier: Classifier, train: LabelledImages, config: ClassifierTrainConfig, progress: Progress
) -> Iterator[float]:
    """Trains a classifier; yields the mean cross entropy of each epoch, in nats per image."""
    device = classifier.head.weight.device
    # Batches of equal size: a small last one would have odd moments for batch normalisation.
    steps = math.ceil(len(train.labels) / config.batch)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=config.learning_rate)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    for epoch in range(1, config.epochs + 1):
        generator = torch.Generator().manual_seed(derive_seed((config.seed, _Stream.ORDER, epoch)))
        order = torch.randperm(len(train.labels), generator=generator)
        classifier.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for rows in order.tensor_split(steps):
            logits = classifier(classifier.pixels(train.images[rows].to(device)))
            loss = nn.functional.cross_entropy(logits, train.labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            total += loss.detach() * len(rows)
            progress.advance(len(rows), f"epoch {epoch}")
        yield total.item() / len(train.labels)


@torch.no_grad()
def accuracy(classifier: Classifier, labelled: LabelledImages) -> float:
    """Returns the share of images that a classifier, in evaluation mode hereafter, names rightly."""
    classifier.eval()
    device = classifier.head.weight.device
    right = 0
    for images, labels in zip(
        labelled.images.split(EVALUATION_BATCH), labelled.labels.split(EVALUATION_BATCH), strict=True
    ):
        named = classifier(classifier.pixels(images.to(device))).argmax(1)
        right += int((named == labels.to(device)).sum())
    return right / len(labelled.labels)
