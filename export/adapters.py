"""Terms of a selection that change the model: low-rank adapters and slices of weights.

- `lora:r=8,alpha=16,target=REGEX`: y + alpha/r · B(A x) beside each matching linear layer, whose own weight stays
  frozen. A is random, B zero, so training starts from the given model. (Hu et al. 2021, arXiv:2106.09685.)
- `sparse:fraction=0.25,dim=out,target=REGEX`: only the first share of the output (`dim=out`) or input (`dim=in`)
  channels of each matching layer's weight learns; its gradient is computed for that slice alone. (The sparse
  tensor update of Lin et al. 2022, arXiv:2206.15472.)

`target` comes last and is searched in module paths; without it every layer that fits is meant.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.export.errors import SelectionError

Weights = dict[str, Tensor]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass
class Adapters:
    """What was added to a module, and how to get an ordinary model back."""

    # Selection term -> the parameters that it lets learn.
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # Weight name -> channels that learn.
    sparse: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # Each takes the trainable parameters that it knows out of the dict and puts an original weight in.
    merges: list[Callable[[Weights], None]] = field(default_factory=list)

    def merged(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Trained parameters as weights of the module without adapters."""
        weights = dict(parameters)
        for merge in self.merges:
            merge(weights)
        return weights


def is_adapter_term(term: str) -> bool:
    """Whether a selection term adds something to the model."""
    return term.startswith(("lora:", "sparse:")) or term in ("lora", "sparse")


def add_adapters(module: nn.Module, term: str, adapters: Adapters) -> None:
    """Changes `module` as a `lora:` or `sparse:` term says.

    Raises:
        SelectionError: the term cannot be read or no layer fits; the message lists those that would.
    """
    kind, _, text = term.partition(":")
    options = _options(term, text)
    if kind == "lora":
        names = _add_lora(module, term, options, adapters)
    else:
        names = _add_slices(module, term, options, adapters)
    adapters.names[term] = tuple(names)


def _options(term: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    rest = text
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals:
            raise SelectionError(f"selection term {term!r}: expected KEY=VALUE, found {key!r}")
        if key.strip() == "target":
            options["target"] = rest
            break
        options[key.strip()], _, rest = rest.partition(",")
    return options


def _number(term: str, options: dict[str, str], key: str, default: float) -> float:
    text = options.pop(key, None)
    try:
        value = default if text is None else float(text)
    except ValueError:
        raise SelectionError(f"selection term {term!r}: {key} must be a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise SelectionError(f"selection term {term!r}: {key} must be positive, got {text}")
    return value


def _targets(
    module: nn.Module, term: str, options: dict[str, str], fits: Callable[[nn.Module], bool]
) -> list[str]:
    target = options.pop("target", "")
    if options:
        raise SelectionError(f"selection term {term!r}: unknown option {', '.join(sorted(options))}")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise SelectionError(f"selection term {term!r}: target is no regular expression: {error}") from error
    possible = [path for path, part in module.named_modules() if fits(part)]
    found = [path for path in possible if pattern.search(path)]
    if not found:
        shown = ", ".join(path or "(the model itself)" for path in possible[:40]) or "none in this model"
        raise SelectionError(f"selection term {term!r} matches no layer. Layers that it could match: {shown}")
    return found


def _is_transposed(part: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is [in, out]."""
    return type(part).__name__ == "Conv1D" and type(part).__module__.startswith("transformers.")


def _is_linear(part: nn.Module) -> bool:
    # Subclasses are left out: attention reads the weight of some without calling them.
    return type(part) is nn.Linear or _is_transposed(part)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _add_lora(module: nn.Module, term: str, options: dict[str, str], adapters: Adapters) -> list[str]:
    r = _number(term, options, "r", 8)
    alpha = _number(term, options, "alpha", 2 * r)
    if r != int(r):
        raise SelectionError(f"selection term {term!r}: r must be a whole number, got {r}")
    names: list[str] = []
    for path in _targets(module, term, options, _is_linear):
        layer = module.get_submodule(path)
        if hasattr(layer, "lora_A"):
            raise SelectionError(f"selection term {term!r}: {path} has an adapter already")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        transposed = _is_transposed(layer)
        n_out, n_in = reversed(weight.shape) if transposed else weight.shape
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(n_in)
        A = torch.empty(int(r), n_in).uniform_(-bound, bound, generator=generator)
        layer.register_parameter("lora_A", nn.Parameter(A))
        layer.register_parameter("lora_B", nn.Parameter(torch.zeros(n_out, int(r))))
        layer.register_forward_hook(_lora_hook(alpha / r))
        names += [_join(path, "lora_A"), _join(path, "lora_B")]
        adapters.merges.append(_merge_lora(path, weight.detach(), alpha / r, transposed=transposed))
    return names


def _lora_hook(scale: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], layer.lora_A), layer.lora_B) * scale  # type: ignore[arg-type]

    return add


def _merge_lora(path: str, frozen: Tensor, scale: float, *, transposed: bool) -> Callable[[Weights], None]:
    def merge(weights: Weights) -> None:
        A, B = weights.pop(_join(path, "lora_A")), weights.pop(_join(path, "lora_B"))
        weight = weights.get(_join(path, "weight"), frozen)
        change = torch.matmul(B, A) * scale
        weights[_join(path, "weight")] = weight + (change.T if transposed else change)

    return merge


class SlicedLayer(nn.Module):
    """A linear layer or convolution whose weight is a part that learns and a part that does not.

    Args:
        layer: the original.
        count: channels that learn, the first ones.
        axis: dimension of the weight that is cut.
    """

    def __init__(self, layer: nn.Module, count: int, axis: int, *, outputs: bool) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.weight = nn.Parameter(weight.detach().narrow(axis, 0, count).clone())
        self.register_buffer("rest", weight.detach().narrow(axis, count, weight.shape[axis] - count).clone())
        self.bias = layer.bias
        self.outputs = outputs
        self.channels_last = type(layer) not in _CONVOLUTIONS
        self.transposed = _is_transposed(layer)
        self.groups = 1
        if not self.channels_last:
            self.convolution = _CONVOLUTIONS[type(layer)]
            self.groups = layer.groups  # type: ignore[assignment]
            self.options = (layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """As the original layer."""
        axis = -1 if self.channels_last else 1
        learning, frozen = self.weight, self.rest
        assert isinstance(frozen, Tensor)
        if not self.outputs:
            count = x.shape[axis] - frozen.shape[0 if self.transposed else 1]
            first, second = x.narrow(axis, 0, count), x.narrow(axis, count, x.shape[axis] - count)
            y = self._apply(first, learning, 1) + self._apply(second, frozen, 1)
        elif self.groups == 1:
            y = torch.cat([self._apply(x, learning, 1), self._apply(x, frozen, 1)], axis)
        else:
            groups = self.groups * learning.shape[0] // (learning.shape[0] + frozen.shape[0])
            count = groups * learning.shape[1]
            first, second = x.narrow(1, 0, count), x.narrow(1, count, x.shape[1] - count)
            y = torch.cat(
                [self._apply(first, learning, groups), self._apply(second, frozen, self.groups - groups)], 1
            )
        if self.bias is None:
            return y
        return y + (self.bias if self.channels_last else self.bias.view(-1, *[1] * (y.ndim - 2)))

    def _apply(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.channels_last:
            return x @ weight if self.transposed else F.linear(x, weight)
        stride, padding, dilation = self.options
        return self.convolution(x, weight, None, stride, padding, dilation, groups)


def _add_slices(module: nn.Module, term: str, options: dict[str, str], adapters: Adapters) -> list[str]:
    fraction = _number(term, options, "fraction", 0.25)
    dim = options.pop("dim", "out")
    if dim not in ("in", "out") or fraction >= 1:
        raise SelectionError(f"selection term {term!r}: dim must be in or out, and fraction below 1")
    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():  # noqa: SLF001
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def fits(part: nn.Module) -> bool:
        if not (_is_linear(part) or type(part) in _CONVOLUTIONS) or owners[id(part.weight)] > 1:
            return False
        plain = getattr(part, "padding_mode", "zeros") == "zeros"
        groups = getattr(part, "groups", 1)
        shape = part.weight.shape  # type: ignore[union-attr]
        axis = int((dim == "in") != _is_transposed(part))
        return (
            plain
            and (groups == 1 or dim == "out")
            and shape[axis] // (shape[0] // groups if groups > 1 else 1) > 1
        )

    names: list[str] = []
    for path in _targets(module, term, options, fits):
        layer = module.get_submodule(path)
        if not path:
            raise SelectionError(f"selection term {term!r}: the model is itself a layer; wrap it in a module")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        axis = int((dim == "in") != _is_transposed(layer))
        groups = getattr(layer, "groups", 1)
        step = weight.shape[0] // groups if groups > 1 else 1
        units = weight.shape[axis] // step
        count = step * min(max(round(fraction * units), 1), units - 1)
        sliced = SlicedLayer(layer, count, axis, outputs=dim == "out")
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, sliced)
        name = _join(path, "weight")
        names.append(name)
        adapters.sparse[name] = tuple(range(count))
        adapters.merges.append(_merge_slice(name, sliced.rest, axis))  # type: ignore[arg-type]
    return names


def _merge_slice(name: str, rest: Tensor, axis: int) -> Callable[[Weights], None]:
    def merge(weights: Weights) -> None:
        weights[name] = torch.cat([weights[name], rest], axis)

    return merge
