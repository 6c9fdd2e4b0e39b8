"""An ONNX file as it lies on disk: the model, its weights' files, and what metadata gives away."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rope_export.errors import BadInputError
from rope_export.inspection import values

_LARGEST_FILE = 2**31 - 1  # of protobuf
# An absolute path to a Python file, or into somebody's home.
_LOCAL_PATH = re.compile(
    r"""(?:^|(?<=[\s"'(=]))(?:/|[A-Za-z]:[\\/])[^"'\n:*?<>|]{1,300}?\.py\b"""
    r"""|(?:/home/|/Users/|/root/|[A-Za-z]:\\Users\\)[^\s"':*?<>|]{1,300}""",
    re.MULTILINE,
)


@dataclass(frozen=True)
class ExternalFile:
    """A file of weights beside the model.

    Attributes:
        name: as the model states it.
        needed: bytes the model reads of it, from its start.
        bytes: its size, or None when it is not there.
        problem: what is wrong with it, or None.
    """

    name: str
    needed: int
    bytes: int | None
    problem: str | None


@dataclass(frozen=True)
class LocalPaths:
    """Paths of the machine a model was made on, in its metadata.

    Attributes:
        nodes: nodes that carry one.
        elsewhere: whether the model, the graph or a value does.
        example: one of them.
    """

    nodes: int
    elsewhere: bool
    example: str


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect what the reader would print about models that are not quite valid."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("onnx_ir")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            yield said
            said += [str(warning.message) for warning in warned]
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def read(path: Path) -> ir.Model:
    """Read a model, its external weights left where they are.

    Raises:
        BadInputError: there is no such file, or it is not a complete ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise BadInputError(f"{path}: {what}; give an ONNX file")
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise BadInputError(f"{path}: not an ONNX model: {size} bytes, protobuf ends at 2 GiB")
        content = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise BadInputError(f"{path}: is empty; give an ONNX file")
    if content.startswith(b"version https://git-lfs"):
        raise BadInputError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull")
    if content[4:8] == b"ORTM":
        raise BadInputError(
            f"{path}: is in onnxruntime's own format; give the ONNX file it was made from"
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, ValueError) as error:
        raise BadInputError(f"{path}: not an ONNX model, or truncated: {error}") from error
    lacks = [
        what
        for what, there in (
            ("graph", proto.HasField("graph") and (proto.graph.node or proto.graph.output)),
            ("IR version", proto.ir_version > 0),
            ("operator set", proto.opset_import or 0 < proto.ir_version < 3),
        )
        if not there
    ]
    if lacks:
        raise BadInputError(
            f"{path}: not an ONNX model, or truncated: it has no {' and no '.join(lacks)}"
        )
    try:
        model = ir.from_proto(proto)
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            graph.sort()  # no node comes before what it needs: fails where that is not possible
    except Exception as error:  # whatever a malformed model makes the reader raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise BadInputError(f"{path}: not a valid ONNX model: {reason}") from error
    if not all(isinstance(text, str) for text in _names(model)):
        raise BadInputError(f"{path}: not a valid ONNX model: a name in it is not UTF-8")
    for tensor in all_tensors(model, all_nodes(model)):
        if tensor.dtype == ir.DataType.UNDEFINED or min(values.dimensions(tensor), default=0) < 0:
            raise BadInputError(
                f"{path}: not a valid ONNX model: the tensor {tensor.name!r} has no dtype, or a "
                "negative size"
            )
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
    return model


def _names(model: ir.Model) -> Iterator[object]:
    """What is printed of a model; a reader may leave as bytes what is no text."""
    yield from (model.producer_name or "", model.producer_version or "", *model.opset_imports)
    for value in (*model.graph.inputs, *model.graph.outputs):
        yield value.name or ""
        yield from (getattr(size, "value", None) or "" for size in value.shape or ())
    for _, node in all_nodes(model):
        yield from (node.domain, node.op_type, node.name or "")
        yield from (value.name or "" for value in (*node.inputs, *node.outputs) if value)


def all_nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Nodes of the graph, and of functions that are left."""
    yield from values.walk(model.graph)
    for function in model.functions.values():
        yield from values.walk(function, f"{function.domain}::{function.name}/")


def all_tensors(
    model: ir.Model, nodes: Iterable[tuple[str, ir.Node]]
) -> Iterator[ir.TensorProtocol]:
    """Every constant tensor once."""
    seen: set[int] = set()
    for tensor in _in_graphs(model.graph, nodes):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _in_graphs(
    graph: ir.Graph, nodes: Iterable[tuple[str, ir.Node]]
) -> Iterator[ir.TensorProtocol]:
    graphs = [graph]
    for _, node in nodes:
        for attribute in node.attributes.values():
            graphs += values.subgraphs(attribute)
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
    for each in graphs:
        for value in each.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def expand_functions(model: ir.Model) -> tuple[dict[str, int], list[str]]:
    """Put the bodies of local functions where they are called; calls by name, and what failed."""
    from onnx_ir.passes.common import InlinePass

    if not model.functions:
        return {}, []
    calls = Counter(
        values.operator(node)
        for _, node in values.walk(model.graph)
        if node.op_identifier() in model.functions
    )
    try:
        InlinePass()(model)
    except Exception as error:  # recursion, clashing operator sets: counted once, not followed
        reason = str(error.__cause__ or error).splitlines()[0]
        return dict(calls), [f"local functions are looked at alone, not where called: {reason}"]
    model.functions.clear()  # what nobody calls does not run
    return dict(calls), []


def local_paths(model: ir.Model) -> LocalPaths | None:
    """Find what metadata and comments say about the machine a model was made on."""
    graph = model.graph
    nodes, examples = 0, []
    for _, node in all_nodes(model):
        path = _path_in([node.doc_string, *node.metadata_props.values()])
        if path is not None:
            nodes += 1
            examples.append(path)
    texts = [model.doc_string, graph.doc_string]
    texts += [*model.metadata_props.values(), *graph.metadata_props.values()]
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        texts += [value.doc_string, *value.metadata_props.values()]
    other = _path_in(texts)
    if other is not None:
        examples.append(other)
    return LocalPaths(nodes, other is not None, examples[0]) if examples else None


def _path_in(texts: Iterable[str | None]) -> str | None:
    for text in texts:
        found = _LOCAL_PATH.search(text) if isinstance(text, str) else None
        if found is not None:
            return found.group()
    return None


def external_files(tensors: Iterable[ir.TensorProtocol], folder: Path) -> tuple[ExternalFile, ...]:
    """Say of every file of weights whether it is there and long enough."""
    needed: dict[str, int] = {}
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            end = int(tensor.offset or 0) + int(tensor.length or tensor.nbytes)
            name = str(tensor.location)
            needed[name] = max(needed.get(name, 0), end)
    return tuple(_external_file(folder, name, end) for name, end in sorted(needed.items()))


def _external_file(folder: Path, name: str, needed: int) -> ExternalFile:
    file = values.file_inside(folder, name)
    if file is None:
        return ExternalFile(name, needed, None, "outside the model's folder")
    if not file.is_file():
        return ExternalFile(name, needed, None, "missing")
    size = file.stat().st_size
    problem = f"truncated: {size} of {needed} bytes" if size < needed else None
    return ExternalFile(name, needed, size, problem)
