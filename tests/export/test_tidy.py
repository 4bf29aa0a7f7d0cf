"""What a trace is turned into before it is lowered."""

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.graph.decompositions import common
from edgetrain.export.graph.fold import fold_batch_norms
from edgetrain.export.graph.tidy import simplify

aten = torch.ops.aten


def graph_of(function, *values):
    return make_fx(function, decomposition_table=common())(*values)


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def test_views_become_reshapes_since_strides_differ_between_traces():
    module = graph_of(lambda x: x.view(6) * 2, torch.ones(2, 3))
    module.graph.output_node().args = ((module.graph.output_node().args[0],),)
    simplify(module)
    assert aten.view.default not in targets(module)
    # Runs on strides that a view refuses.
    assert module(torch.arange(6.0).view(3, 2).T)[0].tolist() == [0, 4, 8, 2, 6, 10]


def test_every_output_has_a_node_of_its_own():
    module = graph_of(lambda x: (x, x + 1, x.detach()), torch.ones(2))
    module.graph.output_node().args = (tuple(module.graph.output_node().args[0]),)
    simplify(module)
    outputs = module.graph.output_node().args[0]
    assert len(set(outputs)) == 3
    assert all(node.op == "call_function" for node in outputs)
    assert aten.detach.default not in targets(module)


def test_a_frozen_norm_is_folded_only_where_nothing_else_reads_the_convolution():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    for parameter in (*conv.parameters(), *norm.parameters()):
        parameter.requires_grad_(False)
    x = torch.randn(2, 2, 5, 5)
    alone = graph_of(lambda x: norm(conv(x)), x)
    assert fold_batch_norms(alone) == 1
    assert aten.native_batch_norm.default not in targets(alone)
    torch.testing.assert_close(alone(x), norm(conv(x)))

    def twice(x):
        y = conv(x)
        return norm(y) + y

    shared = graph_of(twice, x)
    assert fold_batch_norms(shared) == 0
