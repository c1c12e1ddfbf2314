import numpy as np
import pytest
import torch

from infusion_core.normalization import StepBatchNorm, collect_statistics
from infusion_core.operator import MLPOperator, TransitionOperator

EVENT, NUM_STEPS, WIDTHS = (2, 3, 2), 3, (7, 5)
BETA, FLOOR = 0.3, 1e-3


def make_operator(**overrides) -> MLPOperator:
    """Returns an operator in which no two numbers are alike, normalisation included."""
    options = {"hidden_sizes": WIDTHS, "variance_scale": BETA, "variance_floor": FLOOR} | overrides
    operator = MLPOperator(EVENT, NUM_STEPS, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in operator.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for norm in operator.norms:
            norm.running_var.abs_().add_(0.1)
    return operator


def make_states(n: int = 11) -> torch.Tensor:
    return torch.rand(n, *EVENT, generator=torch.Generator().manual_seed(2))


def reference_forward(
    operator: MLPOperator, states: torch.Tensor, step: int, *, training: bool
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Mean, variance and what enters each normalisation, in float64 numpy, from the layers' numbers."""
    tensors = {name: tensor.numpy().astype(np.float64) for name, tensor in operator.state_dict().items()}
    row = min(step, NUM_STEPS) - 1
    features, entering = states.numpy().astype(np.float64).reshape(len(states), -1), []
    for layer in range(len(WIDTHS)):
        features = features @ tensors[f"linears.{layer}.weight"].T
        entering.append(features)
        norm = {
            name: tensors[f"norms.{layer}.{name}"][row] for name in ("weight", "bias", "running_mean", "running_var")
        }
        mean, var = (features.mean(0), features.var(0)) if training else (norm["running_mean"], norm["running_var"])
        features = norm["weight"] * (features - mean) / np.sqrt(var + 1e-5) + norm["bias"]
        features = np.maximum(features, 0)
    heads = 1 / (1 + np.exp(-(features @ tensors["head.weight"].T + tensors["head.bias"])))
    mean, variance = np.split(heads, 2, axis=1)
    shape = (len(states), *EVENT)
    return mean.reshape(shape), (BETA * variance + FLOOR).reshape(shape), entering


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_forward_is_the_network_written_out(step, training):
    # Linear, per-step normalisation, ReLU, twice; sigmoid heads: means first, then β · sigmoid + ε.
    operator = make_operator().train(training)
    mean, variance, _ = reference_forward(operator, make_states(), step, training=training)
    transition = operator(make_states(), step)
    np.testing.assert_allclose(transition.mean.detach(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(transition.variance.detach(), variance, rtol=1e-4, atol=1e-6)


def test_steps_differ_by_their_normalisation_alone():
    operator = make_operator().eval()
    states = make_states()
    first, second = operator(states, 1), operator(states, 2)
    assert not torch.allclose(first.mean, second.mean)
    with torch.no_grad():
        for norm in operator.norms:
            for tensor in norm.state_dict().values():
                tensor[1] = tensor[0]
    assert torch.equal(operator(states, 2).mean, first.mean)
    assert torch.equal(operator(states, 2).variance, first.variance)


@pytest.mark.parametrize("training", [True, False])
def test_steps_beyond_the_last_use_the_last_s_normalisation(training):
    operator = make_operator().train(training)
    last, beyond, before = (operator(make_states(), step) for step in (NUM_STEPS, NUM_STEPS + 5, NUM_STEPS - 1))
    assert torch.equal(beyond.mean, last.mean)
    assert torch.equal(beyond.variance, last.variance)
    assert not torch.equal(before.mean, last.mean)


def test_heads_saturate_at_their_limits():
    # sigmoid(0) = ½, sigmoid(±∞) = 1, 0: means 0, ½, 1 and variances ε, β/2 + ε, β + ε.
    operator = make_operator()
    dimensions = 12
    for logit, level in [(-200.0, 0.0), (0.0, 0.5), (200.0, 1.0)]:
        with torch.no_grad():
            operator.head.weight.zero_()
            operator.head.bias[:dimensions] = logit
            operator.head.bias[dimensions:] = -logit
        transition = operator(make_states(), 1)
        assert transition.mean.unique().tolist() == [level]
        np.testing.assert_allclose(transition.variance.detach(), BETA * (1 - level) + FLOOR, rtol=1e-6)


def test_defaults_are_the_paper_s_network():
    # 784 → 1200 → 1200 → 2 × 784 without biases before a normalisation, which has 2 × 1200 parameters a step.
    operator = MLPOperator((1, 28, 28), 15)
    expected = 784 * 1200 + 1200 * 1200 + (1200 + 1) * 2 * 784 + 2 * (15 * 2 * 1200)
    assert sum(parameter.numel() for parameter in operator.parameters()) == expected
    transition = operator(torch.rand(2, 1, 28, 28), 1)
    assert transition.mean.shape == transition.variance.shape == (2, 1, 28, 28)
    assert transition.variance.min() > 1e-4
    assert transition.variance.max() < 0.1 + 1e-4


def test_statistics_of_every_layer_are_those_of_what_enters_it():
    # Brute force, layer by layer, with each batch normalised by its own moments on the way.
    operator = make_operator().eval()
    batches = make_states(20).split([6, 14])
    with collect_statistics(operator):
        for batch in batches:
            for step in range(1, NUM_STEPS + 1):
                operator(batch, step)
    for step in range(1, NUM_STEPS + 1):
        entering = [reference_forward(operator, batch, step, training=True)[2] for batch in batches]
        for layer, parts in enumerate(zip(*entering, strict=True)):
            seen = np.concatenate(parts)
            np.testing.assert_allclose(operator.norms[layer].running_mean[step - 1], seen.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(operator.norms[layer].running_var[step - 1], seen.var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_distribution_is_float32_under_autocast(training):
    # bfloat16 has steps of 1/256 near 1: the network may use it, the density may not.
    operator = make_operator().train(training)
    exact = operator(make_states(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        transition = operator(make_states(), 2)
    assert transition.mean.dtype == transition.variance.dtype == torch.float32
    assert not torch.equal(transition.mean, exact.mean)  # the network did run in bfloat16
    torch.testing.assert_close(transition.mean, exact.mean, rtol=0.3, atol=0.1)
    as_bfloat16 = transition.mean.bfloat16().float()
    assert not torch.equal(transition.mean, as_bfloat16)


@pytest.mark.parametrize("synchronise", [True, False])
def test_synchronisation_is_every_layer_s(synchronise):
    norms = [m for m in make_operator(synchronise=synchronise).modules() if isinstance(m, StepBatchNorm)]
    assert [norm.synchronise for norm in norms] == [synchronise] * len(WIDTHS)


def test_an_operator_without_a_forward_is_none():
    class Nothing(TransitionOperator):
        pass

    with pytest.raises(TypeError, match="forward"):
        Nothing()
