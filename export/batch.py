"""The example batch `(inputs, targets)`: its structure, and how it meets the module and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from edgetrain.export.errors import BatchError
from edgetrain.protocol.manifest import BatchSpec, Dtype, Structure, TensorSpec

Half = Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor]
"""The inputs or the targets: a tensor, a tuple of tensors, or a dict of tensors; dimension 0 is the batch."""

ExampleBatch = tuple[Half, Half]
"""`(inputs, targets)`."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(outputs, targets)` -> one loss per sample, [B], or per token, [B, T]."""

WEIGHTS = "weights"


@dataclass(frozen=True)
class HalfBatch:
    """One half of the example batch, taken apart."""

    name: Literal["inputs", "targets"]
    kind: Literal["array", "tuple", "dict"]
    keys: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """`inputs`, or `inputs.KEY` for each leaf."""
        return (self.name,) if self.kind == "array" else tuple(f"{self.name}.{key}" for key in self.keys)

    @property
    def structure(self) -> Structure:
        """The half as the manifest describes it."""
        specs = (tensor_spec(name, leaf) for name, leaf in zip(self.leaf_names, self.tensors, strict=True))
        return Structure(kind=self.kind, leaves=tuple(specs))

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """The half with these leaves, in the user's structure."""
        if self.kind == "array":
            return tensors[0]
        return tensors if self.kind == "tuple" else dict(zip(self.keys, tensors, strict=True))

    def call_arguments(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments of the module."""
        if self.kind == "dict":
            return (), dict(zip(self.keys, tensors, strict=True))
        return tensors, {}


@dataclass(frozen=True)
class Example:
    """The example batch at the size of the micro-batch."""

    inputs: HalfBatch
    targets: HalfBatch
    micro_batch: int

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The leaves of the inputs, then of the targets."""
        return self.inputs.tensors + self.targets.tensors

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """Names of `leaves`."""
        return self.inputs.leaf_names + self.targets.leaf_names

    def first(self, samples: int) -> Example:
        """The first samples alone."""
        inputs, targets = (
            replace(half, tensors=tuple(leaf[:samples] for leaf in half.tensors))
            for half in (self.inputs, self.targets)
        )
        return Example(inputs, targets, samples)

    def spec(self, weights: Tensor) -> BatchSpec:
        """The manifest's description, with weights of this shape."""
        return BatchSpec(
            inputs=self.inputs.structure,
            targets=self.targets.structure,
            weights=tensor_spec(WEIGHTS, weights),
        )


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Name, dtype and shape of a tensor.

    Raises:
        BatchError: a dtype that bundles do not carry.
    """
    return TensorSpec(name=name, dtype=dtype_name(tensor.dtype, name), shape=tuple(tensor.shape))


def dtype_name(dtype: torch.dtype, where: str) -> Dtype:
    """The manifest's name of a torch dtype.

    Raises:
        BatchError: bundles do not carry it; `where` says what has it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise BatchError(f"{where} is {name}; a bundle carries only {', '.join(get_args(Dtype))}: convert it")
    return name  # type: ignore[return-value]  # narrowed by the test above


def read_example(example_batch: Any, micro_batch: int | None) -> Example:
    """Checks the user's example batch and brings it to the micro-batch size by slicing or repeating.

    Args:
        example_batch: `(inputs, targets)`.
        micro_batch: samples per step; None for the size of the example.

    Raises:
        BatchError: wrong structure, sizes that differ, an unknown dtype, or a value that is not finite.
    """
    if not isinstance(example_batch, tuple | list) or len(example_batch) != 2:
        raise BatchError(
            f"the example batch must be a pair (inputs, targets), got {_describe(example_batch)}. "
            "Use () for targets if the loss needs none"
        )
    inputs = _read_half("inputs", example_batch[0])
    targets = _read_half("targets", example_batch[1])
    if not inputs.tensors:
        raise BatchError("the example batch has no inputs")
    sizes = {
        name: tensor.shape[0] if tensor.ndim else None
        for half in (inputs, targets)
        for name, tensor in zip(half.leaf_names, half.tensors, strict=True)
    }
    size = next(iter(sizes.values()))
    if size is None or size == 0 or any(other != size for other in sizes.values()):
        listed = ", ".join(f"{name}: {'a scalar' if n is None else n}" for name, n in sizes.items())
        raise BatchError(
            f"dimension 0 of every leaf must be the same batch size of at least 1, got {listed}. "
            "Tensors that do not grow with the batch belong into the module as buffers"
        )
    if micro_batch is not None and (isinstance(micro_batch, bool) or micro_batch < 1):
        raise BatchError(f"micro_batch is {micro_batch}, must be at least 1")
    target = micro_batch or size
    rows = torch.arange(target) % size
    inputs, targets = (
        replace(half, tensors=tuple(leaf[rows].contiguous() for leaf in half.tensors)) for half in (inputs, targets)
    )
    return Example(inputs, targets, target)


def batch_spec(example_batch: Any) -> BatchSpec:
    """The structure of an example batch, with a weight for each sample.

    Raises:
        BatchError: see `read_example`.
    """
    example = read_example(example_batch, None)
    return example.spec(torch.ones(example.micro_batch))


def as_tensors(batch: tuple[Any, Any]) -> ExampleBatch:
    """A batch of numpy arrays as one of tensors, in the same structure."""

    def convert(half: Any) -> Half:
        if isinstance(half, Mapping):
            return {key: torch.from_numpy(np.array(array)) for key, array in half.items()}
        if isinstance(half, tuple | list):
            return tuple(torch.from_numpy(np.array(array)) for array in half)
        return torch.from_numpy(np.array(half))

    return convert(batch[0]), convert(batch[1])


def _read_half(name: Literal["inputs", "targets"], half: Any) -> HalfBatch:
    if isinstance(half, Mapping):
        if not all(isinstance(key, str) for key in half):
            raise BatchError(f"the keys of the example's {name} must be strings, got {list(half)}")
        items, kind = dict(half), "dict"
    elif isinstance(half, tuple | list):
        items, kind = {str(index): leaf for index, leaf in enumerate(half)}, "tuple"
    else:
        items, kind = {"": half}, "array"
    tensors = tuple(_read_leaf(f"{name}.{key}" if key else name, leaf) for key, leaf in items.items())
    return HalfBatch(name, kind, tuple(items), tensors)  # type: ignore[arg-type]


def _read_leaf(name: str, given: Any) -> Tensor:
    if not isinstance(given, Tensor):
        raise BatchError(f"{name} of the example batch must be a torch.Tensor, got {_describe(given)}")
    leaf: Tensor = given.detach().cpu()
    if leaf.dtype == torch.float64:
        leaf = leaf.float()
    dtype_name(leaf.dtype, f"{name} of the example batch")
    if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        bad = int((~torch.isfinite(leaf)).sum())
        raise BatchError(
            f"{name} of the example batch holds {bad} values that are NaN or infinite (shape "
            f"{tuple(leaf.shape)}): gradients cannot be proven with it, give clean data"
        )
    return leaf


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def per_sample_loss(losses: Any, B: int) -> Tensor:
    """Checks what the loss returned: [B] or [B, T], floating point.

    Raises:
        BatchError: another shape, with the usual remedy.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise BatchError(f"the loss must return a floating-point tensor, got {_describe(losses)}")
    if losses.ndim == 0:
        raise BatchError(
            "the loss returned one number for the whole batch; it must give one loss per sample, "
            f"[{B}], or per token, [{B}, T]. For the losses of torch: reduction='none'"
        )
    if losses.ndim > 2 or losses.shape[0] != B:
        raise BatchError(
            f"the loss returned shape {tuple(losses.shape)}; it must be [{B}] (one per sample) or [{B}, T] "
            "(one per token). Use reduction='none' and average over the other dimensions, "
            "e.g. losses.flatten(1).mean(1)"
        )
    return losses


def logits_of(outputs: Any) -> Any:
    """The logits, if the outputs are or have them; else the outputs as they are."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def flatten_outputs(outputs: Any) -> dict[str, Tensor]:
    """The module's outputs by name: `output`, or the keys, fields or indices of a container.

    Raises:
        BatchError: no tensor among them.
    """
    found: dict[str, Tensor] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[prefix or "output"] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), item)
        elif hasattr(value, "_asdict"):
            visit(prefix, value._asdict())
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                visit(f"{prefix or 'output'}.{index}", item)
        elif hasattr(value, "__dataclass_fields__"):
            visit(prefix, {name: getattr(value, name) for name in value.__dataclass_fields__})

    visit("", outputs)
    if not found:
        raise BatchError(f"the module returned no tensor but {_describe(outputs)}")
    return found


def call_module(module: nn.Module, state: Mapping[str, Tensor], example: Example, inputs: tuple[Tensor, ...]) -> Any:
    """`module(*inputs)` with the parameters named in `state` replaced, wherever they are tied or shared."""
    args, kwargs = example.inputs.call_arguments(inputs)
    with replaced(module, state):
        return module(*args, **kwargs)


@contextmanager
def replaced(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the tensors of `state` in place of the parameters of these names, also tied or shared ones."""
    # torch.func.functional_call would leave the replacement behind in a module that is registered twice.
    canonical = {id(parameter): name for name, parameter in module.named_parameters()}
    places = [
        (part._parameters, key, parameter)  # noqa: SLF001
        for part in module.modules()
        for key, parameter in part._parameters.items()  # noqa: SLF001
        if parameter is not None and canonical[id(parameter)] in state
    ]
    for parameters, key, parameter in places:
        parameters[key] = state[canonical[id(parameter)]]  # type: ignore[assignment]
    try:
        yield
    finally:
        for parameters, key, parameter in places:
            parameters[key] = parameter
