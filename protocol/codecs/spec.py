"""The name of a codec: `topk:0.01|int8:block=256|rice|huffman`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgetrain.protocol.codecs import wrap
from edgetrain.protocol.errors import CodecError

Select = Literal["dense", "topk", "randk", "threshold"]
Quantize = Literal["float32", "float16", "int8", "int4", "sign", "ternary"]
Block = int | Literal["all", "tensor"]

_STAGES = (
    ("dense", "topk", "randk", "threshold"),
    ("float32", "float16", "int8", "int4", "sign", "ternary"),
    ("rice", "raw"),
    ("huffman", "packed"),
    ("zstd",),
)
DEFAULT_BLOCK = 256


def supported_stages() -> frozenset[str]:
    """Names of the stages that this process can encode and decode; zstd needs a library."""
    names = frozenset(name for group in _STAGES for name in group)
    return names if wrap.available() else names - {"zstd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSpec:
    """A pipeline. `str(spec)` is its canonical name and `CodecSpec.parse` the inverse.

    Attributes:
        select: which entries are sent.
        amount: topk, randk: a float in (0, 1] for a share of all entries, rounded and at least one, or an int
            for a count. threshold: entries with an absolute value above it.
        per_tensor: topk takes its share or count of every tensor instead of the whole vector.
        quantize: how a value is written. `ternary` is `sign` with one scale for all (Sattler et al. 2019).
        block: int8, int4, sign, ternary: the number of consecutive sent values that share a scale, "all", or
            "tensor" for one scale per tensor.
        stochastic: int8, int4: round up or down at random without bias, instead of to nearest.
        index: `rice`, or `raw` for 32-bit positions.
        values: int8, int4: `huffman` where that is smaller, or always `packed`.
        zstd: compress the rest where that is smaller.
    """

    select: Select = "dense"
    amount: float | None = None
    per_tensor: bool = False
    quantize: Quantize = "float32"
    block: Block = DEFAULT_BLOCK
    stochastic: bool = False
    index: Literal["rice", "raw"] = "rice"
    values: Literal["huffman", "packed"] = "huffman"
    zstd: bool = False

    def __post_init__(self) -> None:
        needs_amount = self.select != "dense"
        if needs_amount != (self.amount is not None):
            raise CodecError(
                f"codec stage {self.select!r} "
                + ("needs a number, e.g. 'topk:0.01'" if needs_amount else "takes no number")
            )
        if self.amount is not None:
            _check_amount(self.select, self.amount)
        if self.per_tensor and self.select != "topk":
            raise CodecError(f"codec stage {self.select!r}: only topk can be per=tensor")
        if isinstance(self.block, int) and not 1 <= self.block < 2**32:
            raise CodecError(f"codec stage {self.quantize!r}: a block has 1 to 2^32 - 1 values, not {self.block}")
        if self.stochastic and self.quantize not in ("int8", "int4"):
            raise CodecError(f"codec stage {self.quantize!r}: only int8 and int4 can be stochastic")
        if self.quantize == "ternary" and self.select == "dense":
            raise CodecError("codec stage 'ternary' needs a selection before it, e.g. 'topk:0.01|ternary'")

    @classmethod
    def parse(cls, text: str) -> CodecSpec:
        """Reads a name.

        Raises:
            CodecError: no such codec; the message names the stage.
        """
        settings: dict[str, object] = {}
        group = 0
        for part in text.split("|"):
            name, *arguments = part.strip().split(":")
            found = [i for i, names in enumerate(_STAGES) if name in names]
            if not found:
                known = ", ".join(stage for names in _STAGES for stage in names)
                raise CodecError(f"codec {text!r}: no stage {name!r}; there are {known}")
            if found[0] < group:
                raise CodecError(
                    f"codec {text!r}: {name!r} cannot stand there; the order is select | quantize | index "
                    "coding | value coding | zstd, one of each at most"
                )
            group = found[0] + 1
            try:
                settings.update(_PARSERS[found[0]](name, arguments))
            except ValueError as error:
                raise CodecError(f"codec {text!r}: cannot read the stage {part.strip()!r}") from error
        return cls(**settings)  # type: ignore[arg-type]  # __post_init__ and the parsers check them

    @property
    def stages(self) -> frozenset[str]:
        """Names of the stages that a decoder must know."""
        names: list[str] = [self.select, self.quantize]
        if self.select in ("topk", "threshold"):
            names.append(self.index)
        if self.quantize in ("int8", "int4"):
            names.append(self.values)
        if self.zstd:
            names.append("zstd")
        return frozenset(names)

    def __str__(self) -> str:
        select: str = self.select
        if self.amount is not None:
            select += f":{self.amount}"
        if self.per_tensor:
            select += ":per=tensor"
        quantize: str = self.quantize
        if self.quantize not in ("float32", "float16"):
            quantize += f":block={self.block}"
        if self.stochastic:
            quantize += ":stochastic"
        parts = [select, quantize]
        if self.select in ("topk", "threshold"):
            parts.append(self.index)
        if self.quantize in ("int8", "int4"):
            parts.append(self.values)
        if self.zstd:
            parts.append("zstd")
        return "|".join(parts)


def _check_amount(select: str, amount: float) -> None:
    if select == "threshold":
        if not 0 <= amount < math.inf:
            raise CodecError(f"codec stage 'threshold': a finite number from 0 up, not {amount}")
    elif isinstance(amount, int):
        if amount < 1:
            raise CodecError(f"codec stage {select!r}: a count is at least 1, not {amount}")
    elif not 0 < amount <= 1:
        raise CodecError(f"codec stage {select!r}: a ratio is above 0 and at most 1, not {amount}")


def _parse_select(name: str, arguments: list[str]) -> dict[str, object]:
    settings: dict[str, object] = {"select": name}
    for argument in arguments:
        if argument == "per=tensor":
            settings["per_tensor"] = True
        elif "amount" in settings:
            raise ValueError(argument)
        elif name != "threshold" and argument.isascii() and argument.isdigit():
            settings["amount"] = int(argument)
        else:
            settings["amount"] = float(argument)
    return settings


def _parse_quantize(name: str, arguments: list[str]) -> dict[str, object]:
    floating = name in ("float32", "float16")
    settings: dict[str, object] = {"quantize": name}
    if not floating:
        settings["block"] = "all" if name == "ternary" else DEFAULT_BLOCK
    for argument in arguments:
        if argument == "stochastic":
            settings["stochastic"] = True
        elif argument == "nearest":
            settings["stochastic"] = False
        elif argument.startswith("block=") and not floating:
            block = argument.removeprefix("block=")
            settings["block"] = block if block in ("all", "tensor") else int(block)
        else:
            raise ValueError(argument)
    return settings


def _parse_flag(key: str) -> Callable[[str, list[str]], dict[str, object]]:
    def parse(name: str, arguments: list[str]) -> dict[str, object]:
        if arguments:
            raise ValueError(name)
        return {key: True if key == "zstd" else name}

    return parse


_PARSERS = (_parse_select, _parse_quantize, _parse_flag("index"), _parse_flag("values"), _parse_flag("zstd"))
