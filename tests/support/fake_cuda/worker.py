"""The process in which onnxruntime finds a CUDA device that is none: one graph a line.

    python worker.py LIBRARIES with-cudnn|without < graphs > findings

A finding is a JSON object: where nodes are, which calls a kernel refused, which kernels attend, how
many copies between host and device a decoding step makes, and whether it can be captured.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libraries
import ml_dtypes
import numpy as np
import onnx.shape_inference

from rope_export.artifacts.cache_layout import MASK, CacheLayout
from rope_export.artifacts.targets import ENDPOINTS
from rope_export.runtime import Decoder, Session
from rope_export.runtime.providers import open_session
from rope_export.runtime.session import on_device

Array = np.ndarray[Any, Any]
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
_INTEGERS = {
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# Sizes of axes by label: sequence, earlier tokens, rows. None of a graph with a cache takes several
# new tokens of several rows at once, unless it says so.
_PLAIN = ((1, 0, 1), (13, 0, 1), (32, 0, 5), (48, 0, 2))
_CACHED = ((7, 0, 2), (1, 5, 2), (1, 31, 3), (4, 9, 1), (1, 47, 1))
_BY_ROWS = ((4, 9, 3),)


class Graph:
    """A graph on the device.

    Args:
        path: the ONNX file.
        layout: how it keeps its cache.
        device: counts what happens on it.
    """

    def __init__(self, path: Path, layout: CacheLayout | None, device: ctypes.CDLL) -> None:
        self.device = device
        self.path = path
        self.layout = layout
        self.windows = layout is not None and any(layer.window for layer in layout.layers)
        self.raw = open_session(str(path), "cuda")
        self.rng = np.random.default_rng(0)

    def look(self) -> dict[str, Any]:
        """All that can be known of it."""
        placed, offences = placement(self.path, self.raw)
        refused = [f"{name}: {error}" for name, call in self.calls() if (error := tried(call))]
        found = {"placed": placed, "offences": offences, "refused": refused}
        if self.layout is not None:
            found["copies"] = [0, 0] if self.windows else self.copies()
            if self.layout.packs_rows:
                found["captured"] = tried(self.capture) or True
        return found

    def calls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Calls of every kind the graph serves."""
        layout = self.layout
        shapes = _PLAIN
        if layout is not None:
            apart = layout.packs_rows and not layout.by_rows
            shapes = _CACHED if apart else _CACHED + _BY_ROWS
            if self.windows:  # one buffer for past and present, as a Decoder has it
                shapes = ()
        for length, past, rows in shapes:
            given = self.inputs(length, past, rows)
            run = functools.partial(self.session(self.raw).run, given)
            yield f"{rows} x {length} after {past}", run
        if layout is not None:
            yield "prompts and tokens", lambda: self.decode(layout, captured=False)

    def inputs(self, length: int, past: int, rows: int) -> dict[str, Array]:
        """Inputs of one call, as wide as the graph's axes say."""
        values = self.raw.get_inputs()
        sizes = {"batch": rows, "sequence": length, "past_sequence": past}
        sizes |= {"total_sequence": past + length, "past_sequence+sequence": past + length}
        return {v.name: self.drawn(v, [sizes.get(n, n) for n in v.shape]) for v in values}

    def drawn(self, value: Any, shape: list[int]) -> Array:
        dtype = np.dtype(_DTYPES[value.type])
        if dtype.kind == "f" or dtype.kind == "V":
            return self.rng.standard_normal(shape).astype(dtype)
        return np.ones(shape, dtype) if value.name == MASK else np.zeros(shape, dtype)

    def session(self, raw: Any) -> Session:
        """As `Session.open` makes it, which would not take this device for a GPU."""
        return Session("cuda", {}, (), raw)

    def decode(self, layout: CacheLayout, *, captured: bool) -> None:
        """Prompts of different lengths, a chunk and tokens, as `Decoder` runs them."""
        raw = self.captures() if captured else self.raw
        decoder = Decoder(self.session(raw), layout, batch=2, capacity=40, cuda_graph=captured)
        tokens = next(v for v in raw.get_inputs() if v.name == layout.tokens)
        axes = [2, *([] if layout.position_axes < 2 else [layout.position_axes])][::-1]

        def some(length: int) -> dict[str, Any]:
            width = [int(n) for n in tokens.shape[2:]]
            given = self.rng.standard_normal((2, length, *width)).astype(_DTYPES[tokens.type])
            ids = {"position_ids": np.zeros((*axes, length), np.int64)}
            return {"tokens": given, **(ids if layout.position_axes else {})}

        mask = np.ones((2, 7), np.int64)
        mask[1, slice(5, None) if layout.padding == "right" else slice(2)] = 0
        decoder.prefill(**some(7), attention_mask=mask if layout.ragged else None)
        for _ in range(3):
            decoder.decode(**some(1))
        decoder.prefill(**some(3))

    def captures(self) -> Any:
        """The graph in a session that captures it."""
        return open_session(str(self.path), "cuda", {"enable_cuda_graph": "1"})

    def copies(self) -> list[int]:
        """Copies to and from the device in a step all of whose inputs and outputs lie there."""
        binding = self.raw.io_binding()
        kept = [(name, on_device(value, "cuda")) for name, value in self.inputs(1, 5, 2).items()]
        for name, value in kept:
            binding.bind_ortvalue_input(name, value)
        for output in self.raw.get_outputs():
            binding.bind_output(output.name, "cuda")
        for _ in itertools.repeat(None, 2):  # the first one also initialises
            self.device.fake_cuda_forget()
            self.raw.run_with_iobinding(binding)
        return [self.device.fake_cuda_copies(kind) for kind in (HOST_TO_DEVICE, DEVICE_TO_HOST)]

    def capture(self) -> None:
        """Decode with a captured step."""
        self.captures()  # a graph that is none to be captured is refused here, by onnxruntime
        before = self.device.fake_cuda_captured(), self.device.fake_cuda_replayed()
        assert self.layout is not None
        self.decode(self.layout, captured=True)
        after = self.device.fake_cuda_captured(), self.device.fake_cuda_replayed()
        if not all(a > b for a, b in zip(after, before, strict=True)):
            raise RuntimeError("nothing was captured and replayed")


def placement(path: Path, raw: Any) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Operators by where they are, and those on the CPU that are no arithmetic of shapes.

    Such arithmetic is on integers, and what it comes from is the shape of tensors, not what is in
    them: neither the mask, nor positions.
    """
    placed: dict[str, Counter[str]] = {}
    on_cpu: list[tuple[str, str]] = []
    for part in raw.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            where = part.ep_name.removesuffix("ExecutionProvider")
            placed.setdefault(where, Counter())[node.op_type] += 1
            if part.ep_name == ENDPOINTS["cpu"]:
                on_cpu.append((node.name, node.op_type))
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    kinds, known, data = {}, {}, set()
    for graph in graphs(model.graph):
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kinds[value.name] = value.type.tensor_type.elem_type
        data |= {value.name for value in graph.input}
        for node in graph.node:
            known[node.name] = node
            if node.op_type not in ("Shape", "Size") and data.intersection(node.input):
                data.update(node.output)
    offences = []
    for name, operator in on_cpu:
        node = known.get(name)
        what = f"{operator} {name!r} on the CPU"
        if node is None:
            offences.append(f"{what}: not a node of the graph")
        elif node.op_type not in ("Shape", "Size") and data.intersection(node.input):
            offences.append(f"{what} reads {sorted(data.intersection(node.input))}")
        elif not all(kinds.get(o) in _INTEGERS for o in node.output):
            offences.append(f"{what} gives no integers")
    return {where: dict(operators) for where, operators in placed.items()}, offences


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def tried(call: Callable[[], Any]) -> str | None:
    """What is said against a call, in one line."""
    try:
        call()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:600]
    return None


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    printed = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(printed.fileno(), 1)  # native code prints, the kernels that attend among it
    os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
    device = libraries.load(Path(sys.argv[1]), cudnn=sys.argv[2] == "with-cudnn")
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            layout = CacheLayout.from_json(asked["cache"]) if asked["cache"] else None
            found = Graph(Path(asked["model"]), layout, device).look()
        except Exception as error:
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
        printed.seek(0)
        said = printed.read().decode(errors="replace")
        found["kernels"] = sorted(set(re.findall(r"SdpaKernel=(\w+)", said)))
        printed.seek(0)
        printed.truncate()
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
