"""Norms and clipped sums of products, without the products."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.graph.ghost import use_ghost_norms


def clipped(x, y, factors, *, transposed):
    product = torch.bmm(x, y)
    flat = (product.permute(0, 2, 1) if transposed else product).flatten(1)
    return (flat * flat).sum(1), factors @ flat


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "saves"), [(1, True), (3, True), (20, False)])
def test_the_numbers_stay_and_the_products_go(tokens, saves, transposed):
    generator = torch.Generator().manual_seed(tokens)
    x, y = torch.randn(4, 12, tokens, generator=generator), torch.randn(4, tokens, 9, generator=generator)
    factors = torch.rand(4, generator=generator)
    module = make_fx(lambda *inputs: clipped(*inputs, transposed=transposed))(x, y, factors)
    use_ghost_norms(module)
    for got, wanted in zip(module(x, y, factors), clipped(x, y, factors, transposed=transposed), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    sizes = {tuple(node.meta["val"].shape) for node in module.graph.nodes if "val" in node.meta}
    # With many tokens, the product is smaller than what would replace it.
    assert ((4, 12, 9) in sizes) is not saves


def test_a_product_that_is_used_otherwise_stays():
    x, y, factors = torch.randn(4, 12, 1), torch.randn(4, 1, 9), torch.rand(4)

    def function(x, y, factors):
        product = torch.bmm(x, y)
        return (product.flatten(1) * product.flatten(1)).sum(1), product.exp(), factors @ product.flatten(1)

    module = make_fx(function)(x, y, factors)
    use_ghost_norms(module)
    for got, wanted in zip(module(x, y, factors), function(x, y, factors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_sums_over_nothing_become_views():
    module = make_fx(lambda x: x.sum(0))(torch.randn(1, 3, 4))
    use_ghost_norms(module)
    assert not any(node.target is torch.ops.aten.sum.dim_IntList for node in module.graph.nodes)
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(module(x), x[0])
