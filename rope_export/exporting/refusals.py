"""What a module's author reads where PyTorch cannot trace or convert it: what it is, what helps."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from rope_export.errors import BadInputError, first_line
from rope_export.exporting.blame import blamed, line_of

_DATA_DEPENDENT = (
    "depends on the values of a tensor, which a graph cannot follow: use torch.where, torch.cond "
    "or a mask instead of Python's if, int() and slices by computed lengths"
)
# By what PyTorch says: what the line does, and what to write instead.
_SAID = (
    (
        ".numpy() is not supported",
        "leaves PyTorch for NumPy, which a graph cannot follow: compute it with torch, or in "
        "__init__ where it is no function of the inputs",
    ),
    (
        "There was no fake impl registered",
        "calls an operator of your own that says nothing of its shapes, and ONNX has no form of "
        "it: write it with PyTorch's operators where torch.compiler.is_exporting()",
    ),
    (
        "found a fake tensor in the exported program constant's list",
        "computes gradients or keeps tensors of the trace, which a graph cannot follow: take "
        "torch.enable_grad(), torch.autograd and tensors kept outside out of forward",
    ),
    (
        "unhashable type: non-nested SymInt",
        "keeps what it computes by a length (a dictionary or functools.lru_cache whose key is a "
        "size), which a graph has none of: compute it in each call",
    ),
    (
        "Only Tensors created explicitly by the user",
        "copies tensors that were computed (copy.deepcopy): use clone()",
    ),
)
# By a part of an operator's name: what the module does, and what to do instead.
_OPERATORS = (
    (
        ("nested",),
        "uses nested tensors, which ONNX does not have: use a padded batch with a mask",
    ),
    (
        ("sparse", "_to_dense"),
        "computes with sparse tensors, which ONNX does not have: call .to_dense() in __init__",
    ),
    (
        ("fake_quantize", "quantize_per", "quantized"),
        "computes with quantised tensors of PyTorch, for which onnxruntime has other operators: "
        "export the float model, or keep int8 weights and scales in buffers and multiply them",
    ),
)
_FLEX = (
    "FlexAttention has no form in ONNX: use F.scaled_dot_product_attention (of transformers: "
    "attn_implementation='sdpa'), what mask_mod says as its attn_mask and what score_mod adds as a "
    "float attn_mask, or rope_export.Attention, which has windows, soft caps and sinks"
)


def untraceable(error: BaseException) -> BadInputError:
    """Why a module cannot be traced, in one line."""
    where = blamed(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return BadInputError(f"{where} {_DATA_DEPENDENT}")
    said = str(error)
    if "flex_attention" in "".join(traceback.format_tb(error.__traceback__)):
        return BadInputError(f"{where}: {_FLEX}")
    for part, does in _SAID:
        if part in said:
            return BadInputError(f"{where} {does}")
    operator = getattr(error, "func", None)
    if isinstance(operator, torch._ops.OpOverload):
        return BadInputError(f"{where} {_of_operator(operator)}")
    return BadInputError(f"{where} cannot be traced by torch.export: {first_line(error)}")


def unconvertible(error: BaseException) -> BadInputError:
    """Why a traced program cannot be written in ONNX, in one line."""
    reason = error
    node: fx.Node | None = None
    while True:
        node = _node_of(reason) or node
        if reason.__cause__ is None:
            break
        reason = reason.__cause__
    if node is None or not isinstance(node.target, torch._ops.OpOverload | _HigherOrder):
        return BadInputError(f"the module cannot be written in ONNX: {first_line(reason)}")
    stack = str(node.meta.get("stack_trace") or "")
    where = line_of(node) or "the module"
    if "flex_attention" in stack or "flex_attention" in str(node.target):
        return BadInputError(f"{where}: {_FLEX}")
    if isinstance(node.target, torch._ops.OpOverload):
        return BadInputError(f"{where} {_of_operator(node.target)}")
    return BadInputError(f"{where} uses {node.target}, which has no form in ONNX")


def refuse_bfloat16(program: torch.export.ExportedProgram) -> None:
    """Check that a program for the CPU, of a module in another dtype, computes nothing in bfloat16.

    Raises:
        BadInputError: it does; the message has the line.
    """
    for graph in program.graph_module.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            given = node.meta.get("val")
            operator = node.target
            computes = isinstance(operator, torch._ops.OpOverload) and not (
                operator.is_view or operator._schema.name.rpartition("::")[2] in _CASTS
            )
            if computes and isinstance(given, Tensor) and given.dtype is torch.bfloat16:
                raise BadInputError(
                    f"{line_of(node) or 'the module'} computes in bfloat16, which onnxruntime "
                    "cannot on the CPU: leave torch.autocast out (enabled=False) where "
                    "torch.compiler.is_exporting(), cast to float32, or export for provider cuda"
                )


_CASTS = ("to", "_to_copy", "clone", "contiguous", "detach", "alias")
_HigherOrder = torch._ops.HigherOrderOperator


def _of_operator(operator: torch._ops.OpOverload) -> str:
    name = operator._schema.name.replace("::", ".")
    for parts, does in _OPERATORS:
        if any(part in name for part in parts):
            return does
    return f"uses {name}, which has no form in ONNX; write it with other operators"


def _node_of(error: BaseException) -> fx.Node | None:
    """The node that was being converted."""
    found: fx.Node | None = None
    step = error.__traceback__
    while step is not None:
        node = step.tb_frame.f_locals.get("node")
        found = node if isinstance(node, fx.Node) else found
        step = step.tb_next
    return found
