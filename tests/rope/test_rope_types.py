"""Every RoPE type against transformers' own initialisers, recomputed in float64."""

from __future__ import annotations

import importlib
import math
import types

import pytest
import torch
import transformers.modeling_rope_utils as oracle
from transformers import LlamaConfig

from rope_export import BadInputError, RotaryEmbedding
from rope_export.rope.rope_types import ROPE_TYPES, frequencies

# Parameters of real models, as their configurations state them.
MODELS = {
    "llama-2 7B": (128, 10000.0, {"rope_type": "default"}, 4096),
    "llama-3.1": (
        128,
        500000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
    "llama-3.2 1B": (
        64,
        500000.0,
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
    "vicuna 16k": (128, 10000.0, {"type": "linear", "factor": 4.0}, 16384),
    "gemma-3 global": (256, 1e6, {"rope_type": "linear", "factor": 8.0}, 131072),
    "qwen2.5 with yarn": (
        128,
        1e6,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "gpt-oss": (
        64,
        150000.0,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        131072,
    ),
    "deepseek-v3": (
        64,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        163840,
    ),
    "deepseek-v2": (
        64,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4096,
        },
        163840,
    ),
    "yarn with its factor stated": (
        128,
        10000.0,
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
        8192,
    ),
    "yarn without its length": (128, 10000.0, {"rope_type": "yarn", "factor": 4}, 4096),
    "phi-3.5 mini": (
        96,
        10000.0,
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.02 * i for i in range(48)],
            "long_factor": [1.1 + 1.3 * i for i in range(48)],
            "original_max_position_embeddings": 4096,
        },
        131072,
    ),
    "longrope with its factors stated": (
        32,
        10000.0,
        {
            "type": "su",
            "short_factor": [1.0] * 16,
            "long_factor": [1.5 * i for i in range(1, 17)],
            "factor": 8.0,
            "attention_factor": 1.19,
            "original_max_position_embeddings": 150,
        },
        1200,
    ),
    "proportional": (
        256,
        1e6,
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
        4096,
    ),
}


@pytest.fixture
def float64_oracle(monkeypatch):
    """Transformers' module with every float32 in it read as float64."""
    wide = types.SimpleNamespace(**{n: getattr(torch, n) for n in dir(torch)})
    wide.float = wide.float32 = torch.float64
    monkeypatch.setattr(oracle, "torch", wide)


def expected(
    dim: int, theta: float, scaling: dict, longest: int, seq_len: int | None = None
) -> tuple[torch.Tensor, float]:
    rope_type = scaling.get("rope_type", scaling.get("type")).replace("su", "longrope")
    if rope_type == "default":
        return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    parameters = {k: v for k, v in scaling.items() if k != "type"}
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=dim,
        max_position_embeddings=longest,
        rope_parameters={**parameters, "rope_type": rope_type, "rope_theta": theta},
    )
    return oracle.ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)


def rounding(scaling: dict) -> float:
    """Transformers' longrope takes its exponents through ``.float()``, whatever we patch."""
    return 1e-6 if "short_factor" in scaling else 1e-13


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("float64_oracle")
def test_frequencies_are_those_of_transformers(model):
    dim, theta, scaling, longest = MODELS[model]
    inv_freq, attention_factor = expected(dim, theta, scaling, longest)
    assert inv_freq.dtype == torch.float64
    found = frequencies(dim, theta, scaling, longest)
    assert found.inv_freq.dtype == torch.float64
    torch.testing.assert_close(found.inv_freq, inv_freq, rtol=rounding(scaling), atol=0)
    assert found.attention_factor == pytest.approx(attention_factor, rel=1e-14)
    if found.beyond is not None:
        longer, _ = expected(dim, theta, scaling, longest, found.beyond.length + 1)
        torch.testing.assert_close(found.beyond.inv_freq, longer, rtol=rounding(scaling), atol=0)
        same, _ = expected(dim, theta, scaling, longest, found.beyond.length)
        torch.testing.assert_close(found.inv_freq, same, rtol=rounding(scaling), atol=0)


def test_longrope_is_its_definition_in_float64():
    short, long = [1.0 + i / 7 for i in range(8)], [2.0 + 3 * i for i in range(8)]
    scaling = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 64,
    }
    found = frequencies(16, 500.0, scaling, 256)
    for inv_freq, factors in ((found.inv_freq, short), (found.beyond.inv_freq, long)):
        exact = [1 / (f * 500.0 ** (2 * i / 16)) for i, f in enumerate(factors)]
        assert inv_freq.tolist() == pytest.approx(exact, rel=1e-15)
    assert found.beyond.length == 64
    assert found.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


def test_static_ntk_is_that_of_rotary_embedding_torch():
    from rotary_embedding_torch import RotaryEmbedding as Theirs

    found = frequencies(64, 10000.0, {"rope_type": "ntk", "factor": 4.0}, None)
    theirs = Theirs(64, theta_rescale_factor=4.0).freqs.detach()
    torch.testing.assert_close(found.inv_freq.float(), theirs, rtol=1e-6, atol=0)


DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize("longest", [1, 99, 100, 101, 250, 100_000])
@pytest.mark.parametrize(("dim", "theta"), [(128, 10000.0), (32, 5e5), (4, 500.0)])
@pytest.mark.parametrize("max_seq_len", [None, 100_000])
@pytest.mark.usefixtures("float64_oracle")
def test_dynamic_ntk_follows_the_longest_position_as_in_transformers(
    dim, theta, longest, max_seq_len
):
    if max_seq_len and dim == 128:
        max_seq_len = 200_000  # nothing is tabled: the length costs nothing
    without = {"rope_type": "dynamic", "factor": 3.0}  # theirs comes from the configuration
    inv_freq, factor = expected(dim, theta, without, 100, longest)
    assert factor == 1
    positions = torch.tensor([[0, 1, longest // 2], [longest - 1, 0, 0]])
    angles = positions.double().unsqueeze(-1) * inv_freq
    rope = RotaryEmbedding(dim, theta=theta, scaling=DYNAMIC, max_seq_len=max_seq_len)
    for table, exact in zip(rope.cos_sin(positions), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=1.5e-7)


def test_dynamic_ntk_below_the_trained_length_is_a_table():
    rope = RotaryEmbedding(8, scaling=DYNAMIC, max_seq_len=100)
    assert rope.one_table
    for table, plain in zip(
        (rope.angles.cos, rope.angles.sin),
        RotaryEmbedding(8).cos_sin(torch.arange(100)),
        strict=True,
    ):
        assert torch.equal(table, plain)


def test_dynamic_ntk_does_not_remember_longer_sequences():
    rope = RotaryEmbedding(8, scaling=DYNAMIC)
    short = torch.arange(50)
    before = rope.cos_sin(short)
    rope.cos_sin(torch.arange(500))
    assert all(torch.equal(a, b) for a, b in zip(before, rope.cos_sin(short), strict=True))


QWEN2_VL = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN3_VL = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}


@pytest.mark.parametrize(
    ("theirs", "scaling", "dim"),
    [
        ("qwen2_vl.Qwen2VL", QWEN2_VL, 128),
        ("qwen2_vl.Qwen2VL", QWEN2_VL | {"rope_type": "default"}, 128),
        ("qwen3_vl.Qwen3VLText", QWEN3_VL, 128),
        ("qwen3_5.Qwen3_5Text", QWEN3_VL | {"mrope_section": [11, 11, 10]}, 64),
    ],
)
def test_mrope_turns_each_pair_by_its_own_axis(theirs, scaling, dim):
    module, name = theirs.split(".")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    recompose = getattr(modeling, f"{name}RotaryEmbedding").recomposition_frequencies
    inv_freq = 1e6 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    positions = torch.randint(0, 3000, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    axes = types.SimpleNamespace(mrope_section=scaling["mrope_section"])
    angles = recompose(axes, positions.double().unsqueeze(-1) * inv_freq)[..., : dim // 2]
    rope = RotaryEmbedding(dim, theta=1e6, scaling=scaling, layout="half")
    assert rope.axes == 3
    for table, exact in zip(rope.cos_sin(positions), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", [QWEN2_VL, QWEN3_VL])
def test_mrope_of_text_is_plain_rope(scaling):
    rope, plain = RotaryEmbedding(128, scaling=scaling), RotaryEmbedding(128)
    x = torch.randn(2, 3, 9, 128, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(3, 2, 9)
    for outputs in (rope.rotate(x, x), rope.rotate(x, x, position_ids=positions)):
        assert torch.equal(outputs[0], plain.rotate(x, x)[0])


def test_axial_is_that_of_the_vision_tower_of_qwen2_vl():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling

    config = modeling.Qwen2VLVisionConfig(embed_dim=160, num_heads=2)
    theirs = modeling.Qwen2VLVisionRotaryEmbedding(config)
    rope = RotaryEmbedding(80, layout="half", scaling=config.rope_parameters)
    places = torch.tensor([[[0, 0, 1, 5]], [[0, 3, 1, 2]]])  # rows, then columns
    cos, sin = theirs(torch.zeros(1), places.transpose(0, 1))
    q = torch.randn(1, 2, 4, 80, generator=torch.Generator().manual_seed(0))
    turned, _ = modeling.apply_rotary_pos_emb(q, q, cos, sin)
    for given in (places, places[:, 0]):
        torch.testing.assert_close(
            rope.rotate(q, q, position_ids=given)[0], turned, rtol=0, atol=5e-6
        )


@pytest.mark.parametrize(
    ("scaling", "position_ids", "says"),
    [
        (QWEN2_VL, (2, 1, 5), r"must be \[S\] or \[B, S\] or \[3, B, S\], got \(2, 1, 5\)"),
        (QWEN2_VL, (3, 2, 5), r"must have one row or 1, got \(3, 2, 5\)"),
        (QWEN2_VL, (3, 1, 4), r"must have the sequence length 5 as last axis, got \(3, 1, 4\)"),
        ({"rope_type": "axial"}, (5,), r"must be \[2, S\] or \[2, B, S\], got \(5,\)"),
        ({"rope_type": "axial"}, (3, 5), r"must be \[2, S\] or \[2, B, S\], got \(3, 5\)"),
        ({"rope_type": "axial"}, None, r"position_ids \[2, B, S\] must be given"),
    ],
)
def test_positions_need_the_axes_of_the_type(scaling, position_ids, says):
    rope, x = RotaryEmbedding(128, scaling=scaling), torch.zeros(1, 1, 5, 128)
    ids = None if position_ids is None else torch.zeros(position_ids, dtype=torch.int64)
    with pytest.raises(BadInputError, match=says):
        rope.rotate(x, x, position_ids=ids)


def test_every_type_is_proven():
    proven = {s.get("rope_type", s.get("type")) for _, _, s, _ in MODELS.values()}
    assert proven | {"ntk", "dynamic", "mrope", "axial"} == set(ROPE_TYPES)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_seq_len", [None, 200])
def test_a_rotation_uses_them(model, max_seq_len):
    dim, theta, scaling, longest = MODELS[model]
    scaling = {"original_max_position_embeddings": longest} | scaling
    if scaling.get("rope_type", scaling.get("type")) not in ("yarn", "llama3", "longrope", "su"):
        del scaling["original_max_position_embeddings"]
    rope = RotaryEmbedding(
        dim, theta=theta, scaling=scaling, layout="half", max_seq_len=max_seq_len
    )
    found = frequencies(dim, theta, scaling, max_seq_len)
    positions = torch.tensor([0, 1, 7, 199] if max_seq_len else [0, 5, 4095, 4096, 9_999_999])
    x = torch.randn(1, 1, len(positions), dim, dtype=torch.float64)
    longer = found.beyond is not None and int(positions.max()) >= found.beyond.length
    inv_freq = found.beyond.inv_freq if longer else found.inv_freq
    angles = positions.double().unsqueeze(-1) * inv_freq
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
    turned = pairs * torch.polar(torch.full_like(angles, found.attention_factor), angles)
    truth = torch.cat((turned.real, turned.imag), dim=-1)
    q, _ = rope.rotate(x.float(), x.float(), position_ids=positions)
    torch.testing.assert_close(q.double(), truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ("yarn", "scaling must be an object with a rope_type, got 'yarn'"),
        ({}, "scaling must state one rope_type, got none"),
        ({"factor": 2}, "scaling must state one rope_type, got none"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2}, "one rope_type, got 'linear' and"),
        ({"rope_type": "warp"}, "one of axial, default, .*got 'warp'"),
        ({"rope_type": None}, "one of axial, default, .*got None"),
        ({"rope_type": "linear"}, "'linear' needs 'factor'"),
        (
            {"rope_type": "linear", "factor": 0.5},
            r"scaling\['factor'\] must be .* at least 1, got 0.5",
        ),
        ({"rope_type": "linear", "factor": "4"}, r"scaling\['factor'\] must be .* got '4'"),
        ({"rope_type": "linear", "factor": True}, r"scaling\['factor'\] must be .* got True"),
        ({"rope_type": "linear", "factor": math.nan}, r"scaling\['factor'\] must be .* got nan"),
        ({"rope_type": "linear", "factor": 2, "facotr": 3}, "'linear' has no field 'facotr'"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, "'yarn' needs 'factor'"),
        ({"rope_type": "yarn", "factor": 2, "truncate": "no"}, r"'truncate'\] must be true or"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "got 1 and 2"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 0}, r"'beta_fast'\] must be .* got 0"),
        ({"rope_type": "llama3", "factor": 8}, "'llama3' needs 'low_freq_factor'"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "must be above .* got 4 and 4",
        ),
        ({"rope_type": "longrope", "long_factor": [1.0] * 32}, "'longrope' needs 'short_factor'"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 31},
            r"'long_factor'\] must list 32 numbers, got 31",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 31 + [0], "long_factor": [1] * 32},
            r"'short_factor'\] must list numbers above 0, got 0",
        ),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, "at most 1, got 1.5"),
        ({"rope_type": ["yarn"]}, "one of axial, default, .*got \\['yarn'\\]"),
        ({"rope_type": "dynamic", "factor": 2}, "needs 'original_max_position_embeddings'"),
        (DYNAMIC | {"factor": 0.5}, r"scaling\['factor'\] must be .* at least 1, got 0.5"),
        (DYNAMIC | {"original_max_position_embeddings": 9.5}, "must be an integer, got 9.5"),
        ({"rope_type": "mrope"}, "'mrope' needs 'mrope_section'"),
        ({"rope_type": "mrope", "mrope_section": [8, 8, 8]}, r"add up to 32.* got \[8, 8, 8\]"),
        ({"rope_type": "mrope", "mrope_section": [32, 0]}, "integers above 0, got 0"),
        ({"rope_type": "mrope", "mrope_section": 32}, "must list integers above 0, got 32"),
        (
            {"rope_type": "mrope", "mrope_section": [4, 24, 4], "mrope_interleaved": True},
            r"cannot be interleaved over 32 pairs, got \[4, 24, 4\]",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value(scaling, says):
    with pytest.raises(BadInputError, match=says):
        RotaryEmbedding(64, scaling=scaling, max_seq_len=128)


def test_yarn_needs_a_length_from_somewhere():
    with pytest.raises(BadInputError, match="needs 'original_max_position_embeddings'"):
        RotaryEmbedding(64, scaling={"rope_type": "yarn", "factor": 2.0})


def test_two_bases_contradict_each_other():
    with pytest.raises(BadInputError, match="differ: 5000 and 10000"):
        RotaryEmbedding(64, theta=1e4, scaling={"rope_type": "default", "rope_theta": 5000.0})


@pytest.mark.parametrize("rope_type", ["default", "linear"])
def test_the_base_may_be_stated_by_the_scaling_alone(rope_type):
    scaling = {"rope_type": rope_type, "rope_theta": 5e5}
    if rope_type == "linear":
        scaling["factor"] = 1.0
    rope = RotaryEmbedding(64, scaling=scaling)
    assert rope.theta == 5e5
    assert torch.equal(rope.inv_freq, RotaryEmbedding(64, theta=5e5).inv_freq)


def test_the_same_theta_may_be_stated_twice():
    rope = RotaryEmbedding(64, theta=5e5, scaling={"rope_type": "default", "rope_theta": 5e5})
    assert torch.equal(rope.inv_freq, RotaryEmbedding(64, theta=5e5).inv_freq)
