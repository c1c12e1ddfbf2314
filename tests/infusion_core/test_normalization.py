import numpy as np
import pytest
import torch
from torch import nn

from infusion_core.normalization import StepBatchNorm, collect_statistics

# Two workers' batch sizes, and the shape of an example's features.
DISTRIBUTED_CASES = {
    "equal": ((4, 4), (3,)),
    "unequal": ((3, 5), (3,)),
    "one example each": ((1, 1), (4,)),
    "images": ((4, 4), (2, 3, 5)),
    "unequal images": ((3, 5), (2, 3, 5)),
}
STEP, NUM_STEPS = 2, 3


def make_norm(features: int, *, dtype: torch.dtype = torch.float64, synchronise: bool = True) -> StepBatchNorm:
    """Returns a layer whose parameters are different numbers for every step and feature."""
    norm = StepBatchNorm(NUM_STEPS, features, synchronise=synchronise)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(NUM_STEPS, features, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(NUM_STEPS, features, generator=generator))
        norm.running_mean.copy_(torch.randn(NUM_STEPS, features, generator=generator))
        norm.running_var.copy_(torch.rand(NUM_STEPS, features, generator=generator) + 0.5)
    return norm.to(dtype)


def make_batch(sizes: tuple[int, int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features and a gradient of some loss with respect to what becomes of them."""
    generator = torch.Generator().manual_seed(5)
    features = 3 * torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) + 2
    return features, torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)


def reference_norm(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    reference = (nn.BatchNorm1d if features.dim() == 2 else nn.BatchNorm2d)(features.shape[1]).to(features.dtype)
    with torch.no_grad():
        reference.weight.copy_(weight)
        reference.bias.copy_(bias)
    return reference


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5)])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_training_is_torch_batch_norm_with_the_step_s_parameters(step, shape):
    # Values and gradients; no other row of the parameters has a gradient; steps beyond the last use the last's.
    features, gradient = make_batch((3, 5), shape)
    features.requires_grad_()
    norm, row = make_norm(shape[0]), min(step, NUM_STEPS) - 1
    reference = reference_norm(features, norm.weight[row], norm.bias[row])
    output, expected = norm(features, step), reference(features)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (d_features,) = torch.autograd.grad(expected, features, gradient, retain_graph=True)
    expected.backward(gradient)
    features.grad = None
    output.backward(gradient)
    torch.testing.assert_close(features.grad, d_features, rtol=1e-12, atol=1e-12)
    for parameter, known in [(norm.weight, reference.weight), (norm.bias, reference.bias)]:
        torch.testing.assert_close(parameter.grad[row], known.grad, rtol=1e-12, atol=1e-12)
        assert parameter.grad[[r for r in range(NUM_STEPS) if r != row]].abs().max() == 0


def test_training_leaves_no_trace_in_the_statistics():
    norm = make_norm(3)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(make_batch((3, 5), (3,))[0], STEP)
    assert set(before) == {"running_mean", "running_var"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize(("step", "row"), [(1, 0), (2, 1), (3, 2), (4, 2), (100, 2)])
def test_evaluation_uses_the_statistics_of_the_step(step, row):
    # γ (x - m) / √(v + ε) + β with the row's numbers, the last row's beyond T; other rows play no part.
    norm = make_norm(3).eval()
    features, _ = make_batch((3, 5), (3,))
    x = features.numpy()
    weight, bias, mean, var = (
        tensor[row].detach().numpy() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    output = norm(features, step).detach()
    np.testing.assert_allclose(output, weight * (x - mean) / np.sqrt(var + 1e-5) + bias, rtol=1e-12)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[[r for r in range(NUM_STEPS) if r != row]] = float("nan")
    assert torch.equal(norm(features, step), output)


def test_evaluation_does_not_depend_on_the_batch():
    norm = make_norm(3).eval()
    features, _ = make_batch((3, 5), (3,))
    whole = norm(features, STEP)
    alone = torch.cat([norm(example[None], STEP) for example in features])
    torch.testing.assert_close(alone, whole, rtol=1e-14, atol=1e-14)
    norm.train()
    assert not torch.allclose(norm(features[:4], STEP), norm(features, STEP)[:4])  # in training it does


def test_epsilon_is_added_to_the_variance():
    norm = StepBatchNorm(1, 1, epsilon=3.0)
    output = norm(torch.tensor([[-1.0], [1.0]]), 1)  # variance 1: ± 1 / √(1 + 3)
    assert output.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("shape", [(3,), (2, 4, 5)])
def test_collected_statistics_are_the_moments_over_all_batches(shape):
    # Brute force over the concatenation of batches of unequal sizes; population (not sample) variance.
    norm = make_norm(shape[0]).eval()
    generator = torch.Generator().manual_seed(0)
    batches = {
        step: [step + step * torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in (2, 7, 4)]
        for step in range(1, NUM_STEPS + 1)
    }
    with collect_statistics(norm):
        for turn in range(3):
            for step in range(1, NUM_STEPS + 1):
                norm(batches[step][turn], step)
    for step, seen in batches.items():
        everything = np.moveaxis(torch.cat(seen).numpy(), 1, 0).reshape(shape[0], -1)
        np.testing.assert_allclose(norm.running_mean[step - 1], everything.mean(1), rtol=1e-12)
        np.testing.assert_allclose(norm.running_var[step - 1], everything.var(1), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 3000.0), (torch.bfloat16, 100.0)])
def test_collected_statistics_survive_a_large_mean(dtype, mean):
    # Moments of the features as they are, whatever their precision, to that of the statistics: float32.
    norm = make_norm(2, dtype=torch.float32)
    features = (mean + torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))).to(dtype)
    with collect_statistics(norm):
        for batch in features.split(300):
            norm(batch, STEP)
    known = features.double().numpy()
    np.testing.assert_allclose(norm.running_mean[STEP - 1], known.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var[STEP - 1], known.var(0), rtol=1e-4)


def test_steps_beyond_the_last_are_collected_with_the_last():
    norm = make_norm(1)
    with collect_statistics(norm):
        norm(torch.tensor([[1.0], [2.0]], dtype=torch.float64), NUM_STEPS)
        norm(torch.tensor([[6.0], [7.0]], dtype=torch.float64), NUM_STEPS + 4)
    assert norm.running_mean[-1].item() == 4  # of 1, 2, 6, 7
    assert norm.running_var[-1].item() == 6.5


def test_steps_that_were_not_seen_keep_their_statistics():
    norm = make_norm(3)
    before = norm.running_mean.clone(), norm.running_var.clone()
    with collect_statistics(norm):
        norm(make_batch((3, 5), (3,))[0], STEP)
    for now, then in zip((norm.running_mean, norm.running_var), before, strict=True):
        assert torch.equal(now[[0, 2]], then[[0, 2]])
        assert not torch.equal(now[1], then[1])


def test_collecting_normalises_by_each_batch_s_own_moments():
    # A second layer sees what the first makes of each batch in training mode: every batch has mean β and variance γ².
    first, second = make_norm(1).eval(), make_norm(1).eval()
    with collect_statistics(nn.ModuleList([first, second])):
        for mean in (0.0, 50.0):
            x = torch.tensor([[mean - 3], [mean + 3]], dtype=torch.float64)
            second(first(x, STEP), STEP)
    expected_var = first.weight[STEP - 1].item() ** 2 * 9 / (9 + 1e-5)
    assert second.running_mean[STEP - 1].item() == pytest.approx(first.bias[STEP - 1].item(), rel=1e-12)
    assert second.running_var[STEP - 1].item() == pytest.approx(expected_var, rel=1e-12)
    assert first.running_mean[STEP - 1].item() == pytest.approx(25)


@pytest.mark.parametrize("training", [True, False])
def test_collecting_returns_to_the_mode_it_found_and_takes_no_gradients(training):
    module = nn.Sequential(make_norm(3)).train(training)
    with collect_statistics(module):
        assert module[0].training
        assert not module[0](make_batch((3, 5), (3,))[0], STEP).requires_grad
    assert module.training == module[0].training == training
    assert torch.is_grad_enabled()


def test_an_exception_while_collecting_changes_nothing():
    norm = make_norm(3).eval()
    features, _ = make_batch((3, 5), (3,))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

    def fail() -> None:
        with collect_statistics(norm):
            norm(features + 100, STEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert not norm.training
    # What had been collected is forgotten: it can neither be finished later nor join the next collection.
    with pytest.raises(AssertionError, match="start_collecting"):
        norm.finish_collecting()
    norm.train()
    norm(features + 1000, STEP)
    with collect_statistics(norm):
        norm(features, STEP)
    np.testing.assert_allclose(norm.running_mean[STEP - 1], features.numpy().mean(0), rtol=1e-12)


@pytest.fixture(scope="module")
def workers(run_workers):
    return run_workers(__file__)


@pytest.mark.parametrize("case", DISTRIBUTED_CASES)
def test_two_workers_normalise_as_one_with_the_concatenated_batch(workers, case):
    # Outputs, and gradients with respect to features, weight and bias, to float64's rounding.
    sizes, shape = DISTRIBUTED_CASES[case]
    features, gradient = make_batch(sizes, shape)
    features.requires_grad_()
    norm = make_norm(shape[0])
    reference = reference_norm(features, norm.weight[STEP - 1], norm.bias[STEP - 1])
    expected = reference(features)
    expected.backward(gradient)
    results = [worker[case] for worker in workers]
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([result["output"] for result in results]), expected.detach(), **close)
    torch.testing.assert_close(torch.cat([result["d_features"] for result in results]), features.grad, **close)
    for name, known in [("d_weight", reference.weight.grad), ("d_bias", reference.bias.grad)]:
        total = sum(result[name] for result in results)
        torch.testing.assert_close(total[STEP - 1], known, **close)
        assert total[[0, 2]].abs().max() == 0


def test_two_workers_without_synchronisation_normalise_apart(workers):
    sizes, shape = DISTRIBUTED_CASES["unequal"]
    features, _ = make_batch(sizes, shape)
    norm = make_norm(shape[0])
    for part, worker in zip(features.split(sizes), workers, strict=True):
        expected = reference_norm(part, norm.weight[STEP - 1], norm.bias[STEP - 1])(part).detach()
        torch.testing.assert_close(worker["apart"], expected, rtol=1e-12, atol=1e-12)


def test_two_workers_collect_the_moments_of_all_their_examples(workers):
    # Worker r passes r + 1 batches of 3 and 5 examples at step 2, and only worker 1 sees step 3.
    sizes, shape = DISTRIBUTED_CASES["unequal"]
    parts = make_batch(sizes, shape)[0].split(sizes)
    everything = torch.cat([parts[0], parts[1], 2 * parts[1]]).numpy()
    for worker in workers:
        np.testing.assert_allclose(worker["mean"][1], everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(worker["var"][1], everything.var(0), rtol=1e-12)
        np.testing.assert_allclose(worker["mean"][2], parts[1].numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(worker["mean"][0], make_norm(shape[0]).running_mean[0], rtol=0)


def test_two_workers_normalise_bfloat16_by_float32_moments(workers):
    # As torch's own batch normalisation does under autocast; rounded to bfloat16, a mean near 100 would be off by 0.25.
    features, gradient, norm = make_bfloat16_case()
    features = features.double().requires_grad_()
    reference = reference_norm(features, norm.weight[0].double(), norm.bias[0].double())
    expected = reference(features)
    expected.backward(gradient.double())
    for name, known in [("output", expected.detach()), ("d_features", features.grad)]:
        result = torch.cat([worker["bfloat16"][name] for worker in workers])
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), known, rtol=2**-6, atol=2**-6)
    for name, known in [("d_weight", reference.weight.grad), ("d_bias", reference.bias.grad)]:
        total = sum(worker["bfloat16"][name][0].double() for worker in workers)
        torch.testing.assert_close(total, known, rtol=1e-2, atol=1e-2)


def make_bfloat16_case() -> tuple[torch.Tensor, torch.Tensor, StepBatchNorm]:
    features, gradient = make_batch((3, 5), (3,))
    return (features + 100).bfloat16(), gradient.bfloat16(), make_norm(3, dtype=torch.float32)


def differentiate(norm: StepBatchNorm, features: torch.Tensor, gradient: torch.Tensor, step: int) -> dict:
    features = features.clone().requires_grad_()
    output = norm(features, step)
    (output * gradient).sum().backward()
    return {
        "output": output.detach(),
        "d_features": features.grad,
        "d_weight": norm.weight.grad,
        "d_bias": norm.bias.grad,
    }


def worker(rank: int) -> dict:
    """What one of two processes computes."""
    results = {}
    for case, (sizes, shape) in DISTRIBUTED_CASES.items():
        features, gradient = (tensor.split(sizes)[rank] for tensor in make_batch(sizes, shape))
        results[case] = differentiate(make_norm(shape[0]), features, gradient, STEP)
    sizes, shape = DISTRIBUTED_CASES["unequal"]
    features = make_batch(sizes, shape)[0].split(sizes)[rank]
    results["apart"] = make_norm(shape[0], synchronise=False)(features, STEP).detach()
    norm = make_norm(shape[0], synchronise=False)
    with collect_statistics(norm):
        for factor in range(1, rank + 2):
            norm(factor * features, STEP)
        if rank == 1:
            norm(features, STEP + 1)
    results["mean"], results["var"] = norm.running_mean, norm.running_var
    features, gradient, norm = make_bfloat16_case()
    try:
        results["bfloat16"] = differentiate(norm, features.split((3, 5))[rank], gradient.split((3, 5))[rank], 1)
    except RuntimeError as error:
        results["bfloat16"] = str(error)
    return results
