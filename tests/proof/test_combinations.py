"""Options together: what is legal is exported, proven and right in every target."""

from __future__ import annotations

import tempfile
from pathlib import Path

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
    command_of,
    export_of,
    kinds,
    legal,
    longrope,
    offences,
    run_command,
    scalings,
    seeds,
    served,
    sweep,
    totals,
)
from hypothesis import given, note, settings
from selection import slow_unless

from rope_export import Attention


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


def check_legal(request: Request) -> None:
    assert not offences(request)
    with tempfile.TemporaryDirectory() as folder:
        result = export_of(request, Path(folder), validate=True)
        assert result.report.passed, result.report.to_markdown()
        assert_served(request, block_of(request), result.model)


@settings(sweep, max_examples=1)
@given(seeds)
def test_what_is_legal_is_proven_and_right(seed):
    request = legal(seed)
    note(request)
    check_legal(request)


@pytest.mark.slow
@settings(sweep, max_examples=10)
@given(seeds)
def test_much_more_that_is_legal_is_proven_and_right(seed):
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


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in ("two tokens", "a switch within the prompt"),
        CORNERS,
    ),
)
def test_corners(name):
    target, changes = CORNERS[name]
    check_legal(DEFAULTS | {"target": target} | changes)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("ort", {}),
        *(
            pytest.param(target, changes, marks=pytest.mark.slow)
            for target, changes in (
                ("ort", {"value_head_dim": 12, "dtype": "float16"}),
                ("onnx", {"value_head_dim": 12, "softcap": None, "sinks": False}),
                ("primitive", {"value_head_dim": 12}),
            )
        ),
    ],
)
def test_the_command_takes_everything_at_once(tmp_path, target, changes):
    request = DEFAULTS | EVERYTHING | {"target": target} | changes
    code, stdout, stderr = run_command([*command_of(request), f"--out={tmp_path / 'block'}"])
    assert code == 0, stderr
    assert "PASSED" in stdout
    assert_served(request, block_of(request), tmp_path / "block" / "model.onnx")
