"""Parts of a module that no trace can follow: told by name before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer, UninitializedParameter

from rope_export.artifacts.targets import DTYPES
from rope_export.attention.adapters import refuse_what_weights_do_not_say
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.models.experts import refuse_experts

_PLAIN = (Tensor, nn.Parameter, Buffer, UninitializedParameter)
_QUANTIZED = ("torch.ao.nn.", "torchao.", "bitsandbytes.")
_FLOAT_INSTEAD = (
    "export the float model, or hold the integers and their scales in buffers and multiply them in "
    "forward"
)


def check_parts(module: nn.Module) -> None:
    """Check that every part of a module, and every tensor it holds, can be traced.

    Raises:
        BadInputError: one cannot; the message has its name.
    """
    for name, part in module.named_modules():
        if isinstance(part, Attention):
            refuse_what_weights_do_not_say(part, name)
        _check_kind(name or "module", part)
        for path, tensor in _tensors(name, part):
            _check_tensor(path, tensor)
    refuse_experts(module)
    for path, weight in module.named_parameters():
        if weight.is_floating_point():
            dtype = str(weight.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise BadInputError(
                    f"weights must be one of {', '.join(DTYPES)}, got {dtype} of {path}"
                )


def _check_kind(name: str, part: nn.Module) -> None:
    kind = type(part)
    if isinstance(part, torch.jit.ScriptModule):
        raise BadInputError(
            f"{name} must be a module in Python, which torch.export traces, got TorchScript: give "
            "it as it was before torch.jit.script or torch.jit.trace"
        )
    if f"{kind.__module__}.".startswith(_QUANTIZED) and "quant" in kind.__module__:
        raise BadInputError(
            f"{name} must be a float layer, got {kind.__module__}.{kind.__name__}, whose operators "
            f"ONNX does not have: {_FLOAT_INSTEAD}"
        )


def _tensors(name: str, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights, buffers and plain attributes of one part."""
    for holder in (part._parameters, part._buffers, vars(part)):
        for key, value in holder.items():
            if isinstance(value, Tensor):
                yield (f"{name}.{key}" if name else key), value


def _check_tensor(path: str, tensor: Tensor) -> None:
    kind = type(tensor)
    if kind not in _PLAIN:
        raise BadInputError(
            f"{path} must be a plain tensor, got a {kind.__name__} of "
            f"{kind.__module__.partition('.')[0]}, whose operators ONNX does not have: "
            f"{_FLOAT_INSTEAD}"
        )
    if isinstance(tensor, UninitializedParameter):
        return
    if tensor.is_quantized:
        raise BadInputError(
            f"{path} must be a plain tensor, got a quantised one ({tensor.dtype}): {_FLOAT_INSTEAD}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise BadInputError(
            f"{path} must be dense, got {layout}, which ONNX does not have: call .to_dense()"
        )
    if tensor.is_meta:
        raise BadInputError(
            f"{path} must hold numbers, got a tensor on the meta device: load the weights (and "
            "buffers that are not saved) first"
        )
    if tensor.is_inference():
        raise BadInputError(
            f"{path} was made under torch.inference_mode, which torch.export refuses: make or load "
            "the module outside it, or under torch.no_grad"
        )
