"""Defects for the validator to find: wrong graphs, and right graphs of wrong blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from rope_export import Attention, RotaryEmbedding, export
from rope_export.norm import Norm
from rope_export.specs import QKNorm
from rope_export.synthetic import random_block

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


# --- blocks with a cache --------------------------------------------------------------------

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

# Here the graph is that of the wrong block; its right block is made by mending the defect.


def window_one_wider(right: Attention) -> None:
    right.window = WINDOW - 1


def window_one_narrower(right: Attention) -> None:
    right.window = WINDOW + 1


def window_dropped(right: Attention) -> None:
    right.window = WINDOW


def sinks_dropped(right: Attention) -> None:
    right.sinks = torch.nn.Parameter(_drawn(right, (HEADS,)))


def sinks_that_weigh_nothing(right: Attention) -> None:
    """The graph has sinks where the block's are as good as none."""
    assert right.sinks is not None
    right.sinks.data.fill_(-1e4)


def sinks_of_other_heads(right: Attention) -> None:
    assert right.sinks is not None
    right.sinks.data = right.sinks.data.roll(1)


def softcap_dropped(right: Attention) -> None:
    right.softcap = 50.0


def softcap_two_percent_off(right: Attention) -> None:
    assert right.softcap is not None
    right.softcap *= 1.02


def norm_epsilon_off(right: Attention) -> None:
    assert right.q_norm is not None
    assert right.k_norm is not None
    right.q_norm.eps = right.k_norm.eps = 1e-2


def norms_exchanged(right: Attention) -> None:
    assert right.q_norm is not None
    assert right.k_norm is not None
    right.q_norm.weight, right.k_norm.weight = right.k_norm.weight, right.q_norm.weight


def norms_dropped(right: Attention) -> None:
    for name in ("q_norm", "k_norm"):
        norm = Norm(QKNorm(), HEADS if name == "q_norm" else KV_HEADS, HEAD_DIM)
        norm.weight.data = 1 + _drawn(right, (HEAD_DIM,)) / 4
        setattr(right, name, norm)


def values_of_other_heads(right: Attention) -> None:
    width = right.value_head_dim
    for parameter in right.v_proj.parameters():
        parameter.data = parameter.data.roll(width, dims=0)


def projection_biases_dropped(right: Attention) -> None:
    for layer in (right.q_proj, right.k_proj, right.v_proj):
        _give_bias(right, layer)


def output_bias_dropped(right: Attention) -> None:
    _give_bias(right, right.o_proj)


def _give_bias(right: Attention, layer: torch.nn.Linear) -> None:
    layer.bias = torch.nn.Parameter(_drawn(right, (layer.out_features,)) / 8)


def _drawn(block: Attention, shape: Sequence[int]) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return drawn.to(block.dtype)


# Defects, with the variant whose graph has them.
CACHED_BLOCK_MUTANTS: tuple[tuple[BlockMutation, str], ...] = (
    (window_one_wider, "varied"),
    (window_one_narrower, "varied"),
    (window_dropped, "plain"),
    (sinks_dropped, "plain"),
    (sinks_that_weigh_nothing, "varied"),
    (sinks_of_other_heads, "varied"),
    (softcap_dropped, "plain"),
    (softcap_two_percent_off, "varied"),
    (norm_epsilon_off, "varied"),
    (norms_exchanged, "varied"),
    (norms_dropped, "plain"),
    (values_of_other_heads, "varied"),
    (projection_biases_dropped, "plain"),
    (output_bias_dropped, "plain"),
)
CAPPED_BLOCK_MUTANTS: tuple[BlockMutation, ...] = (
    window_one_wider,
    window_one_narrower,
    softcap_two_percent_off,
    values_of_other_heads,
)


# --- defects in the graph of a block with a cache -------------------------------------------


def nodes_of(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """All nodes of a type, those in branches and loops included."""
    return [n for g in _graphs(model.graph) for n in g.node if n.op_type == op_type]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _read_instead(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for graph in _graphs(model.graph):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]


def _first(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _constant(model: onnx.ModelProto, name: str, value: object, dtype: type = np.int64) -> str:
    array = np.array(value, dtype=dtype)
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def presents_exchanged(model: onnx.ModelProto) -> None:
    names = {"present_key": "present_value", "present_value": "present_key"}
    _read_instead(model, names)
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def pasts_exchanged(model: onnx.ModelProto) -> None:
    _read_instead(model, {"past_key": "past_value", "past_value": "past_key"})


def key_slot_stale(model: onnx.ModelProto) -> None:
    """One slot of the cache holds what its neighbour does."""
    slot = _constant(model, "defect.slot", 7)
    before = _constant(model, "defect.before", 6)
    _move_slots(
        model,
        "present_key",
        helper.make_node("Equal", ["defect.slots", slot], ["defect.hit"]),
        helper.make_node("Where", ["defect.hit", before, "defect.slots"], ["defect.source"]),
    )


def newest_value_not_appended(model: onnx.ModelProto) -> None:
    """The last slot holds what the one before it does."""
    zero = _constant(model, "defect.from", 0)
    two = _constant(model, "defect.two", 2)
    _move_slots(
        model,
        "present_value",
        helper.make_node("Sub", ["defect.total", two], ["defect.last"]),
        helper.make_node("Min", ["defect.slots", "defect.last"], ["defect.bounded"]),
        helper.make_node("Max", ["defect.bounded", zero], ["defect.source"]),
    )


def _move_slots(model: onnx.ModelProto, name: str, *choose: onnx.NodeProto) -> None:
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    right = _rename_output(model, name)
    model.graph.node.extend(
        [
            helper.make_node("Shape", [right], ["defect.size"], start=2, end=3),
            helper.make_node("Squeeze", ["defect.size"], ["defect.total"]),
            helper.make_node("Range", [zero, "defect.total", one], ["defect.slots"]),
            *choose,
            helper.make_node("Gather", [right, "defect.source"], [name], axis=2),
        ]
    )


def _rename_output(model: onnx.ModelProto, name: str) -> str:
    right = f"defect.{name}"
    _read_instead(model, {name: right})
    for node in model.graph.node:
        node.output[:] = [right if output == name else output for output in node.output]
    return right


def value_slot_empty(model: onnx.ModelProto) -> None:
    """Zeros in one slot of the cache."""
    right = _rename_output(model, "present_value")
    slot = _constant(model, "defect.slot", [[[[2]]]])
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    axes = _constant(model, "defect.axes", [0, 1, 3])
    model.graph.node.extend(
        [
            helper.make_node("Shape", [right], ["defect.size"], start=2, end=3),
            helper.make_node("Squeeze", ["defect.size"], ["defect.total"]),
            helper.make_node("Range", [zero, "defect.total", one], ["defect.slots"]),
            helper.make_node("Unsqueeze", ["defect.slots", axes], ["defect.column"]),
            helper.make_node("Equal", ["defect.column", slot], ["defect.hit"]),
            helper.make_node("CastLike", [zero, right], ["defect.nothing"]),
            helper.make_node("Where", ["defect.hit", "defect.nothing", right], ["present_value"]),
        ]
    )


def past_ignored(model: onnx.ModelProto) -> None:
    """Zeros in its place."""
    _read_instead(model, {name: f"defect.{name}" for name in ("past_key", "past_value")})
    for name in ("past_key", "past_value"):
        _first(model, helper.make_node("Sub", [name, name], [f"defect.{name}"]))


def mask_ignored(model: onnx.ModelProto) -> None:
    """Padding counts as tokens."""
    _read_instead(model, {"attention_mask": "defect.ones"})
    ones = numpy_helper.from_array(np.array([1], dtype=np.int64))
    _first(
        model,
        helper.make_node("Shape", ["attention_mask"], ["defect.size"]),
        helper.make_node("ConstantOfShape", ["defect.size"], ["defect.ones"], value=ones),
    )


def positions_begin_anew(model: onnx.ModelProto) -> None:
    """The new tokens of every call stand at 0, 1, …, whatever the past."""
    zero, one = _constant(model, "defect.zero", 0), _constant(model, "defect.one", 1)
    axis = _constant(model, "defect.axis", [0])
    _first(
        model,
        helper.make_node("Shape", ["hidden_states"], ["defect.size"], start=0, end=2),
        helper.make_node("Shape", ["hidden_states"], ["defect.new"], start=1, end=2),
        helper.make_node("Squeeze", ["defect.new"], ["defect.length"]),
        helper.make_node("Range", [zero, "defect.length", one], ["defect.row"]),
        helper.make_node("Unsqueeze", ["defect.row", axis], ["defect.one_row"]),
        helper.make_node("Expand", ["defect.row", "defect.size"], ["defect.rows"]),
    )
    for node in nodes_of(model, "Gather"):
        if node.input[0].startswith("rope.angles."):
            node.input[1] = "defect.rows"
    scanned = [n for scan in nodes_of(model, "Scan") for n in scan.attribute[0].g.node]
    for node in nodes_of(model, "GroupQueryAttention"):
        if _attribute(node, "do_rotary"):
            node.input.extend([""] * (10 - len(node.input)))
            node.input[9] = "defect.one_row" if node in scanned else "defect.rows"


def mask_of_columns(model: onnx.ModelProto) -> None:
    """A token's place is its column, padding counted, in order and positions."""
    (count,) = nodes_of(model, "CumSum")
    ones = numpy_helper.from_array(np.array([1], dtype=np.int64))
    place = list(model.graph.node).index(count)
    count.input[0] = "defect.ones"
    for node in (
        helper.make_node("ConstantOfShape", ["defect.size"], ["defect.ones"], value=ones),
        helper.make_node("Shape", ["attention_mask"], ["defect.size"]),
    ):
        model.graph.node.insert(place, node)


CACHED_GRAPH_MUTANTS: tuple[GraphMutation, ...] = (
    presents_exchanged,
    pasts_exchanged,
    key_slot_stale,
    newest_value_not_appended,
    value_slot_empty,
    past_ignored,
    mask_ignored,
    positions_begin_anew,
)
# These change what is answered after a past that is right, beside the present.
MISREAD_PAST = (pasts_exchanged, past_ignored, mask_ignored, positions_begin_anew)


def norm_after_rotation(model: onnx.ModelProto) -> None:
    """A rotation keeps the mean square: what comes after it is the norm's weight."""
    for name, heads in (("q_norm.weight", HEADS), ("k_norm.weight", KV_HEADS)):
        weight = table(model, name)
        late = numpy_helper.to_array(weight).astype(np.float32)
        change(weight, np.ones_like)
        (reader,) = [n for n in model.graph.node if name in n.input]
        turned = _rotation_after(model, reader)
        if _attribute(turned, "num_heads") is not None:
            late = np.tile(late, heads)
        output = turned.output[0]
        if turned.op_type == "Concat":  # the operator turns in float32, arithmetic as it is given
            late = late.astype(numpy_helper.to_array(table(model, "o_proj.weight")).dtype)
        model.graph.initializer.append(numpy_helper.from_array(late, f"defect.{name}"))
        turned.output[0] = f"defect.{output}"
        scaled = helper.make_node("Mul", [turned.output[0], f"defect.{name}"], [output])
        model.graph.node.insert(list(model.graph.node).index(turned) + 1, scaled)


def _rotation_after(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.NodeProto:
    """Where the heads that a node gives have been turned."""
    names = set(node.output)
    for later in model.graph.node:
        if names & set(later.input):
            joined = later.op_type == "Concat" and _attribute(later, "axis") == -1
            if later.op_type == "RotaryEmbedding" or joined:
                return later
            names |= set(later.output)
    raise AssertionError("nothing is rotated")


def lengths_one_less(model: onnx.ModelProto) -> None:
    _shift_lengths(model, -1)


def lengths_one_more(model: onnx.ModelProto) -> None:
    _shift_lengths(model, 1)


def _shift_lengths(model: onnx.ModelProto, by: int) -> None:
    (lengths,) = {
        name
        for graph in _graphs(model.graph)
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
        for name in [node.input[5]]
        if any(name in n.output for n in model.graph.node)
    }
    step = _constant(model, "defect.step", by, np.int32)
    _read_instead(model, {lengths: "defect.lengths"})
    place = [lengths in n.output for n in model.graph.node].index(True) + 1
    shifted = helper.make_node("Add", [lengths, step], ["defect.lengths"])
    model.graph.node.insert(place, shifted)


def branches_exchanged(model: onnx.ModelProto, which: int) -> None:
    names = {"then_branch": "else_branch", "else_branch": "then_branch"}
    for attribute in nodes_of(model, "If")[which].attribute:
        attribute.name = names[attribute.name]


def rest_of_the_buffer_lost(model: onnx.ModelProto) -> None:
    """A long prompt's present is as long as the prompt, not as the buffer it goes into."""
    rests = [n for n in nodes_of(model, "Slice") if n.input[0] in ("past_key", "past_value")]
    assert len(rests) == 2
    for node in rests:
        node.input[1] = node.input[2]


def long_chunk_taken_for_a_prompt(model: onnx.ModelProto) -> None:
    """Computed in blocks, which know no past."""
    conditions = {n.input[0] for n in nodes_of(model, "If")}
    (both,) = [n for n in nodes_of(model, "And") if n.output[0] in conditions]
    long = next(n.output[0] for n in nodes_of(model, "Greater") if n.output[0] in both.input)
    both.input[:] = [long, long]


def _of_single_tokens(model: onnx.ModelProto) -> onnx.NodeProto:
    """The call whose queries are scaled before."""
    calls = nodes_of(model, "GroupQueryAttention")
    (single,) = [n for n in calls if _attribute(n, "scale") == 1.0]
    return single


def queries_of_single_tokens_unscaled(model: onnx.ModelProto) -> None:
    name = _of_single_tokens(model).input[0]
    (cast,) = [n for n in nodes_of(model, "Cast") if name in n.output] or [None]
    scaled = name if cast is None else cast.input[0]
    (by,) = [n for n in nodes_of(model, "Mul") if scaled in n.output]
    change(table(model, by.input[1]), np.ones_like)


def sinks_of_single_tokens_weigh(model: onnx.ModelProto) -> None:
    change(table(model, _of_single_tokens(model).input[11]), np.zeros_like)


def window_attribute_off(model: onnx.ModelProto, which: int, by: int) -> None:
    attributes = nodes_of(model, "GroupQueryAttention")[which].attribute
    (window,) = [a for a in attributes if a.name == "local_window_size"]
    window.i += by
