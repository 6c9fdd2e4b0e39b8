"""The Decoder serves what the block computes, on one buffer and at any lengths."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import mutants
import numpy as np
import pytest
import torch
from driven import Schedule, drive

from rope_export import Attention, BadInputError, export
from rope_export.runtime import Decoder

CAPACITY, HIDDEN = mutants.LONGEST, mutants.HIDDEN


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, length, HIDDEN), dtype=np.float32)


# Only `ort` moves padding about.
SERVED = [("ort", "right"), ("ort", "left"), ("onnx", "left"), ("primitive", "right")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(row, marks=pytest.mark.slow if "left" in row else ()) for row in SERVED],
    ids="-".join,
)
def served(exports, request) -> tuple[Attention, Path, str]:
    """A block, its artifact and the side of the padding."""
    target, padding = request.param
    return *exports.get(target, variant="varied", padding=padding), padding


# What is served

SCHEDULES: dict[str, Schedule] = {
    "prefill": [(9, 9, 9)],
    "padded prefill": [(9, 4, 1)],
    "decode from nothing": [(1, 1, 1)] * 5,
    "prefill and decode": [(7, 7, 7), *[(1, 1, 1)] * 6],
    "rows of different lengths": [(7, 3, 5), *[(1, 1, 1)] * 6],
    "chunks": [(5, 5, 5), (3, 3, 3), (8, 8, 8), (1, 1, 1)],
    "padded chunks": [(5, 2, 4), (1, 6, 3), (4, 4, 2), (1, 1, 1)],
    "rows that wait": [(4, 0, 2), (0, 5, 0), (1, 1, 1), (0, 0, 3), (1, 1, 1)],
    "one row": [(6,), (9,), (1,), (1,), (4,)],
    "up to capacity": [(40, 30, 40), (7, 7, 7), (1, 1, 1)],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_calls_are_the_full_pass(served, name):
    block, folder, padding = served
    schedule = SCHEDULES[name]
    drive(Decoder.open(folder, batch=len(schedule[0])), block, schedule, padding)


def test_any_calls_are_the_full_pass(served):
    block, folder, padding = served
    decoders = {rows: Decoder.open(folder, batch=rows) for rows in (1, 2, 4)}
    rng = np.random.default_rng(7)
    for _ in range(12):
        rows = int(rng.choice([1, 2, 4]))
        schedule: list[tuple[int, ...]] = []
        while True:
            step = tuple(int(n) for n in rng.integers(0, rng.choice([2, 4, 16]), rows))
            if sum(map(max, schedule)) + max(step) > CAPACITY:
                break
            if max(step):
                schedule.append(step)
        decoders[rows].reset()
        drive(decoders[rows], block, schedule, padding)


def test_a_reset_forgets_everything(served):
    block, folder, padding = served
    decoder, fresh = (Decoder.open(folder, batch=3) for _ in range(2))
    drive(decoder, block, [(9, 2, 5), (1, 1, 1), (6, 6, 6)], padding)
    decoder.reset()
    assert decoder.lengths == (0, 0, 0)
    for length in (4, 1, 3):
        x = tokens(3, length, seed=length)
        np.testing.assert_array_equal(decoder.prefill(x), fresh.prefill(x))
    decoder.reset()
    drive(decoder, block, [(5, 9, 1), (2, 2, 2), (1, 1, 1)], padding)


def test_a_smaller_capacity_serves_the_same(served):
    block, folder, padding = served
    decoder = Decoder.open(folder, batch=2, capacity=9)
    assert decoder.capacity == 9
    drive(decoder, block, [(5, 3), (3, 3), (1, 1)], padding)
    with pytest.raises(BadInputError, match="9 of 9 tokens are taken and 1 more do not fit"):
        decoder.decode(tokens(2, 1))


def test_a_full_cache_refuses_and_stays_as_it_is(served):
    _, folder, _ = served
    decoder, other = (Decoder.open(folder, batch=2, capacity=12) for _ in range(2))
    for d in (decoder, other):
        d.prefill(tokens(2, 10))
    for refused in (tokens(2, 3), tokens(2, CAPACITY)):
        with pytest.raises(BadInputError) as raised:
            decoder.prefill(refused)
        assert str(raised.value) == (
            f"the cache is full: 10 of 12 tokens are taken and {refused.shape[1]} more do not "
            "fit; reset() it, or open it with a larger capacity"
        )
        assert decoder.lengths == (10, 10)
    # What fits goes on.
    for seed in (1, 2):
        x = tokens(2, 1, seed)
        np.testing.assert_array_equal(decoder.decode(x), other.decode(x))
    for call in (decoder.decode, decoder.prefill):
        with pytest.raises(BadInputError, match="12 of 12 tokens are taken and 1 more do not fit"):
            call(tokens(2, 1))
    assert decoder.lengths == (12, 12)
    decoder.reset()
    x = tokens(2, 12, seed=3)
    other.reset()
    np.testing.assert_array_equal(decoder.prefill(x), other.prefill(x))


def test_inputs_of_any_layout_in_memory(exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    decoder = Decoder.open(folder, batch=2)
    x = tokens(2, 5)
    wanted = decoder.prefill(x)
    for same in (
        np.asfortranarray(x),
        np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
        np.repeat(x, 2, axis=1)[:, ::2],
    ):
        decoder.reset()
        np.testing.assert_array_equal(decoder.prefill(same), wanted)
    for mask in ([[1] * 5] * 2, np.ones((2, 5), dtype=bool), np.ones((2, 5), dtype=np.int32)):
        decoder.reset()
        np.testing.assert_array_equal(decoder.prefill(x, attention_mask=mask), wanted)


def test_positions_that_are_given(exports):
    block, folder = exports.get("ort", padding="left", position_ids=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, CAPACITY, (3, 24)))
    for schedule in ("rows of different lengths", "padded chunks", "chunks"):
        drive(Decoder.open(folder, batch=3), block, SCHEDULES[schedule], "left", ids)


def test_positions_on_several_axes(tmp_path):
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    block = mutants.block(scaling=sections)
    export(block, tmp_path / "block", cache=True, position_ids=True)
    decoder = Decoder.open(tmp_path / "block", batch=3)
    assert decoder.layout.position_axes == 3
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, CAPACITY, (3, 3, 24)))
    drive(decoder, block, SCHEDULES["padded chunks"], ids=ids)
    with pytest.raises(BadInputError, match=r"integers \[3, 3, 1\], got \[3, 1\] of int64"):
        decoder.decode(tokens(3, 1), position_ids=np.zeros((3, 1), dtype=np.int64))


def test_half_precision(exports):
    block, folder = exports.get("ort", "float16", variant="varied")
    for name, schedule in SCHEDULES.items():
        decoder = Decoder.open(folder, batch=len(schedule[0]))
        assert decoder.dtype == np.float16, name
        drive(decoder, block, schedule)


def test_long_prompts_by_blocks_of_the_window(exports):
    """In one call, behind a past, and padded; the buffers are longer than the prompt."""
    block, folder = exports.get("ort", variant="long")
    for schedule in (
        [(515, 520), (3, 3), (1, 1)],
        [(9, 9), (514, 514), (1, 1)],
        [(3, 7), (515, 2)],
        [(514,), (5,), (1,)],
    ):
        drive(Decoder.open(folder, batch=len(schedule[0])), block, schedule)


# Made for CUDA alone: one call for each of several tokens behind a past


def test_a_graph_without_control_flow_is_given_token_by_token(exports, monkeypatch):
    block, folder = exports.get(
        "ort", "float16", variant="varied", padding="left", providers=("cuda",)
    )
    decoder = Decoder.open(folder, batch=3)
    assert decoder.layout.packs_rows
    assert not decoder.layout.by_rows
    for schedule in SCHEDULES.values():
        if len(schedule[0]) == 3:
            decoder.reset()
            drive(decoder, block, schedule, "left")
    calls = []
    run = Decoder._run

    def counted(self: Decoder, hidden: np.ndarray, *rest: object) -> np.ndarray:
        calls.append(hidden.shape[1])
        return run(self, hidden, *rest)

    monkeypatch.setattr(Decoder, "_run", counted)
    for rows in (3, 1):
        decoder = Decoder.open(folder, batch=rows)
        decoder.prefill(tokens(rows, 6).astype(np.float16))
        decoder.prefill(tokens(rows, 4).astype(np.float16))
    assert calls == [6, 1, 1, 1, 1, 6, 4]


def test_such_a_graph_takes_positions_token_by_token(exports):
    block, folder = exports.get("ort", "float16", providers=("cuda",), position_ids=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, CAPACITY, (3, 24)))
    for name in ("padded chunks", "chunks"):
        drive(Decoder.open(folder, batch=3), block, SCHEDULES[name], ids=ids)


# One buffer


def buffer_of(value: object) -> np.ndarray:
    """The memory of a float32 value itself."""
    count = int(np.prod(value.shape()))
    memory = (ctypes.c_float * count).from_address(value.data_ptr())
    return np.ctypeslib.as_array(memory).reshape(value.shape())


def test_past_and_present_are_one_buffer_and_a_step_writes_one_slot(exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    decoder = Decoder.open(folder, batch=2)
    addresses = [value.data_ptr() for value in decoder._buffers]
    memory = [buffer_of(value) for value in decoder._buffers]
    width = (2, mutants.KV_HEADS, CAPACITY, mutants.HEAD_DIM)
    assert [m.shape for m in memory] == [width, width]

    def same_buffers() -> bool:
        bound = decoder._binding.get_outputs()[:2]  # bound before the output
        return (
            addresses == [v.data_ptr() for v in decoder._buffers] == [v.data_ptr() for v in bound]
        )

    decoder.prefill(tokens(2, 9), attention_mask=[[1] * 9, [1] * 4 + [0] * 5])
    assert same_buffers()
    for step in range(20):
        lengths = decoder.lengths
        for m in memory:  # nobody reads or writes what is behind the tokens
            for row, length in enumerate(lengths):
                m[row, :, length:] = 77.0
        before = [m.copy() for m in memory]
        decoder.decode(tokens(2, 1, seed=step))
        assert same_buffers()
        for m, was in zip(memory, before, strict=True):
            written = np.argwhere((m != was).any(axis=(1, 3)))
            assert written.tolist() == [[0, lengths[0]], [1, lengths[1]]]
    decoder.prefill(tokens(2, 5))
    decoder.reset()
    decoder.prefill(tokens(2, 3))
    assert same_buffers()


def test_where_it_grows_the_cache_stays_in_the_runtime(exports):
    """The other targets return a new present, which is the next call's past as it is."""
    _, folder = exports.get("onnx", variant="varied", padding="left")
    decoder = Decoder.open(folder, batch=2)
    for length, total in ((5, 5), (1, 6), (3, 9)):
        decoder.prefill(tokens(2, length))
        assert [v.shape()[2] for v in decoder._buffers] == [total, total]
        assert [v.data_ptr() for v in decoder._buffers] == [
            v.data_ptr() for v in decoder._binding.get_outputs()[1:]
        ]


def test_serving_needs_no_torch(exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    script = f"""
import sys
import numpy as np
from rope_export.runtime import Decoder
decoder = Decoder.open({str(folder)!r}, batch=2)
x = np.ones((2, 5, {HIDDEN}), dtype=np.float32)
y = decoder.prefill(x, attention_mask=[[1] * 5, [1, 1, 0, 0, 0]])
assert np.isfinite(decoder.decode(y[:, :1])).all()
assert decoder.lengths == (6, 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)
