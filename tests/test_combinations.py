"""Options together: what is legal exports and is right in every target, what is not is refused.

Graphs are run here by a driver of its own, with nothing but onnxruntime and the interface as the
README has it, and compared with eager PyTorch on every row's whole sequence alone, unpadded.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from rope_export import Attention, BadInputError, _cli, export
from rope_export.synthetic import random_block

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


WRONG: list[Request] = [
    *({"window": n} for n in (0, -1)),
    *({name: n} for name in ("softcap", "scale") for n in (0.0, -1.0, math.nan, math.inf)),
    *({"qk_norm_eps": n} for n in (-1e-6, 0.0, math.nan)),
    {"value_head_dim": 0},
    *({"rotary_dim": n} for n in (0, 3, 64, -2)),
    {"head_dim": 9, "rotary_dim": None, "scaling": None},
    {"num_heads": 3, "num_kv_heads": 2},
    {"num_heads": 2, "num_kv_heads": 4},
    {"dtype": "bfloat16"},
    {"head_dim": 16, "rotary_dim": 8, "scaling": {"rope_type": "axial"}, "position_ids": False},
    {"cache": True, "causal": False},
    {"cache": True, "static": True},
    {"cache": True, "max_seq_len": 1},
    {"max_seq_len": 0},
    {"padding": "left", "cache": False, "attention_mask": False},
    {"padding": "middle"},
    {"batch": 2, "static": False},
    {"batch": 0, "static": True},
]


def illegal(seed: int) -> Request:
    request, rng = legal(seed), random.Random(seed)
    if request["rotary_dim"] is None:  # a scaling is for one width
        request["rotary_dim"] = request["head_dim"]
    for change in rng.sample(WRONG, rng.choice((1, 1, 2))):
        if "rotary_dim" in change or "head_dim" in change:
            request["scaling"] = None
        request |= change
    return request


# One number is drawn, and all options come of it: drawn one by one, many examples would be near
# repetitions of others. Every run tries the same ones, and none is stored on disk; nothing is
# shrunk, which would take many exports.
seeds = st.integers(0, 2**32 - 1)
sweep = settings(derandomize=True, deadline=None, phases=[Phase.generate])


# A driver

# Columns of a call, and how many tokens each row has in them.
Call = tuple[int, list[int]]


def tight(*calls: list[int]) -> list[Call]:
    return [(max(counts), counts) for counts in calls]


def totals(calls: Sequence[Call]) -> list[int]:
    return [sum(counts) for counts in zip(*(counts for _, counts in calls), strict=True)]


def drawn_calls(
    rng: np.random.Generator, rows: int, room: int, *, cache: bool, padded: bool
) -> list[Call]:
    """A prompt, a chunk, then token by token, in ``room`` columns at most."""
    widths = [room]
    if cache:
        prompt = max(1, int(room * rng.choice([0.4, 0.9])))
        chunk = min((room - prompt) // 2, 25)
        widths = [prompt, chunk, *[1] * min(room - prompt - chunk, 5)]
    calls = []
    for index, width in enumerate(n for n in widths if n):
        counts = np.full(rows, width)
        if padded and (index < 2 or rng.random() < 0.3):
            counts = rng.integers(0, width + 1, rows)
            if rng.random() < 0.7:  # else there may be columns in which no row has a token
                counts[rng.integers(rows)] = width
        calls.append((width, counts.tolist()))
    return calls


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


# Whatever is legal


def assert_served(request: Request, block: Attention, path: Path) -> None:
    """Run the graph by hand: ragged prompts, a chunk, then token by token."""
    rng = np.random.default_rng([request["seed"], 1])
    scaling, cache = request["scaling"] or {}, request["cache"]
    room = request["max_seq_len"]
    if scaling.get("rope_type") in ("dynamic", "longrope"):
        # Their frequencies follow the largest position of a call: only below where they change.
        room = min(room, scaling["original_max_position_embeddings"])
        if request["static"] and room < request["max_seq_len"]:
            return
    batch = request["batch"] if request["static"] else int(rng.choice([1, 3]))
    padded = cache or request["attention_mask"]
    calls = drawn_calls(rng, batch, room, cache=cache, padded=padded)
    side = "right" if request["padding"] == "right" else "any"
    graphs: list[Growing | Shared] = [Growing(path, block, batch)]
    asked = {"past_key": cache, "past_value": cache, "attention_mask": padded}
    asked |= {"hidden_states": True, "position_ids": request["position_ids"]}
    assert sorted(graphs[0].names) == sorted(name for name, is_asked in asked.items() if is_asked)
    if cache and GQA in kinds(path):
        columns = sum(width for width, _ in calls)
        graphs.append(Shared(path, block, batch, room=columns + int(rng.integers(9)), packed=False))
    for graph in graphs:
        rows = Rows(request, block, totals(calls), room)
        assert_close(served(rows, graph, calls, side), rows.truth(), request["dtype"])


def kinds(path: Path) -> set[str]:
    """Operators of a graph and its branches."""
    found, graphs = set(), [onnx.load(path, load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(f"{node.domain}::{node.op_type}".removeprefix("::"))
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


def check_legal(request: Request) -> None:
    assert not offences(request)
    with tempfile.TemporaryDirectory() as folder:
        result = export_of(request, Path(folder), validate=True)
        assert result.report.passed, result.report.to_markdown()
        assert_served(request, block_of(request), result.model)


@settings(sweep, max_examples=11)
@given(seeds)
def test_what_is_legal_is_proven_and_right(seed):
    request = legal(seed)
    note(request)
    check_legal(request)


EVERYTHING: Request = {
    "hidden_size": 40,
    "num_heads": 6,
    "num_kv_heads": 2,
    "rotary_dim": 8,
    "scaling": scalings(8)[3],
    "layout": "interleaved",
    "window": 7,
    "softcap": 5.0,
    "sinks": True,
    "qk_norm": True,
    "qkv_bias": True,
    "out_bias": True,
    "scale": 0.3,
    "position_ids": True,
    "cache": True,
    "padding": "left",
}


# What random options once found, and may not find again.
CORNERS: dict[str, tuple[str, Request]] = {
    "two tokens": ("ort", {"cache": True, "max_seq_len": 2}),
    "two tokens by arithmetic": ("primitive", {"cache": True, "max_seq_len": 2, "window": 1}),
    "odd heads": (
        "onnx",
        {
            "cache": True,
            "head_dim": 7,
            "rotary_dim": 4,
            "num_heads": 1,
            "layout": "interleaved",
        },
    ),
    "padding seen both ways": ("ort", {"causal": False, "attention_mask": True}),
    "grouped heads seen both ways": (
        "primitive",
        {"causal": False, "attention_mask": True, "softcap": 5.0, "num_kv_heads": 1},
    ),
    "a switch within the prompt": ("ort", {"cache": True, "scaling": longrope(8, 20)}),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name):
    target, changes = CORNERS[name]
    check_legal(DEFAULTS | {"target": target} | changes)


# One buffer for past and present

SERVED: dict[str, Request] = {
    "rotating": {"hidden_size": 40},
    "rotated first": {"head_dim": 8, "position_ids": True, "num_heads": 6, "num_kv_heads": 3},
    "variants": {"window": 3, "softcap": 5.0, "sinks": True, "qk_norm": True, "qkv_bias": True},
    "left": {"padding": "left", "position_ids": True, "num_kv_heads": 1},
    "left, rotating": {"padding": "left", "layout": "interleaved", "dtype": "float16"},
    "by blocks": {"window": 7, "max_seq_len": 600, "num_kv_heads": 1},
    "by blocks, left": {"window": 40, "max_seq_len": 600, "padding": "left", "sinks": True},
}
CALLS = {
    "growing": tight(*[[1, 1, 1]] * 5),
    "ragged": tight([9, 4, 1], [1, 1, 1], [1, 1, 1]),
    "chunks of a batch": tight([6, 6, 6], [5, 5, 5], [1, 1, 1], [2, 2, 2]),
    "padded chunks": tight([9, 0, 1], [2, 6, 3], [0, 1, 1], [1, 1, 1], [4, 0, 2]),
    "columns of padding": [(9, [4, 0, 7]), (5, [2, 3, 1]), (1, [1, 1, 1]), (3, [1, 1, 1])],
    "one row": tight([7], [5], [1], [1], [3]),
}
LONG = {
    "long prompt": tight([530, 3, 513], [1, 1, 1], [4, 6, 1]),
    "long chunk": tight([2, 1, 0], [520, 515, 9], [1, 1, 1]),
}


@pytest.mark.parametrize("case", SERVED)
def test_one_buffer_serves_as_past_and_present(tmp_path, case):
    request = DEFAULTS | {"cache": True} | SERVED[case]
    result = export_of(request, tmp_path)
    assert GQA in kinds(result.model)
    block = block_of(request)
    for calls in (CALLS | (LONG if "blocks" in case else {})).values():
        lengths, widths = totals(calls), [width for width, _ in calls]
        filled = [0, *(max(totals(calls[: index + 1])) for index in range(len(calls)))]
        least = max(map(sum, zip(filled, widths, strict=False)))
        # Room for all columns and some more, or for what the longest row fills.
        for packed, room in ((False, sum(widths) + 3), (True, least), (True, least + 40)):
            rows = Rows(request, block, lengths, request["max_seq_len"])
            side = "any" if request["padding"] == "left" else "right"
            graph = Shared(result.model, block, len(lengths), room=room, packed=packed)
            assert_close(served(rows, graph, calls, side), rows.truth(), request["dtype"])


# Padding on either side


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("ort", {"cache": True, "window": 5}),
        ("ort", {"cache": True, "head_dim": 12, "value_head_dim": 8}),
        ("ort", {"position_ids": True}),
        ("ort", {"causal": False}),
        ("onnx", {"cache": True, "position_ids": True}),
        ("onnx", {"causal": False, "window": 2, "sinks": True}),
        ("primitive", {"cache": True, "window": 5}),
        ("primitive", {"causal": False, "softcap": 5.0}),
    ],
    ids=str,
)
def test_where_padding_is_on_the_left_any_side_will_do(tmp_path, target, changes):
    request = DEFAULTS | {"target": target, "attention_mask": True, "padding": "left"} | changes
    request |= {"num_heads": 4, "num_kv_heads": 2}
    block, result = block_of(request), export_of(request, tmp_path)
    calls = tight([9, 4, 1], *([[2, 6, 3], [1, 1, 1], [1, 0, 1]] if request["cache"] else []))
    for side in ("left", "right", "mixed", "any"):
        rows = Rows(request, block, totals(calls), 48)
        graph = Growing(result.model, block, 3)
        assert_close(served(rows, graph, calls, side), rows.truth(), "float32")


MISPLACED = [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("target", "changes", "refuses"),
    [
        ("ort", {"cache": True}, True),
        ("ort", {"cache": False}, True),
        ("ort", {"cache": True, "head_dim": 8, "position_ids": True, "window": 2}, True),
        ("ort", {"cache": True, "head_dim": 12, "softcap": 5.0}, False),
        ("onnx", {"cache": True}, False),
        ("primitive", {"cache": False, "window": 2}, False),
    ],
    ids=str,
)
def test_padding_on_the_wrong_side_is_never_answered_wrongly(tmp_path, target, changes, refuses):
    """NaN for that row where the operator cannot do it, the right answer elsewhere."""
    request = DEFAULTS | {"target": target, "attention_mask": True} | changes
    block, result = block_of(request), export_of(request, tmp_path)
    assert (GQA in kinds(result.model)) == refuses
    mask = np.array(MISPLACED)
    placed = [np.flatnonzero(row) for row in mask]
    wrong = [1, 2, 4] if refuses else []
    for before in (0, 3) if request["cache"] else (0,):
        lengths = [before + len(at) for at in placed]
        rows = Rows(request, block, lengths, 48)
        graph = Growing(result.model, block, len(mask))
        if before:
            graph(rows.call([0] * len(mask), [np.arange(before)] * len(mask), before))
        output = graph(rows.call([before] * len(mask), placed, mask.shape[1]))
        truth = rows.truth()
        for row, at in enumerate(placed):
            if row in wrong:
                assert np.isnan(output[row]).all()
            else:
                assert_close([output[row, at]], [truth[row][before:]], "float32")


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


def mentions(message: str, argument: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(argument)}(?![\w-])", message) is not None


@settings(sweep, max_examples=100)
@given(seeds)
def test_what_is_not_legal_is_refused_by_name_and_writes_nothing(seed):
    request = illegal(seed)
    note(request)
    wrong = offences(request)
    assert wrong
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(BadInputError) as refused:
            export_of(request, Path(folder))
        message = str(refused.value)
        assert len(message.splitlines()) == 1
        assert any(mentions(message, argument) for argument in set().union(*wrong)), message
        assert list(Path(folder).iterdir()) == []


def run_command(arguments: Sequence[str]) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            _cli.run(list(arguments))
        except SystemExit as left:
            return int(left.code or 0), stdout.getvalue(), stderr.getvalue()
    raise AssertionError("it always exits")


@settings(sweep, max_examples=40)
@given(seeds)
def test_the_command_refuses_it_in_one_line(seed):
    request = illegal(seed)
    note(request)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "made", "block")
        code, stdout, stderr = run_command([*command_of(request), f"--out={out}"])
        assert (code, stdout) == (2, ""), stderr
        (line,) = [line for line in stderr.splitlines() if "error" in line]
        assert line.startswith("rope-export: error: ")
        assert line == stderr.splitlines()[-1]
        wrong = set().union(*offences(request))
        assert any(mentions(line, option(argument)) for argument in wrong), line
        assert not out.parent.exists()


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("ort", {}),
        ("ort", {"value_head_dim": 12, "dtype": "float16"}),
        ("onnx", {"value_head_dim": 12, "softcap": None, "sinks": False}),
        ("primitive", {"value_head_dim": 12}),
    ],
)
def test_the_command_takes_everything_at_once(tmp_path, target, changes):
    request = DEFAULTS | EVERYTHING | {"target": target} | changes
    code, stdout, stderr = run_command([*command_of(request), f"--out={tmp_path / 'block'}"])
    assert code == 0, stderr
    assert "PASSED" in stdout
    assert_served(request, block_of(request), tmp_path / "block" / "model.onnx")
