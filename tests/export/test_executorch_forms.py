"""The forms that XNNPACK runs, in torch, against torch's own operators and autograd in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.executorch import convolution as conv
from edgetrain.export.lowering.executorch import decompositions as forms
from edgetrain.export.lowering.executorch.layout import from_last, to_last
from edgetrain.export.lowering.executorch.pooling import max_pool, max_pool_backward
from edgetrain.export.lowering.executorch.rewrite import rewrite

aten = torch.ops.aten


def close(got, expected, tolerance=1e-5):
    expected = expected.detach().to(torch.float32)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


GEOMETRIES = {
    "plain": dict(size=(5, 7), channels=(3, 4), kernel=(3, 3), padding=(1, 1)),
    "even width": dict(size=(5, 8), channels=(3, 4), kernel=(3, 3), padding=(1, 1)),
    "even width, five taps": dict(size=(6, 8), channels=(3, 4), kernel=(3, 5), padding=(1, 2)),
    "even width, two taps": dict(size=(9, 8), channels=(3, 4), kernel=(2, 2), padding=(0, 1)),
    "even width, loose rows": dict(size=(9, 8), channels=(3, 4), kernel=(3, 3), padding=(2, 1), dilation=(2, 1)),
    "even width, loose columns": dict(size=(6, 8), channels=(3, 4), kernel=(3, 3), padding=(1, 2), dilation=(1, 2)),
    "even row": dict(size=(1, 12), channels=(3, 4), kernel=(1, 3), padding=(0, 1)),
    "many channels": dict(size=(8, 8), channels=(18, 20), kernel=(3, 3), padding=(1, 1)),
    "pointwise": dict(size=(4, 4), channels=(3, 5), kernel=(1, 1)),
    "pointwise stride": dict(size=(5, 4), channels=(3, 5), kernel=(1, 1), stride=(2, 2)),
    "stride": dict(size=(8, 9), channels=(2, 4), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "wide stride": dict(size=(11, 8), channels=(2, 2), kernel=(2, 3), stride=(3, 2), padding=(0, 1)),
    "stride beyond kernel": dict(size=(9, 9), channels=(2, 2), kernel=(2, 2), stride=(3, 3)),
    "dilation": dict(size=(9, 8), channels=(2, 3), kernel=(3, 2), dilation=(2, 3), padding=(2, 1)),
    "dilation and stride": dict(size=(12, 11), channels=(2, 3), kernel=(3, 3), dilation=(3, 2), stride=(2, 2)),
    "no padding": dict(size=(6, 6), channels=(1, 2), kernel=(4, 5)),
    "much padding": dict(size=(4, 4), channels=(2, 2), kernel=(2, 2), padding=(2, 3)),
    "groups": dict(size=(5, 6), channels=(4, 6), kernel=(3, 3), padding=(1, 1), groups=2),
    "groups stride": dict(size=(7, 6), channels=(4, 4), kernel=(3, 3), padding=(1, 1), groups=2, stride=(2, 2)),
    "depthwise": dict(size=(6, 5), channels=(4, 4), kernel=(3, 3), padding=(1, 1), groups=4),
    "depthwise stride": dict(size=(8, 7), channels=(4, 4), kernel=(3, 3), padding=(1, 1), groups=4, stride=(2, 2)),
    "multiplier": dict(size=(6, 5), channels=(3, 6), kernel=(3, 3), padding=(1, 1), groups=3),
    "fewer channels out": dict(size=(5, 7), channels=(4, 3), kernel=(3, 3), padding=(1, 1)),
    "fewer channels out, even width": dict(size=(5, 8), channels=(4, 3), kernel=(3, 3), padding=(1, 1)),
    "fewer channels out, five taps": dict(size=(9, 8), channels=(4, 4), kernel=(5, 5), padding=(1, 2)),
    "fewer channels out, dilation": dict(size=(9, 9), channels=(5, 2), kernel=(3, 2), padding=(2, 1), dilation=(2, 2)),
    "many channels and fewer out": dict(size=(8, 8), channels=(20, 18), kernel=(3, 3), padding=(1, 1)),
    "zeros below only": dict(size=(8, 8), channels=(4, 3), kernel=(2, 3), padding=(1, 1), stride=(2, 1)),
    "one row": dict(size=(1, 9), channels=(3, 4), kernel=(1, 3), padding=(0, 1), stride=(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_convolution_and_both_gradients_match_autograd(name, samples, monkeypatch):
    # Else images as small as these are not multiplied by rows.
    monkeypatch.setattr(conv, "MANY", 1)
    case = GEOMETRIES[name]
    inputs, outputs = case["channels"]
    groups = case.get("groups", 1)
    stride, padding, dilation = (
        case.get(k, d) for k, d in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    )
    geometry = conv.Geometry(case["kernel"], stride, padding, dilation, groups)
    x = torch.randn(samples, inputs, *case["size"], dtype=torch.float64, requires_grad=True)
    w = torch.randn(outputs, inputs // groups, *case["kernel"], dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, w, None, stride, padding, dilation, groups)
    grad = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), grad)
    x32, w32, g32 = (t.detach().float() for t in (x, w, grad))
    close(from_last(conv.convolution(to_last(x32), w32, geometry)), y)
    close(conv.weight_gradient(to_last(x32), to_last(g32), geometry), grad_w)
    close(from_last(conv.input_gradient(to_last(g32), w32, geometry, x.shape[2:])), grad_x)


# Blocks of lines: a single one, some that XNNPACK concatenates; a last one that is not full.
BLOCKS = {
    "one block": dict(size=(5, 5)),
    "some blocks": dict(size=(25, 5)),
    "some blocks, the last not full": dict(size=(13, 6)),
    "many blocks": dict(size=(24, 16)),
    "many blocks, the last not full": dict(size=(17, 15)),
    "five by three taps": dict(size=(15, 7), kernel=(5, 3), padding=(2, 1)),
    "dilation": dict(size=(14, 9), padding=(2, 3), dilation=(2, 3)),
    "no padding": dict(size=(15, 7), padding=(0, 0)),
    "more padding than the kernel reaches": dict(size=(9, 6), padding=(3, 4)),
    "two taps": dict(size=(11, 9), kernel=(2, 2), padding=(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_depthwise_convolution_in_blocks_of_lines_and_both_gradients_match_autograd(name, monkeypatch):
    monkeypatch.setattr(conv, "MOST", 1000)
    case, channels, samples = BLOCKS[name], 5, 24
    padding, dilation = case.get("padding", (1, 1)), case.get("dilation", (1, 1))
    geometry = conv.Geometry(case.get("kernel", (3, 3)), (1, 1), padding, dilation, channels)
    x = torch.randn(samples, channels, *case["size"], dtype=torch.float64, requires_grad=True)
    w = torch.randn(channels, 1, *geometry.kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, w, None, 1, padding, dilation, channels)
    grad = torch.randn_like(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), grad)
    x32, w32, g32 = (t.detach().float() for t in (x, w, grad))
    for gradient in (False, True):
        assert geometry.in_blocks(w32, case["size"], samples, gradient=gradient) is not None
    close(from_last(conv.convolution(to_last(x32), w32, geometry)), y)
    images = to_last(x32), to_last(g32), w32, geometry
    by_input, by_weight = conv.gradients(*images, by_input=True, by_weight=True)
    close(from_last(by_input), grad_x)
    close(by_weight, grad_w)
    assert torch.equal(conv.gradients(*images, by_input=True, by_weight=False)[0], by_input)
    assert torch.equal(conv.gradients(*images, by_input=False, by_weight=True)[1], by_weight)


@pytest.mark.parametrize(
    ("samples", "size", "stride"),
    [(1, (25, 5), (1, 1)), (8, (16, 16), (2, 2)), (8, (1, 64), (1, 1)), (8, (64, 64), (1, 1))],
)
def test_blocks_of_lines_are_not_taken_where_they_would_multiply_too_much(samples, size, stride):
    geometry = conv.Geometry((3, 3), stride, (1, 1), (1, 1), 64)
    assert geometry.in_blocks(torch.empty(64, 1, 3, 3), size, samples, gradient=False) is None


POOLS = list(
    itertools.product(
        [(2, 2), (3, 3), (3, 2)],
        [(), (1, 1), (2, 2), (3, 1)],
        [(0, 0), (1, 1)],
        [(1, 1), (2, 2)],
        [False, True],
    )
)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil"), POOLS)
def test_max_pool_and_its_gradient_match_autograd_even_with_ties(kernel, stride, padding, dilation, ceil):
    # Few different values: most windows have several maxima, and the first one must win.
    x = torch.randint(0, 3, (2, 3, 9, 8)).double().requires_grad_()
    y = F.max_pool2d(x, kernel, stride or None, padding, dilation, ceil)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    x32, settings = x.detach().float(), (kernel, stride, padding, dilation, ceil)
    close(from_last(max_pool(to_last(x32), y.shape[2:], *settings)), y, 0)
    close(from_last(max_pool_backward(to_last(grad.float()), to_last(x32), *settings)), expected)


def gradient(function, x, grad):
    x = x.double().requires_grad_()
    return torch.autograd.grad(function(x), x, grad.double())[0]


ACTIVATIONS = {
    "relu": (F.relu, lambda g, x: forms.threshold_backward(g, x, 0.0)),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.0), lambda g, x: forms.threshold_backward(g, x, 0.5)),
    "relu6": (F.relu6, lambda g, x: forms.hardtanh_backward(g, x, 0.0, 6.0)),
    "hardtanh": (F.hardtanh, lambda g, x: forms.hardtanh_backward(g, x, -1.0, 1.0)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), lambda g, x: forms.leaky_relu_backward(g, x, 0.1, False)),
    "gelu": (F.gelu, forms.gelu_backward),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: forms.gelu_backward(g, x, approximate="tanh"),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_without_comparisons(name):
    function, form = ACTIVATIONS[name]
    # Down to the smallest normal numbers, and exactly 0, whose gradient is 0 in torch.
    x = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([0.0, 1e-30, -1e-30, 1.2e-38, 3e38, -3e38])])
    grad = torch.randn_like(x)
    inside = x.abs() < 1e30
    close(form(grad, x)[inside], gradient(function, x, grad)[inside], 2e-6)
    if name in {"relu", "relu6", "hardtanh", "leaky_relu", "threshold"}:
        close(form(grad, x), gradient(function, x, grad), 1e-7)


def test_gelu_in_tanh_form():
    x = torch.linspace(-8, 8, 161)
    close(forms.gelu(x, approximate="tanh"), F.gelu(x.double(), approximate="tanh"), 1e-6)


def test_softmax_family():
    x, grad = torch.randn(5, 7) * 4, torch.randn(5, 7)
    x[0, 0] = 200.0  # the others' log-probabilities are near -200: no underflow to minus infinity
    log = forms.log_softmax(x, -1, False)
    close(log, torch.log_softmax(x.double(), -1), 1e-6)
    close(
        forms.log_softmax_backward(grad, log, -1, torch.float32),
        gradient(lambda t: torch.log_softmax(t, -1), x, grad),
    )
    close(
        forms.softmax_backward(grad, torch.softmax(x, -1), -1, torch.float32),
        gradient(lambda t: torch.softmax(t, -1), x, grad),
    )


def test_negative_log_likelihood_with_ignored_targets():
    x, target, grad = torch.randn(6, 4), torch.tensor([0, 3, -100, 1, -100, 2]), torch.randn(6)
    loss, _ = forms.nll_loss(x, target, None, 0, -100)
    close(loss, F.nll_loss(x.double(), target, reduction="none"))
    got = forms.nll_loss_backward(grad, x, target, None, 0, -100, torch.zeros(()))
    close(got, gradient(lambda t: F.nll_loss(t, target, reduction="none"), x, grad))


def test_embedding_gradient_adds_repeated_tokens_and_skips_padding():
    tokens, grad = torch.tensor([[1, 4, 1], [0, 2, 4]]), torch.randn(2, 3, 3)
    expected = gradient(lambda w: F.embedding(tokens, w, padding_idx=4), torch.randn(5, 3), grad)
    close(forms.embedding_backward(grad, tokens, 5, 4, False), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_and_their_statistics(affine):
    x = torch.randn(3, 6, 4, 5) * 3 + 1
    weight, bias = (torch.randn(6), torch.randn(6)) if affine else (None, None)
    got = forms.group_norm(x, weight, bias, 3, 6, 20, 2, 1e-5)
    expected = aten.native_group_norm(*(t if t is None else t.double() for t in (x, weight, bias)), 3, 6, 20, 2, 1e-5)
    for part, whole in zip(got, expected, strict=True):
        close(part, whole)
    weight, bias = (torch.randn(4, 5), torch.randn(4, 5)) if affine else (None, None)
    got = forms.layer_norm(x, [4, 5], weight, bias, 1e-5)
    expected = aten.native_layer_norm(
        x.double(), [4, 5], *(t if t is None else t.double() for t in (weight, bias)), 1e-5
    )
    for part, whole in zip(got, expected, strict=True):
        close(part, whole)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "transposed"),
    [
        ((8, 8), (3, 3), (2, 2), (1, 1), False),
        ((8, 6), (5, 3), (2, 2), (2, 1), False),
        ((6, 8), (3, 3), (1, 2), (1, 1), False),
        ((9, 9), (3, 3), (3, 3), (1, 1), False),
        ((7, 8), (3, 3), (2, 2), (1, 1), True),
        ((8, 8), (2, 2), (2, 2), (0, 0), True),
        ((8, 8), (1, 1), (2, 2), (0, 0), False),
    ],
)
def test_a_frozen_depthwise_convolution_with_strides_is_undone_forwards(size, kernel, stride, padding, transposed):
    """Transposed only where the padding would not be the same on both sides."""
    channels = 4
    weight = torch.randn(channels, 1, *kernel)
    x = torch.randn(2, channels, *size, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding, 1, channels)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)

    def backward(grad, x):
        settings = ([0], stride, padding, (1, 1), False, (0, 0), channels, [True, False, False])
        return (torch.ops.aten.convolution_backward(grad, x, weight, *settings)[0],)

    example = grad, x.detach()
    module = rewrite(TracedGraph("step", make_fx(backward)(*example), (), (), example))
    calls = [node for node in module.graph.nodes if node.target == torch.ops.aten.convolution.default]
    assert [node.args[6] for node in calls] == [transposed]
    torch.testing.assert_close(module(*example)[0], expected)
