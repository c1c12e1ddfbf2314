"""Evaluation of registered models whose exact log-likelihood is known, on a real MLflow server."""

import dataclasses
import math
import uuid
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch.distributions import Normal

from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.noise import GeneratorNoise, derive_seed
from infusion_core.pixels import dequantise
from pipeline import model_package, registry, tracking
from pipeline.bound_evaluation import chunk_share, load_chunks, sum_log_prob
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.judges import BASELINE_FLOORS, JudgeConfig
from pipeline.manifest import Manifest
from pipeline.measurements import EvaluationRecord, record_path
from pipeline.shards import load_rows
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
        evaluate(registered.uri, digits[0], config=JudgeConfig(split="valid"))
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


@pytest.mark.usefixtures("client_env")
class TestJudges:
    """A model that ignores its input is a known Gaussian, whatever is infused."""

    WIDE = dataclasses.replace(CONFIG, num_steps=3, target_variance=0.05)

    def exact(self, digits: Digits, images: int, seed: int = 0) -> torch.Tensor:
        """The log-likelihoods of the first test images, dequantised with the evaluation's noise."""
        (_, chunk), *_ = load_chunks(*digits, "test", range(1))
        noise = GeneratorNoise.from_seed(derive_seed((seed, 2)), 0)
        x = dequantise(chunk[:images], 17, noise).double().flatten(1)
        return Normal(0.5, math.sqrt(0.1 / 2 + 0.01)).log_prob(x).sum(1)

    def test_importance_sampling_and_annealing_close_the_bounds_gap(self, digits: Digits) -> None:
        registered = register_constant(digits, self.WIDE)
        judges = ["importance_sampling", "annealed_importance_sampling"]
        config = JudgeConfig(images=40, num_chains=(1, 10, 400), num_temperatures=40)
        result = evaluate(registered.uri, digits[0], judges, config)
        figures = {judge: found["value"] for judge, found in result.measurements.items()}
        exact = float(self.exact(digits, 40).mean())
        assert {judge: result.measurements[judge]["of"] for judge in judges} == dict.fromkeys(judges, 40)
        assert result.images == 250
        assert figures["lower_bound"] < float(self.exact(digits, 250).mean()) - 1
        assert exact - 0.6 < figures["importance_sampling"] < exact + 0.2
        assert curve_of(registered)[0][1] + 2 < figures["annealed_importance_sampling"] < exact + 0.2
        record, curve = read_record(registered, "test"), curve_of(registered)
        assert [k for k, *_ in curve] == [1, 10, 400]
        estimates = [estimate for _, estimate, _ in curve]
        assert estimates == sorted(estimates)
        sizes = [size for *_, size in curve]
        assert sizes[0] == pytest.approx(1)
        assert 1 < sizes[1] < sizes[2] < 400
        averaged, bound = (record.measurement(name) for name in ("component_averaged_bound", "lower_bound"))
        assert averaged.value == pytest.approx(bound.value, abs=1.5)

    def test_isotropic_output_has_the_variance_that_suits_validation_best(self, digits: Digits) -> None:
        dataset, manifest = digits
        registered = register_constant(digits, self.WIDE)
        config = JudgeConfig(images=30, num_chains=(1, 50))
        evaluate(registered.uri, dataset, ["isotropic"], config)
        record = read_record(registered, "test")
        bound = record.measurement("isotropic_lower_bound")
        # E (x - ½)² of dequantised validation pixels, from their grey levels.
        total = 0.0
        for _, images in load_chunks(dataset, manifest, "valid", range(1)):
            total = float((((images.double() + 0.5) / 17 - 0.5).square() + 1 / (12 * 17**2)).mean())
        assert bound.details["output_variance"] == pytest.approx(total, rel=2e-3)
        estimate = record.measurement("isotropic_importance_sampling")
        assert estimate.details["output_variance"] == bound.details["output_variance"]
        assert estimate.value > bound.value

    def test_table_2_is_repeated_with_new_noise(self, digits: Digits) -> None:
        registered = register_constant(digits, self.WIDE)
        evaluate(registered.uri, digits[0], ["table_2"], JudgeConfig(num_chains=(1, 20), repetitions=3))
        measured = read_record(registered, "test").measurement("table_2")
        rows = {(row["estimate"], row["split"]): row for row in measured.details["rows"]}
        assert len(rows) == 8
        assert {row["images"] for row in rows.values()} == {250, 100}
        for split in ("train", "test"):
            for prefix in ("", "isotropic_"):
                bound = rows[prefix + "lower_bound", split]
                estimate = rows[prefix + "importance_sampling", split]
                assert bound["mean"] + 1 < estimate["mean"]
                # The deviation is that of the mean over images: what new noise changes, no more.
                assert all(0 < row["deviation"] < 1 for row in (bound, estimate))
        assert measured.value == rows["isotropic_importance_sampling", "test"]["mean"]
        exact = float(self.exact(digits, 250).mean())
        assert rows["importance_sampling", "test"]["mean"] < exact + 0.2

    def test_parzen_estimate_is_that_of_the_models_samples(self, digits: Digits) -> None:
        # Means of the last step are ½ everywhere: one Gaussian of the given bandwidth.
        registered = register_constant(digits)
        config = JudgeConfig(images=20, num_samples=10, bandwidth=0.3)
        result = evaluate(registered.uri, digits[0], ["parzen"], config)
        noise = GeneratorNoise.from_seed(derive_seed((0, 2)))
        x = dequantise(load_rows(*digits, "test", 0, 20), 17, noise).double()
        known = float(Normal(0.5, 0.3).log_prob(x).flatten(1).sum(1).mean())
        assert result.measurements["parzen"]["value"] == pytest.approx(known, abs=1e-3)
        evaluate(registered.uri, digits[0], ["parzen"], dataclasses.replace(config, bandwidth=None))
        details = read_record(registered, "test").measurement("parzen").details
        assert details["bandwidth_chosen_on"] == "valid"
        # The best σ of one Gaussian at ½ is the root of the mean squared distance, 0.40.
        assert details["bandwidth"] == 0.4

    def test_baseline_has_the_floor_that_is_best_on_validation(self, digits: Digits) -> None:
        dataset, manifest = digits
        registered = register_constant(digits)
        result = evaluate(registered.uri, dataset)
        seed = derive_seed((0, 2))

        def score(split: str, floor: float) -> float:
            chunks = load_chunks(dataset, manifest, split, chunk_share(250, 0, 1))
            return sum_log_prob(training_gaussian(manifest, floor), chunks, 17, seed).mean

        scores = {floor: score("valid", floor) for floor in BASELINE_FLOORS}
        assert scores[result.baseline_variance_floor] == max(scores.values())
        assert result.baseline_log_likelihood == score("test", result.baseline_variance_floor)
        assert result.baseline_at_model_floor == score("test", CONFIG.variance_floor)

    def test_record_keeps_what_was_not_measured_again(self, digits: Digits) -> None:
        registered = register_constant(digits)
        evaluate(registered.uri, digits[0], ["parzen"], JudgeConfig(num_samples=3, bandwidth=0.3, images=5))
        before = read_record(registered, "test")
        evaluate(registered.uri, digits[0], config=JudgeConfig(seed=1))
        after = read_record(registered, "test")
        assert after.measurement("parzen") == before.measurement("parzen")
        assert (after.measurement("parzen").images, after.measurement("parzen").seed) == (5, 0)
        for judge in ("lower_bound", "gaussian"):
            assert (after.measurement(judge).images, after.measurement(judge).seed) == (250, 1)
            assert after.measurement(judge).value != before.measurement(judge).value

    def test_what_cannot_be_judged_is_refused(self, digits: Digits) -> None:
        registered = register_constant(digits)
        with pytest.raises(UserError, match="no judge 'fid'; choose of importance_sampling"):
            evaluate(registered.uri, digits[0], ["fid"])
        with pytest.raises(UserError, match="give --features"):
            evaluate(registered.uri, digits[0], ["sample_scores"])


def curve_of(registered: registry.RegisteredModel) -> list[list[float]]:
    curve: list[list[float]] = read_record(registered, "test").measurement("importance_sampling").details["curve"]
    return curve


def read_record(registered: registry.RegisteredModel, split: str) -> EvaluationRecord:
    path = record_path("digits", split)
    content = tracking.TrackedRun.of(registered.run_id).read_file(path)
    assert content is not None
    return EvaluationRecord.from_json(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chains": (0, 10)}, "num_chains must be .* not 0,10"),
        ({"num_chains": (10, 10)}, "num_chains must be .* not 10,10"),
        ({"num_chains": ()}, "num_chains"),
        ({"images": 0}, "images must be at least 1, not 0"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"repetitions": 1}, "repetitions must be at least 2"),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"split": "dev"}, "no split 'dev'"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JudgeConfig(**change)
