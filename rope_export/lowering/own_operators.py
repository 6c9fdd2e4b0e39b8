"""The package's own operators, each of which stands for several while a block is traced."""

from __future__ import annotations

import onnx_ir as ir

from rope_export.lowering import ops
from rope_export.lowering.bidirectional_calls import BidirectionalCalls
from rope_export.lowering.gqa_calls import GroupQueryCalls

_CALLS = {ops.GROUP_QUERY: GroupQueryCalls, ops.BIDIRECTIONAL: BidirectionalCalls}


def expand(model: ir.Model) -> None:
    """Replace them by operators that runtimes have, in place."""
    for node in list(model.graph):
        if node.domain == ops.OWN_DOMAIN:
            _CALLS[node.op_type](model.graph, node).replace()
            model.opset_imports["com.microsoft"] = 1
    model.opset_imports.pop(ops.OWN_DOMAIN, None)
