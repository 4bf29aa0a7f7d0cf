"""Our forms of backward passes against torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from edgetrain.export.graph import decompositions
from edgetrain.export.lowering.onnx.decompositions import gelu, gelu_backward, safe_softmax

aten = torch.ops.aten

# stride, padding, dilation, kernel, size of the image
SHAPES = [
    *itertools.product(([1, 1], [2, 2], [2, 1], [3, 2]), ([0, 0], [1, 1], [2, 0]), ([1, 1],), ([3, 3],), ([9, 8],)),
    ([1, 1], [2, 2], [2, 2], [3, 3], [9, 7]),
    ([2, 2], [2, 4], [2, 3], [3, 3], [9, 11]),
    ([3, 1], [0, 1], [1, 2], [4, 2], [10, 6]),
    ([2, 2], [5, 1], [1, 1], [10, 4], [49, 10]),
    ([1, 1], [0, 0], [1, 1], [1, 1], [5, 4]),
    ([1, 1], [0, 0], [1, 1], [5, 4], [5, 4]),
    ([2, 2], [0, 0], [1, 1], [2, 2], [7, 7]),
]


@pytest.mark.parametrize("channels", [(4, 6, 1), (6, 6, 6), (4, 6, 2), (4, 8, 4)], ids=str)
def test_gradients_of_convolutions(channels):
    inputs, outputs, groups = channels
    torch.manual_seed(0)
    for stride, padding, dilation, kernel, size in SHAPES:
        x = torch.randn(3, inputs, *size, dtype=torch.float64)
        weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
        y = aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
        grad = torch.randn_like(y)
        options = ([outputs], stride, padding, dilation, False, [0, 0], groups, [True, True, True])
        expected = aten.convolution_backward(grad, x, weight, *options)
        got = decompositions.convolution_backward(grad, x, weight, *options)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text: f"{stride} {padding} {kernel}: {text}")  # noqa: B023


@pytest.mark.parametrize("channels", [(4, 6, 1), (6, 6, 6)], ids=str)
def test_gradients_of_transposed_convolutions(channels):
    inputs, outputs, groups = channels
    torch.manual_seed(0)
    for stride, padding in (([1, 1], [1, 1]), ([2, 2], [1, 1]), ([2, 3], [0, 1])):
        x = torch.randn(3, inputs, 5, 4, dtype=torch.float64)
        weight = torch.randn(inputs, outputs // groups, 3, 3, dtype=torch.float64)
        y = aten.convolution(x, weight, None, stride, padding, [1, 1], True, [0, 0], groups)
        grad = torch.randn_like(y)
        options = ([outputs], stride, padding, [1, 1], True, [0, 0], groups, [True, True, True])
        expected = aten.convolution_backward(grad, x, weight, *options)
        got = decompositions.convolution_backward(grad, x, weight, *options)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_its_gradient(approximate):
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    torch.testing.assert_close(gelu(x, approximate=approximate), aten.gelu(x, approximate=approximate))
    grad = torch.cos(x)
    ours = gelu_backward(grad, x, approximate=approximate)
    torch.testing.assert_close(ours, aten.gelu_backward(grad, x, approximate=approximate))


def test_a_softmax_of_masked_rows_is_zero():
    x = torch.randn(2, 3, 4)
    x[0, 1] = -torch.inf
    x[1, 2, :2] = -torch.inf
    torch.testing.assert_close(safe_softmax(x, -1), aten._safe_softmax(x, -1))


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine):
    x = 3 + torch.randn(4, 5, 2, 6, dtype=torch.float64)
    weight, bias = (torch.randn(2, 6, dtype=torch.float64) if affine else None for _ in range(2))
    _, mean, rstd = aten.native_layer_norm(x, [2, 6], weight, bias, 1e-5)
    grad = torch.randn_like(x)
    options = (grad, x, [2, 6], mean, rstd, weight, bias, [True, affine, affine])
    for ours, theirs in zip(
        decompositions.layer_norm_backward(*options), aten.native_layer_norm_backward(*options), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
