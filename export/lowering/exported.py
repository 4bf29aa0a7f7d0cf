"""A traced graph as torch's ExportedProgram, without `torch.export`, which would trace it once more."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree


def exported(module: fx.GraphModule, example: Sequence[Tensor]) -> ExportedProgram:
    """The program of a graph without effects, whose calls are operators. Shares its constants; the graph is a copy.

    Args:
        module: takes tensors and returns some, and holds nothing but constants.
        example: its inputs.

    Raises:
        SpecViolationError: something else is called.
    """
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    graph.eliminate_dead_code()
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example)
    names = _lift_constants(graph)
    constants = {name: attrgetter(name)(module) for name in names.values()}
    inputs = [_input(node, names.get(node), constants) for node in graph.find_nodes(op="placeholder")]
    results: Any = tuple(pytree.tree_leaves(graph.output_node().args[0]))
    graph.output_node().args = (results,)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    arguments: tuple[Any, dict[str, Any]] = (tuple(example), {})
    calls = ModuleCallSignature([], [], pytree.tree_structure(arguments), pytree.tree_structure(results))
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=constants,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", calls)],
        example_inputs=arguments,
    )


def _lift_constants(graph: fx.Graph) -> dict[fx.Node, str]:
    """Makes constants the first inputs, in place. Returns which is which."""
    lifted: dict[str, fx.Node] = {}
    for node in reversed(list(graph.find_nodes(op="placeholder"))):
        next(iter(graph.nodes)).prepend(node)
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            with graph.inserting_before():
                lifted[node.target] = graph.placeholder(f"c_{node.target.replace('.', '_')}")
            lifted[node.target].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    return {node: name for name, node in lifted.items()}


def _input(node: fx.Node, name: str | None, constants: Mapping[str, Tensor]) -> InputSpec:
    argument = TensorArgument(node.name)
    if name is None:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    if isinstance(constants[name], torch.nn.Parameter):
        return InputSpec(InputKind.PARAMETER, argument, name)
    return InputSpec(InputKind.BUFFER, argument, name, persistent=True)
