"""What an ONNX file will do where it is deployed: rotation, lengths served, memory, cache, files.

Reads the graph and no weights, runs nothing, and needs neither PyTorch nor onnxruntime.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rope_export.inspection import values
from rope_export.inspection.attention_patterns import PASTS, AttentionUse, Mask, attention
from rope_export.inspection.files import (
    ExternalFile,
    LocalPaths,
    all_nodes,
    all_tensors,
    complaints,
    expand_functions,
    external_files,
    local_paths,
    read,
)
from rope_export.inspection.rope_patterns import Rotation, rotations
from rope_export.inspection.since import IR_VERSIONS, NEWEST, OPSETS, Need, Node, needs

_LATEST_OPSET, _LATEST_IR = max(OPSETS), max(IR_VERSIONS)
_KNOWN_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})
_CACHED = re.compile(r"past|present|cache", re.IGNORECASE)


@dataclass(frozen=True)
class Interface:
    """An input or output of the graph.

    Attributes:
        name: its name.
        dtype: of its elements.
        axes: sizes, dynamic ones by name or "?"; None when the rank is not stated.
    """

    name: str
    dtype: str
    axes: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Cache:
    """Past keys and values that come in, and present ones that go out.

    Attributes:
        layers: how many layers have one.
        inputs: names of the past.
        outputs: names of the present.
        axes: of the first input.
        dtype: likewise.
    """

    layers: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[int | str, ...] | None
    dtype: str = ""


@dataclass(frozen=True)
class ModelReport:
    """What an ONNX file holds.

    Attributes:
        ir_version: of the format.
        opsets: version of each operator set; the standard's own is ``"ai.onnx"``.
        producer: what made it, or "".
        inputs: of the graph.
        outputs: of the graph.
        operators: how often each occurs, in branches, loops and functions too.
        functions: how often each local function is called from the graph.
        rotations: how RoPE is expressed; empty when none was recognised.
        positions: ``"bounded"``: up to ``longest``; ``"unbounded"``; ``"unknown"``; ``"none"``
            without a rotation.
        longest: tokens served, where a table, a guard or a constant bounds them.
        attention: what attends.
        masks: constant masks of scores.
        cache: past and present, or None.
        weights: bytes of constants by dtype, in external files too.
        model_bytes: size of the file itself.
        external: files of weights.
        local_paths: paths in metadata, or None.
        needs: what is in it that not every onnxruntime has, what is newest first.
        onnxruntime: the oldest that has all of it, as far as known, or None.
        notes: what to know before deploying it, in plain words.
    """

    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    operators: dict[str, int]
    functions: dict[str, int]
    rotations: tuple[Rotation, ...]
    positions: str
    longest: int | None
    attention: tuple[AttentionUse, ...]
    masks: tuple[Mask, ...]
    cache: Cache | None
    weights: dict[str, int]
    model_bytes: int
    external: tuple[ExternalFile, ...]
    local_paths: LocalPaths | None
    needs: tuple[Need, ...]
    onnxruntime: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def inspect_model(path: Path) -> ModelReport:
    """Inspect an ONNX file.

    Raises:
        BadInputError: there is no such file, or it is not a complete ONNX model.
    """
    with complaints() as said:
        model = read(path)
        paths = local_paths(model)
        functions, not_expanded = expand_functions(model)
        nodes = list(all_nodes(model))
        found = rotations(nodes)
        uses, masks = attention(nodes)
    positions, longest = _positions(found, masks)
    tensors = list(all_tensors(model, nodes))
    inputs, outputs = (
        tuple(_interface(v) for v in side if v.name not in model.graph.initializers)
        for side in (model.graph.inputs, model.graph.outputs)
    )
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[values.dtype_name(tensor.dtype)] += int(tensor.nbytes)
    opsets = {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
    asked_for = needs(
        (_asked(node) for _, node in nodes), opsets.get("ai.onnx", 1), model.ir_version
    )
    report = ModelReport(
        ir_version=model.ir_version,
        opsets=dict(sorted(opsets.items())),
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=inputs,
        outputs=outputs,
        operators=dict(sorted(Counter(values.operator(node) for _, node in nodes).items())),
        functions=functions,
        rotations=found,
        positions=positions,
        longest=longest,
        attention=uses,
        masks=masks,
        cache=_cache(model.graph, nodes, inputs, outputs),
        weights=dict(weights.most_common()),
        model_bytes=path.stat().st_size,
        external=external_files(tensors, path.parent),
        local_paths=paths,
        needs=asked_for,
        onnxruntime=asked_for[0].version if asked_for else None,
        notes=(),
    )
    problems = [*not_expanded, *(f"not valid ONNX: {text.split('. ')[0]}" for text in said[:1])]
    return replace(report, notes=(*problems, *_notes(report)))


def _asked(node: ir.Node) -> Node:
    """A node as what it asks of a runtime."""
    read = {ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING}
    graphs = [graph for each in node.attributes.values() for graph in values.subgraphs(each)]
    return Node(
        values.operator(node),
        frozenset(place for place, value in enumerate(node.inputs) if value is not None),
        {
            name: each.value if not each.is_ref() and each.type in read else None
            for name, each in node.attributes.items()
        },
        any(value.shape is None for graph in graphs for value in graph.outputs),
    )


def _interface(value: ir.Value) -> Interface:
    axes = None
    if value.shape is not None:
        axes = tuple(size if isinstance(size, int) else (size.value or "?") for size in value.shape)
    return Interface(value.name or "", values.dtype_name(value.dtype), axes)


def _positions(found: tuple[Rotation, ...], masks: tuple[Mask, ...]) -> tuple[str, int | None]:
    if not found:
        return "none", None
    bounds = [r.angles.longest for r in found if r.angles.longest is not None]
    if bounds:
        return "bounded", min([*bounds, *(mask.length for mask in masks)])
    computed = all(rotation.angles.kind == "computed" for rotation in found)
    if masks:
        return "bounded", min(mask.length for mask in masks)
    return ("unbounded" if computed else "unknown"), None


def _cache(
    graph: ir.Graph,
    nodes: list[tuple[str, ir.Node]],
    inputs: tuple[Interface, ...],
    outputs: tuple[Interface, ...],
) -> Cache | None:
    wired = {
        value.name
        for _, node in nodes
        for index in PASTS.get(values.operator(node), ())
        if (value := values.argument(node, index)) is not None and value in graph.inputs
    }

    def cached(each: Interface) -> bool:
        whole = each.dtype in ("int16", "int32", "int64", "bool", "string")
        ranked = each.axes is None or len(each.axes) >= 3
        return each.name in wired or (bool(_CACHED.search(each.name)) and ranked and not whole)

    past = [each for each in inputs if cached(each)]
    if not past:
        return None
    present = tuple(each.name for each in outputs if cached(each))
    numbers = {tuple(re.findall(r"\d+", each.name)) for each in past}
    layers = len(numbers) if len(numbers) > 1 else math.ceil(len(past) / 2)
    names = tuple(each.name for each in past)
    return Cache(layers, names, present, past[0].axes, past[0].dtype)


def _notes(report: ModelReport) -> Iterator[str]:
    opset = report.opsets.get("ai.onnx", 0)
    if opset > _LATEST_OPSET:
        yield f"opset {opset}: onnxruntime {NEWEST} loads models up to opset {_LATEST_OPSET}"
    if report.ir_version > _LATEST_IR:
        yield f"IR version {report.ir_version}: onnxruntime {NEWEST} loads up to {_LATEST_IR}"
    foreign = {name.split("::")[0] for name in report.operators if "::" in name} - _KNOWN_DOMAINS
    if foreign:
        yield f"operators of {', '.join(sorted(foreign))}: they need a library of their own"
    for file in report.external:
        if file.problem is not None:
            yield f"{file.name}: {file.problem}"
    fixed = [r.angles for r in report.rotations if r.angles.kind == "constant"]
    lengths = sorted({angles.longest for angles in fixed if angles.longest is not None})
    if lengths:
        names = dict.fromkeys(table.name for angles in fixed for table in angles.tables)
        yield (
            f"cosines and sines are constants of {' and '.join(map(str, lengths))} tokens "
            f"({', '.join(names)}): sequences of another length fail, or are rotated wrongly"
        )
    for mask in report.masks:
        if not mask.cut:
            yield f"the mask {mask.name} is a constant {list(mask.shape)}: it fits one length"
    if report.rotations and all(
        isinstance(size, int) for each in report.inputs for size in each.axes or ("?",)
    ):
        yield "no axis of any input is dynamic"
    if not report.rotations and {"Cos", "Sin"} <= set(report.operators):
        yield "there are Cos and Sin nodes, but no rotation was recognised"
    if "bfloat16" in report.weights:
        yield (
            "bfloat16: onnxruntime's CPU provider has no kernel for it in MatMul, RotaryEmbedding "
            "or attention"
        )
    if report.local_paths is not None:
        count, example = report.local_paths.nodes, report.local_paths.example
        where = f"{count} nodes carry" if count != 1 else "1 node carries"
        where = where if count else "metadata carries"
        yield f"{where} local file paths, such as {example}"
