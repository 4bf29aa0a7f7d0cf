"""The user's module, made ready to be traced: a copy in evaluation mode with the chosen parameters free."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgetrain.export.errors import SelectionError, UnsupportedError
from edgetrain.export.selection.adapters import Adapters, is_adapter_term
from edgetrain.export.selection.lora import add_lora
from edgetrain.export.selection.select import select, terms
from edgetrain.export.selection.sparse import add_slices


@dataclass(frozen=True)
class Prepared:
    """A module that can be traced."""

    # A copy: the user's own module is never touched.
    module: nn.Module
    # The same without adapters: what remains of it after training.
    base: nn.Module
    adapters: Adapters
    # The parameters that learn, by name, in manifest order.
    trainable: dict[str, Tensor]
    # The other parameters, and the buffers.
    frozen: dict[str, Tensor]
    # What was changed, for the user to read.
    notes: tuple[str, ...]

    def constant_names(self) -> dict[int, str]:
        """Names of all parameters and buffers, by the identity of the tensor."""
        return {
            id(tensor): name
            for part in (self.base, self.module)
            for name, tensor in (*part.named_parameters(), *part.named_buffers())
        }


def prepare(module: nn.Module, selection: str) -> Prepared:
    """Copies the module, makes it deterministic and frees the selected parameters.

    Raises:
        SelectionError: see `edgetrain.export.selection.select`.
        UnsupportedError: a module that cannot be copied, or that has no export.
    """
    notes: list[str] = []
    module = _copy(module)
    _convert_dtypes(module, notes)
    _describe_dropout(module, notes)
    _refuse_batch_statistics(module)
    module.eval()
    base, adapters = module, Adapters()
    adapter_terms = [term for term in terms(selection) if is_adapter_term(term)]
    if adapter_terms:
        base = _copy(module)
        base.requires_grad_(False)
    for term in adapter_terms:
        (add_lora if term.startswith("lora") else add_slices)(module, term, adapters)
    names = set(select(module, selection, adapters.names))
    trainable: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name in names and not parameter.is_floating_point():
            raise SelectionError(f"{name} holds {parameter.dtype} and cannot learn; exclude it with '!{name}'")
        parameter.requires_grad_(False)
        (trainable if name in names else frozen)[name] = parameter.detach()
    _describe_norms(module, trainable, notes)
    frozen |= dict(module.named_buffers())
    return Prepared(module, base, adapters, trainable, frozen, tuple(notes))


@contextmanager
def plain_math(module: nn.Module) -> Iterator[None]:
    """Attention, transformer and recurrent layers as plain operations: fused kernels have no export."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            # Not torch.backends.mkldnn.flags: it warns about settings of other devices.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())  # noqa: SLF001
            torch._C._set_mkldnn_enabled(False)  # noqa: SLF001
        yield


def _copy(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"the model must be a torch.nn.Module, got a {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError("the model is a TorchScript module; export the nn.Module that it was made from")
    try:
        return copy.deepcopy(module).cpu()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied ({error}). A tensor attribute that carries gradients "
            "is the usual reason: register it as a parameter or buffer, or detach it"
        ) from error


def _convert_dtypes(module: nn.Module, notes: list[str]) -> None:
    others = sorted({str(p.dtype).removeprefix("torch.") for p in _floats(module) if p.dtype != torch.float32})
    if others:
        module.float()
        notes.append(f"parameters and buffers of {', '.join(others)} were converted to float32")


def _floats(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _describe_dropout(module: nn.Module, notes: list[str]) -> None:
    layers = [part for part in module.modules() if type(part).__module__ == nn.Dropout.__module__]
    if layers:
        notes.append(f"{len(layers)} dropout layers were removed: training on the device uses none")


def _batch_norms(module: nn.Module) -> dict[str, nn.BatchNorm1d]:
    # All kinds share a private base class; the 1d one stands for its attributes.
    base = nn.BatchNorm1d.__bases__[0]
    return {name: part for name, part in module.named_modules() if isinstance(part, base)}  # type: ignore[misc]


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, part in _batch_norms(module).items():
        if part.running_mean is None:
            raise UnsupportedError(
                f"{name} ({type(part).__name__}) keeps no running statistics: its output would depend on who "
                "shares the micro-batch. Use track_running_stats=True, or GroupNorm"
            )


def _describe_norms(module: nn.Module, trainable: Collection[str], notes: list[str]) -> None:
    norms = _batch_norms(module)
    learning = [name for name in norms if {f"{name}.weight", f"{name}.bias"} & set(trainable)]
    if learning:
        notes.append(
            f"{len(learning)} batch normalisations learn weight and bias with frozen statistics: the running "
            "mean and variance of the given model are used and not updated"
        )
    if frozen := len(norms) - len(learning):
        notes.append(
            f"{frozen} frozen batch normalisations use their running statistics, folded into the convolution "
            "before them where that is frozen too"
        )
