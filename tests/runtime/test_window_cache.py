"""A cache of the window only serves what the whole cache does, and holds what is documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mutants
import numpy as np
import onnxruntime
import pytest
import torch
from driven import Schedule, drawn, drive
from window_layout import resident

from rope_export import Attention, BadInputError, export
from rope_export.artifacts import cache_layout
from rope_export.runtime import Decoder
from rope_export.runtime.session import from_ort

WINDOW, LONGEST = 4, 72
Served = Callable[..., tuple[Attention, Path]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A block with a window that keeps all tokens in PyTorch, and its graph that does not."""
    root, made = tmp_path_factory.mktemp("windows"), {}

    def get(target: str = "ort", padding: str = "right", **options: object):
        name = f"{target}-{padding}-{options}"
        if name not in made:
            changes = {**mutants.VARIANTS["varied"], "window": WINDOW, "max_seq_len": LONGEST}
            changes["qk_norm"] = padding == "left"  # without, the operator turns queries and keys
            dtype = str(options.pop("dtype", "float32"))
            block = mutants.block(dtype, **changes)
            folder = root / str(len(made))
            export(block, folder, target=target, padding=padding, cache="window", **options)
            made[name] = block, folder
        return made[name]

    return get


SERVED = [("ort", "right"), ("ort", "left"), ("onnx", "left"), ("primitive", "right")]
SCHEDULES: dict[str, Schedule] = {
    "token by token": [(1, 1)] * 61,
    "prompt of many windows": [(47, 47, 47), *[(1, 1, 1)] * 9],
    "rows of different lengths": [(29, 3, 14), *[(1, 1, 1)] * 21],
    "chunks": [(5, 5), (3, 3), (17, 17), (1, 1), (4, 4), (20, 20)],
    "padded chunks": [(13, 2, 4), (1, 16, 3), (4, 4, 12), (1, 1, 1), (9, 1, 5), (1, 1, 1)],
    "rows that wait": [(14, 0, 2), (0, 15, 0), (1, 1, 1), (0, 0, 13), (1, 0, 1), (1, 1, 1)],
    "one row": [(6,), (29,), (1,), (1,), (14,), (1,), (1,)],
}


@pytest.mark.parametrize("slots", [None, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("graph", SERVED, ids="-".join)
def test_calls_are_the_full_pass(served, graph, slots):
    block, folder = served(*graph)
    for schedule in SCHEDULES.values():
        decoder = Decoder.open(folder, batch=len(schedule[0]), window_capacity=slots)
        drive(decoder, block, schedule, graph[1])


def test_any_calls_are_the_full_pass(served):
    block, folder = served()
    rng = np.random.default_rng(3)
    for _ in range(8):
        rows, slots = int(rng.choice([1, 2, 4])), int(rng.integers(WINDOW, 12))
        decoder = Decoder.open(folder, batch=rows, window_capacity=slots)
        schedule: list[tuple[int, ...]] = []
        while True:
            step = tuple(int(n) for n in rng.integers(0, rng.choice([2, 4, 16]), rows))
            if sum(map(max, schedule)) + max(step) > LONGEST:
                break
            if max(step):
                schedule.append(step)
        drive(decoder, block, schedule)


def test_half_precision_and_positions_that_are_given(served):
    block, folder = served("ort", "left", dtype="float16", position_ids=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, LONGEST, (3, LONGEST)))
    for name in ("rows of different lengths", "padded chunks"):
        drive(Decoder.open(folder, batch=3), block, SCHEDULES[name], "left", ids)


def test_long_prompts_by_blocks_of_the_window(tmp_path):
    block = mutants.block(**mutants.VARIANTS["long"])
    result = export(block, tmp_path / "block", cache="window")
    assert any("run in blocks" in text for text in result.graph["branches"])
    for schedule in ([(515, 520), (3, 3), (1, 1)], [(9, 9), (514, 3), (1, 1)], [(514,), (1,)]):
        drive(Decoder.open(result.path, batch=len(schedule[0])), block, schedule)


# What lies where


def keys_of(block: Attention, given: torch.Tensor) -> np.ndarray:
    """Rotated keys of a full pass, and values, in float64: ``[2, B, G, T, D]``."""
    wide = mutants.mutated(block, lambda b: b.double())
    with torch.no_grad():
        _, keys, values = wide.heads(given.double())
    return np.stack([keys.numpy(), values.numpy()])


@pytest.mark.parametrize("slots", [WINDOW, WINDOW + 1, 9, 30])
@pytest.mark.parametrize("graph", SERVED, ids="-".join)
def test_every_slot_holds_the_token_that_is_documented(served, graph, slots):
    block, folder = served(*graph)
    side = graph[1]
    given = drawn(block, 2, LONGEST)
    wanted = keys_of(block, given)
    decoder = Decoder.open(folder, batch=2, window_capacity=slots)
    totals = [0, 0]
    for step in [(3, 1), (1, 1), (1, 1), (9, 2), *[(1, 1)] * 7, (5, 21), (1, 1), (1, 1)]:
        length = max(step)
        x = np.zeros((2, length, block.hidden_size), np.float32)
        mask = np.zeros((2, length), np.int64)
        for row, count in enumerate(step):
            first = length - count if side == "left" else 0
            x[row, first : first + count] = given[row, totals[row] : totals[row] + count]
            mask[row, first : first + count] = 1
            totals[row] += count
        decoder.prefill(x, attention_mask=mask)
        for kind, value in enumerate(decoder._buffers):
            got = from_ort(value)
            assert got.shape[2] == slots
            for row, total in enumerate(totals):
                kept = resident(total, slots, WINDOW)
                assert min(total, WINDOW) <= kept <= min(total, slots)
                truth = wanted[kind, row, :, total - kept : total]
                np.testing.assert_allclose(got[row, :, :kept], truth, rtol=0, atol=2e-5)


def test_how_many_lie_there_is_as_documented():
    for window in (1, 2, 5, 16):
        for capacity in range(window, 4 * window + 2):
            wanted = [resident(t, capacity, window) for t in range(200)]
            assert cache_layout.resident(np.arange(200), window, capacity).tolist() == wanted


def test_graphs_may_be_exchanged_between_any_two_calls(served):
    """The present of one target is the past of another."""
    block, _ = served("ort")
    sessions = [
        onnxruntime.InferenceSession(served(target)[1] / "model.onnx")
        for target in ("ort", "onnx", "primitive")
    ]
    given = drawn(block, 2, LONGEST)
    with torch.no_grad():
        whole = block(given).numpy()
    names = ("output", "present_key", "present_value")
    # What lies in slots without a token must not matter.
    nothing = np.full((2, mutants.KV_HEADS, 7, mutants.HEAD_DIM), np.nan, np.float32)
    cache, done = (nothing, nothing), 0
    for call, length in enumerate([1, 1, 9, 1, 1, 1, 5, 1, 1, 22, 1, 1, 1, 6, 1, 1, 1]):
        x = given[:, done : done + length].numpy()
        done += length
        mask = np.ones((2, done), np.int64)
        inputs = {"hidden_states": x, "attention_mask": mask}
        inputs |= dict(zip(("past_key", "past_value"), cache, strict=True))
        output, *cache = sessions[call % 3].run(names, inputs)
        np.testing.assert_allclose(output, whole[:, done - length : done], rtol=0, atol=2e-5)
    assert done == 55


def test_memory_does_not_follow_the_sequence(served):
    _, folder = served()
    for capacity in (8, LONGEST):
        decoder = Decoder.open(folder, batch=2, capacity=capacity)
        assert {tuple(v.shape()) for v in decoder._buffers} == {
            (2, mutants.KV_HEADS, WINDOW, mutants.HEAD_DIM)
        }
        addresses = [v.data_ptr() for v in decoder._buffers]
        decoder.prefill(np.ones((2, 5, mutants.HIDDEN), np.float32))
        decoder.decode(np.ones((2, 1, mutants.HIDDEN), np.float32))
        assert [v.data_ptr() for v in decoder._buffers] == addresses


# Going back


@pytest.mark.parametrize("slots", [WINDOW, 6, 11])
def test_tokens_are_taken_back_as_far_as_they_lie_there(served, slots):
    """As far as documented, ``L(T - k) = L(T) - k``, and then the same tokens answer the same."""
    block, folder = served()
    given = drawn(block, 1, LONGEST).numpy()
    with torch.no_grad():
        whole = block(torch.from_numpy(given)).numpy()
    allowed = refused = 0
    for total in (3, 5, 9, 20, 21, 22, 23, 24, 40):
        for back in range(1, min(total, 14) + 1):
            decoder = Decoder.open(folder, window_capacity=slots)
            if total > back:
                decoder.prefill(given[:, : total - back])
            state = decoder.state()
            decoder.prefill(given[:, total - back : total])
            kept = resident(total, slots, WINDOW)
            if resident(total - back, slots, WINDOW) == kept - back:
                decoder.restore(state)
                allowed += 1
                assert decoder.lengths == (total - back,)
                for place in range(total - back, total + 2):
                    answer = decoder.decode(given[:, place : place + 1])
                    np.testing.assert_allclose(answer[0, 0], whole[0, place], rtol=0, atol=2e-5)
                continue
            refused += 1
            with pytest.raises(BadInputError) as raised:
                decoder.restore(state)
            most = max(k for k in range(kept + 1) if resident(total - k, slots, WINDOW) == kept - k)
            says = str(raised.value)
            assert says.startswith(f"{back} tokens of row 0 cannot be taken back: ")
            assert f"a window of {WINDOW} in {slots} slots" in says
            assert f"after {total} tokens at most {most} can" in says
            assert decoder.lengths == (total,)  # and goes on
            answer = decoder.decode(given[:, total : total + 1])
            np.testing.assert_allclose(answer[0, 0], whole[0, total], rtol=0, atol=2e-5)
    assert allowed
    assert refused


def test_a_state_with_copies_is_gone_back_to_from_anywhere(served):
    block, folder = served()
    given = drawn(block, 2, LONGEST).numpy()
    with torch.no_grad():
        whole = block(torch.from_numpy(given)).numpy()
    decoder = Decoder.open(folder, batch=2)
    decoder.prefill(given[:, :30])
    addresses = [v.data_ptr() for v in decoder._buffers]
    state = decoder.state(windows=True)
    for _ in range(2):
        decoder.prefill(given[:, 40:60])
        decoder.restore(state)
        assert [v.data_ptr() for v in decoder._buffers] == addresses
        for place in (30, 31):
            answer = decoder.decode(given[:, place : place + 1])[:, 0]
            np.testing.assert_allclose(answer, whole[:, place], rtol=0, atol=2e-5)


def test_a_new_present_can_always_be_gone_back_from(served):
    """Where every call returns new tensors, the ones before are still what they were."""
    block, folder = served("onnx", "left")
    given = drawn(block, 2, LONGEST).numpy()
    decoder = Decoder.open(folder, batch=2)
    decoder.prefill(given[:, :30])
    state = decoder.state()
    decoder.prefill(given[:, 30:50])
    decoder.restore(state)
    with torch.no_grad():
        whole = block(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(
        decoder.decode(given[:, 30:31])[:, 0], whole[:, 30], rtol=0, atol=2e-5
    )


# What is refused


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        (WINDOW - 1, "must be at least the window of 4 tokens, got 3"),
        (0, "must be an integer above 0, got 0"),
        (2.5, "must be an integer above 0, got 2.5"),
    ],
)
def test_slots_that_a_window_does_not_fit_in(served, slots, says):
    _, folder = served()
    with pytest.raises(BadInputError, match=f"^window_capacity {says}"):
        Decoder.open(folder, window_capacity=slots)


def test_slots_of_graphs_without_a_window_or_with_one_size(served, exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    with pytest.raises(BadInputError, match=r"^window_capacity is of layers that keep a window"):
        Decoder.open(folder, window_capacity=16)
    _, folder = served("ort", dtype="float16", providers=("cpu", "cuda"))
    assert Decoder.open(folder, window_capacity=WINDOW).lengths == (0,)
    with pytest.raises(BadInputError, match=r"^window_capacity must be the 4 slots .* got 5"):
        Decoder.open(folder, window_capacity=5)


def test_a_graph_without_control_flow_serves_rows_of_one_length(served):
    """Made for CUDA alone, where padding would push out tokens."""
    block, folder = served("ort", "left", dtype="float16", providers=("cuda",))
    decoder = Decoder.open(folder, batch=2)
    assert not decoder.layout.ragged
    drive(decoder, block, [(9, 9), (4, 4), *[(1, 1)] * 12], "left")
    with pytest.raises(BadInputError, match="serves rows of one length only"):
        decoder.prefill(np.zeros((2, 2, 64), np.float16), attention_mask=[[1, 1], [0, 1]])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    past = np.zeros((2, mutants.KV_HEADS, WINDOW, mutants.HEAD_DIM), np.float16)
    x = np.ones((2, 3, 64), np.float16)
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    inputs = {"hidden_states": x, "past_key": past, "past_value": past, "attention_mask": mask}
    (output,) = session.run(["output"], inputs)
    assert np.isfinite(output[0]).all()
    assert np.isnan(output[1]).all()
