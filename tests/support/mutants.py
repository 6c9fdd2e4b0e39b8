"""Defects for the validator to find: wrong graphs, and right graphs of wrong blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from rope_export import Attention, RotaryEmbedding, export
from rope_export.attention.random_block import random_block

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LONGEST = 64, 4, 2, 16, 48
ATTENTION_OPS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")

GraphMutation = Callable[[onnx.ModelProto], None]
BlockMutation = Callable[[Attention], None]


def block(dtype: str = "float32", **changes: object) -> Attention:
    shape = {
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_seq_len": LONGEST,
    }
    return random_block(**{**shape, "dtype": dtype, **changes})


WINDOW = 10
# What is exported with a cache, beside its dtype.
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "varied": {
        "window": WINDOW,
        "softcap": 3.0,
        "sinks": True,
        "qk_norm": True,
        "qkv_bias": True,
        "out_bias": True,
    },
    # Gemma 2's cap; no sinks, which the standard's Attention lacks.
    "capped": {"window": WINDOW, "softcap": 50.0, "value_head_dim": 24},
    # Long enough for prompts to be computed in blocks of the window.
    "long": {"window": WINDOW, "qk_norm": True, "max_seq_len": 530},
}


class Exports:
    """Blocks and the folders they are exported to, when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[Attention, Path]] = {}

    def get(
        self,
        target: str = "ort",
        dtype: str = "float32",
        *,
        variant: str = "plain",
        **options: object,
    ) -> tuple[Attention, Path]:
        """A block of `VARIANTS`, exported with a cache unless ``options`` say otherwise."""
        name = "-".join([target, dtype, variant, *(f"{k}={v}" for k, v in options.items())])
        if name not in self._made:
            made = block(dtype, **VARIANTS[variant])
            folder = self._root / str(len(self._made))
            export(made, folder, target=target, **{"cache": True, **options})
            self._made[name] = made, folder
        return self._made[name]


# --- defects in the graph -------------------------------------------------------------------


def table(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return tensor


def change(tensor: onnx.TensorProto, to: Callable[[np.ndarray], np.ndarray]) -> None:
    before = numpy_helper.to_array(tensor)
    after = np.ascontiguousarray(to(before.copy())).astype(before.dtype)
    assert after.shape != before.shape or not np.array_equal(before, after)
    tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))


def sine_negated(model: onnx.ModelProto) -> None:
    change(table(model, "rope.angles.sin"), lambda t: -t)


def tables_shifted_one_row(model: onnx.ModelProto) -> None:
    for name in ("rope.angles.cos", "rope.angles.sin"):
        change(table(model, name), lambda t: np.concatenate([t[1:], t[-1:]]))


def tables_rolled_one_row(model: onnx.ModelProto) -> None:
    for name in ("rope.angles.cos", "rope.angles.sin"):
        change(table(model, name), lambda t: np.roll(t, 1, axis=0))


def tables_truncated(model: onnx.ModelProto) -> None:
    for name in ("rope.angles.cos", "rope.angles.sin"):
        change(table(model, name), lambda t: t[: LONGEST // 2])


def last_table_row_stale(model: onnx.ModelProto) -> None:
    def stale(t: np.ndarray) -> np.ndarray:
        t[-1] = t[-2]
        return t

    change(table(model, "rope.angles.cos"), stale)


def cosine_and_sine_swapped(model: onnx.ModelProto) -> None:
    cos, sin = table(model, "rope.angles.cos"), table(model, "rope.angles.sin")
    cos.name, sin.name = sin.name, cos.name


def output_scaled(model: onnx.ModelProto) -> None:
    (weight,) = [t for t in model.graph.initializer if t.name == "o_proj.weight"]
    change(weight, lambda w: w * 1.02)


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def output_renamed(model: onnx.ModelProto) -> None:
    (last,) = [n for n in model.graph.node if "output" in n.output]
    last.output[0] = "result"
    model.graph.output[0].name = "result"


def output_as_not_a_number(model: onnx.ModelProto) -> None:
    (weight,) = [t for t in model.graph.initializer if t.name == "o_proj.weight"]
    change(weight, lambda w: np.where(np.arange(w.size).reshape(w.shape) == 5, np.nan, w))


def queries_unrotated(model: onnx.ModelProto) -> None:
    _unrotate(model, 0)


def keys_unrotated(model: onnx.ModelProto) -> None:
    _unrotate(model, 1)


def _unrotate(model: onnx.ModelProto, which: int) -> None:
    """Let queries (0) or keys (1) reach the scores as they were projected."""
    (fused,) = [n for n in model.graph.node if n.op_type in ATTENTION_OPS] or [None]
    if fused is None:
        _unrotate_arithmetic(model, which)
    elif fused.op_type == "GroupQueryAttention" and not fused.input[1]:
        _unrotate_fused(model, fused, which)
    else:
        producers = {output: n for n in model.graph.node for output in n.output}
        rotation = producers[fused.input[which]]
        while rotation.op_type == "Cast":
            rotation = producers[rotation.input[0]]
        assert rotation.op_type == "RotaryEmbedding"
        name = rotation.output[0]
        rotation.op_type = "Identity"
        del rotation.input[1:], rotation.attribute[:]
        assert name in rotation.output


def _unrotate_fused(model: onnx.ModelProto, gqa: onnx.NodeProto, which: int) -> None:
    """Take the rotation out of the fused operator and give it to one of the two only."""
    model.opset_import[0].version = 23
    widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    model.graph.initializer.append(
        numpy_helper.from_array(np.array(widths, dtype=np.int64), "widths")
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, dtype=np.int64), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "axis"))
    parts = ["q_part", "k_part", "v_part"]
    rotated = 1 - which
    (total,) = [n.input[0] for n in model.graph.node if gqa.input[6] in n.output]  # as int64
    new = [
        helper.make_node("Split", [gqa.input[0], "widths"], parts, axis=-1),
        helper.make_node("Range", ["zero", total, "one"], ["positions"]),
        helper.make_node("Unsqueeze", ["positions", "axis"], ["row"]),
        helper.make_node("Shape", [gqa.input[0]], ["batch_and_length"], start=0, end=2),
        helper.make_node("Expand", ["row", "batch_and_length"], ["ids"]),
        helper.make_node(
            "RotaryEmbedding",
            [parts[rotated], "rope.angles.cos", "rope.angles.sin", "ids"],
            ["turned"],
            num_heads=HEADS if rotated == 0 else KV_HEADS,
        ),
    ]
    place = list(model.graph.node).index(gqa)
    for offset, node in enumerate(new):
        model.graph.node.insert(place + offset, node)
    parts[rotated] = "turned"
    gqa = model.graph.node[place + len(new)]
    for index, name in enumerate(parts):
        gqa.input[index] = name
    del gqa.input[7:]
    kept = [a for a in gqa.attribute if a.name not in ("do_rotary", "rotary_interleaved")]
    del gqa.attribute[:]
    gqa.attribute.extend(kept)


def _unrotate_arithmetic(model: onnx.ModelProto, which: int) -> None:
    """The rotations end in the first two joins of turned halves; let one give its input back."""
    producers = {output: n for n in model.graph.node for output in n.output}
    joins = [n for n in model.graph.node if n.op_type == "Concat" and _attribute(n, "axis") == -1]
    join = joins[which]
    source = producers[join.input[0]]  # half times cosine minus half times sine
    while source.op_type != "Slice":
        source = producers[source.input[0]]
    join.op_type = "Identity"
    del join.input[:], join.attribute[:]
    join.input.append(source.input[0])


def _attribute(node: onnx.NodeProto, name: str) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


GRAPH_MUTANTS: tuple[GraphMutation, ...] = (
    sine_negated,
    tables_shifted_one_row,
    tables_rolled_one_row,
    tables_truncated,
    last_table_row_stale,
    cosine_and_sine_swapped,
    output_scaled,
    fixed_batch,
    output_renamed,
    output_as_not_a_number,
    queries_unrotated,
    keys_unrotated,
)


# These are caught because the graph no longer runs or answers; the others by their numbers.
REFUSED_BY_THE_RUNTIME = (tables_truncated, fixed_batch, output_renamed)


# --- defects in the block -------------------------------------------------------------------


def causal_flag_dropped(wrong: Attention) -> None:
    wrong.causal = False


def scale_two_percent_off(wrong: Attention) -> None:
    wrong.scale *= 1.02


def layout_flipped(wrong: Attention) -> None:
    assert wrong.rope is not None
    wrong.rope.layout = "interleaved" if wrong.rope.layout == "half" else "half"


def theta_off(wrong: Attention) -> None:
    wrong.rope = RotaryEmbedding(HEAD_DIM, theta=10500.0, layout="half", max_seq_len=LONGEST)


def half_of_the_width_rotated(wrong: Attention) -> None:
    wrong.rope = RotaryEmbedding(HEAD_DIM // 2, layout="half", max_seq_len=LONGEST)


def frequencies_rounded_to_bfloat16(wrong: Attention) -> None:
    assert wrong.rope is not None
    rounded = wrong.rope.inv_freq.bfloat16().double()
    wrong.rope._found = replace(wrong.rope._found, inv_freq=rounded)
    wrong.rope.reset_parameters()


def value_heads_swapped(wrong: Attention) -> None:
    _swap_heads(wrong.v_proj)


def key_heads_swapped(wrong: Attention) -> None:
    _swap_heads(wrong.k_proj)


def _swap_heads(layer: torch.nn.Linear) -> None:
    weight = layer.weight.data
    layer.weight.data = torch.cat((weight[HEAD_DIM:], weight[:HEAD_DIM]))


def keys_and_values_exchanged(wrong: Attention) -> None:
    wrong.k_proj, wrong.v_proj = wrong.v_proj, wrong.k_proj


def groups_interleaved(wrong: Attention) -> None:
    """Query head h reads key head h % 2 instead of h // 2."""
    weight = wrong.q_proj.weight.data.unflatten(0, (KV_HEADS, HEADS // KV_HEADS, HEAD_DIM))
    wrong.q_proj.weight.data = weight.transpose(0, 1).flatten(0, 2).contiguous()
    weight = wrong.o_proj.weight.data.unflatten(1, (KV_HEADS, HEADS // KV_HEADS, HEAD_DIM))
    wrong.o_proj.weight.data = weight.transpose(1, 2).flatten(1, 3).contiguous()


def weights_with_noise(wrong: Attention) -> None:
    """Relative noise of 1e-3 on every weight: what a careless quantisation leaves."""
    generator = torch.Generator().manual_seed(7)
    for parameter in wrong.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.data = (parameter.data.float() * (1 + 1e-3 * noise)).to(parameter.dtype)


BLOCK_MUTANTS: tuple[BlockMutation, ...] = (
    causal_flag_dropped,
    scale_two_percent_off,
    layout_flipped,
    theta_off,
    half_of_the_width_rotated,
    frequencies_rounded_to_bfloat16,
    value_heads_swapped,
    key_heads_swapped,
    keys_and_values_exchanged,
    groups_interleaved,
    weights_with_noise,
)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}


def scaling_dropped(wrong: Attention) -> None:
    """The scores keep their factor, the frequencies are those before scaling."""
    assert wrong.rope is not None
    plain = RotaryEmbedding(wrong.rope.dim, layout="half", max_seq_len=LONGEST)
    wrong.rope._found = replace(wrong.rope._found, inv_freq=plain.inv_freq)
    wrong.rope.reset_parameters()


def attention_factor_dropped(wrong: Attention) -> None:
    assert wrong.rope is not None
    wrong.rope._found = replace(wrong.rope._found, attention_factor=1.0)
    wrong.rope.reset_parameters()


def attention_factor_applied_twice(wrong: Attention) -> None:
    assert wrong.rope is not None
    found = wrong.rope._found
    wrong.rope._found = replace(found, attention_factor=found.attention_factor**2)
    wrong.rope.reset_parameters()


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 2 * i for i in range(8)],
    "original_max_position_embeddings": 20,
}


def switch_ignored(wrong: Attention) -> None:
    assert wrong.rope is not None
    wrong.rope._found = replace(wrong.rope._found, beyond=None)
    wrong.rope.reset_parameters()


def switch_one_token_late(wrong: Attention) -> None:
    assert wrong.rope is not None
    late = replace(wrong.rope._found.beyond, length=21)
    wrong.rope._found = replace(wrong.rope._found, beyond=late)
    wrong.rope.reset_parameters()


# Defects of scaled blocks, with the scaling they are about.
SCALING_MUTANTS: dict[BlockMutation, dict[str, object]] = {
    scaling_dropped: YARN,
    attention_factor_dropped: YARN,
    attention_factor_applied_twice: YARN,
    switch_ignored: LONGROPE,
    switch_one_token_late: LONGROPE,
}


def mutated(right: Attention, mutate: BlockMutation) -> Attention:
    wrong = copy.deepcopy(right)
    mutate(wrong)
    return wrong
