"""What a module takes and gives has its name and axes in the graph."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import modules
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from modules import (
    AXES,
    ONE,
    Served,
    X,
    Y,
    Z,
    agrees,
    drawn,
    interface,
    linear,
    module_of,
    plus,
    with_past,
)
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from rope_export import Attention, BadInputError, export, replay, validate
from rope_export.artifacts.targets import TARGETS
from rope_export.runtime import Decoder

TARGETS = TARGETS

# --- its interface -------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["u", "v"])


@dataclass
class Parts:
    first: Tensor
    rest: list[Tensor]


def model_output(self: Any, x: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    y = self.linear(x)
    return BaseModelOutput(last_hidden_state=y, hidden_states=(x * 2, y * 3))


def variadic(self: Any, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
    for index, tensor in enumerate(more):
        x = x + (index + 2) * tensor
    for name in sorted(named):
        x = x * named[name]
    return self.linear(x)


def with_options(
    self: Any, x: Tensor, mask: Tensor | None = None, *, y: Tensor, sign: bool = True, how: str = ""
) -> Tensor:
    assert how in ("", "plain")
    x = x if mask is None else x * mask
    return self.linear(x) + (y if sign else -y)


KEYS = tuple(drawn(3, 2, 4, 8, seed=seed) for seed in (1, 2))
BS = ["b", "s", 4]
# What forward is, its arguments, labels, and the axes of inputs and outputs by name.
INTERFACES = {
    "nested containers": (
        lambda self, state: self.linear(state["a"]) + state["b"][0] - 2 * state["b"][1],
        ({"a": X, "b": [Y, Z]},),
        {},
        {"state": AXES},
        {"state.a": BS, "state.b.0": BS, "state.b.1": BS},
        {"output": BS},
    ),
    "namedtuples": (
        lambda self, p: Pair(self.linear(p.u), p.v * 2),
        (Pair(X, Y),),
        {},
        {"p": Pair(AXES, {0: "b"})},
        {"p.u": BS, "p.v": ["b", 5, 4]},
        {"u": BS, "v": ["b", 5, 4]},
    ),
    "a mapping with numbers": (
        lambda self, d: {1: self.linear(d[1]), 2: d[2] * 2},
        ({1: X, 2: Y},),
        {},
        {"d": {1: {0: "b"}, 2: {1: "s"}}},
        {"d.1": ["b", 5, 4], "d.2": [3, "s", 4]},
        {"output_1": ["b", 5, 4], "output_2": [3, "s", 4]},
    ),
    "output of transformers": (
        model_output,
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"last_hidden_state": BS, "hidden_states.0": BS, "hidden_states.1": BS},
    ),
    "a dataclass": (
        lambda self, x: Parts(self.linear(x), [x * 2, x * 3]),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"first": BS, "rest.0": BS, "rest.1": BS},
    ),
    "any number of arguments": (
        variadic,
        (X, Y, Z),
        {"w": X + 1},
        {"x": AXES, "more_0": AXES, "more_1": AXES, "w": AXES},
        {"x": BS, "more_0": BS, "more_1": BS, "w": BS},
        {"output": BS},
    ),
    "keywords, None and constants": (
        with_options,
        (X,),
        {"y": Y, "sign": False, "how": "plain"},
        {"x": AXES, "y": AXES},
        {"x": BS, "y": BS},
        {"output": BS},
    ),
    "one pair of keys and values": (
        lambda self, x, past: (self.linear(x), (past[0] * 2, past[1] - 1)),
        (X, KEYS),
        {},
        {"x": AXES, "past": {0: "b", 2: "p"}},
        {
            "x": BS,
            "past_key_values.0.key": ["b", 2, "p", 8],
            "past_key_values.0.value": ["b", 2, "p", 8],
        },
        {"output": BS, "present.0.key": ["b", 2, "p", 8], "present.0.value": ["b", 2, "p", 8]},
    ),
    "the same tensor twice, and an input": (
        lambda self, x: (lambda y: {"a": y, "b": y, "c": x})(self.linear(x)),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"a": BS, "b": BS, "c": BS},
    ),
    "an input as it is": (lambda _, x: x, (X,), {}, {"x": AXES}, {"x": BS}, {"output": BS}),
    "one tensor given twice": (
        lambda self, x, y: self.linear(x) - y,
        (X, X),
        {},
        {"x": AXES, "y": AXES},
        {"x": BS, "y": BS},
        {"output": BS},
    ),
    "integers, booleans and numbers": (
        lambda self, x: {
            "best": self.linear(x).argmax(-1),
            "above": x > 0,
            "sum": x.sum(),
            "places": torch.arange(x.shape[1]),
        },
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"best": ["b", "s"], "above": BS, "sum": [], "places": ["s"]},
    ),
    "outputs without the dynamic axes": (
        lambda self, x: (self.linear(x).mean((0, 1)), self.linear.weight * x[0, 0]),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"output_0": [4], "output_1": [4, 4]},
    ),
    "one axis": (
        lambda _, v: v * 2,
        (drawn(6),),
        {},
        {"v": {0: "n"}},
        {"v": ["n"]},
        {"output": ["n"]},
    ),
    "no axis": (
        lambda self, v, n: self.linear.bias * v + n,
        (torch.tensor(1.5), torch.tensor(3)),
        {},
        None,
        {"v": [], "n": []},
        {"output": [4]},
    ),
    "a result that is partly None": (
        lambda self, x: (None, self.linear(x), None),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"output_1": BS},
    ),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_interfaces(tmp_path, name):
    forward, args, kwargs, labels, inputs, outputs = INTERFACES[name]
    module = module_of(forward)
    result = export(
        module, tmp_path / "x", args=args, kwargs=kwargs, dynamic_shapes=labels, validate=True
    )
    assert interface(result) == (inputs, outputs)
    assert result.report.passed, result.report.to_markdown()
    agrees(result, module, *args, **kwargs)
    if [] not in [*inputs.values(), *outputs.values()]:
        assert replay(result.path).passed


def test_constants_are_in_the_notes(tmp_path):
    result = export(
        module_of(with_options),
        tmp_path / "x",
        args=(X,),
        kwargs={"y": Y, "sign": False, "how": "plain"},
    )
    (note,) = result.notes
    assert note == "fixed in the graph, as in the example: sign=False, how='plain'"
    config = json.loads((result.path / "config.json").read_text())
    assert config["module"]["constants"] == {"sign": "False", "how": "plain"}


def test_outputs_are_renamed_and_caches_are_not(tmp_path):
    module = module_of(lambda self, x, past: (self.linear(x), (past[0] * 2, past[1]), x * 2))
    result = export(
        module,
        tmp_path / "x",
        args=(X, KEYS),
        dynamic_shapes=({0: "b", 1: "s"}, {0: "b", 2: "p"}),
        output_names=["logits", "twice"],
        validate=True,
    )
    assert list(interface(result)[1]) == ["logits", "present.0.key", "present.0.value", "twice"]
    assert result.report.passed


def test_one_pair_of_an_attention_is_served(tmp_path):
    model = modules.enlivened(Served())
    result = export(
        model,
        tmp_path / "x",
        args=with_past(4),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}],
        target="onnx",
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert list(interface(result)[1]) == ["output", "present.0.key", "present.0.value"]
    decoder = Decoder.open(result.path)
    x = drawn(1, 5, 32, seed=3)
    parts = [decoder.prefill(x[:, :4].numpy()), decoder.decode(x[:, 4:].numpy())]
    (truth,) = modules.in_double(model.attention, x)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), truth, rtol=1e-4, atol=1e-5)


def test_weights_are_copied_where_they_are_examples(tmp_path):
    """A graph must not take a tensor that is given for the weight it was in the example."""
    module = module_of(lambda self, x, w: F.linear(x, w) + self.linear(x))
    result = export(
        module,
        tmp_path / "x",
        args=(X, module.linear.weight),
        dynamic_shapes={"x": AXES},
        validate=True,
    )
    assert result.report.passed
    agrees(result, module, Y, drawn(4, 4, seed=7))


# --- labels ----------------------------------------------------------------------------------

BATCHED = ["b", "s", 4]


def blocks(self: Any, x: Tensor) -> Tensor:
    return self.linear(x.unflatten(1, (-1, 8)).mean(2))


def joined(self: Any, x: Tensor, past: Tensor, mask: Tensor) -> Tensor:
    return self.linear(torch.cat((past, x), dim=1)) * mask.unsqueeze(-1)


SUMMED = {"x": {1: "sequence"}, "past": {1: "past_sequence"}}
SUM = ["past_sequence+sequence", "sequence+past_sequence"]
JOINED = [drawn(2, 3, 4), drawn(2, 5, 4, seed=1), drawn(2, 8)]
EMPTY = [drawn(2, 1, 4), drawn(2, 0, 4), drawn(2, 1)]
LABELLED = {
    "Dims": (
        linear,
        [X],
        {"x": {-3: Dim("b"), -2: Dim("s", min=2, max=50)}},
        {"x": BATCHED},
        BATCHED,
        {"b": [1, None], "s": [2, 50]},
    ),
    "hints": (
        linear,
        [X],
        {"x": {0: Dim.DYNAMIC(max=9), 1: Dim.AUTO, 2: Dim.STATIC}},
        {"x": ["x_0", "x_1", 4]},
        ["x_0", "x_1", 4],
        {"x_0": [1, 9], "x_1": [1, None]},
    ),
    "a batch of one": (linear, [X[:1, :1]], (["b", "s", None],), {"x": BATCHED}, BATCHED, {}),
    "sizes that stay": (linear, [X], {"x": {0: "b", 1: 5}}, {"x": ["b", 5, 4]}, ["b", 5, 4], {}),
    "blocks": (
        blocks,
        [drawn(2, 24, 4)],
        {"x": {0: "b", 1: "8*blocks"}},
        {"x": ["b", "8*blocks", 4]},
        None,
        {"b": [1, None], "blocks": [1, None]},
    ),
    "one block": (
        blocks,
        [drawn(1, 8, 4)],
        {"x": {0: "b", 1: "8 * blocks"}},
        {"x": ["b", "8*blocks", 4]},
        None,
        {},
    ),
    "one less": (
        lambda self, x, y: self.linear(x)[:, 1:] * y,
        [X, drawn(3, 4, 4)],
        {"x": AXES, "y": {0: "b", 1: "s-1"}},
        {"x": BATCHED, "y": ["b", "s-1", 4]},
        ["b", "s-1", 4],
        {},
    ),
    "a sum": (
        joined,
        JOINED,
        {**SUMMED, "mask": {1: "past_sequence + sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[0]]},
        [2, SUM[1], 4],
        {"past_sequence": [1, None], "sequence": [1, None]},
    ),
    "a sum after an empty past": (
        joined,
        EMPTY,
        {**SUMMED, "mask": {1: "past_sequence+sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[0]]},
        [2, SUM[1], 4],
        {},
    ),
    "a sum by its name": (
        joined,
        EMPTY,
        {**SUMMED, "mask": {1: "total_sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[1]]},
        [2, SUM[1], 4],
        {},
    ),
    "two that must be equal": (
        plus,
        [X, Y],
        {"x": {0: "b", 1: "s"}, "y": {0: "b", 1: "t"}},
        {"x": BATCHED, "y": BATCHED},
        BATCHED,
        {"b": [1, None], "s": [1, None]},
    ),
    "the narrower of two ranges": (
        plus,
        [X, Y],
        {"x": {0: Dim("b", max=9)}, "y": {0: Dim("b", max=7)}},
        {"x": ["b", 5, 4], "y": ["b", 5, 4]},
        ["b", 5, 4],
        {"b": [1, 7]},
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels(tmp_path, name):
    forward, args, labels, inputs, output, ranges = LABELLED[name]
    module = module_of(forward)
    result = export(module, tmp_path / "x", args=args, dynamic_shapes=labels)
    got, outputs = interface(result)
    assert got == inputs
    if output is not None:
        assert outputs == {"output": output}
    for label, served in ranges.items():
        assert result.graph["ranges"][label] == served
    assert replay(result.path).passed
    agrees(result, module, *args)


def test_leaf_names_are_keys_too(tmp_path):
    module = module_of(lambda self, x, past: (self.linear(x), past[0][0] * 2, past[1][1] * 2))
    pairs = [KEYS, KEYS[::-1]]
    labels = {"x": AXES, "past_key_values.0.key": {0: "b"}, "past_key_values.1.value": {2: "p"}}
    result = export(module, tmp_path / "x", args=(X, pairs), dynamic_shapes=labels, validate=True)
    inputs, _ = interface(result)
    assert inputs["past_key_values.0.key"] == ["b", 2, 4, 8]
    assert inputs["past_key_values.0.value"] == [3, 2, 4, 8]
    assert inputs["past_key_values.1.value"] == [3, 2, "p", 8]
    assert result.report.passed


def test_sizes_that_the_module_refuses_bound_a_label(tmp_path):
    """A guard on a shape narrows what is served, and the proof goes up to it."""

    def forward(self, x):
        if x.shape[1] > 20:
            raise ValueError(f"at most 20, got {x.shape[1]}")
        return self.linear(x)

    module = module_of(forward)
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True)
    assert result.graph["ranges"]["s"] == [1, 20]
    assert result.report.passed
    assert max(case.sequence for case in result.report.cases) == 20


def test_inputs_are_drawn_by_the_caller(tmp_path):
    """Sizes come by label, arrays do as well as tensors, and what is left out is drawn as ever."""
    seen = []

    def draw(sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
        seen.append(sizes)
        shape = sizes["b"], sizes["s"], 4
        return {"x": rng.standard_normal(shape).astype(np.float32) + 100}

    module = module_of(lambda self, x, y: self.linear(x - 100) + y)
    result = export(
        module,
        tmp_path / "x",
        args=(X, Y),
        dynamic_shapes=[AXES, AXES],
        inputs=draw,
        validate=True,
    )
    assert result.report.passed
    assert {tuple(sizes) for sizes in seen} == {("b", "s")}
    session = json.loads((result.path / "config.json").read_text())["test_vectors"]
    drawn_at = {(s["b"], s["s"]) for s in seen}
    assert len(session) == len(drawn_at) + 1  # and the example
    stored = onnx.TensorProto()
    stored.ParseFromString((result.path / "test_data_set_1/input_0.pb").read_bytes())
    assert abs(numpy_helper.to_array(stored).mean() - 100) < 1


def test_validate_knows_what_was_exported(tmp_path):
    module = module_of(linear)
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES})
    other, two = module_of(lambda self, y: self.linear(y)), module_of(plus)
    for wrong, args, says in (
        (module, None, "args must be example inputs of Given, as given to export, got None"),
        (module, (drawn(4),), r"x must have more than 1 axes, as at the export, got \[4\]"),
        (module, (X.half(),), "raises RuntimeError"),
        (other, (X,), "args must be those of the export, x, got y"),
        (two, (X, Y), "args must be those of the export, x, got x, y"),
        (Attention(16, 2), (drawn(2, 5, 16),), "those of the export, x, got hidden_states"),
    ):
        with pytest.raises(BadInputError, match=says):
            validate(result, wrong, args=args)
    for forward, reason in (
        (lambda self, x: {"y": self.linear(x)}, "the graph has no output 'y'"),
        (lambda self, x: self.linear(x)[..., :2], "output is (3, 5, 4), not (3, 5, 2)"),
        (lambda self, x: self.linear(x) > 0, "output is float32, not bool"),
        (lambda self, x: self.linear(x) * 1.001, None),
    ):
        report = validate(result, module_of(forward), args=(X,))
        assert not report.passed
        assert report.cases[0].reason == reason
    assert validate(str(result.path), torch.compile(module), kwargs={"x": Y}).passed


def test_numbers_without_axes_replay(tmp_path):
    module = module_of(lambda self, x: (self.linear(x), x.sum()))
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes=[AXES], validate=True)
    assert result.report.passed
    assert replay(result.path).passed


def test_numbers_without_axes_are_given_as_they_are(tmp_path):
    module = module_of(lambda self, x, n: (self.linear(x), n * 2))
    result = export(module, tmp_path / "x", args=(X, torch.tensor(3)), validate=True)
    assert result.report.passed, result.report.to_markdown()


def test_an_output_that_is_a_constant_keeps_its_name(tmp_path):
    module = module_of(lambda self, x: {"y": self.linear(x), "version": torch.tensor(3)})
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True)
    assert list(interface(result)[1]) == ["y", "version"]
    assert result.report.passed


def test_equal_weights_stay_apart(tmp_path):
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    result = export(module, tmp_path / "x", args=(X,))
    names = {t.name for t in onnx.load(result.model).graph.initializer}
    assert {"0.weight", "2.weight"} <= names
