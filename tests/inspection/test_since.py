"""Since when onnxruntime has what, and what of it a graph asks for."""

from __future__ import annotations

import itertools
import re

import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from rope_export.inspection import since
from rope_export.inspection.report import inspect_model
from rope_export.runtime import providers, schemas

GQA_INPUTS = [
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
    "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
]  # fmt: skip


def gqa(*inputs, **attributes):
    """A node with these inputs beside those that it must have, as onnxruntime's manual has them."""
    names = ["query", "key", "value", "", "", "seqlens_k", "total_sequence_length", *[""] * 7]
    for name in inputs:
        names[GQA_INPUTS.index(name)] = name
    while not names[-1]:
        names.pop()
    return helper.make_node(
        "GroupQueryAttention",
        names,
        ["y"],
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=1,
        **attributes,
    )


def attention(*inputs, **attributes):
    return helper.make_node("Attention", ["q", "k", "v", *inputs], ["y"], **attributes)


def scan(shape):
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [entry], [value])
    return helper.make_node("Scan", ["xs"], ["ys"], body=body, num_scan_inputs=1)


def within(node):
    """The node in a branch of a branch."""
    for name in ("inner", "outer"):
        value = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2])
        branch = helper.make_graph([node], name, [], [value])
        node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    return node


def model(*nodes, opset=18, ir_version=8):
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(
        helper.make_graph(nodes, "graph", [], [value]),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=ir_version,
    )


# By hand from releases and from runs in each of them.
ASKED = [
    (gqa(), "1.18", "GroupQueryAttention"),
    (gqa(softcap=30.0), "1.20", "softcap"),
    (gqa("position_ids"), "1.22", "position_ids"),
    (gqa("attention_bias"), "1.22", "attention_bias"),
    (gqa("head_sink"), "1.23", "head_sink"),
    (gqa("head_sink", local_window_size=-1), "1.23", "head_sink"),
    (gqa(local_window_size=512), "1.24", "window"),
    (gqa(k_quant_type="NONE"), "1.25", "k_quant_type"),
    (gqa("k_scale", "v_scale", k_quant_type="PER_TENSOR"), "1.27", "integers"),
    (gqa("k_scale", "v_scale", v_quant_type="PER_CHANNEL"), "1.27", "integers"),
    (gqa(local_window_size=4, sliding_window_cache=1), "1.29", "sliding_window_cache"),
    (gqa(sliding_window_cache=0), "1.29", "sliding_window_cache"),
    (gqa(causal=0), "1.30", "causal"),
    (gqa(causal=1, sliding_window_cache=1), "1.30", "causal"),
    (attention(softcap=5.0, is_causal=1), "1.27", "soft cap"),
    (attention("mask", softcap=5.0), "1.27", "soft cap"),
    (scan(None), "1.25", "Scan"),
]


@pytest.mark.parametrize(("node", "version", "what"), ASKED, ids=lambda x: str(x)[:40])
def test_what_a_node_asks_for_is_known_wherever_it_stands(tmp_path, node, version, what):
    for proto in (model(node), model(within(node))):
        first, *_ = since.of_model(proto)
        assert first.version == version
        assert what in first.what
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        report = inspect_model(path)
        assert (report.onnxruntime, report.needs) == (version, since.of_model(proto))


@pytest.mark.parametrize(
    "node",
    [
        attention(is_causal=1),
        attention("mask"),
        attention(softcap=5.0),
        attention("mask", softcap=0.0),
        scan([2]),
        scan([None]),
        helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="my.own", causal=0),
        helper.make_node("Softmax", ["x"], ["y"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_every_version_has_is_asked_of_none(node):
    assert since.of_model(model(node)) == ()


def test_what_is_newest_is_first_and_opset_and_format_count():
    found = since.of_model(model(gqa("head_sink", causal=0), opset=23, ir_version=13))
    assert [need.version for need in found] == ["1.30", "1.24", "1.23", "1.23", "1.18"]
    assert [need.what for need in found if "IR" in need.what] == ["IR version 13"]
    # More than any tried loads: what would, nobody knows.
    assert since.of_model(model(opset=60, ir_version=60)) == ()


@pytest.mark.parametrize(
    ("table", "given"), [(since.OPSETS, "opset"), (since.IR_VERSIONS, "ir_version")]
)
def test_graphs_load_here_as_the_tables_say(table, given):
    loaded = [
        number
        for number, version in table.items()
        if not since.is_older(providers.onnxruntime_module().__version__, version)
    ]
    for number in loaded:
        assert providers.open_session(providers.tiny_model(**{given: number}), "cpu")
    versions = [since.parts(table[number]) for number in sorted(table)]
    assert versions == sorted(versions)


@pytest.mark.parametrize("feature", since.FEATURES, ids=lambda feature: feature.what)
def test_the_schema_here_has_what_the_table_says(feature):
    """An attribute or an input that the table gives to this onnxruntime must exist in it."""
    here = providers.onnxruntime_module().__version__
    domain, _, name = feature.operator.rpartition("::")
    found = [s for s in get_all_operator_schema() if (s.domain, s.name) == (domain, name)]
    newest = max(found, key=lambda s: s.since_version, default=None)
    if since.is_older(here, feature.version):
        pytest.skip(f"is of onnxruntime {feature.version}")
    assert newest is not None
    if feature.attribute is not None:
        assert feature.attribute in newest.attributes
    if feature.input is not None:
        assert [each.name for each in newest.inputs].index(feature.input) == list(
            since.GQA_INPUTS
        ).index(feature.input)
    assert re.fullmatch(r"1\.\d\d", feature.version)


def test_an_attribute_or_input_that_is_unknown_here_is_found():
    assert schemas.unknown([gqa("head_sink", softcap=3.0), attention(future=1)]) is None
    assert schemas.unknown([gqa(future=1)]) == "no future of GroupQueryAttention"
    many = gqa()
    many.input.extend(map(str, range(20)))
    assert "inputs of GroupQueryAttention, not 27" in schemas.unknown([many])
    unheard = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="com.microsoft")
    assert schemas.unknown([gqa(), unheard]) == "no NoSuchOperator"


def test_versions_compare_as_numbers():
    ordered = ["1.9", "1.10.5", "1.24", "1.31.1", "2.0.0rc1", "2.1.dev3"]
    for one, other in itertools.combinations(ordered, 2):
        assert since.is_older(one, other)
        assert not since.is_older(other, one)
    assert not since.is_older("1.31.0", "1.31.1")
    assert since.latest(ordered) == "2.1.dev3"
