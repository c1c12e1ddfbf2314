"""The bare loop: two workers against one, a run resumed against one that was not, and bounds that add up."""

import copy
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributions import Independent, Normal

from infusion_core.bound import log_weight
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig, Network, save_model
from infusion_core.noise import ConcatenatedNoise, GeneratorNoise
from infusion_core.objective import OBJECTIVES, ObjectiveName
from infusion_core.pixels import dequantise
from infusion_core.sampling import sample_batches
from pipeline.bound_evaluation import BoundSums, chunk_share, load_chunks, sum_bound, sum_log_prob
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.shards import load_rows
from pipeline.training import TrainConfig, Training, Worker, training_gaussian

Digits = tuple[str, Manifest]

CONFIG = TrainConfig(
    model=ModelConfig(
        image_shape=(8, 8, 1),
        levels=17,
        num_steps=3,
        rate_increment=0.1,
        hidden_sizes=(32, 32),
        variance_floor=1e-3,
    ),
    epochs=4,
    global_batch=128,
    validate_every=2,
    seed=7,
)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")


def tensors_of(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def without_rates(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if not k.startswith("throughput/")} for epoch in history]


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(digits: Digits, tmp_path: Path) -> None:
    whole = Training(CONFIG, *digits)
    list(whole.epochs())

    first = Training(CONFIG, *digits)
    for report in first.epochs():
        if report.epoch == 2:
            break
    first.save(tmp_path)
    second = Training(CONFIG, *digits)
    second.restore(tmp_path)
    assert second.epoch == 2
    assert [report.epoch for report in second.epochs()] == [3, 4]

    assert without_rates(second.history) == without_rates(whole.history)
    assert second.best_bound == whole.best_bound
    for name, tensor in tensors_of(whole).items():
        assert torch.equal(tensor, tensors_of(second)[name]), name
    bounds = whole.finish(), second.finish()
    assert bounds[0].mean == bounds[1].mean


def test_training_raises_the_bound_of_the_best_model(digits: Digits) -> None:
    config = dataclasses.replace(CONFIG, epochs=12, validate_every=1)
    training = Training(config, *digits)
    bounds = [report.metrics["valid/lower_bound"] for report in training.epochs()]
    assert bounds[-1] > bounds[0] + 10
    assert training.best_bound == max(bounds)
    assert training.best_epoch == bounds.index(max(bounds)) + 1


@pytest.mark.parametrize("objective", ["lower_bound", "reparametrised_lower_bound"])
def test_a_run_that_begins_with_denoising_goes_on_with_the_bound(digits: Digits, objective: ObjectiveName) -> None:
    config = dataclasses.replace(CONFIG, objective=objective, denoising_epochs=2)
    images = load_rows(digits[0], digits[1], "train", 0, 128)
    for epoch, name in ((1, "denoising"), (2, "denoising"), (3, objective)):
        training = Training(config, *digits)
        training.epoch = epoch
        training.model.train()
        noise, model = GeneratorNoise.from_seed(0), copy.deepcopy(training.model)
        target = dequantise(images, 17, noise)
        expected = sum(OBJECTIVES[name](model.prior, model.operator, model.schedule, target, noise))
        expected.backward()
        loss = training.train_step(images, GeneratorNoise.from_seed(0))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        # Adam's first step moves every parameter by the learning rate against the sign of its gradient.
        parameters = zip(training.model.operator.parameters(), model.operator.parameters(), strict=True)
        for after, before in parameters:
            sure = before.grad.abs() > 1e-4 * before.grad.abs().max()
            step = (after - before)[sure].sign()
            assert torch.equal(step, -before.grad[sure].sign())


@needs_compiler
@pytest.mark.parametrize("network", ["mlp", "convolutional"])
def test_compiled_steps_are_the_eager_ones_but_for_rounding(digits: Digits, network: Network) -> None:
    model = dataclasses.replace(CONFIG.model, network=network, hidden_sizes=(16, 8))
    config = dataclasses.replace(CONFIG, model=model, epochs=1)
    eager, compiled = (Training(dataclasses.replace(config, compiled=value), *digits) for value in (False, True))
    before = tensors_of(eager)
    compiled_frames = counters["frames"]["ok"]
    for training in (eager, compiled):
        list(training.epochs())
    assert counters["frames"]["ok"] > compiled_frames
    assert compiled.history[0]["train/objective"] == pytest.approx(eager.history[0]["train/objective"], rel=1e-5)
    for name, tensor in tensors_of(eager).items():
        # As for two workers below: single weights may differ by as much as a step of Adam.
        assert (tensors_of(compiled)[name] - tensor).abs().mean() < 0.01 * config.learning_rate, name
    weight = f"operator.{'linears.0' if network == 'mlp' else 'linear'}.weight"
    assert (before[weight] - tensors_of(eager)[weight]).abs().max() > config.learning_rate


def test_compiling_without_a_compiler_is_refused(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compiled needs a C\+\+ compiler .* no no-such-compiler on .* CXX"):
        Training(dataclasses.replace(CONFIG, compiled=True), *digits)


def worker(rank: int, dataset: str, config: dict, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What one of two processes ends with after a step on its half of each batch."""
    training = Training(TrainConfig.from_json(config), dataset, Manifest.load(dataset), Worker(rank, 2))
    training.model.train()
    for step, images in enumerate(batches):
        training.train_step(images.chunk(2)[rank], GeneratorNoise.from_seed(step, rank))
    return training.model.state_dict()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_two_workers_take_the_steps_of_one(digits: Digits, run_workers, compiled: bool) -> None:
    dataset, manifest = digits
    batches = load_rows(dataset, manifest, "train", 0, 3 * 128).split(128)
    config = dataclasses.replace(CONFIG, compiled=compiled)
    ranks = run_workers(__file__, dataset=dataset, config=config.to_json(), batches=list(batches))

    alone = Training(CONFIG, dataset, manifest)
    alone.model.train()
    before = tensors_of(alone)
    for step, images in enumerate(batches):
        noise = ConcatenatedNoise([GeneratorNoise.from_seed(step, rank) for rank in range(2)])
        alone.train_step(images, noise)
    for name, tensor in tensors_of(alone).items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        # Adam makes a step of about the learning rate of any gradient, even of one that is nothing but rounding: single
        # weights may differ by as much, but not many.
        assert (ranks[0][name] - tensor).abs().mean() < 0.01 * CONFIG.learning_rate, name
    weight = "operator.linears.0.weight"
    assert (before[weight] - tensors_of(alone)[weight]).abs().max() > CONFIG.learning_rate


def test_the_bound_does_not_depend_on_the_number_of_workers(digits: Digits) -> None:
    dataset, manifest = digits
    model = InfusionModel(CONFIG.model, training_gaussian(manifest)).eval()

    def part(rank: int, world_size: int) -> BoundSums:
        chunks = chunk_share(manifest.rows("train"), rank, world_size)
        return sum_bound(model, load_chunks(dataset, manifest, "train", chunks), seed=3)

    whole = part(0, 1)
    parts = sum((part(rank, 4).values for rank in range(4)), torch.zeros(5, dtype=torch.float64))
    assert whole.count == manifest.rows("train")
    # Chunks that go through the network together are not the same ones for one worker and for four.
    torch.testing.assert_close(parts, whole.values, rtol=1e-6, atol=0)
    assert whole.mean == pytest.approx(sum(whole.addends.values()))


def test_the_bound_is_that_of_single_chunks_with_their_own_noise(digits: Digits) -> None:
    dataset, manifest = digits
    model = InfusionModel(CONFIG.model, training_gaussian(manifest)).eval()
    # Six chunks, the last of them smaller: none of the others' images may meet its noise.
    chunks = list(load_chunks(dataset, manifest, "train", chunk_share(manifest.rows("train"), 0, 1)))
    assert len(chunks) > 5
    assert len(chunks[-1][1]) < len(chunks[0][1])
    singly = []
    with torch.no_grad():
        for number, images in chunks:
            noise = GeneratorNoise.from_seed(3, number)
            target = dequantise(images, manifest.levels, noise)
            singly.append(log_weight(model.prior, model.operator, model.schedule, target, noise))
    expected = torch.cat([torch.stack([part.prior, part.transitions, part.reconstruction]) for part in singly], 1)
    sums = sum_bound(model, chunks, seed=3)
    torch.testing.assert_close(sums.values, BoundSums.of(expected).values, rtol=1e-6, atol=0)


def test_the_bounds_standard_error_is_that_of_the_single_values(digits: Digits) -> None:
    dataset, manifest = digits
    gaussian = training_gaussian(manifest, variance_floor=1e-3)
    chunks = list(load_chunks(dataset, manifest, "test", chunk_share(manifest.rows("test"), 0, 1)))
    sums = sum_log_prob(gaussian, chunks, manifest.levels, seed=5)

    values = []
    for number, images in chunks:
        x = dequantise(images, manifest.levels, GeneratorNoise.from_seed(5, number))
        reference = Independent(Normal(gaussian.mean.double(), gaussian.variance.double().sqrt()), 3)
        values.append(reference.log_prob(x.double()))
    exact = torch.cat(values)
    assert sums.count == len(exact) == 250
    assert sums.mean == pytest.approx(exact.mean().item(), rel=1e-5)
    assert sums.standard_error == pytest.approx((exact.std() / len(exact) ** 0.5).item(), rel=1e-4)


def test_the_prior_is_the_training_splits_gaussian(digits: Digits) -> None:
    dataset, manifest = digits
    images = load_rows(dataset, manifest, "train", 0, manifest.rows("train"))
    draws = torch.cat([dequantise(images, 17, GeneratorNoise.from_seed(i)) for i in range(40)])
    expected = FactorialGaussian.fit(draws)
    gaussian = training_gaussian(manifest)
    torch.testing.assert_close(gaussian.mean, expected.mean, rtol=0, atol=5e-4)
    torch.testing.assert_close(gaussian.variance, expected.variance, rtol=0.01, atol=1e-5)


def test_streamed_images_train_as_well(digits: Digits) -> None:
    config = dataclasses.replace(CONFIG, epochs=2)
    training = Training(config, *digits, memory_limit=0)
    assert "streamed" in training.images.placement
    assert "memory" in Training(config, *digits).images.placement
    reports = list(training.epochs())
    assert reports[-1].metrics["train/images_seen"] == 2 * 10 * 128
    assert reports[-1].metrics["valid/lower_bound"] > -1000


def test_parzen_estimates_stand_beside_the_bound_where_pictures_are_due(digits: Digits) -> None:
    config = dataclasses.replace(CONFIG, epochs=6, validate_every=2, figures_every=4, parzen_bandwidth=0.2)
    training = Training(config, *digits)
    estimates = {}
    for report in training.epochs():
        if "valid/parzen" in report.metrics:
            estimates[report.epoch] = report.metrics["valid/parzen"]
    assert sorted(estimates) == [4, 6]
    assert training.history[3]["valid/parzen"] == estimates[4]
    # By brute force, from other samples and with other noise, at the last epoch.
    samples = torch.cat(list(sample_batches(training.model.eval(), 10_000, 1))).clamp(0, 1).double()
    images = load_rows(*digits, "valid", 0, digits[1].rows("valid"))
    examples = dequantise(images, 17, GeneratorNoise.from_seed(1)).double()
    distances = torch.cdist(examples.flatten(1), samples.flatten(1))
    kernels = -distances.square() / (2 * 0.2**2) - 64 * math.log(0.2 * math.sqrt(2 * math.pi))
    assert estimates[6] == pytest.approx((kernels.logsumexp(1) - math.log(10_000)).mean().item(), abs=1.0)
    plain = Training(dataclasses.replace(config, parzen_bandwidth=None), *digits)
    assert all("valid/parzen" not in report.metrics for report in plain.epochs())
    assert torch.equal(
        plain.model.state_dict()["operator.linears.0.weight"], tensors_of(training)["operator.linears.0.weight"]
    )


def test_bfloat16_stays_close_to_float32(digits: Digits) -> None:
    bounds = []
    for precision in ("float32", "bfloat16"):
        training = Training(dataclasses.replace(CONFIG, epochs=6, validate_every=6, precision=precision), *digits)
        bounds += [report.metrics["valid/lower_bound"] for report in training.epochs() if report.validated]
    assert bounds[0] != bounds[1]
    assert bounds[1] == pytest.approx(bounds[0], abs=5)


def test_a_diverged_training_ends_with_one_line(digits: Digits) -> None:
    training = Training(dataclasses.replace(CONFIG, learning_rate=1e30), *digits)
    with pytest.raises(UserError, match=r"diverged: the objective is .* in epoch \d; lower --learning-rate"):
        list(training.epochs())


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        ({"image_shape": (28, 28, 1)}, 1, r"8 × 8 × 1 .* 28 × 28 × 1"),
        ({"levels": 256}, 1, r"17 grey levels, but the model is for 256"),
        ({}, 3, r"128 cannot be shared equally by 3 workers"),
        ({"global_batch": 2000}, 1, r"2000 is more than the 1297 training images"),
    ],
)
def test_what_does_not_fit_is_refused(digits: Digits, change: dict, workers: int, message: str) -> None:
    model_fields = {k: v for k, v in change.items() if k != "global_batch"}
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **model_fields),
        global_batch=change.get("global_batch", CONFIG.global_batch),
    )
    with pytest.raises(UserError, match=message):
        Training(config, *digits, worker=Worker(0, workers))


def test_a_checkpoint_holds_the_best_model_beside_the_last(digits: Digits, tmp_path: Path) -> None:
    training = Training(CONFIG, *digits)
    for report in training.epochs():
        if report.epoch == 2:
            best = tensors_of(training)
    training.best_epoch, training._best_weights = 2, best
    training.save(tmp_path)
    expected = tmp_path / "expected"
    expected.mkdir()
    save_model(training.model, expected)
    last = load_file(tmp_path / "last" / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(last[name], tensor)
    stored = load_file(tmp_path / "best" / "model.safetensors")
    for name, tensor in best.items():
        assert torch.equal(stored[name], tensor), name
