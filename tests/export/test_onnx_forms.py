"""The forms that onnxruntime is fast with, against torch."""

from __future__ import annotations

import itertools
from functools import partial

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.batch import read_example
from edgetrain.export.exporter import make_problem
from edgetrain.export.graph.attention import attention
from edgetrain.export.graph.before_autograd import BeforeAutograd
from edgetrain.export.graph.decompositions import common
from edgetrain.export.graph.joint import trace_infer, trace_step
from edgetrain.export.lowering.onnx import OnnxLowering, decompositions
from edgetrain.export.lowering.onnx.convolution import convolution
from edgetrain.export.lowering.onnx.convolution_form import choose
from edgetrain.export.lowering.onnx.rewrite import for_onnxruntime
from edgetrain.export.lowering.onnx.strips import in_strips
from edgetrain.export.prepare import prepare
from edgetrain.export.program import Translator
from support.layers import squared
from support.steps import Step

aten = torch.ops.aten

# channels in, channels out, groups
CHANNELS = [(6, 5, 1), (1, 5, 1), (6, 6, 6), (6, 12, 6), (6, 4, 2)]
# stride, padding, dilation
STEPS = [
    *itertools.product(([1, 1], [2, 2], [2, 1], [3, 2]), ([0, 0], [1, 1], [2, 0]), ([1, 1],)),
    ([1, 1], [2, 2], [2, 2]),
    ([2, 2], [2, 4], [2, 3]),
]
# kernel, image
IMAGES = [([3, 3], [9, 8]), ([1, 1], [5, 4]), ([4, 2], [10, 7]), ([3, 3], [7, 7]), ([3, 2], [18, 21])]


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_convolutions(channels):
    inputs, outputs, groups = channels
    kinds = set()
    for (stride, padding, dilation), (kernel, size) in itertools.product(STEPS, IMAGES):
        x = torch.randn(3, inputs, *size, dtype=torch.float64)
        weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
        bias = torch.randn(outputs, dtype=torch.float64)
        settings = (stride, padding, dilation, False, [0, 0], groups)
        if any(size[i] + 2 * padding[i] < dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)):
            continue
        expected = aten.convolution(x, weight, bias, *settings)
        form = choose(x, weight, stride, padding, dilation, transposed=False, groups=groups)
        kinds.add(form and form.kind)
        got = convolution(x, weight, bias, *settings)
        if got is not NotImplemented:
            torch.testing.assert_close(got, expected)
        grad = torch.randn_like(expected)
        options = ([outputs], *settings, [True, True, True])
        gradients = decompositions.convolution_backward(grad, x, weight, *options)
        for ours, theirs in zip(gradients, aten.convolution_backward(grad, x, weight, *options), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert (
        kinds
        == {
            (6, 5, 1): {"wide", "strided", "gathered"},
            (1, 5, 1): {"gathered"},
            (6, 6, 6): {"whole", "band", None},
            (6, 12, 6): {None},
            (6, 4, 2): {None},
        }[channels]
    )


class Separable(nn.Module):
    """A stem, a depthwise and a pointwise convolution, with norms, in an order of which some is frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.first_norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(6)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.pointwise_norm = nn.BatchNorm2d(8, affine=False)
        for norm in (self.first_norm, self.depthwise_norm, self.pointwise_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu(self.first_norm(self.first(x)))
        x = F.relu6(3 * self.depthwise_norm(self.depthwise(x)))
        return torch.relu(self.pointwise_norm(self.pointwise(x))).mean((2, 3))


@pytest.mark.parametrize("trainable", ["all", "depthwise", "first_norm|bias"])
def test_norms_go_into_trainable_convolutions(trainable):
    step = Step(Separable(), squared, (torch.randn(4, 3, 14, 9), ()), trainable)
    step.assert_matches_eager()
    frozen = {"all": 0, "depthwise": 2, "first_norm|bias": 3}[trainable]
    assert step.ops.count("Conv") == frozen
    assert ("BatchNormalization" in step.ops) == (trainable == "first_norm|bias")


def test_a_convolution_that_is_read_or_written_beside_its_norm():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
            self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.convolution(x)
            z = torch.tanh(y) + self.norm(y)
            written = self.second(x)
            written += 1
            return z * self.other(written)

    Step(Both(), squared, (torch.randn(3, 2, 6, 6), ())).assert_matches_eager()


def masks():
    some = torch.rand(2, 1, 5, 7) > 0.4
    some[0, 0, 2] = False
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": some},
        "float": {"attn_mask": torch.where(some, 0.3, -torch.inf)},
        "large": {"attn_mask": torch.where(torch.rand(5, 7) > 0.4, 0.0, -1e4)},
        "scale": {"scale": 0.7},
    }


@pytest.mark.parametrize("name", masks())
def test_attention(name):
    options = masks()[name]
    query, key, value = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    if options.get("attn_mask", torch.ones(1)).is_floating_point():
        options = {key: value.double() if key == "attn_mask" else value for key, value in options.items()}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    got = attention(query, key, value, **options)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_attention_with_a_mask_that_learns_and_sample_by_sample():
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.randn(3, 5, 5)

    def loss(function, mask, *sample):
        return function(*sample, attn_mask=mask).square().sum()

    def per_sample(function):
        gradients = torch.func.grad(lambda *a: loss(function, *a), (0, 1))
        return torch.func.vmap(gradients, in_dims=(None, 0, 0, 0))(mask, query, key, value)

    torch.testing.assert_close(per_sample(attention), per_sample(F.scaled_dot_product_attention))


def test_what_is_not_ours_is_left_to_torch():
    query = torch.randn(2, 4, 3, 8)
    key = value = torch.randn(2, 2, 3, 8)
    with BeforeAutograd():
        got = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


def test_rectifiers():
    x = torch.cat([torch.linspace(-2, 8, 101), torch.tensor([0.0, 6.0])])
    grad = torch.randn_like(x)
    ours = decompositions.threshold_backward(grad, x, 0)
    torch.testing.assert_close(ours, aten.threshold_backward(grad, x, 0), rtol=0, atol=0)
    ours = decompositions.hardtanh_backward(grad, x, 0.0, 6.0)
    torch.testing.assert_close(ours, aten.hardtanh_backward(grad, x, 0.0, 6.0), rtol=0, atol=0)


class TwoGelus(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x), approximate="tanh")
        return x


def test_a_gelu_without_backward_is_one_operator():
    step = Step(TwoGelus(), squared, (torch.randn(4, 6), ()), "layers.2")
    step.assert_matches_eager()
    assert step.ops.count("FastGelu") == 2
    assert step.ops.count("Sigmoid") >= 1


def test_the_gradient_of_a_mean_is_not_spread_out():
    def function(x, y):
        return (x[:, :, None].expand(3, 4, 5) / 5 * y, x[:, :, None].expand(3, 4, 5) * 2)

    values = torch.randn(3, 4), torch.randn(3, 4, 5)
    module = make_fx(function)(*values)
    rewritten = for_onnxruntime(module)
    targets = [node.target for node in rewritten.graph.nodes]
    # The second result is nothing but spread out.
    assert targets.count(aten.expand.default) == 1
    for ours, theirs in zip(rewritten(*values), function(*values), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_asked_for_by_other_lowerings():
    assert aten.batch_norm.default in OnnxLowering().decompositions()
    assert aten.batch_norm.default not in common()


def test_a_graph_for_inference_has_standard_operators():
    class Network(Separable):
        def forward(self, x):
            return F.gelu(super().forward(x), approximate="tanh")

    problem = make_problem(prepare(Network(), "all"), squared, read_example((torch.randn(2, 3, 8, 8), ()), None))
    model = onnx.load_from_string(Translator(OnnxLowering(), problem).translate(trace_infer)[1].data)
    assert {opset.domain for opset in model.opset_import} <= {""}
    assert [node.op_type for node in model.graph.node].count("Conv") == 3


class Tower(nn.Module):
    """Wide layers with the activations that people use, between narrow ones."""

    ACTIVATIONS = (partial(F.gelu, approximate="tanh"), F.gelu, F.silu, lambda x: torch.relu(x) ** 2)

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(48, 512) for _ in self.ACTIVATIONS)
        self.down = nn.ModuleList(nn.Linear(512, 48, bias=i != 1) for i, _ in enumerate(self.ACTIVATIONS))

    def forward(self, x):
        for up, activation, down in zip(self.up, self.ACTIVATIONS, self.down, strict=True):
            x = x + down(activation(up(x)))
        return x


# With the last selection, only the last activation is differentiated.
@pytest.mark.parametrize(("trainable", "blocks"), [("all", 4), (r"down\.2|up\.3\.bias", 1)])
def test_wide_activations_in_strips(trainable, blocks):
    step = Step(Tower(), squared, (torch.randn(4, 96, 48), ()), trainable)
    step.assert_matches_eager()
    # Two weights and a bias each.
    assert step.ops.count("Split") == 3 * blocks


def test_strips_compute_what_the_whole_does():
    def function(x, up, bias, down, grad):
        h = torch.addmm(bias, x.reshape(-1, 32), up.T).reshape(4, 200, 256)
        gate = torch.sigmoid(h * 1.7)
        y = torch.addmm(grad.reshape(-1, 32)[0], (h * gate).reshape(-1, 256), down.T)
        by_h = torch.mm(y * grad.reshape(-1, 32), down).reshape(4, 200, 256) * (gate + h * gate - h * gate * gate)
        flat = by_h.reshape(-1, 256)
        return y, flat @ up, flat.T @ x.reshape(-1, 32), (y * 2).T @ (h * gate).reshape(-1, 256), flat.sum(0)

    values = [torch.randn(shape) / 4 for shape in ((4, 200, 32), (256, 32), (256,), (32, 256), (4, 200, 32))]
    module = make_fx(function, decomposition_table=decompositions.for_onnx())(*values)
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    tiled = in_strips(module)
    assert any(node.target is aten.split_with_sizes.default for node in tiled.graph.nodes)
    largest = max(
        node.meta["val"].numel() for node in tiled.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    )
    assert largest == 800 * 64
    for ours, theirs in zip(tiled(*values), function(*values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_strips_where_something_else_reads_them():
    class Seen(Tower):
        def forward(self, x):
            wide = F.silu(self.up[0](x))
            return torch.cat([self.down[0](wide), wide.amax(-1, keepdim=True)], -1)

    step = Step(Seen(), squared, (torch.randn(4, 96, 48), ()))
    step.assert_matches_eager()
    assert "Split" not in step.ops


def test_no_strips_in_what_is_frozen_and_in_inference():
    problem = make_problem(prepare(Tower(), r"down\.3"), squared, read_example((torch.randn(4, 96, 48), ()), None))
    translator = Translator(OnnxLowering(), problem)
    for trace in (trace_infer, trace_step):
        model = onnx.load_from_string(translator.translate(trace)[1].data)
        assert "Split" not in [node.op_type for node in model.graph.node]
