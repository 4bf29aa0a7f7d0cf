"""Terms of a selection that change the model: low-rank adapters and slices of weights.

- `lora:r=8,alpha=16,target=REGEX`: y + alpha/r · B(A x) beside each matching linear layer, whose own weight
  stays frozen. A is random, B zero, so training starts from the given model. (Hu et al. 2021,
  arXiv:2106.09685.)
- `sparse:fraction=0.25,dim=out,target=REGEX`: only the first share of the output (`dim=out`) or input
  (`dim=in`) channels of each matching layer's weight learns; its gradient is computed for that slice alone.
  (The sparse tensor update of Lin et al. 2022, arXiv:2206.15472.)

`target` comes last and is searched in module paths; without it every layer that fits is meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from edgetrain.export.errors import SelectionError

Weights = dict[str, Tensor]


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
    return term.partition(":")[0] in ("lora", "sparse")


def read_options(term: str) -> dict[str, str]:
    """KEY=VALUE pairs after the colon, separated by commas; `target` takes the rest of the term.

    Raises:
        SelectionError: something else stands there.
    """
    options: dict[str, str] = {}
    rest = term.partition(":")[2]
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals:
            raise SelectionError(f"selection term {term!r}: expected KEY=VALUE, found {key!r}")
        if key.strip() == "target":
            options["target"] = rest
            break
        options[key.strip()], _, rest = rest.partition(",")
    return options


def number(term: str, options: dict[str, str], key: str, default: float) -> float:
    """Takes a positive number out of the options.

    Raises:
        SelectionError: it is none.
    """
    text = options.pop(key, None)
    try:
        value = default if text is None else float(text)
    except ValueError:
        raise SelectionError(f"selection term {term!r}: {key} must be a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise SelectionError(f"selection term {term!r}: {key} must be positive, got {text}")
    return value


def targets(module: nn.Module, term: str, options: dict[str, str], fits: Callable[[nn.Module], bool]) -> list[str]:
    """Paths of the layers that fit and that `target` names; no other option may be left.

    Raises:
        SelectionError: one is, `target` is no regular expression, or no layer fits; the message lists those that would.
    """
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


def is_transposed(part: nn.Module) -> bool:
    """The linear layer of GPT-2 in transformers, whose weight is [in, out]."""
    return type(part).__name__ == "Conv1D" and type(part).__module__.startswith("transformers.")


def is_linear(part: nn.Module) -> bool:
    """Whether an adapter can stand beside a layer."""
    # Subclasses are left out: attention reads the weight of some without calling them.
    return type(part) is nn.Linear or is_transposed(part)


def join(path: str, name: str) -> str:
    """The name of a parameter by its module's path."""
    return f"{path}.{name}" if path else name
