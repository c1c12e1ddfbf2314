import math

import pytest
import torch

from infusion_core import sampling
from infusion_core.chain import sampling_chain
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.noise import GeneratorNoise
from infusion_core.sampling import sample_batches

CONFIG = ModelConfig(image_shape=(2, 2, 1), num_steps=3, hidden_sizes=(4,), variance_scale=0.5)
STATE = (1, 2, 2)


@pytest.fixture
def model() -> InfusionModel:
    torch.manual_seed(0)
    prior = FactorialGaussian(torch.rand(STATE), torch.rand(STATE))
    return InfusionModel(CONFIG, prior).eval()


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLES_PER_BATCH", 4)


def ignore_input(model: InfusionModel) -> None:
    """Makes the operator ignore its input: mean sigmoid(0.8) and variance ½ sigmoid(-0.4) + 1e-4, everywhere."""
    with torch.no_grad():
        model.operator.head.weight.zero_()
        model.operator.head.bias[:4] = 0.8
        model.operator.head.bias[4:] = -0.4


@pytest.mark.parametrize(("num_samples", "sizes"), [(1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_samples_come_in_batches_of_bounded_size(model, small_batches, num_samples, sizes):
    batches = list(sample_batches(model, num_samples, 0))
    assert [tuple(batch.shape) for batch in batches] == [(size, *STATE) for size in sizes]
    assert not any(batch.requires_grad for batch in batches)


def test_last_step_s_mean_and_sample_have_the_closed_form(model):
    ignore_input(model)
    n = 5000
    mean, variance = 1 / (1 + math.exp(-0.8)), 0.5 / (1 + math.exp(0.4)) + 1e-4
    means = torch.cat(list(sample_batches(model, n, 0, last_step="mean")))
    torch.testing.assert_close(means, torch.full((n, *STATE), mean))
    samples = torch.cat(list(sample_batches(model, n, 0, last_step="sample"))).double()
    assert samples.shape == (n, *STATE)
    assert (samples.mean(0) - mean).abs().max() < 5 * math.sqrt(variance / n)
    assert ((samples - mean).square().mean(0) - variance).abs().max() < 5 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize(("num_steps", "length"), [(None, 3), (1, 1), (7, 7)])
def test_the_chain_has_the_steps_asked_for(model, num_steps, length):
    # The operator is applied to the prior's draw and then `length - 1` times more, by the chain itself.
    calls = []
    model.operator.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[1]))
    (batch,) = sample_batches(model, 5, 3, num_steps=num_steps)
    assert calls == list(range(1, length + 1))
    with torch.no_grad():
        *_, last = sampling_chain(model.prior, model.operator, length, 5, GeneratorNoise.from_seed(3, 0))
    assert torch.equal(batch, last.transition.mean)


def test_a_seed_determines_the_samples_and_batches_differ(model, small_batches):
    first, again, other = (torch.cat(list(sample_batches(model, 8, seed, last_step="sample"))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:4], first[4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"last_step": "median"}, "last_step is one of mean, sample, not 'median'"),
    ],
)
def test_arguments_out_of_range_are_refused_before_sampling(model, arguments, message):
    with pytest.raises(InfusionError, match=message):
        sample_batches(model, **{"num_samples": 3, "seed": 0} | arguments)
