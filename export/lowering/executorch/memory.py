"""Where in the arena each tensor lies: the largest first, each in the smallest gap that fits.

Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference" (arXiv:2001.03288), greedy by
size: unlike ExecuTorch's own algorithm, tensors may lie anywhere, not only in blocks that the largest ones opened.
Several orders are tried; the smallest arena wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from executorch.exir.memory_planning import MemoryAlgoResult, SpecAllocResult, greedy


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
