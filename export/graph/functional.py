"""The second way to a trace, for modules that the first cannot take.

`torch.export` sees through guards on data-independent values, frees the forward of in-place writes to views
and takes large operators apart *before* autograd differentiates them, so that no exotic backward operator
arises.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions

from edgetrain.export.graph.joint import Problem
from edgetrain.export.prepare import plain_math
from edgetrain.export.quiet import quiet

# Decomposing these would lose the closed form of their backward for nothing.
_KEPT = ("convolution", "native_layer_norm", "native_group_norm", "native_batch_norm", "embedding")


def functional_problem(problem: Problem) -> Problem:
    """The same problem with the module replaced by its functional, decomposed graph.

    Raises:
        Exception: whatever torch.export raises about control flow that it cannot follow.
    """
    example = problem.example
    args, kwargs = example.inputs.call_arguments(example.inputs.tensors)
    table = {
        op: rule
        for op, rule in dict(core_aten_decompositions()).items()
        if not op._schema.name.removeprefix("aten::").startswith(_KEPT)  # noqa: SLF001
    }
    table[torch.ops.aten.copy.default] = _copy
    prepared = problem.prepared

    def decomposed(module: nn.Module) -> nn.Module:
        exported = torch.export.export(module, args, kwargs, strict=False)
        graph: nn.Module = exported.run_decompositions(table).module(check_guards=False)
        return graph.requires_grad_(False)

    with plain_math(prepared.module), torch.no_grad(), quiet():
        module = decomposed(prepared.module)
        base = module if prepared.base is prepared.module else decomposed(prepared.base)
    return replace(problem, prepared=replace(prepared, module=module, base=base))


def _copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What in-place writes become; autograd knows the parts but not the whole."""
    del non_blocking
    return source.to(destination.dtype).expand(destination.shape).clone()
