import pytest
import torch

from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.inpainting import inpaint
from infusion_core.model import InfusionModel, ModelConfig
from infusion_core.operator import TransitionOperator
from infusion_core.sampling import sample_batches

SHAPE = (2, 4, 6)


class MirrorOperator(TransitionOperator):
    """Means are the state upside down: what is missing below can only come from what is known above."""

    num_steps = 3

    def forward(self, state, step):
        return FactorialGaussian(state.flip(2), torch.full_like(state, 1e-8))


@pytest.fixture
def model() -> InfusionModel:
    torch.manual_seed(0)
    config = ModelConfig(image_shape=(4, 6, 2), num_steps=3, rate_increment=0.1, hidden_sizes=(8,))
    return InfusionModel(config, FactorialGaussian(torch.rand(SHAPE), torch.rand(SHAPE))).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask_shape", [(4, 6), SHAPE, (5, *SHAPE)])
def test_known_values_come_back_unchanged(model, images, mask_shape):
    known = torch.rand(mask_shape, generator=torch.Generator().manual_seed(2)) < 0.5
    completed = inpaint(model, images, known, 0, num_completions=3)
    assert completed.shape == (5, 3, *SHAPE)
    everywhere = known.expand(images.shape)
    for completion in completed.unbind(1):
        assert torch.equal(completion[everywhere], images[everywhere])
        assert (completion[~everywhere] != images[~everywhere]).all()
    assert not torch.equal(completed[:, 0], completed[:, 1])


def test_what_is_missing_follows_from_what_is_known_at_every_step(model, images):
    # After each step the lower half is the mirrored upper half of the state before, where the known values were put
    # back: without that, an odd number of steps would show the prior's noise.
    model.operator = MirrorOperator()
    known = torch.zeros(4, 6, dtype=torch.bool)
    known[:2] = True
    for num_steps in (1, 2, 3):
        (completed,) = inpaint(model, images, known, 0, num_steps=num_steps).unbind(1)
        assert torch.equal(completed[:, :, :2], images[:, :, :2])
        torch.testing.assert_close(completed[:, :, 2:], images.flip(2)[:, :, 2:])


def test_nothing_known_is_sampling_batch_by_batch(model):
    completed = inpaint(model, torch.rand(1200, *SHAPE), torch.zeros(4, 6, dtype=torch.bool), 7)
    samples = list(sample_batches(model, 1200, 7))
    assert [len(batch) for batch in samples] == [1000, 200]
    assert torch.equal(completed[:, 0], torch.cat(samples))


def test_seed_decides(model, images):
    known = torch.zeros(SHAPE, dtype=torch.bool)
    assert torch.equal(inpaint(model, images, known, 1), inpaint(model, images, known, 1))
    assert not torch.equal(inpaint(model, images, known, 1), inpaint(model, images, known, 2))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 4, dtype=torch.bool), r"one of the shapes \(4, 6\).*not torch.bool and \(6, 4\)"),
        (torch.ones(1, 4, 6, dtype=torch.bool), r"not torch.bool and \(1, 4, 6\)"),
        (torch.ones(4, 6), r"must be boolean.*not torch.float32"),
    ],
)
def test_mask_that_does_not_fit_is_refused(model, images, mask, message):
    with pytest.raises(InfusionError, match=message):
        inpaint(model, images, mask, 0)


@pytest.mark.parametrize("name", ["num_completions", "num_steps"])
def test_numbers_below_one_are_refused(model, images, name):
    with pytest.raises(InfusionError, match=f"{name} must be at least 1, not 0"):
        inpaint(model, images, torch.ones(4, 6, dtype=torch.bool), 0, **{name: 0})


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(InfusionError, match=r"\(2, 4, 6\), not \(1, 4, 6\)"):
        inpaint(model, torch.rand(3, 1, 4, 6), torch.ones(4, 6, dtype=torch.bool), 0)
