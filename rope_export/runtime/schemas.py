"""What the onnxruntime here knows of its own operators, held against a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DOMAIN = "com.microsoft"


def unknown(nodes: Iterable[Any]) -> str | None:
    """The first attribute or input that the onnxruntime here has not, in plain words, or None.

    Args:
        nodes: ``onnx.NodeProto``; of operators that are not onnxruntime's own nothing is said.
    """
    own = [node for node in nodes if node.domain == DOMAIN]
    if not own:
        return None
    schemas = _schemas({node.op_type for node in own})
    for node in own:
        schema = schemas.get(node.op_type)
        if schema is None:
            return f"no {node.op_type}"
        for attribute in node.attribute:
            if attribute.name not in schema.attributes:
                return f"no {attribute.name} of {node.op_type}"
        if len(node.input) > len(schema.inputs) and not _repeats(schema):
            return f"{len(schema.inputs)} inputs of {node.op_type}, not {len(node.input)}"
    return None


def _schemas(names: set[str]) -> dict[str, Any]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found = get_all_operator_schema()
    return {each.name: each for each in found if each.domain == DOMAIN and each.name in names}


def _repeats(schema: Any) -> bool:
    """Whether the last input stands for any number of them."""
    return bool(schema.inputs) and str(schema.inputs[-1].option).endswith("Variadic")
