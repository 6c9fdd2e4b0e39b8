"""ONNX graphs: from torch.export's to one that is clean, named, reproducible and on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer, rewriter

from rope_export.artifacts.files import MODEL, WEIGHTS, sha256
from rope_export.artifacts.version import __version__
from rope_export.errors import ExportError
from rope_export.lowering import booleans, own_operators

# Larger weights go into a file of their own; protobuf itself ends at 2 GiB.
_EXTERNAL_BYTES = 128 * 2**20
_NO_LIMIT = 1 << 62
_FOLDS = 2
Axes = Sequence[str | int]


def tidy(
    model: ir.Model,
    inputs: Mapping[str, Axes],
    outputs: Mapping[str, Axes],
    *,
    name: str = "attention",
    parameters: Collection[str] = (),
    prefix: str = "",
) -> None:
    """Fold constants, name everything by what it is, and drop what points to this machine.

    Tables and constants that are equal, those of several layers say, are kept once.

    Args:
        model: changed in place.
        inputs: axes of every graph input, symbolic ones by name.
        outputs: axes of every graph output, in order.
        name: of the graph.
        parameters: names of the weights that are trained; these stay apart even where they are
            equal.
        prefix: taken off the names of weights.

    Raises:
        ExportError: a graph input or output does not have the axes asked for.
    """
    sources, learned = _weight_names(model, parameters)
    _optimize(model, learned)
    common_passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for value in (
        *model.graph.inputs,
        *model.graph.outputs,
        *model.graph.initializers.values(),
    ):
        value.metadata_props.clear()
        value.doc_string = None
    own_operators.expand(model)
    _keep_once(model, learned)
    _name_interface(model, inputs, outputs)
    _name_inside(model, sources, prefix)
    model.producer_name = "rope-export"
    model.producer_version = __version__
    model.graph.name = name


def _optimize(model: ir.Model, learned: Collection[str]) -> None:
    """What ``onnxscript.optimizer.optimize`` does, which also merges weights that are equal."""
    common_passes.InlinePass()(model)
    for _ in range(_FOLDS):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_NO_LIMIT,
            output_size_limit=_NO_LIMIT,
        )
        rewriter.rewrite(model)
        booleans.expand(model)  # the fold after it infers the shapes of what it writes
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common_passes.LiftSubgraphInitializersToMainGraphPass()(model)
    _keep_once(model, learned)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.OutputFixPass()(model)
    common_passes.NameFixPass()(model)


def _weight_names(model: ir.Model, parameters: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """Names of values computed from weights alone, and which of those are made of parameters."""
    names = {name: name for name in model.graph.initializers if name is not None}
    learned = set(names) & set(parameters)
    for node in model.graph:
        inputs = [value.name or "" for value in node.inputs if value is not None]
        origins = [names.get(name) for name in inputs]
        weights = [origin for origin in origins if origin is not None and "." in origin]
        if weights and len(weights) == len(origins):
            for output in node.outputs:
                names[output.name or ""] = _joined(weights)
                if learned.intersection(inputs):
                    learned.add(output.name or "")
    return names, learned


def _keep_once(model: ir.Model, learned: Collection[str]) -> None:
    """Keep one of all initializers with the same content that are not made of parameters."""
    kept: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in learned or tensor is None or value.is_graph_output():
            continue
        content = hashlib.sha256(tensor.tobytes()).digest()
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), content), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]


def _joined(names: list[str]) -> str:
    """``q_proj.weight``, ``k_proj.weight``, … become ``q_proj+k_proj+….weight``."""
    if len(names) == 1:
        return names[0]
    stems, suffixes = zip(*(name.rsplit(".", 1) for name in names), strict=True)
    return f"{'+'.join(stems)}.{suffixes[0]}" if len(set(suffixes)) == 1 else "+".join(names)


def _name_interface(
    model: ir.Model, inputs: Mapping[str, Axes], outputs: Mapping[str, Axes]
) -> None:
    for values, wanted in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if len(values) != len(wanted):
            raise ExportError(f"the graph has {len(values)} inputs or outputs, not {len(wanted)}")
        for value, (name, axes) in zip(values, wanted.items(), strict=True):
            got = list(value.shape) if value.shape is not None else []
            # Of an output the converter may know more: arithmetic that always comes to one number.
            known = values is model.graph.outputs
            fits = len(got) == len(axes) and all(
                (known or not isinstance(size, int)) if isinstance(axis, str) else axis == size
                for size, axis in zip(got, axes, strict=True)
            )
            if not fits:
                raise ExportError(f"{name} came out as {got}, asked for {list(axes)}")
            value.name = name
            value.shape = ir.Shape(
                [
                    size if isinstance(size, int) else axis
                    for size, axis in zip(got, axes, strict=True)
                ]
            )


def _name_inside(model: ir.Model, sources: Mapping[str, str], prefix: str) -> None:
    interface = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    taken: Counter[str] = Counter()
    for value in list(model.graph.initializers.values()):
        if id(value) in interface:
            continue
        old = value.name or ""
        name = "+".join(part.removeprefix(prefix) for part in sources.get(old, old).split("+"))
        if "." not in name:
            name = "constant"
        taken[name] += 1
        if taken[name] > 1 or name == "constant":
            name = f"{name}_{taken[name]}"
        value.name = name
    scanned = {
        id(value)
        for node in model.graph.all_nodes()
        if node.op_type == "Scan" and "body" in node.attributes
        for value in node.attributes["body"].as_graph().outputs
    }
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        counts[node.op_type] += 1
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        for index, value in enumerate(node.outputs):
            if id(value) in interface:
                continue
            value.name = node.name if index == 0 else f"{node.name}_{index}"
            # Shapes in between speak of the tracer's symbols; runtimes infer their own. What a
            # subgraph returns must keep its type, and a scanned one its rank.
            known = id(value) in scanned and value.shape is not None
            value.shape = ir.Shape([None] * len(value.shape or ())) if known else None
            if not value.is_graph_output():
                value.type = None


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, in branches too, as ``domain::name`` or ``name``."""
    nodes = model.graph.all_nodes()
    counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)
    return dict(sorted(counts.items()))


def save(model: ir.Model, folder: Path) -> None:
    """Write ``model.onnx``, and ``model.onnx.data`` beside it when the weights are large."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = WEIGHTS if size > _EXTERNAL_BYTES else None
    path = folder / MODEL
    ir.save(model, path, external_data=external)
    onnx.checker.check_model(str(path))


def description(model: ir.Model, folder: Path) -> dict[str, Any]:
    """The graph's own part of the report."""
    return {
        "opset": model.opset_imports[""],
        "ir_version": model.ir_version,
        "ops": operators(model),
        "sha256": sha256(folder / MODEL),
        "bytes": sum(
            file.stat().st_size for name in (MODEL, WEIGHTS) if (file := folder / name).exists()
        ),
    }
