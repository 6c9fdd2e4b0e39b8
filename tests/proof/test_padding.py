"""Padding on either side, and one buffer for past and present, are served right or as NaN."""

from __future__ import annotations

import numpy as np
import pytest
from combinations import (
    DEFAULTS,
    GQA,
    Call,
    Growing,
    Request,
    Rows,
    Shared,
    assert_close,
    block_of,
    export_of,
    kinds,
    served,
    totals,
)
from selection import slow_unless


def tight(*calls: list[int]) -> list[Call]:
    return [(max(counts), counts) for counts in calls]


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


@pytest.mark.parametrize(
    "case", slow_unless(lambda case: case in ("variants", "by blocks, left"), SERVED)
)
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
        pytest.param(
            "ort", {"cache": True, "head_dim": 12, "value_head_dim": 8}, marks=pytest.mark.slow
        ),
        pytest.param("ort", {"position_ids": True}, marks=pytest.mark.slow),
        pytest.param("ort", {"causal": False}, marks=pytest.mark.slow),
        pytest.param("onnx", {"cache": True, "position_ids": True}, marks=pytest.mark.slow),
        pytest.param("onnx", {"causal": False, "window": 2, "sinks": True}, marks=pytest.mark.slow),
        pytest.param("primitive", {"cache": True, "window": 5}, marks=pytest.mark.slow),
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
        pytest.param("ort", {"cache": False}, True, marks=pytest.mark.slow),
        pytest.param(
            "ort",
            {"cache": True, "head_dim": 8, "position_ids": True, "window": 2},
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ort", {"cache": True, "head_dim": 12, "softcap": 5.0}, False, marks=pytest.mark.slow
        ),
        pytest.param("onnx", {"cache": True}, False, marks=pytest.mark.slow),
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
