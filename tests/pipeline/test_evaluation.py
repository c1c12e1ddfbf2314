"""Evaluation of registered models whose exact log-likelihood is known, on a real MLflow server."""

import dataclasses
import math
import uuid

import pytest
import torch
from mlflow import MlflowClient

from infusion_core.model import InfusionModel, ModelConfig
from pipeline import model_package, registry, tracking
from pipeline.bound_evaluation import chunk_share, load_chunks, sum_log_prob
from pipeline.errors import UserError
from pipeline.evaluation import BASELINE_FLOORS, baseline_floor, evaluate
from pipeline.manifest import Manifest
from pipeline.training import training_gaussian

Digits = tuple[str, Manifest]
CONFIG = ModelConfig(
    image_shape=(8, 8, 1), levels=17, num_steps=2, hidden_sizes=(8,), rate_increment=0.1, variance_floor=0.01
)


def register_constant(dataset: Digits, config: ModelConfig = CONFIG) -> registry.RegisteredModel:
    """Registers an operator that ignores its input: it gives every pixel mean ½ and variance β / 2 + ε."""
    _, manifest = dataset
    model = InfusionModel(config, training_gaussian(manifest))
    with torch.no_grad():
        model.operator.head.weight.zero_()
        model.operator.head.bias.zero_()
    tags = {
        "valid/lower_bound": "-1000",
        "variance_floor": str(config.variance_floor),
        "dataset_fingerprint": manifest.origin.fingerprint,
        "best_epoch": "7",
    }
    name = f"infusion-{uuid.uuid4().hex[:8]}"
    with tracking.owned_run("tests", name, params={}, tags={}) as run:
        return model_package.register(model.eval(), name, run, tags)


@pytest.mark.usefixtures("client_env")
class TestEvaluate:
    def test_a_constant_operator_without_infusion_scores_its_gaussian(self, digits: Digits) -> None:
        dataset, manifest = digits
        config = dataclasses.replace(CONFIG, rate_increment=0.0)
        registered = register_constant(digits, config)
        result = evaluate(registered.uri, dataset)
        # The moments of dequantised pixels give the mean log-likelihood, but for the noise's own sampling error.
        variance = 0.1 / 2 + 0.01
        squares = 0.0
        for _, images in load_chunks(dataset, manifest, "test", chunk_share(manifest.rows("test"), 0, 1)):
            grey = images.double()
            squares += float((((grey + 0.5) / 17 - 0.5).square() + 1 / (12 * 17**2)).sum())
        exact = -0.5 * (squares / 250 / variance + 64 * math.log(2 * math.pi * variance))
        assert result.images == 250
        assert result.lower_bound == pytest.approx(exact, abs=0.5)
        assert result.bits_per_dimension == pytest.approx(math.log2(17) - result.lower_bound / 64 / math.log(2))
        assert result.variance_floor == 0.01

    def test_figures_of_the_own_test_split_are_the_runs(self, digits: Digits) -> None:
        registered = register_constant(digits)
        result = evaluate(registered.uri, digits[0])
        (point,) = MlflowClient().get_metric_history(registered.run_id, "test/lower_bound")
        assert (point.step, point.value) == (7, pytest.approx(result.lower_bound))
        assert float(registry.find(registered.uri).tags["test/lower_bound"]) == result.lower_bound

    def test_other_splits_and_data_leave_alone_what_decides_on_promotion(self, digits: Digits) -> None:
        registered = register_constant(digits)
        evaluate(registered.uri, digits[0], split="valid")
        tags = registry.find(registered.uri).tags
        assert tags["valid/lower_bound"] == "-1000"
        assert "evaluation/digits/valid/lower_bound" in tags
        assert MlflowClient().get_metric_history(registered.run_id, "valid/lower_bound") == []

    def test_images_of_another_kind_are_refused(self, digits: Digits) -> None:
        for change, message in (
            ({"image_shape": (4, 4, 1)}, r"8 × 8 × 1 .*but the model is for 4 × 4 × 1"),
            ({"levels": 256}, r"17 grey levels, but the model is for 256"),
        ):
            model = InfusionModel(dataclasses.replace(CONFIG, **change))
            name = f"infusion-{uuid.uuid4().hex[:8]}"
            with tracking.owned_run("tests", name, params={}, tags={}) as run:
                registered = model_package.register(model, name, run, {})
            with pytest.raises(UserError, match=message):
                evaluate(registered.uri, digits[0])


def test_the_baselines_floor_is_the_best_on_validation(digits: Digits) -> None:
    dataset, manifest = digits
    chunks = list(load_chunks(dataset, manifest, "valid", chunk_share(manifest.rows("valid"), 0, 1)))
    scores = {f: sum_log_prob(training_gaussian(manifest, f), chunks, 17, seed=1).mean for f in BASELINE_FLOORS}
    assert scores[baseline_floor(dataset, manifest, seed=1)] == max(scores.values())
