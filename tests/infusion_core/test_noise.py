import itertools
import math

import pytest
import torch

from infusion_core.noise import GeneratorNoise, derive_seed


def test_derived_seeds_of_small_tuples_do_not_collide():
    # All tuples of one to four numbers below 8: their lengths differ too, as those of (seed,) and (seed, 0) do.
    tuples = [t for length in range(1, 5) for t in itertools.product(range(8), repeat=length)]
    assert len({derive_seed(t) for t in tuples}) == len(tuples)


def test_derived_seeds_of_large_numbers_do_not_collide():
    # Neither where a number fills several 32-bit words, nor where it ends in zeros.
    numbers = [0, 1, 10, 100, 2**31, 2**32, 2**32 + 1, 2**33, 2**63, 2**64, 10**30]
    tuples = [t for length in range(1, 4) for t in itertools.product(numbers, repeat=length)]
    assert len({derive_seed(t) for t in tuples}) == len(tuples)


def test_derived_seed_depends_on_order_and_on_nothing_else():
    assert derive_seed((1, 2)) != derive_seed((2, 1))
    assert derive_seed((1, 2)) == derive_seed([1, 2])
    assert all(0 <= derive_seed((n,)) < 2**63 for n in range(100))


def test_derived_seeds_of_neighbours_share_no_bits():
    # 62 bits set or not, as often as a coin: 5 standard errors. seed + rank would leave the upper half at zero.
    seeds = [derive_seed((n, rank)) for n in range(50) for rank in range(4)]
    differences = [bin(a ^ b).count("1") for a, b in itertools.pairwise(seeds)]
    mean = sum(differences) / len(differences)
    assert abs(mean - 63 / 2) < 5 * math.sqrt(63 / 4 / len(differences))


def draw_all(noise: GeneratorNoise, like: torch.Tensor) -> list[torch.Tensor]:
    return [noise.normal_like(like), noise.uniform_like(like), noise.bernoulli_like(like, 0.3)]


def test_a_seed_determines_the_noise():
    like = torch.empty(4, 5)
    first, again = (draw_all(GeneratorNoise.from_seed(1, 2, 3), like) for _ in range(2))
    other = draw_all(GeneratorNoise.from_seed(1, 3, 2), like)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_noise_neither_reads_nor_moves_the_global_generator():
    like = torch.empty(7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw_all(GeneratorNoise.from_seed(5), like)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_all(GeneratorNoise.from_seed(5), like), strict=True))


def test_draws_go_on_in_one_stream():
    # Replaying the generator's state replays what follows; a second draw is not the first again.
    generator = torch.Generator().manual_seed(3)
    noise = GeneratorNoise(generator)
    first = noise.normal_like(torch.empty(9))
    state = generator.get_state()
    second = noise.normal_like(torch.empty(9))
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(noise.normal_like(torch.empty(9)), second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_shape_and_type_of_what_it_is_asked_for(dtype):
    like = torch.empty(2, 3, 4, dtype=dtype)
    normal, uniform, mask = draw_all(GeneratorNoise.from_seed(0), like)
    assert normal.shape == uniform.shape == mask.shape == like.shape
    assert normal.dtype == uniform.dtype == dtype
    assert mask.dtype == torch.bool


def test_normal_draws_are_standard():
    # Moments 0, 1, 0, 3 within 5 standard errors (1, 2, 15, 96 over n); neighbours are uncorrelated.
    n = 200_000
    z = GeneratorNoise.from_seed(0).normal_like(torch.empty(n, dtype=torch.float64))
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)


def test_uniform_draws_fill_0_1():
    n = 200_000
    u = GeneratorNoise.from_seed(0).uniform_like(torch.empty(n))
    assert u.min() >= 0
    assert u.max() < 1
    assert (torch.histc(u, 10, 0, 1) / n - 0.1).abs().max() < 5 * math.sqrt(0.09 / n)


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.3, 0.97, 1.0])
def test_bernoulli_draws_are_true_as_often_as_asked(probability):
    n = 200_000
    frequency = GeneratorNoise.from_seed(0).bernoulli_like(torch.empty(n), probability).double().mean().item()
    assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / n)


def test_streams_of_different_workers_are_uncorrelated():
    n = 100_000
    streams = [GeneratorNoise.from_seed(0, 4, rank).normal_like(torch.empty(n)) for rank in range(3)]
    for a, b in itertools.combinations(streams, 2):
        assert abs((a * b).mean()) < 5 / math.sqrt(n)
