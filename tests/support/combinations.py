"""Requests at random, legal or not, and a driver of graphs that is nobody's but the tests'."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from rope_export import Attention, _cli, export
from rope_export.attention.random_block import random_block

TARGETS = ("ort", "onnx", "primitive")
GQA = "com.microsoft::GroupQueryAttention"
# Of outputs near 1, relative to the largest.
CLOSE = {"float32": 2e-5, "float16": 2e-2}
JUNK = 10.0
Request = dict[str, Any]
# What a block is made of, and what is asked of its graph: everything at its default.
SHAPE: Request = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": None,
    "head_dim": 16,
    "rotary_dim": None,
    "scaling": None,
    "layout": "half",
    "max_seq_len": 48,
    "value_head_dim": None,
    "causal": True,
    "window": None,
    "softcap": None,
    "sinks": False,
    "qk_norm": False,
    "qk_norm_eps": 1e-6,
    "qkv_bias": False,
    "out_bias": False,
    "scale": None,
    "dtype": "float32",
    "seed": 0,
}
INTERFACE: Request = {
    "target": "ort",
    "position_ids": False,
    "cache": False,
    "attention_mask": False,
    "padding": "right",
    "static": False,
    "batch": 1,
}
DEFAULTS = SHAPE | INTERFACE


def block_of(request: Request) -> Attention:
    return random_block(**{name: request[name] for name in SHAPE})


def export_of(request: Request, folder: Path, **options: Any) -> Any:
    interface = {name: request[name] for name in INTERFACE}
    return export(block_of(request), folder / "block", seed=request["seed"], **interface, **options)


# The contract


def offences(request: Request) -> list[set[str]]:
    """For everything that is wrong with a request, the arguments that may be named for it."""
    wrong: list[set[str]] = []

    def needs(holds: bool, *names: str) -> None:
        if not holds:
            wrong.append(set(names))

    r = request
    head_dim, scaling = r["head_dim"], r["scaling"] or {}
    needs(r["num_heads"] % (r["num_kv_heads"] or r["num_heads"]) == 0, "num_heads", "num_kv_heads")
    if r["rotary_dim"] is None:
        needs(head_dim % 2 == 0, "head_dim")
    else:
        needs(r["rotary_dim"] > 0 and r["rotary_dim"] % 2 == 0, "rotary_dim", "dim")
        needs(r["rotary_dim"] <= head_dim, "rotary_dim")
    for name in ("softcap", "scale"):
        needs(r[name] is None or (math.isfinite(r[name]) and r[name] > 0), name)
    needs(math.isfinite(r["qk_norm_eps"]) and r["qk_norm_eps"] > 0, "qk_norm_eps")
    for name in ("window", "value_head_dim"):
        needs(r[name] is None or r[name] >= 1, name)
    needs(r["dtype"] != "bfloat16", "dtype")
    needs(scaling.get("rope_type") != "axial" or r["position_ids"], "position_ids")
    needs(r["causal"] or not r["cache"], "cache", "causal")
    needs(not (r["static"] and r["cache"]), "cache", "static")
    needs(r["max_seq_len"] >= (2 if r["cache"] else 1), "max_seq_len")
    needs(r["padding"] in ("right", "left"), "padding")
    needs(r["padding"] == "right" or r["cache"] or r["attention_mask"], "padding")
    needs(r["batch"] >= 1, "batch")
    needs(r["batch"] == 1 or r["static"], "batch")
    return wrong


def longrope(pairs: int, original: int) -> Request:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.0 + 2.0 * i for i in range(pairs)],
        "original_max_position_embeddings": original,
    }


def scalings(width: int) -> list[Request | None]:
    """RoPE types that a rotated width can have."""
    pairs = width // 2
    found: list[Request | None] = [
        None,
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
        {"rope_type": "yarn", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        longrope(pairs, 20),
        longrope(pairs, 40),
    ]
    if pairs > 1:
        found += [
            {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8},
            {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 33},
            {"rope_type": "ntk", "factor": 3.0},
            {"rope_type": "mrope", "mrope_section": [1, pairs - 1]},
        ]
    if pairs % 2 == 0:
        found.append({"rope_type": "axial"})
    if pairs > 3:
        found.append({"rope_type": "default", "mrope_section": [pairs - 3, 1, 2]})
    return found


def legal(seed: int) -> Request:
    rng = random.Random(seed)
    pick = rng.choice
    flag = (False, True)
    kv_heads, groups = pick((1, 2, 3)), pick((1, 2, 3))
    head_dim = pick((8, 8, 16, 16, 24, 32, 12, 10, 7))
    rotary_dim = pick([n for n in (2, 4, 6, 8, 16) if n <= head_dim])
    if head_dim % 2 == 0 and pick(flag):
        rotary_dim = None
    scaling = pick((None, *scalings(rotary_dim or head_dim)))
    cache, masked = pick(flag), pick(flag)
    static = not cache and pick((False, False, True))
    norm = pick(flag)
    return {
        "hidden_size": pick((32, 40, 64)),
        "num_heads": kv_heads * groups,
        "num_kv_heads": kv_heads if groups > 1 else pick((None, kv_heads)),
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "scaling": scaling,
        "layout": pick(("half", "interleaved")),
        "max_seq_len": pick((2, 17, 48, 48, 600)),
        "value_head_dim": pick((None, None, None, head_dim, 8, 12, 5)),
        "causal": cache or pick(flag),
        "window": pick((None, None, 1, 3, 7, 40)),
        "softcap": pick((None, None, 0.7, 5.0, 50.0)),
        "sinks": pick((False, False, True)),
        "qk_norm": norm,
        "qk_norm_eps": pick((1e-6, 1e-6, 1e-5, 0.1)) if norm else 1e-6,
        "qkv_bias": pick(flag),
        "out_bias": pick(flag),
        "scale": pick((None, None, 0.07, 0.5)),
        "dtype": pick(("float32", "float32", "float16")),
        "seed": rng.randrange(1000),
        "target": pick(("ort", *TARGETS)),
        "position_ids": (scaling or {}).get("rope_type") == "axial" or pick(flag),
        "cache": cache,
        "attention_mask": masked,
        "padding": pick(("right", "left")) if cache or masked else "right",
        "static": static,
        "batch": pick((1, 3)) if static else 1,
    }


# One number is drawn, and all options come of it: drawn one by one, many examples would be near
# repetitions of others. Every run tries the same ones, and none is stored on disk; nothing is
# shrunk, which would take many exports.
seeds = st.integers(0, 2**32 - 1)
sweep = settings(derandomize=True, deadline=None, phases=[Phase.generate])

# A driver

# Columns of a call, and how many tokens each row has in them.
Call = tuple[int, list[int]]


def totals(calls: Sequence[Call]) -> list[int]:
    return [sum(counts) for counts in zip(*(counts for _, counts in calls), strict=True)]


def columns(rng: np.random.Generator, count: int, width: int, side: str) -> np.ndarray:
    """Where a row's tokens are among the columns of a call."""
    if side == "right":
        return np.arange(count)
    if side == "left":
        return np.arange(width - count, width)
    return np.sort(rng.choice(width, count, replace=False))


class Rows:
    """Whole sequences, and what eager PyTorch makes of each of them alone."""

    def __init__(self, request: Request, block: Attention, lengths: Sequence[int], reach: int):
        self.block = block
        self.rng = np.random.default_rng(request["seed"])
        self.dtype = dtype_of(block)
        self.lengths = list(lengths)
        self.tokens = [self.draw(n, 2.0) for n in lengths]
        self.axes = block.rope.axes
        self.reach = reach
        self.ids = None
        if request["position_ids"]:
            self.ids = [self.draw_ids(n) for n in lengths]

    def draw(self, length: int, deviation: float) -> np.ndarray:
        drawn = self.rng.standard_normal((length, self.block.hidden_size))
        return (deviation * drawn).astype(self.dtype)

    def draw_ids(self, length: int) -> np.ndarray:
        return self.rng.integers(0, self.reach, (self.axes, length))

    @torch.no_grad()
    def truth(self) -> list[np.ndarray]:
        outputs = []
        for row, tokens in enumerate(self.tokens):
            if not len(tokens):
                outputs.append(tokens)
                continue
            ids = None
            if self.ids is not None:
                ids = torch.from_numpy(self.shaped(self.ids[row][:, None]))
            outputs.append(self.block(torch.from_numpy(tokens)[None], position_ids=ids)[0].numpy())
        return outputs

    def shaped(self, ids: np.ndarray) -> np.ndarray:
        """``[axes, B, S]`` as the graph takes them."""
        return ids if self.axes > 1 else ids[0]

    def call(self, taken: Sequence[int], placed: Sequence[np.ndarray], width: int) -> Request:
        """Inputs of one call, with junk wherever there is no token."""
        rows = len(placed)
        deviation = self.rng.choice([0.0, JUNK])
        hidden = self.draw(rows * width, deviation).reshape(rows, width, -1)
        ids = self.draw_ids(rows * width).reshape(self.axes, rows, width)
        mask = np.zeros((rows, width), dtype=np.int64)
        for row, (start, at) in enumerate(zip(taken, placed, strict=True)):
            hidden[row, at] = self.tokens[row][start : start + len(at)]
            mask[row, at] = 1
            if self.ids is not None:
                ids[:, row, at] = self.ids[row][:, start : start + len(at)]
        feed = {"hidden_states": hidden, "attention_mask": mask}
        return feed if self.ids is None else feed | {"position_ids": self.shaped(ids)}


class Growing:
    """Past fed from present, whatever the graph makes of its shape."""

    def __init__(self, path: Path, block: Attention, rows: int) -> None:
        self.session = open_session(path)
        self.names = [value.name for value in self.session.get_inputs()]
        self.past = {}
        dtype = dtype_of(block)
        if "past_key" in self.names:
            for name, width in (("key", block.head_dim), ("value", block.value_head_dim)):
                self.past[f"past_{name}"] = np.zeros((rows, block.num_kv_heads, 0, width), dtype)
        self.mask = np.zeros((rows, 0), dtype=np.int64)

    def __call__(self, feed: Request) -> np.ndarray:
        self.mask = np.concatenate((self.mask, feed["attention_mask"]), axis=1)
        inputs = feed | self.past | {"attention_mask": self.mask}
        names = [value.name for value in self.session.get_outputs()]
        given = {name: inputs[name] for name in self.names}
        outputs = dict(zip(names, self.session.run(None, given), strict=True))
        for name, past in self.past.items():
            present = outputs[name.replace("past", "present")]
            assert present.shape == (*past.shape[:2], self.mask.shape[1], past.shape[3])
            self.past[name] = present
        return outputs["output"]


class Shared:
    """One pair of buffers longer than the past, bound as past and present at once.

    Unused slots hold what must never be read. The mask has the columns of all calls, or with
    ``packed`` those that the longest row fills.
    """

    def __init__(self, path: Path, block: Attention, rows: int, *, room: int, packed: bool) -> None:
        self.session = open_session(path)
        dtype = dtype_of(block)
        self.buffers = {}
        for name, width in (("key", block.head_dim), ("value", block.value_head_dim)):
            array = np.full((rows, block.num_kv_heads, room, width), math.nan, dtype)
            self.buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self.packed = packed
        self.mask = np.zeros((rows, 0), dtype=np.int64)

    def __call__(self, feed: Request) -> np.ndarray:
        new = feed["attention_mask"]
        mask = np.concatenate((self.mask, new), axis=1)
        binding = self.session.io_binding()
        arrays = feed | {"attention_mask": mask}
        kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("output")
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        self.session.run_with_iobinding(binding)
        self.mask = mask
        if self.packed:
            lengths = mask.sum(axis=1, keepdims=True)
            self.mask = (np.arange(lengths.max()) < lengths).astype(np.int64)
        return binding.get_outputs()[0].numpy()


def dtype_of(block: Attention) -> np.dtype[Any]:
    return np.dtype(str(block.dtype).removeprefix("torch."))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def served(
    rows: Rows, graph: Callable[[Request], np.ndarray], calls: Sequence[Call], side: str
) -> list[np.ndarray]:
    """What the graph makes of every token, by row."""
    answers = [np.zeros_like(tokens) for tokens in rows.tokens]
    taken = [0] * len(answers)
    for width, counts in calls:
        sides = [side] * len(counts)
        if side == "any":
            sides = rows.rng.choice(["left", "right", "mixed"], len(counts)).tolist()
        placed = [
            columns(rows.rng, n, width, of_row) for n, of_row in zip(counts, sides, strict=True)
        ]
        output = graph(rows.call(taken, placed, width))
        assert output.shape == (len(counts), width, rows.block.hidden_size)
        for row, (start, at) in enumerate(zip(taken, placed, strict=True)):
            answers[row][start : start + len(at)] = output[row, at]
        taken = [start + n for start, n in zip(taken, counts, strict=True)]
    assert taken == rows.lengths
    return answers


def assert_close(got: Sequence[np.ndarray], exact: Sequence[np.ndarray], dtype: str) -> None:
    largest = max(float(np.abs(row).max(initial=0)) for row in exact)
    for row, (mine, theirs) in enumerate(zip(got, exact, strict=True)):
        assert mine.dtype == theirs.dtype
        difference = np.abs(mine.astype(np.float64) - theirs)
        assert np.isfinite(difference).all(), f"row {row}: {np.argwhere(~np.isfinite(mine))[:3]}"
        worst = difference.max(axis=-1, initial=0)
        assert (worst <= CLOSE[dtype] * largest).all(), f"row {row}: {worst} of {largest}"


def kinds(path: Path) -> set[str]:
    """Operators of a graph and its branches."""
    found, graphs = set(), [onnx.load(path, load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(f"{node.domain}::{node.op_type}".removeprefix("::"))
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


# Whatever is not

OPTIONS = {
    "hidden_size": "--hidden",
    "num_heads": "--heads",
    "num_kv_heads": "--kv-heads",
    "max_seq_len": "--seq",
    "causal": "--no-causal",
    "dim": "--rotary-dim",
}


def option(name: str) -> str:
    return OPTIONS.get(name, f"--{name.replace('_', '-')}")


def command_of(request: Request) -> Iterator[str]:
    yield "block"
    always = {"hidden_size", "num_heads", "head_dim", "max_seq_len"}  # it has defaults of its own
    for name, value in request.items():
        if value == DEFAULTS[name] and name not in always:
            continue
        if name == "scaling":
            yield f"--scaling={json.dumps(value)}"
        elif value is True or name == "causal":
            yield option(name)
        else:
            yield f"{option(name)}={value}"


def run_command(arguments: Sequence[str]) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            _cli.run(list(arguments))
        except SystemExit as left:
            return int(left.code or 0), stdout.getvalue(), stderr.getvalue()
    raise AssertionError("it always exits")
