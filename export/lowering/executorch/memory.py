"""Where in the arena each tensor lies: the largest first, each in the smallest gap that fits.

Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference" (arXiv:2001.03288), greedy by
size: unlike ExecuTorch's own algorithm, tensors may lie anywhere, not only in blocks that the largest ones opened.
Several orders are tried; the smallest arena wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import memory
from executorch.exir.memory_planning import (
    MemoryAlgoResult,
    MemoryPlanningAlgorithmSuite,
    SpecAllocResult,
    greedy,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.tensor import TensorSpec
from torch import fx

from edgetrain.export.lowering.executorch.pieces import is_piece


@dataclass(frozen=True)
class Block:
    """One tensor: its bytes, and the first and last instruction that touches it."""

    size: int
    first: int
    last: int


# What decides who is placed earlier; all have put long-lived or large blocks first.
_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda block: (-block.size, block.first),
    lambda block: (-block.size * (block.last - block.first + 1), block.first),
    lambda block: (block.first - block.last, -block.size),
    lambda block: (block.first, -block.size),
    lambda block: (-block.last, -block.size),
)


def place(blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Offsets of blocks such that no two that live at the same time overlap, and the arena's size."""
    tried = []
    for order in _ORDERS:
        offsets = _place_in_order(blocks, sorted(range(len(blocks)), key=lambda i: order(blocks[i])))
        tried.append((max((offsets[i] + block.size for i, block in enumerate(blocks)), default=0), offsets))
    size, offsets = min(tried, key=lambda pair: pair[0])
    return offsets, size


def least(blocks: Sequence[Block]) -> int:
    """What is alive at the worst moment: no arena can be smaller."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.first] = changes.get(block.first, 0) + block.size
        changes[block.last + 1] = changes.get(block.last + 1, 0) - block.size
    alive = worst = 0
    for when in sorted(changes):
        alive += changes[when]
        worst = max(worst, alive)
    return worst


def _place_in_order(blocks: Sequence[Block], order: Sequence[int]) -> list[int]:
    offsets = [0] * len(blocks)
    # Of what is placed: offset, index; by offset.
    placed: list[tuple[int, int]] = []
    for index in order:
        block = blocks[index]
        best, end = None, 0
        for offset, other_index in placed:
            other = blocks[other_index]
            if block.last < other.first or other.last < block.first:
                continue
            gap = offset - end
            if gap >= block.size and (best is None or gap < best[0]):
                best = gap, end
            end = max(end, offset + other.size)
        offsets[index] = end if best is None else best[1]
        placed.append((offsets[index], index))
        placed.sort()
    return offsets


class Planning(MemoryPlanningPass):  # type: ignore[misc]  # executorch is untyped
    """ExecuTorch's memory planning, by `best_fit` where that is better, with pieces in what they are pieces of.

    Args:
        held_inputs: the program holds some of its inputs itself.
    """

    def __init__(self, *, held_inputs: bool) -> None:
        # Inputs are the caller's memory, but for parameters that the program holds, which count as inputs too. Outputs
        # would be the caller's as well, but the stock Module of phone apps cannot say where.
        super().__init__(
            memory_planning_algo=MemoryPlanningAlgorithmSuite([greedy, best_fit]),
            alloc_graph_input=held_inputs,
            alloc_graph_output=True,
        )

    def run(self, graph_module: fx.GraphModule, graph_signature: Any = None) -> Any:
        """See `MemoryPlanningPass`."""
        pieces = _pieces(graph_module)
        result = super().run(graph_module, graph_signature)
        for piece in pieces.values():
            piece.place()
        return result


@dataclass(frozen=True)
class _Piece:
    """A tensor that lies in another one, from a byte on."""

    spec: TensorSpec
    whole: TensorSpec
    start: int

    def place(self) -> None:
        """Once the whole has its place."""
        self.spec.mem_id, self.spec.mem_obj_id = self.whole.mem_id, self.whole.mem_obj_id
        self.spec.mem_offset = self.whole.mem_offset + self.start


def _pieces(module: fx.GraphModule) -> dict[fx.Node, _Piece]:
    """Makes views of what is a piece of planned memory, in place: ExecuTorch plans and computes nothing for these."""
    results = set(module.graph.output_node().all_input_nodes)
    pieces: dict[fx.Node, _Piece] = {}
    for node in list(module.graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target == memory.view and source in pieces:
            # ExecuTorch holds the memory of what a view is of.
            node.replace_input_with(source, source.args[0])
            continue
        if node.target != torch.ops.aten.as_strided_copy.out or not is_piece(node):
            continue
        start = node.args[3] * node.meta["val"].element_size()
        whole = source
        while whole.target == memory.view:
            start += pieces[whole].start if whole in pieces else 0
            whole = whole.args[0]
        piece = _Piece(node.meta["spec"], whole.meta.get("spec"), start)
        leaves = {whole, node, *(user for user in node.users if user.target == memory.view)} & results
        if whole.op != "call_function" or leaves or not _fits(piece):
            continue
        place = node.kwargs["out"]
        node.target, node.args, node.kwargs = memory.view, (whole, node.args[1]), {}
        module.graph.erase_node(place)
        pieces[node] = piece
    return pieces


def _fits(piece: _Piece) -> bool:
    whole = piece.whole
    return isinstance(whole, TensorSpec) and not whole.const and piece.start + piece.spec.nbytes() <= whole.nbytes()


def best_fit(
    alignment: int, specs: Any, graph_module: Any, graph_signature: Any, extra_padding: int = 0
) -> MemoryAlgoResult:
    """`place` as ExecuTorch's memory planning calls it; arguments as of its `greedy`."""
    known = list(specs)
    before = getattr(graph_module, "input_mem_buffer_sizes", None) or []
    if not known or any(before) or any(s.storage_base is not None or s.mem_id not in (None, 1) for s in known):
        result: MemoryAlgoResult = greedy(alignment, specs, graph_module, graph_signature, extra_padding)
        return result
    for spec in known:
        spec.realign(alignment)
    offsets, size = place([Block(spec.allocated_memory, *spec.lifetime) for spec in known])
    places = {
        spec: SpecAllocResult(mem_id=1, mem_obj_id=index, mem_offset=offset)
        for index, (spec, offset) in enumerate(zip(known, offsets, strict=True))
    }
    return MemoryAlgoResult(places, [0, size + extra_padding])
