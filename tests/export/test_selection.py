"""What learns: names, node counts, adapters, slices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from edgetrain.export import SelectionError, export_bundle
from edgetrain.export.prepare import prepare
from support.bundles import assert_step_matches, manifest_of, run_graph
from support.layers import CausalAttention
from support.steps import Step

LOSS = nn.CrossEntropyLoss(reduction="none")


def network():
    torch.manual_seed(3)
    module = nn.Sequential()
    module.add_module("stem", nn.Conv2d(2, 8, 3, padding=1, bias=False))
    module.add_module("norm1", nn.BatchNorm2d(8))
    module.add_module("act1", nn.ReLU())
    module.add_module("depthwise", nn.Conv2d(8, 8, 3, groups=8))
    module.add_module("norm2", nn.GroupNorm(2, 8))
    module.add_module("act2", nn.ReLU())
    module.add_module("pool", nn.AdaptiveAvgPool2d(1))
    module.add_module("flat", nn.Flatten())
    module.add_module("drop", nn.Dropout(0.5))
    module.add_module("fc", nn.Linear(8, 4))
    module.norm1.running_mean.uniform_(-0.5, 0.5)
    module.norm1.running_var.uniform_(0.5, 2)
    nn.init.uniform_(module.norm1.weight, 0.5, 1.5)
    nn.init.uniform_(module.norm1.bias, -0.5, 0.5)
    return module


def batch(n=3):
    return torch.randn(n, 2, 7, 7), torch.arange(n) % 4


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("last:1", ["fc.weight", "fc.bias"]),
        ("last:2", ["norm2.weight", "norm2.bias", "fc.weight", "fc.bias"]),
        ("head", ["fc.weight", "fc.bias"]),
        ("bias", ["norm1.bias", "depthwise.bias", "norm2.bias", "fc.bias"]),
        ("norm", ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]),
        (r"^depthwise\.", ["depthwise.weight", "depthwise.bias"]),
        ("bias;head", ["norm1.bias", "depthwise.bias", "norm2.bias", "fc.weight", "fc.bias"]),
        ("all;!norm;!bias", ["stem.weight", "depthwise.weight", "fc.weight"]),
        ("!stem|fc|norm", ["depthwise.weight", "depthwise.bias"]),
        ("re:head|fc", ["fc.weight", "fc.bias"]),
    ],
)  # fmt: skip
def test_names(selection, expected):
    assert list(prepare(network(), selection).trainable) == expected


def test_a_tied_head_is_its_embedding():
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "mid": nn.Linear(3, 3), "out": nn.Linear(3, 5, bias=False)})
    module["out"].weight = module["embed"].weight
    assert list(prepare(module, "head").trainable) == ["embed.weight"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("", "selection is empty"),
        ("decoder", r"matches no parameter.*stem\.weight, norm1\.weight"),
        ("last:9", "only 5 modules with parameters: stem"),
        ("last:x", "whole number"),
        ("all;!.", "leaves no parameter"),
        ("fc(", "no regular expression"),
        ("lora:r=2,target=conv", r"matches no layer.*could match: fc"),
        ("lora:r=0", "r must be positive"),
        ("lora:rank=2", "unknown option rank"),
        ("sparse:fraction=0.5,dim=in,target=depthwise", r"matches no layer.*stem, fc"),
        ("sparse:fraction=1.5", "fraction below 1"),
        ("sparse:0.5", "KEY=VALUE"),
    ],
)
def test_wrong_selections_say_what_is_possible(selection, message):
    with pytest.raises(SelectionError, match=message):
        prepare(network(), selection)


@pytest.mark.parametrize("selection", ["norm", "stem"])
def test_partial_gradients_match_eager(selection):
    Step(network(), LOSS, batch(), selection).assert_matches_eager()


def test_frozen_parts_carry_no_backward():
    """With only the head learning, nothing of the convolutions' backward is in the graph."""
    steps = {selection: Step(network(), LOSS, batch(), selection) for selection in ("all", "head", "norm2")}
    counts = {selection: step.ops for selection, step in steps.items()}
    assert counts["head"].count("Conv") == 2
    assert "ConvTranspose" not in counts["head"]
    assert "BatchNormalization" not in counts["head"]
    assert "Conv" not in counts["all"]  # trainable ones are products
    # The forward of the head is one Gemm; its backward is one product. Those with ones are sums of rows.
    graph = steps["head"].model.graph
    ones = {array.name for array in graph.initializer if (numpy_helper.to_array(array) == 1).all()}
    products = [node for node in graph.node if node.op_type in {"Gemm", "MatMul"} and not ones & set(node.input)]
    assert [node.op_type for node in products] == ["Gemm", "MatMul"]
    assert len(counts["head"]) < len(counts["norm2"]) < len(counts["all"])
    assert "ConvTranspose" not in counts["norm2"]


def test_what_was_converted_is_said(tmp_path):
    path = export_bundle(network(), LOSS, batch(), trainable="norm1", out=tmp_path / "b")
    notes = " ".join(manifest_of(path).notes)
    assert "1 dropout" in notes
    assert "1 batch normalisations learn weight and bias with frozen statistics" in notes
    assert_step_matches(path, network(), LOSS, batch(), np.ones(3, np.float32))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, 12)
        self.block = CausalAttention()
        self.out = nn.Linear(12, 11)

    def forward(self, ids):
        return self.out(self.block(self.embed(ids)))


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def tokens(n=2, t=5):
    return torch.randint(11, (n, t)), torch.randint(11, (n, t))


def test_lora_starts_as_the_model_and_has_the_gradients_of_low_rank_factors(tmp_path):
    module, data = Language(), tokens()
    path = export_bundle(module, token_loss, data, trainable="lora:r=2,alpha=6,target=qkv", out=tmp_path / "b")
    manifest = manifest_of(path)
    assert [(e.name, e.shape) for e in manifest.parameters] == [
        ("block.qkv.lora_A", (2, 12)),
        ("block.qkv.lora_B", (36, 2)),
    ]
    vector = torch.randn(manifest.num_parameters) * 0.1
    A, B = vector[:24].view(2, 12).requires_grad_(), vector[24:].view(36, 2).requires_grad_()
    # By hand: the weight W + 6/2 B A in the user's own module.
    weight = module.block.qkv.weight.detach() + 3 * B @ A
    outputs = torch.func.functional_call(module, {"block.qkv.weight": weight}, data[0])
    total = token_loss(outputs, data[1]).sum()
    wanted = torch.autograd.grad(total, (A, B))
    weights = np.ones((2, 5), np.float32)
    got = run_graph(path, "step", vector.numpy(), data, weights)
    np.testing.assert_allclose(got["loss_sum"], total.detach(), rtol=1e-5)
    for name, want in zip(("A", "B"), wanted, strict=True):
        np.testing.assert_allclose(got[f"gradients.block.qkv.lora_{name}"], want, rtol=1e-3, atol=1e-5)
    inferred = run_graph(path, "infer", vector.numpy(), data, weights)["output"]
    np.testing.assert_allclose(inferred, outputs.detach(), rtol=1e-4, atol=1e-5)


def test_lora_on_a_weight_that_is_read_around_its_layer_is_refused():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.b(x @ self.a.weight)

    with pytest.raises(SelectionError, match=r"a\.lora_A has no influence"):
        export_bundle(Around(), LOSS, (torch.randn(2, 3), torch.tensor([0, 1])), trainable="lora:r=1", out="unused")


@pytest.fixture(scope="module")
def whole():
    """All gradients of the network, and the batch that gave them."""
    torch.manual_seed(0)
    data = batch()
    return Step(network(), LOSS, data).run(), data


@pytest.mark.parametrize(
    ("layer", "dim", "axis", "count"),
    [("fc", "out", 0, 2), ("fc", "in", 1, 4), ("stem", "in", 1, 1), ("stem", "out", 0, 4),
     ("depthwise", "out", 0, 4)],
)  # fmt: skip
def test_a_sparse_gradient_is_the_slice_of_the_whole(whole, layer, dim, axis, count):
    gradients, data = whole
    part = Step(network(), LOSS, data, f"sparse:fraction=0.5,dim={dim},target=^{layer}$")
    name = f"gradients.{layer}.weight"
    wanted = np.take(gradients[name], range(count), axis)
    np.testing.assert_allclose(part.run()[name], wanted, rtol=1e-4, atol=1e-6)


def test_the_manifest_names_sparse_channels(tmp_path):
    path = export_bundle(
        network(), LOSS, batch(), trainable="sparse:fraction=0.25,target=stem;fc.bias", out=tmp_path / "b"
    )
    manifest = manifest_of(path)
    assert manifest.frozen.sparse == {"stem.weight": (0, 1)}
    assert [(e.name, e.shape) for e in manifest.parameters] == [
        ("stem.weight", (2, 2, 3, 3)),
        ("fc.bias", (4,)),
    ]
