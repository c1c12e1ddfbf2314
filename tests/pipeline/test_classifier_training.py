"""Training of the classifier, on the digits and with a real MLflow server."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from sklearn.linear_model import RidgeClassifier

from pipeline import classifier, registry
from pipeline.classifier import Classifier
from pipeline.classifier_training import (
    ClassifierTrainConfig,
    LabelledImages,
    accuracy,
    fit,
    load_labelled,
    new_classifier,
    train_classifier,
)
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.progress import Progress
from pipeline.sources import ArraySource, Rows
from pipeline.staging import stage

Digits = tuple[str, Manifest]


def quiet(total: int | None = None) -> Progress:
    return Progress("train", total, "images", stream=io.StringIO())


def trained(digits: Digits, config: ClassifierTrainConfig, images: int | None = None) -> tuple[Classifier, list[float]]:
    dataset, manifest = digits
    train = load_labelled(dataset, manifest)["train"]
    network = new_classifier(manifest, config.seed)
    losses = list(fit(network, LabelledImages(train.images[:images], train.labels[:images]), config, quiet()))
    return network, losses


def test_it_names_digits_better_than_a_linear_model(digits: Digits) -> None:
    network, losses = trained(digits, ClassifierTrainConfig())
    splits = load_labelled(*digits)
    train, test = splits["train"], splits["test"]
    linear = RidgeClassifier().fit(train.images.flatten(1).numpy(), train.labels.numpy())
    assert accuracy(network, test) > linear.score(test.images.flatten(1).numpy(), test.labels.numpy()) > 0.9
    assert losses[-1] < 0.1 * losses[0]


def test_accuracy_is_that_of_images_named_one_by_one(digits: Digits) -> None:
    network, _ = trained(digits, ClassifierTrainConfig(epochs=1))
    train = load_labelled(*digits)["train"]
    some = LabelledImages(train.images[:601], train.labels[:601])
    found = accuracy(network, some)
    with torch.no_grad():
        right = [
            int(network((image[None].float() + 0.5) / 17).argmax()) == label
            for image, label in zip(some.images, some.labels.tolist(), strict=True)
        ]
    assert found == sum(right) / 601
    assert 0.2 < found < 1


def test_an_epochs_loss_is_the_mean_over_all_images(digits: Digits) -> None:
    dataset, manifest = digits
    train = load_labelled(dataset, manifest)["train"]
    # All images make one batch: the first epoch's loss is that of the initial network, whatever their order.
    _, losses = trained(digits, ClassifierTrainConfig(epochs=1, batch=2000))
    network = new_classifier(manifest, 0).train()
    log_probability = network((train.images.float() + 0.5) / 17).double().log_softmax(1)
    assert losses[0] == pytest.approx(-log_probability.gather(1, train.labels[:, None]).mean().item(), rel=1e-5)


def test_every_image_is_seen_once_an_epoch(digits: Digits) -> None:
    dataset, manifest = digits
    train = load_labelled(dataset, manifest)["train"]
    progress = quiet()
    seen: list[torch.Tensor] = []
    network = new_classifier(manifest, 0)
    network.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in fit(network, train, ClassifierTrainConfig(epochs=2, batch=100), progress):
        pass
    assert progress.done == 2 * len(train.labels)
    # 1,297 images make 13 batches of at most 100, none of them small.
    assert {len(batch) for batch in seen} == {99, 100}
    epochs = [torch.cat(seen[:13]), torch.cat(seen[13:])]
    assert not torch.equal(*epochs)
    everything = ((train.images.double() + 0.5) / 17 - 0.5).flatten(1).sort(0).values
    for epoch in epochs:
        assert torch.allclose(epoch.double().flatten(1).sort(0).values, everything, atol=1e-6)


def test_the_seed_determines_the_weights(digits: Digits) -> None:
    weights = []
    for seed, disturbance in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(disturbance)
        weights.append(trained(digits, ClassifierTrainConfig(epochs=1, seed=seed), images=300)[0].state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch": 1}, {"seed": -1}, {"learning_rate": 0.0}])
def test_settings_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(change))} must be"):
        ClassifierTrainConfig(**change)  # type: ignore[arg-type]


@pytest.mark.usefixtures("client_env")
def test_a_trained_classifier_is_registered_with_its_accuracies(digits: Digits) -> None:
    dataset, manifest = digits
    result = train_classifier(dataset, ClassifierTrainConfig(epochs=2, seed=5))
    registered = registry.find(result.classifier)
    assert registry.find("models:/infusion-classifier-digits@champion").uri == result.champion
    assert registered.tags["dataset_fingerprint"] == manifest.origin.fingerprint
    assert registered.tags["classes"] == "10" == str(result.classes)
    loaded, splits = classifier.load(registered), load_labelled(dataset, manifest)
    assert result.valid_accuracy == accuracy(loaded, splits["valid"]) == float(registered.tags["valid/accuracy"])
    assert result.test_accuracy == accuracy(loaded, splits["test"]) == float(registered.tags["test/accuracy"])
    assert result.train_images == 1297
    client = MlflowClient()
    history = client.get_metric_history(registered.run_id, "valid/accuracy")
    assert [point.step for point in history] == [1, 2]
    assert history[-1].value == result.valid_accuracy
    run = client.get_run(registered.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["channels"] == "(32,)"
    assert run.data.params["seed"] == "5"
    assert run.info.run_id in result.mlflow_run


class TestLabels:
    def staged(self, folder: Path, labels: dict[str, int], class_names: list[str] | None) -> Digits:
        """Stages eight images in every split that has a label."""
        images = np.zeros((8, 4, 4, 1), np.uint8)
        rows = {
            split: Rows(images if split in labels else images[:0], np.full(8 if split in labels else 0, label))
            for split, label in {"train": 0, "valid": 0, "test": 0, **labels}.items()
        }
        stage(ArraySource("some", rows, class_names=class_names), str(folder / "some"))
        return str(folder / "some"), Manifest.load(str(folder / "some"))

    def test_a_data_set_without_labels(self, tmp_path: Path) -> None:
        data = self.staged(tmp_path, {"train": -1, "valid": -1, "test": -1}, None)
        with pytest.raises(UserError, match=rf"{data[0]} has no labels"):
            load_labelled(*data)

    def test_one_class_alone(self, digits: Digits) -> None:
        dataset, manifest = digits
        with pytest.raises(UserError, match="one class alone, 'cat'"):
            load_labelled(dataset, dataclasses.replace(manifest, class_names=("cat",)))

    def test_a_split_without_labels(self, tmp_path: Path) -> None:
        data = self.staged(tmp_path, {"train": 0, "valid": 1, "test": -1}, ["a", "b"])
        with pytest.raises(UserError, match="images of the test split have no label"):
            load_labelled(*data)

    def test_splits_without_images(self, digits: Digits) -> None:
        dataset, manifest = digits
        without_test = dataclasses.replace(manifest, splits={**manifest.splits, "test": ()})
        assert list(load_labelled(dataset, without_test)) == ["train", "valid"]
        without_valid = dataclasses.replace(manifest, splits={**manifest.splits, "valid": ()})
        with pytest.raises(UserError, match="no images in its valid split"):
            load_labelled(dataset, without_valid)
