"""Which form is chosen where, and the reasons given for those passed over."""

import itertools
import re
from collections import Counter
from dataclasses import asdict, replace

import pytest

from rope_export.attention import Attention
from rope_export.errors import BadInputError
from rope_export.lowering import rules
from rope_export.lowering.rules import FORMS, Situation, broken_limits, choose
from rope_export.rotary import RotaryEmbedding

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
    "not causal": "GroupQueryAttention is always causal",
    "float32 on cuda": "GroupQueryAttention has no float32 kernel on CUDA",
    "8": "GroupQueryAttention needs head_dim to be a multiple of 8, got",
    "256": "GroupQueryAttention on CUDA takes head_dim up to 256, got",
    "no rope": "there is no rotation to fuse",
    "head 16": "rotation inside GroupQueryAttention needs head_dim to be a multiple of 16, got",
    "rotary 16": "rotation inside GroupQueryAttention needs a rotated width that is a multiple",
    "positions": "GroupQueryAttention reads only the first position id",
    "no table": "rotation inside GroupQueryAttention needs one cos/sin table",
    "linear": "MultiHeadAttention on the CPU provider has a memory-linear kernel only when not",
    "bfloat16 mha": "MultiHeadAttention has no bfloat16 kernel on CUDA",
    "half on cpu": "Attention on the CPU rounds its float16 scores to float16",
}

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
    ({"causal": False}, "mha", [("not causal", "")] * 2),
    ({"causal": False, "dtype": "float32"}, "mha", [("not causal", "")] * 2),
    ({"causal": False, "head_dim": 12, "rotary_dim": 12}, "mha", [("not causal", "")] * 2),
]
CUDA = [
    ({}, "gqa_rotating", []),
    ({"dtype": "bfloat16"}, "gqa_rotating", []),
    ({"head_dim": 256, "rotary_dim": 256}, "gqa_rotating", []),
    ({"head_dim": 40, "rotary_dim": 40}, "gqa", [("head 16", "40")]),
    ({"implied_positions": False, "dtype": "bfloat16"}, "gqa", [("positions", "")]),
    ({"dtype": "float32"}, "mha", [("float32 on cuda", "")] * 2),
    ({"head_dim": 272, "rotary_dim": 64}, "mha", [("256", "272")] * 2),
    ({"head_dim": 12, "rotary_dim": 12}, "mha", [("8", "12")] * 2),
    (
        {"head_dim": 12, "rotary_dim": 12, "dtype": "bfloat16"},
        "attention",
        [("8", "12"), ("8", "12"), ("bfloat16 mha", "")],
    ),
    ({"causal": False}, "mha", [("not causal", "")] * 2),
    (
        {"causal": False, "dtype": "bfloat16"},
        "attention",
        [("not causal", "")] * 2 + [("bfloat16 mha", "")],
    ),
]
BOTH = [
    ({}, "gqa_rotating", []),
    # Not one form for each provider: one graph, and every provider must have all of it.
    (
        {"dtype": "float32"},
        "attention",
        [("float32 on cuda", ""), ("float32 on cuda", ""), ("linear", "")],
    ),
    (
        {"head_dim": 272, "rotary_dim": 64},
        "attention_in_float32",
        [("256", "272"), ("256", "272"), ("linear", ""), ("half on cpu", "")],
    ),
    ({"causal": False}, "mha", [("not causal", "")] * 2),
    ({"rotary_dim": 24}, "gqa", [("rotary 16", "24")]),
]
ORT = [
    *((("cpu",), *row) for row in CPU),
    *((("cuda",), *row) for row in CUDA),
    *((("cpu", "cuda"), *row) for row in BOTH),
    *((("cuda", "cpu"), *row) for row in BOTH),
]


def on(providers, **changes):
    return [replace(BEST, provider=provider, **changes) for provider in providers]


def assert_reasons(reasons, expected):
    """One line for each better form, equal ones once, each with its value."""
    expected = list(dict.fromkeys(expected))
    assert len(reasons) == len(expected)
    for reason, (name, value) in zip(reasons, expected, strict=True):
        assert reason.startswith(REASON[name])
        assert reason.endswith(f"got {value}") or not value


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
        ("primitive", ("cpu",), "float32", "primitive"),
        ("primitive", ("cpu",), "float16", "primitive"),
        ("primitive", ("cpu", "cuda"), "float32", "primitive"),
        ("primitive", ("cuda",), "bfloat16", "primitive"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": False}, {"implied_positions": False}, {"head_dim": 7, "rotary_dim": 2}],
    ids=str,
)
def test_the_standard_targets_depend_on_the_dtype_alone(target, providers, dtype, form, changes):
    assert choose(target, on(providers, dtype=dtype, **changes)).form.name == form


@pytest.mark.parametrize("target", rules.TARGETS)
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
        ("ort", "cpu", {}, 0.0),
        ("ort", "cpu", {"causal": False}, 0.0),
        ("ort", "cpu", {"head_dim": 12}, 2.5),
        ("onnx", "cpu", {"dtype": "float32"}, 2.5),
        ("onnx", "cuda", {"dtype": "float16"}, 0.0),
        ("onnx", "cuda", {"dtype": "float32"}, 2.5),
        ("onnx", "cuda", {"dtype": "float32", "num_kv_heads": 4}, 0.0),
        ("primitive", "cuda", {}, 6.0),
    ],
)
def test_the_copies_of_the_scores_are_known(target, provider, changes, copies):
    choice = choose(target, on((provider,), **changes))
    assert choice.score_copies == {provider: copies}


def every_situation():
    """A grid on both sides of every limit."""
    for provider, dtype, widths, causal, tabled, implied in itertools.product(
        rules.PROVIDERS,
        rules.DTYPES,
        [(64, 64), (64, 0), (64, 24), (40, 40), (24, 16), (12, 12), (264, 64)],
        [True, False],
        [True, False],
        [True, False],
    ):
        head_dim, rotary_dim = widths
        yield Situation(
            provider=provider,
            dtype=dtype,
            num_heads=4,
            num_kv_heads=2,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            causal=causal,
            tabled=tabled,
            implied_positions=implied,
            longest=4096,
            value_head_dim=head_dim,
        )


LIMITS = list(dict.fromkeys(limit for forms in FORMS.values() for f in forms for limit in f.limits))


@pytest.mark.parametrize("target", rules.TARGETS)
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


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.reason)
def test_every_limit_can_be_broken_and_says_so_with_its_values(limit):
    broken = [situation for situation in every_situation() if limit.broken_by(situation)]
    assert broken
    for situation in broken:
        reason = limit.reason.format(**asdict(situation))
        assert "{" not in reason
        assert "None" not in reason
        assert limit.provider in (None, situation.provider)
    for name in re.findall(r"{(\w+)}", limit.reason):
        assert str(getattr(broken[0], name)) in limit.reason.format(**asdict(broken[0]))


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
    assert set(FORMS) == set(rules.OPSETS) == set(rules.TARGETS)


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
    described = rules.situations(
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
