"""Which form is chosen where, and the reasons given for those passed over."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from rope_export.artifacts.targets import OPSETS, TARGETS
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.lowering.choice import choose
from rope_export.lowering.rules import FORMS, Form, broken_limits
from rope_export.lowering.situation import Situation, situations
from rope_export.rope.embedding import RotaryEmbedding

# Where onnxruntime's best form is legal on both providers.
BEST = Situation(
    provider="cpu",
    dtype="float16",
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=64,
    causal=True,
    tabled=True,
    implied_positions=True,
    longest=4096,
    value_head_dim=64,
)
REASON = {
    "bfloat16 on cpu": "onnxruntime has no bfloat16 kernel",
    "always causal": "GroupQueryAttention is always causal (before onnxruntime 1.30; the graph is "
    "made for {})",
    "faster": "MultiHeadAttention is faster than GroupQueryAttention on the CPU when not causal",
    "scores": "without causal order, GroupQueryAttention on the CPU keeps the scores of all "
    "queries of a call; blocks of {} queries are rotated first",
    "past": "GroupQueryAttention is made for a past only in causal order",
    "padding on cuda": "GroupQueryAttention on CUDA attends to the padding of a call that is not",
    "window": "GroupQueryAttention takes a window only in causal order; without it, blocks of "
    "queries with the keys they see are made on the CPU alone, for prompts over {} tokens",
    "window, rotating": "GroupQueryAttention takes a window only in causal order",
    "float32 on cuda": "GroupQueryAttention has no float32 kernel on CUDA",
    "8": "GroupQueryAttention needs head_dim to be a multiple of 8, got {}",
    "512": "GroupQueryAttention on CUDA takes head_dim up to 512, got {}",
    "values": "GroupQueryAttention needs value heads as wide as key heads, got {}",
    "no rope": "there is no rotation to fuse",
    "head 16": "rotation inside GroupQueryAttention needs head_dim to be a multiple of 16, got {}",
    "rotary 16": "rotation inside GroupQueryAttention needs a rotated width that is a multiple of "
    "16, got {}",
    "positions": "GroupQueryAttention reads only the first position id",
    "no table": "rotation inside GroupQueryAttention needs one cos/sin table",
    "blocks": "with a window, GroupQueryAttention on the CPU still computes the whole triangle; "
    "prompts over {} instead, rotated first",
    "masked": "MultiHeadAttention would need a mask of its own making for {}; Attention takes",
    "cap": "MultiHeadAttention has no soft cap",
    **{
        f"integers {step}": "GroupQueryAttention with a cache of the window needs head_dim to be a "
        f"multiple of {step} for integers of {bits} bits, got {{}}"
        for bits, step in ((8, 16), (4, 32))
    },
    "sinks of mha": "MultiHeadAttention has no sinks",
    "linear": "MultiHeadAttention on the CPU provider has a memory-linear kernel only when not",
    "mha on cuda": "MultiHeadAttention on CUDA needs cuDNN, and computes all scores",
    "sinks": "Attention has no sinks",
    "half on cpu": "Attention on the CPU rounds its float16 scores to float16",
    "keeps all": "GroupQueryAttention has no cache of the window only (before onnxruntime 1.29; "
    "the graph is made for {})",
    "no integers": "GroupQueryAttention has no cache of integers (before onnxruntime 1.27; the "
    "graph is made for {})",
    "capped": "Attention caps the scores of hidden keys too, which then count (before onnxruntime "
    "1.27; the graph is made for {})",
}
CACHE = {"cache": True, "mask": True}
LEFT = {"padding": "left"}
INTEGERS = {"cache_bits": 8, "dtype": "float32"}

WINDOW_CACHE = {"window": 512, "window_cache": True}


def width_of(heads):
    return {"head_dim": heads, "rotary_dim": 16, "value_head_dim": heads}


# What differs from BEST, the form, and the reason for each better form in turn.
CPU = [
    ({}, "gqa_rotating", []),
    ({"dtype": "float32"}, "gqa_rotating", []),
    ({"num_kv_heads": 4}, "gqa_rotating", []),
    ({"num_kv_heads": 1}, "gqa_rotating", []),
    ({"rotary_dim": 16}, "gqa_rotating", []),
    ({"head_dim": 16, "rotary_dim": 16}, "gqa_rotating", []),
    ({"head_dim": 512, "rotary_dim": 512}, "gqa_rotating", []),
    ({"head_dim": 40, "rotary_dim": 40}, "gqa", [("head 16", "40")]),
    ({"head_dim": 24, "rotary_dim": 16}, "gqa", [("head 16", "24")]),
    ({"head_dim": 8, "rotary_dim": 8}, "gqa", [("head 16", "8")]),
    ({"rotary_dim": 24}, "gqa", [("rotary 16", "24")]),
    ({"rotary_dim": 2}, "gqa", [("rotary 16", "2")]),
    ({"rotary_dim": 0, "tabled": False}, "gqa", [("no rope", "")]),
    ({"implied_positions": False}, "gqa", [("positions", "")]),
    ({"tabled": False}, "gqa", [("no table", "")]),
    ({"mask": True}, "gqa_rotating", []),
    ({"mask": True} | LEFT, "gqa_rotating", []),
    (CACHE, "gqa_rotating", []),
    (CACHE | LEFT, "gqa_rotating", []),
    (CACHE | {"implied_positions": False}, "gqa", [("positions", "")]),
    ({"softcap": True, "sinks": True}, "gqa_rotating", []),
    # The kernel for a cache of integers is another; it has no blocks beside it.
    (CACHE | INTEGERS, "gqa_rotating", []),
    (CACHE | INTEGERS | {"window": 128}, "gqa_rotating", []),
    (
        CACHE | INTEGERS | {"head_dim": 12, "rotary_dim": 12},
        "attention",
        [("8", "12"), ("8", "12"), ("masked", "a past and padding")],
    ),
    *(
        (
            CACHE | INTEGERS | WINDOW_CACHE | {"cache_bits": bits} | width_of(wrong),
            "attention",
            [(f"integers {step}", str(wrong))] * 2
            + [("masked", "a past and padding and a window")],
        )
        for bits, step, wrong in ((8, 16, 24), (4, 32, 48))
    ),
    (CACHE | INTEGERS | WINDOW_CACHE | width_of(48), "gqa_rotating", []),
    (CACHE | INTEGERS | WINDOW_CACHE | {"cache_bits": 4} | width_of(96), "gqa_rotating", []),
    # A window is worth its blocks where the longest prompt has more than four of them.
    ({"window": 1024}, "gqa_rotating", []),
    ({"window": 1023}, "gqa", [("blocks", "4092 tokens run in blocks of 1023")]),
    ({"window": 1, "longest": 512}, "gqa_rotating", []),
    ({"window": 1, "longest": 513}, "gqa", [("blocks", "512 tokens run in blocks of 128")]),
    ({"window": 129, "longest": 516}, "gqa_rotating", []),
    ({"window": 129, "longest": 517}, "gqa", [("blocks", "516 tokens run in blocks of 129")]),
    (
        CACHE | LEFT | {"window": 128, "sinks": True, "softcap": True},
        "gqa",
        [("blocks", "512 tokens run in blocks of 128")],
    ),
    (
        {"head_dim": 12, "rotary_dim": 12, "dtype": "float32"},
        "attention",
        [("8", "12"), ("8", "12"), ("linear", "")],
    ),
    (
        {"head_dim": 12, "rotary_dim": 12},
        "attention_in_float32",
        [("8", "12"), ("8", "12"), ("linear", ""), ("half on cpu", "")],
    ),
    (
        CACHE | {"head_dim": 12, "rotary_dim": 12, "dtype": "float32"},
        "attention",
        [("8", "12"), ("8", "12"), ("masked", "a past and padding")],
    ),
    (
        CACHE | {"value_head_dim": 32, "window": 7, "longest": 512},
        "attention_in_float32",
        [
            ("values", "32 and 64"),
            ("values", "32 and 64"),
            ("masked", "a past and padding and a window"),
            ("half on cpu", ""),
        ],
    ),
    (
        {"value_head_dim": 32, "sinks": True},
        "decomposed",
        [
            ("values", "32 and 64"),
            ("values", "32 and 64"),
            ("sinks of mha", ""),
            ("sinks", ""),
            ("sinks", ""),
        ],
    ),
    # Without causal order: MultiHeadAttention where it can, by rows where they are padded.
    ({"causal": False}, "mha", [("faster", "")] * 2),
    ({"causal": False, "dtype": "float32"}, "mha", [("faster", "")] * 2),
    ({"causal": False, "head_dim": 12, "rotary_dim": 12}, "mha", [("faster", "")] * 2),
    ({"causal": False, "value_head_dim": 32}, "mha", [("faster", "")] * 2),
    ({"causal": False, "implied_positions": False}, "mha", [("faster", "")] * 2),
    ({"causal": False, "mask": True, "dtype": "float32"}, "mha", [("faster", "")] * 2),
    ({"causal": False, "mask": True} | LEFT, "mha", [("faster", "")] * 2),
    # ... else GroupQueryAttention by blocks of queries.
    ({"causal": False, "softcap": True, "dtype": "float32"}, "gqa", [("scores", "256")]),
    ({"causal": False, "softcap": True, "mask": True} | LEFT, "gqa", [("scores", "256")]),
    ({"causal": False, "sinks": True, "longest": 257}, "gqa", [("scores", "256")]),
    ({"causal": False, "sinks": True, "longest": 256}, "gqa_rotating", []),
    (
        {"causal": False, "window": 512, "dtype": "float32"},
        "gqa",
        [("scores", "256")],
    ),
    ({"causal": False, "window": 128, "longest": 513}, "gqa", [("scores", "128")]),
    ({"causal": False, "mask": True, "window": 1023} | LEFT, "gqa", [("scores", "511")]),
    ({"causal": False, "window": 1025, "longest": 9999}, "gqa", [("scores", "512")]),
    # What is shorter than its blocks, or is no width for them, is Attention with a mask.
    (
        {"causal": False, "window": 128, "longest": 512, "dtype": "float32"},
        "attention",
        [("window", "512"), ("window", "512"), ("masked", "a window")],
    ),
    (
        {"causal": False, "mask": True, "window": 7, "value_head_dim": 32} | LEFT,
        "attention_in_float32",
        [("values", "32 and 64")] * 2 + [("masked", "padding and a window"), ("half on cpu", "")],
    ),
    (
        {"causal": False, "softcap": True, "head_dim": 12, "rotary_dim": 12, "dtype": "float32"},
        "attention",
        [("8", "12")] * 2 + [("cap", "")],
    ),
    (
        {"causal": False, "dtype": "float32"} | CACHE,
        "attention",
        [("past", "")] * 2 + [("masked", "a past and padding")],
    ),
]
CUDA = [
    ({}, "gqa_rotating", []),
    ({"dtype": "bfloat16"}, "gqa_rotating", []),
    ({"head_dim": 512, "rotary_dim": 512}, "gqa_rotating", []),
    ({"head_dim": 40, "rotary_dim": 40}, "gqa", [("head 16", "40")]),
    ({"implied_positions": False, "dtype": "bfloat16"}, "gqa", [("positions", "")]),
    # Its kernel computes windows only: no blocks.
    (CACHE | LEFT | {"window": 128, "softcap": True, "sinks": True}, "gqa_rotating", []),
    ({"dtype": "float32"}, "attention", [("float32 on cuda", "")] * 2 + [("mha on cuda", "")]),
    *(
        (
            CACHE | INTEGERS | {"cache_bits": bits},
            "attention",
            [("float32 on cuda", "")] * 2 + [("masked", "a past and padding")],
        )
        for bits in (8, 4)
    ),
    (
        CACHE | {"dtype": "float32"},
        "attention",
        [("float32 on cuda", "")] * 2 + [("masked", "a past and padding")],
    ),
    (
        {"dtype": "float32", "sinks": True},
        "decomposed",
        [("float32 on cuda", "")] * 2 + [("sinks of mha", "")] + [("sinks", "")] * 2,
    ),
    (
        {"head_dim": 528, "rotary_dim": 64},
        "attention",
        [("512", "528")] * 2 + [("mha on cuda", "")],
    ),
    ({"head_dim": 12, "rotary_dim": 12}, "attention", [("8", "12")] * 2 + [("mha on cuda", "")]),
    (
        {"value_head_dim": 128},
        "attention",
        [("values", "128 and 64")] * 2 + [("mha on cuda", "")],
    ),
    (
        {"value_head_dim": 128, "softcap": True},
        "attention",
        [("values", "128 and 64")] * 2 + [("cap", "")],
    ),
    (
        {"head_dim": 12, "rotary_dim": 12, "dtype": "bfloat16"},
        "attention",
        [("8", "12"), ("8", "12"), ("mha on cuda", "")],
    ),
    # Its kernel has no causal order either, but no lengths of rows then.
    ({"causal": False}, "gqa_rotating", []),
    ({"causal": False, "dtype": "bfloat16", "softcap": True}, "gqa_rotating", []),
    (
        {"causal": False, "dtype": "float32"},
        "attention",
        [("float32 on cuda", "")] * 2 + [("mha on cuda", "")],
    ),
    (
        {"causal": False, "mask": True},
        "attention",
        [("padding on cuda", "")] * 2 + [("masked", "padding")],
    ),
    (
        {"causal": False, "window": 128},
        "attention",
        [("window", "512")] * 2 + [("masked", "a window")],
    ),
]
BOTH = [
    ({}, "gqa_rotating", []),
    (CACHE | LEFT, "gqa_rotating", []),
    # Not one form for each provider: one graph, and every provider must have all of it.
    (
        {"dtype": "float32"},
        "attention",
        [("float32 on cuda", ""), ("float32 on cuda", ""), ("linear", "")],
    ),
    (
        {"head_dim": 528, "rotary_dim": 64},
        "attention_in_float32",
        [("512", "528"), ("512", "528"), ("linear", ""), ("half on cpu", "")],
    ),
    (
        {"dtype": "float32", "sinks": True, "window": 512},
        "decomposed",
        [
            ("float32 on cuda", ""),
            ("float32 on cuda", ""),
            ("masked", "a window"),
            ("sinks", ""),
            ("sinks", ""),
        ],
    ),
    # One call on both, since rows and blocks would be control flow.
    ({"causal": False}, "gqa_rotating", []),
    ({"causal": False, "softcap": True}, "gqa_rotating", []),
    ({"rotary_dim": 24}, "gqa", [("rotary 16", "24")]),
    # Blocks are control flow, which is not for CUDA: nothing is left for them.
    ({"window": 128}, "gqa_rotating", []),
    (CACHE | {"window": 128, "sinks": True}, "gqa_rotating", []),
]
ORT = [
    *((("cpu",), *row) for row in CPU),
    *((("cuda",), *row) for row in CUDA),
    *((("cpu", "cuda"), *row) for row in BOTH),
    *((("cuda", "cpu"), *row) for row in BOTH),
]


def on(providers, **changes):
    widths = {"value_head_dim": changes.get("head_dim", BEST.head_dim)}
    return [replace(BEST, **widths | changes, provider=provider) for provider in providers]


def assert_reasons(reasons, expected):
    """One line for each better form, equal ones once, each with its value."""
    expected = list(dict.fromkeys(expected))
    assert len(reasons) == len(expected)
    for reason, (name, value) in zip(reasons, expected, strict=True):
        assert re.match(rf"{re.escape(REASON[name].format(value))}\b", reason)


@pytest.mark.parametrize(("providers", "changes", "form", "reasons"), ORT, ids=str)
def test_onnxruntime_gets_the_best_form_that_is_legal_everywhere(providers, changes, form, reasons):
    choice = choose("ort", on(providers, **changes))
    assert choice.form.name == form
    assert_reasons(choice.reasons, reasons)
    assert set(choice.score_copies) == set(providers)


@pytest.mark.parametrize(
    ("target", "providers", "dtype", "form"),
    [
        ("onnx", ("cpu",), "float32", "attention"),
        ("onnx", ("cpu",), "float16", "attention_in_float32"),
        ("onnx", ("cuda",), "float16", "attention"),
        ("onnx", ("cuda",), "bfloat16", "attention"),
        ("onnx", ("cpu", "cuda"), "float16", "attention_in_float32"),
        ("onnx", ("cpu", "cuda"), "float32", "attention"),
        ("primitive", ("cpu",), "float32", "primitive"),
        ("primitive", ("cpu",), "float16", "primitive"),
        ("primitive", ("cpu", "cuda"), "float32", "primitive"),
        ("primitive", ("cuda",), "bfloat16", "primitive"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"implied_positions": False},
        {"tabled": False},
        {"head_dim": 7, "rotary_dim": 2},
        {"value_head_dim": 5},
        {"window": 3},
        {"softcap": True},
        {"mask": True, "padding": "left"},
        {"cache": True, "mask": True, "window": 128, "softcap": True},
    ],
    ids=str,
)
def test_the_standard_targets_depend_on_the_dtype_and_sinks(
    target, providers, dtype, form, changes
):
    choice = choose(target, on(providers, dtype=dtype, **changes))
    assert choice.form.name == form
    assert_reasons(choice.reasons, [("half on cpu", "")] * (form == "attention_in_float32"))
    choice = choose(target, on(providers, dtype=dtype, sinks=True, **changes))
    assert choice.form.name == ("primitive" if target == "primitive" else "decomposed")
    assert_reasons(choice.reasons, [("sinks", "")] * (target == "onnx"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("providers", [("cpu",), ("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_bfloat16_on_the_cpu_is_refused_with_the_reason(target, providers):
    message = (
        f"target {target} with dtype bfloat16 is not possible for provider "
        f"{' and '.join(providers)}: {REASON['bfloat16 on cpu']}"
    )
    with pytest.raises(BadInputError, match=re.escape(message)):
        choose(target, on(providers, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("target", "provider", "changes", "copies"),
    [
        # Measured, in float32 copies of the scores of 4096 tokens.
        ("ort", "cpu", {"dtype": "float32"}, 0.0),
        ("ort", "cpu", {"dtype": "float32", "onnxruntime": "1.28"}, 0.0),
        ("ort", "cpu", {"dtype": "float32", "onnxruntime": "1.27"}, 1.0),
        ("ort", "cpu", {"dtype": "float32", "softcap": True}, 1.0),
        ("ort", "cpu", {"dtype": "float32", "sinks": True}, 1.0),
        ("ort", "cpu", {}, 2.0),
        ("ort", "cpu", {"sinks": True, "onnxruntime": "1.24"}, 2.0),
        ("ort", "cpu", {"causal": False}, 0.0),
        ("ort", "cpu", {"causal": False, "mask": True}, 0.0),
        ("ort", "cpu", {"causal": False, "sinks": True}, 0.0),
        ("ort", "cpu", {"causal": False, "sinks": True, "longest": 256}, 2.0),
        ("ort", "cpu", {"window": 512, "dtype": "float32"} | CACHE, 0.0),
        ("ort", "cpu", CACHE | INTEGERS, 0.0),
        # Of blocks there is only one at a time.
        ("ort", "cpu", {"window": 512} | CACHE, 0.0),
        ("ort", "cuda", {"sinks": True}, 0.0),
        ("ort", "cpu", {"head_dim": 12}, 2.5),
        ("ort", "cpu", {"head_dim": 12, "sinks": True}, 6.0),
        ("onnx", "cuda", {"sinks": True}, 6.0),
        ("onnx", "cpu", {"dtype": "float32"}, 2.5),
        ("onnx", "cuda", {"dtype": "float16"}, 0.0),
        ("onnx", "cuda", {"dtype": "float32"}, 0.0),
        ("onnx", "cuda", {"dtype": "float32", "head_dim": 20}, 2.5),
        ("onnx", "cuda", {"dtype": "float16", "window": 512}, 2.5),
        ("onnx", "cuda", {"dtype": "float16"} | CACHE, 2.5),
        ("onnx", "cuda", {"dtype": "float32", "num_kv_heads": 4}, 0.0),
        ("primitive", "cuda", {}, 6.0),
    ],
)
def test_the_copies_of_the_scores_are_known(target, provider, changes, copies):
    choice = choose(target, on((provider,), **changes))
    assert choice.score_copies == {provider: copies}


@pytest.mark.parametrize(
    ("target", "changes", "before", "form", "otherwise"),
    [
        ("onnx", {"dtype": "float32", "softcap": True}, "1.27", "attention", "decomposed"),
        ("onnx", {"softcap": True} | CACHE, "1.27", "attention_in_float32", "decomposed"),
        (
            "onnx",
            {"dtype": "float32", "softcap": True, "causal": False, "window": 5},
            "1.27",
            "attention",
            "decomposed",
        ),
        (
            "ort",
            {"dtype": "float32", "softcap": True, "head_dim": 12},
            "1.27",
            "attention",
            "decomposed",
        ),
        (
            "ort",
            CACHE | {"dtype": "float32", "window": 1024, "window_cache": True},
            "1.29",
            "gqa_rotating",
            "attention",
        ),
        ("ort", {"dtype": "float32", "softcap": True, "causal": False}, "1.30", "gqa", "attention"),
        ("ort", {"causal": False, "sinks": True}, "1.30", "gqa", "decomposed"),
        ("ort", {"causal": False, "window": 128}, "1.30", "gqa", "attention_in_float32"),
        ("ort", CACHE | INTEGERS | {"sinks": True}, "1.27", "gqa_rotating", "decomposed"),
        # Nothing is hidden from anyone.
        ("onnx", {"dtype": "float32", "softcap": True, "causal": False}, None, "attention", ""),
        ("ort", {"softcap": True, "sinks": True} | CACHE, None, "gqa_rotating", ""),
        ("primitive", {"softcap": True}, None, "primitive", ""),
    ],
    ids=str,
)
def test_a_form_that_needs_a_later_onnxruntime_is_passed_over(
    target, changes, before, form, otherwise
):
    choice = choose(target, on(("cpu",), **changes))
    assert (choice.form.name, choice.onnxruntime) == (form, before)
    for number in range(24, 32):
        version = f"1.{number}"
        earlier = choose(target, on(("cpu",), **changes, onnxruntime=version))
        if before is None or number >= int(before[2:]):
            assert earlier == choice
            continue
        assert earlier.form.name == otherwise
        assert earlier.onnxruntime is None
        why = "capped" if target == "onnx" or "softcap" in changes else "keeps all"
        why = "always causal" if before == "1.30" else why
        why = "no integers" if "cache_bits" in changes else why
        assert REASON[why].format(version) in earlier.reasons


def test_padded_rows_are_cut_in_every_onnxruntime():
    for version in ("1.24", "1.29", "1.30", "1.31"):
        choice = choose("ort", on(("cpu",), causal=False, mask=True, onnxruntime=version))
        assert (choice.form.name, choice.cut_rows, choice.onnxruntime) == ("mha", True, None)


# What the graph does while it runs: one call a row for chunks of a batch, blocks of the window.
ROWS, BLOCKS, ONE_BY_ONE = "run row by row", "run in blocks of", "must be given row by row"
CUT = "rows of a padded batch run one by one, each cut to its tokens"
SINGLE = "a single new token is a call of its own"
SLIDES = [ROWS, SINGLE, BLOCKS]
SLIDING = {"window": 200, "longest": 801}
RUNS = [
    ("ort", ("cpu",), {}, False, 0, [], []),
    ("ort", ("cpu",), {"mask": True}, False, 0, [], []),
    ("ort", ("cpu",), CACHE, True, 0, [ROWS, SINGLE], []),
    ("ort", ("cpu",), CACHE | LEFT, True, 0, [ROWS, SINGLE], []),
    ("ort", ("cpu",), CACHE | {"implied_positions": False}, True, 0, [ROWS, SINGLE], []),
    ("ort", ("cpu",), SLIDING, False, 200, [BLOCKS], []),
    ("ort", ("cpu",), SLIDING | {"longest": 800}, False, 0, [], []),
    ("ort", ("cpu",), {"window": 127}, False, 128, [BLOCKS], []),
    ("ort", ("cpu",), {"window": 127, "longest": 512}, False, 0, [], []),
    ("ort", ("cpu",), CACHE | SLIDING, True, 200, SLIDES, []),
    ("ort", ("cpu",), CACHE | SLIDING | {"dtype": "float32"}, True, 200, SLIDES, []),
    # None of it where the form is another.
    ("ort", ("cpu",), CACHE | SLIDING | {"head_dim": 12}, False, 0, [], []),
    ("ort", ("cpu",), {"causal": False, "mask": True}, False, 0, [CUT], []),
    ("ort", ("cpu",), {"causal": False}, False, 0, [], []),
    ("ort", ("cpu",), SLIDING | {"causal": False}, False, 0, ["over 800 tokens run in bl"], []),
    ("ort", ("cpu",), {"causal": False, "sinks": True}, False, 0, ["over 256 tokens run in"], []),
    ("ort", ("cuda",), {"causal": False, "sinks": True}, False, 0, [], []),
    ("ort", ("cpu", "cuda"), {"causal": False, "sinks": True}, False, 0, [], []),
    ("onnx", ("cpu",), {"causal": False, "mask": True}, False, 0, [], []),
    ("ort", ("cuda",), CACHE | SLIDING | {"dtype": "float32"}, False, 0, [], []),
    ("onnx", ("cpu",), CACHE | SLIDING, False, 0, [], []),
    ("onnx", ("cuda",), CACHE, False, 0, [], []),
    ("primitive", ("cpu",), CACHE | SLIDING, False, 0, [], []),
    # Nor on CUDA, which could not capture it.
    ("ort", ("cuda",), {}, False, 0, [], []),
    ("ort", ("cuda",), SLIDING, False, 0, [], []),
    ("ort", ("cuda",), CACHE | SLIDING, False, 0, [], [ONE_BY_ONE]),
    ("ort", ("cuda",), CACHE | LEFT | {"dtype": "bfloat16"}, False, 0, [], [ONE_BY_ONE]),
    ("ort", ("cpu", "cuda"), SLIDING, False, 0, [], []),
    ("ort", ("cpu", "cuda"), CACHE | SLIDING, True, 0, [ROWS], []),
    ("ort", ("cuda", "cpu"), CACHE, True, 0, [ROWS], []),
]


@pytest.mark.parametrize(
    ("target", "providers", "changes", "by_rows", "block", "branches", "limits"), RUNS, ids=str
)
def test_what_a_graph_decides_while_it_runs(
    target, providers, changes, by_rows, block, branches, limits
):
    choice = choose(target, on(providers, **changes))
    assert choice.by_rows is by_rows
    assert choice.single is any(SINGLE in line for line in choice.branches)
    assert choice.window_block == block
    assert choice.padding == changes.get("padding", "right")
    for said, expected in ((choice.branches, branches), (choice.limits, limits)):
        assert len(said) == len(expected)
        assert all(part in line for part, line in zip(expected, said, strict=True))
    if block:
        assert f"prompts over {4 * block} tokens run in blocks of {block}:" in choice.branches[-1]


# One step to the other side of each limit.
STEPS = [
    {"provider": "cuda"},
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"causal": False},
    {"tabled": False},
    {"implied_positions": False},
    *({"head_dim": n, "rotary_dim": n, "value_head_dim": n} for n in (12, 40)),
    {"head_dim": 520, "value_head_dim": 520},
    *({"rotary_dim": n} for n in (0, 24)),
    {"value_head_dim": 32},
    {"window": 512},
    {"window": 3, "longest": 512},
    {"softcap": True},
    {"softcap": True, "onnxruntime": "1.26"},
    CACHE | {"window": 512, "window_cache": True, "onnxruntime": "1.28"},
    {"sinks": True},
    {"mask": True},
    {"padding": "left"},
    CACHE,
    CACHE | {"cache_bits": 8},
    CACHE | {"cache_bits": 8, "onnxruntime": "1.26"},
    CACHE | {"cache_bits": 4, "window": 512, "window_cache": True},
]


@cache
def every_situation():
    """Up to three steps away from the best one."""
    chosen = itertools.chain.from_iterable(itertools.combinations(STEPS, n) for n in range(4))
    merged = [{key: step[key] for step in steps for key in step} for steps in chosen]
    return [replace(BEST, **changes) for changes in merged]


LIMITS = list(dict.fromkeys(limit for forms in FORMS.values() for f in forms for limit in f.limits))


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_is_reached_and_a_better_one_never_left(target):
    reached = Counter()
    for situation in every_situation():
        legal = [form for form in FORMS[target] if not broken_limits(form, [situation])]
        if not legal:
            with pytest.raises(BadInputError):
                choose(target, [situation])
            continue
        choice = choose(target, [situation])
        assert choice.form is legal[0]
        assert bool(choice.reasons) == (choice.form is not FORMS[target][0])
        reached[choice.form.name] += 1
    assert set(reached) == {form.name for form in FORMS[target]}


@pytest.mark.parametrize("providers", [("cpu",), ("cuda",), ("cpu", "cuda")], ids=str)
def test_no_form_is_left_for_blocks_that_are_not_computed(providers):
    for situation in every_situation():
        refused = situation.cache_bits and situation.dtype != "float32"
        if situation.provider != "cpu" or situation.dtype == "bfloat16" or refused:
            continue
        choice = choose("ort", [replace(situation, provider=provider) for provider in providers])
        promised = re.findall(r"run in blocks of (\d+)", " ".join(choice.reasons))
        assert promised in ([], [str(choice.window_block)])
        assert bool(choice.window_block) <= (providers == ("cpu",))
        assert choice.by_rows == (
            choice.form.attention.endswith("GroupQueryAttention")
            and situation.cache
            and "cpu" in providers
        )


PREFERENCES = (
    "run in blocks of",
    "is faster than",
    "Attention does neither",
    "keeps the scores of all queries",
)


@pytest.mark.parametrize("target", TARGETS)
def test_a_preference_is_no_inability(target):
    """What is passed over for speed alone would run; everything else passed over would not."""
    for situation in every_situation():
        for form in FORMS[target]:
            broken = broken_limits(form, [situation])
            cannot = broken_limits(form, [situation], to_run=True)
            assert cannot == [
                reason for reason in broken if not any(part in reason for part in PREFERENCES)
            ]


# What reasons name beside the fields of a situation.
DERIVED = {
    "integer_step": lambda s: {8: 16, 4: 32}[s.cache_bits],
    "window_block": lambda s: max(s.window, 128),
    "long_prompt": lambda s: 4 * max(s.window, 128),
    "query_block": lambda s: 256 if not s.window else min(512, max(128, s.window // 2)),
    "what_is_masked": lambda s: " and ".join(
        ["a past"] * s.cache + ["padding"] * s.mask + ["a window"] * (s.window > 0)
    ),
}


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.reason)
def test_every_limit_can_be_broken_and_says_so_with_its_values(limit):
    alone = Form("alone", "::Alone", None, (limit,), lambda _: 0.0)
    said = 0
    for situation in every_situation():
        reasons = broken_limits(alone, [situation])
        assert len(reasons) == limit.broken_by(situation)
        for reason in reasons:
            values = {
                name: DERIVED[name](situation) if name in DERIVED else getattr(situation, name)
                for name in re.findall(r"{(\w+)}", limit.reason)
            }
            plain = limit.reason.format(**values)
            assert reason.startswith(plain)
            assert (reason == plain) == (limit.since is None)
            if limit.since is not None:
                assert reason.endswith(f"the graph is made for {situation.onnxruntime})")
            assert "{" not in reason
            assert "None" not in reason
            assert "" not in values.values()
            assert limit.provider in (None, situation.provider)
            said += 1
    assert said


@pytest.mark.parametrize(
    "limit", [limit for limit in LIMITS if limit.provider], ids=lambda limit: limit.reason
)
def test_a_limit_of_one_provider_does_not_bind_the_other(limit):
    for situation in every_situation():
        if situation.provider != limit.provider:
            assert not limit.broken_by(situation)


def test_form_names_are_unique_and_every_target_has_its_opset():
    names = Counter(form.name for form in {form for forms in FORMS.values() for form in forms})
    assert max(names.values()) == 1
    assert set(FORMS) == set(OPSETS) == set(TARGETS)


@pytest.mark.parametrize(
    ("rope", "rotary_dim", "tabled"),
    [
        (None, 0, False),
        (RotaryEmbedding(4), 4, False),
        (RotaryEmbedding(2, max_seq_len=9), 2, True),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implied", [True, False])
def test_a_block_is_described_once_for_each_provider(rope, rotary_dim, tabled, causal, implied):
    block = Attention(12, 2, num_kv_heads=1, head_dim=5, rope=rope, causal=causal)
    described = situations(
        block, ("cuda", "cpu"), dtype="float16", implied_positions=implied, longest=64
    )
    assert described == [
        Situation(
            provider=provider,
            dtype="float16",
            num_heads=2,
            num_kv_heads=1,
            head_dim=5,
            rotary_dim=rotary_dim,
            causal=causal,
            tabled=tabled,
            implied_positions=implied,
            longest=64,
            value_head_dim=5,
        )
        for provider in ("cuda", "cpu")
    ]


@pytest.mark.parametrize(
    ("variant", "asked", "described"),
    [
        ({"window": 7}, {}, {"window": 7}),
        ({"softcap": 0.5}, {}, {"softcap": True}),
        ({"sinks": True}, {}, {"sinks": True}),
        ({"value_head_dim": 3}, {}, {"value_head_dim": 3}),
        ({}, {"mask": True}, {"mask": True}),
        ({}, {"mask": True, "padding": "left"}, {"mask": True, "padding": "left"}),
        ({"window": 7}, CACHE, CACHE | {"window": 7}),
        ({}, {"onnxruntime": "1.24"}, {"onnxruntime": "1.24"}),
        # These change no operator's limits.
        ({"qk_norm": True, "qkv_bias": True, "out_bias": True, "scale": 0.3}, {}, {}),
    ],
    ids=str,
)
def test_variants_are_described(variant, asked, described):
    usual = {"dtype": "float32", "implied_positions": True, "longest": 64}
    (plain,) = situations(Attention(12, 2), ["cpu"], **usual)
    (got,) = situations(Attention(12, 2, **variant), ["cpu"], **usual, **asked)
    assert got == replace(plain, **described)
