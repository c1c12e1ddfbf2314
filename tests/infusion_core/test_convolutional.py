import math

import pytest
import torch
from torch.nn import functional

from infusion_core.convolutional import ConvolutionalOperator
from infusion_core.errors import InfusionError
from infusion_core.operator import gaussian_from_heads


@pytest.mark.parametrize(
    ("event_shape", "hidden_sizes"),
    [((3, 32, 32), (16, 8, 4)), ((3, 64, 64), (16, 8, 4, 2)), ((1, 8, 12), (6,))],
)
def test_transition_has_the_shape_of_the_state(event_shape, hidden_sizes):
    operator = ConvolutionalOperator(event_shape, 2, hidden_sizes=hidden_sizes)
    transition = operator(torch.rand(5, *event_shape), 1)
    assert transition.mean.shape == transition.variance.shape == (5, *event_shape)


def test_default_has_the_layers_of_the_paper():
    # Counted by hand: 3072 → 4 × 4 × 512, then 5 × 5 kernels 512 → 256 → 128 → two heads of 3 channels; T = 3.
    operator = ConvolutionalOperator((3, 32, 32), 3)
    weights = 3072 * 8192 + 25 * (512 * 256 + 256 * 128 + 128 * 6) + 6
    normalisation = 3 * 2 * (8192 + 256 + 128)
    assert sum(parameter.numel() for parameter in operator.parameters()) == weights + normalisation


def test_heads_are_mean_and_variance_by_channel():
    operator = ConvolutionalOperator((3, 8, 8), 1, hidden_sizes=(4, 4), variance_scale=0.5, variance_floor=0.01)
    head = operator.convolutions[-1]
    logits = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(logits)
    transition = operator(torch.rand(2, 3, 8, 8), 1)
    for channel in range(3):
        mean, variance = (1 / (1 + math.exp(-logits[i].item())) for i in (channel, channel + 3))
        torch.testing.assert_close(transition.mean[:, channel], torch.full((2, 8, 8), mean))
        torch.testing.assert_close(transition.variance[:, channel], torch.full((2, 8, 8), 0.5 * variance + 0.01))


def test_network_is_the_generator_layer_by_layer():
    # Written out with statistics at 0 and 1: linear, shift, relu; then a convolution of the zero-stuffed grid.
    torch.manual_seed(0)
    operator = ConvolutionalOperator((1, 4, 4), 3, hidden_sizes=(3,)).eval()
    with torch.no_grad():
        operator.norms[0].weight.copy_(torch.rand(3, 12))
        operator.norms[0].bias.copy_(torch.randn(3, 12))
    state = torch.rand(2, 1, 4, 4)
    scale = operator.norms[0].weight[1] / math.sqrt(1 + 1e-5)
    features = functional.linear(state.flatten(1), operator.linear.weight) * scale + operator.norms[0].bias[1]
    grid = features.clamp(min=0).view(2, 3, 2, 2)
    stuffed = torch.zeros(2, 3, 4, 4)
    stuffed[:, :, ::2, ::2] = grid
    kernel = operator.convolutions[0].weight.flip(2, 3).transpose(0, 1)
    heads = functional.conv2d(stuffed, kernel, operator.convolutions[0].bias, padding=2)
    torch.testing.assert_close(operator(state, 2).mean[:, 0], torch.sigmoid(heads[:, 0]))


def test_order_in_memory_changes_neither_values_nor_gradients():
    torch.manual_seed(0)
    operator = ConvolutionalOperator((3, 16, 16), 2, hidden_sizes=(8, 4))
    state = torch.rand(6, 3, 16, 16)
    transition = operator(state, 2)
    assert transition.mean.stride()[1:] == state.stride()[1:]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in operator.convolutions)

    usual = {name: value.detach().contiguous().requires_grad_() for name, value in operator.named_parameters()}
    hidden = functional.linear(state.flatten(1), usual["linear.weight"])
    for number, kernel in enumerate(("convolutions.0.weight", "convolutions.1.weight")):
        weight, bias = usual[f"norms.{number}.weight"][1], usual[f"norms.{number}.bias"][1]
        hidden = functional.batch_norm(hidden, None, None, weight, bias, training=True).relu()
        hidden = hidden.view(6, 8, 4, 4) if number == 0 else hidden
        hidden = functional.conv_transpose2d(hidden, usual[kernel], stride=2, padding=2, output_padding=1)
    heads = hidden + usual["convolutions.1.bias"].view(-1, 1, 1)
    torch.testing.assert_close(transition.mean, heads[:, :3].sigmoid())

    transition.log_prob(state).mean().backward()
    gaussian_from_heads(heads.view(6, 2, 3, 16, 16), 0.1, 1e-4).log_prob(state).mean().backward()
    for name, parameter in operator.named_parameters():
        torch.testing.assert_close(parameter.grad, usual[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def test_steps_share_weights_but_not_normalisation():
    operator = ConvolutionalOperator((1, 8, 8), 3, hidden_sizes=(4, 4)).eval()
    state = torch.rand(2, 1, 8, 8)
    assert torch.equal(operator(state, 1).mean, operator(state, 3).mean)
    for norm in operator.norms:
        with torch.no_grad():
            norm.bias[2] += 1.0
    assert not torch.equal(operator(state, 1).mean, operator(state, 3).mean)
    assert torch.equal(operator(state, 1).mean, operator(state, 2).mean)
    assert torch.equal(operator(state, 3).mean, operator(state, 7).mean)


def test_images_that_cannot_be_halved_so_often_are_refused():
    with pytest.raises(InfusionError, match=r"28 × 28 are no multiple of 8.*mlp"):
        ConvolutionalOperator((1, 28, 28), 3)
