"""Masks of ``Attention`` that onnxruntime does not broadcast."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

_QUERY, _KEY, _MASK, _PAST_KEY = 0, 1, 3, 4  # inputs of Attention-23
_SEQUENCE = 2  # axis of queries and keys ``[B, heads, S, width]``


def expand(model: ir.Model) -> None:
    """Give every mask the whole axes of queries and keys, in place.

    The operator's specification broadcasts a mask ``[B, 1, 1, T]`` over the queries, onnxruntime
    refuses it (https://onnx.ai/onnx/operators/onnx__Attention.html).
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        given = [*node.inputs, None, None][: _PAST_KEY + 1]
        query, key, mask, past = (given[i] for i in (_QUERY, _KEY, _MASK, _PAST_KEY))
        if mask is None or past is not None or _whole(mask) or "q_num_heads" in node.attributes:
            continue
        tape = Tape()
        axes = {"start": _SEQUENCE, "end": _SEQUENCE + 1}
        sizes = [tape.op("Shape", [x], axes) for x in (query, key)]
        wide = tape.op("Expand", [mask, tape.op("Concat", sizes, {"axis": 0})])
        wide.type = mask.type
        assert node.graph is not None
        node.graph.insert_before(node, tape.nodes)
        node.replace_input_with(_MASK, wide)


def _whole(mask: ir.Value) -> bool:
    """Whether neither of its last two axes is one that stands for many."""
    return mask.shape is not None and 1 not in list(mask.shape)[-2:]
