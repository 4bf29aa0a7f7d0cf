"""The program of one slice made into that of a whole micro-batch, instruction by instruction.

An ExecuTorch program is a list of instructions on numbered values, which lie where its memory plan says. For every
slice, its samples are copied to where the instructions read them, and the same instructions follow. Those of the first
slice write their results to the sums, those of the others write to where they always have, and are added.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch.exir.schema import (
    AllocationDetails,
    DelegateCall,
    EValue,
    ExecutionPlan,
    Instruction,
    Int,
    KernelCall,
    Operator,
)
from executorch.exir.tensor import get_scalar_type

from edgetrain.export.lowering.executorch.compile import Compiled
from edgetrain.export.lowering.executorch.slices import Slices

# XNNPACK likes addresses that are multiples of it.
_ALIGNMENT = 64
_VIEW = "executorch_prim::et_view"


def unroll(compiled: Compiled, slices: Slices) -> Compiled | None:
    """The program that takes a whole micro-batch; None if one of its results is no tensor that it computes.

    Args:
        compiled: the program of one slice, all of whose results are sums over samples.
        slices: how many, and which of its inputs have a row for each sample.
    """
    file = deserialize_pte_binary(compiled.data)
    (plan,) = file.program.execution_plan
    if not _computes_results(plan):
        return None
    _Unrolling(plan, slices).run()
    data = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
    return Compiled(data, sum(plan.non_const_buffer_sizes), compiled.external)


def _computes_results(plan: ExecutionPlan) -> bool:
    (chain,) = plan.chains
    calls = [instruction.instr_args for instruction in chain.instructions]
    if not all(isinstance(call, KernelCall | DelegateCall) for call in calls):
        return False
    views = {c.args[-1] for c in calls if isinstance(c, KernelCall) and plan.operators[c.op_index].name == _VIEW}
    touched = {value for call in calls for value in call.args}
    return all(
        plan.values[result].val.allocation_info is not None
        and result in touched
        and result not in views
        and result not in plan.inputs
        for result in plan.outputs
    )


class _Unrolling:
    """One plan while it changes."""

    def __init__(self, plan: ExecutionPlan, slices: Slices) -> None:
        self._plan = plan
        self._count = slices.count
        self._integers: dict[int, int] = {}
        # What the program is given in place of a value, and where sums are in place of one.
        self._wholes = {plan.inputs[i]: self._whole(plan.inputs[i]) for i in slices.inputs}
        self._sums = {result: self._sum(result) for result in plan.outputs}

    def run(self) -> None:
        """Changes the plan."""
        plan = self._plan
        (chain,) = plan.chains
        one_slice, chain.instructions = chain.instructions, []
        for index in range(self._count):
            for part, whole in self._wholes.items():
                rows = plan.values[part].val.sizes[0]
                bounds = (self._integer(rows * index), self._integer(rows * (index + 1)))
                self._call("aten::slice_copy", "Tensor_out", whole, self._integer(0), *bounds, self._integer(1), part)
            for instruction in map(deepcopy, one_slice):
                call: Any = instruction.instr_args
                if index == 0:
                    call.args = [self._sums.get(value, value) for value in call.args]
                chain.instructions.append(instruction)
            for result, sum_ in self._sums.items() if index else ():
                self._call("aten::add", "out", sum_, result, self._integer(1), sum_)
        plan.inputs = [self._wholes.get(value, value) for value in plan.inputs]
        plan.outputs = [self._sums[value] for value in plan.outputs]

    def _whole(self, part: int) -> int:
        """An input with the rows of all slices; the one slice gets memory of its own."""
        tensor: Any = self._plan.values[part].val
        whole = deepcopy(tensor)
        whole.sizes[0] *= self._count
        self._place(tensor)
        return self._new(whole)

    def _sum(self, result: int) -> int:
        tensor = deepcopy(self._plan.values[result].val)
        self._place(tensor)
        return self._new(tensor)

    def _place(self, tensor: Any) -> None:
        """Gives a tensor memory behind all others."""
        sizes = self._plan.non_const_buffer_sizes
        offset = -(-sizes[1] // _ALIGNMENT) * _ALIGNMENT
        tensor.allocation_info = AllocationDetails(1, offset % (1 << 32), offset >> 32)
        sizes[1] = offset + math.prod(tensor.sizes) * get_scalar_type(tensor.scalar_type).itemsize

    def _new(self, value: Any) -> int:
        self._plan.values.append(EValue(value))
        return len(self._plan.values) - 1

    def _integer(self, value: int) -> int:
        if value not in self._integers:
            self._integers[value] = self._new(Int(value))
        return self._integers[value]

    def _call(self, name: str, overload: str, *args: int) -> None:
        """A kernel whose last argument is the result, which ExecuTorch wants twice."""
        operators = self._plan.operators
        operator = Operator(name, overload)
        if operator not in operators:
            operators.append(operator)
        call = KernelCall(operators.index(operator), [*args, args[-1]])
        self._plan.chains[0].instructions.append(Instruction(call))
