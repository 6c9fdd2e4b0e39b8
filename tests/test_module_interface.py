"""What a module takes and gives, in its graph: names, labels, and what is refused."""

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
    tree,
    with_past,
)
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from rope_export import (
    Attention,
    BadInputError,
    export,
    replay,
    validate,
)
from rope_export.lowering import rules
from rope_export.runtime import Decoder

TARGETS = rules.TARGETS


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


def plus(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.linear(x) + y


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


# --- what is refused -----------------------------------------------------------------------


class Decomposing(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.linalg.qr(y)[0]


class Deciding(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


class Leaving(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class Raising(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] > 1, "two at least"
        return self.linear(x)


def hooked() -> nn.Module:
    module = Served()
    module.attention.q_proj.register_forward_hook(lambda *_: None)
    return module


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def adapted() -> nn.Module:
    module = Served()
    module.attention.q_proj = Adapter(32, 32)
    return module


def exporting(forward: Any = linear, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A module, and what `export` is given beside it."""
    module = forward if isinstance(forward, nn.Module) else module_of(forward)
    return module, {"args": args or (X,), "dynamic_shapes": None, **options}


def labelled(labels: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
    return exporting(plus if args else linear, *args, dynamic_shapes=labels)


LINE = r"\w+\.py:\d+ `"
MASKED = drawn(2, 7, 32), torch.ones(2, 7, dtype=torch.int64)
REFUSED = {
    # labels
    "unknown input": (labelled({"y": AXES}), r"inputs of Given \(x\), got 'y'"),
    "no such axis": (labelled({"x": {3: "b"}}), "one of its 3 axes, got 3"),
    "no such axis from the end": (labelled({"x": {-4: "b"}}), "got -4"),
    "an axis by name": (labelled({"x": {"0": "b"}}), "axes as integers, got '0'"),
    "two names": (labelled({"x": {0: "b c"}}), "got 'b c'"),
    "no name": (labelled({"x": {0: ""}}), "got ''"),
    "a number": (labelled({"x": {0: "3"}}), "with a name, got '3'"),
    "a call": (labelled({"x": {0: "f(x)"}}), r"\+, -, \* and // .* got 'f\(x\)'"),
    "a quotient": (labelled({"x": {0: "b/2"}}), "got 'b/2'"),
    "a division by zero": (labelled({"x": {0: "b", 1: "b//0"}}), "divide by zero"),
    "a float": (labelled({"x": {0: 1.5}}), "text or a torch.export.Dim, .* got 1.5"),
    "another size": (labelled({"x": {0: 7}}), "give its size 3, got 7"),
    "a truth value": (labelled({"x": {0: True}}), "got True"),
    "no mapping of axes": (labelled({"x": "batch"}), "mapping from axes to labels, got 'batch'"),
    "no mapping": (labelled(5), "mapping from inputs to axes, got int"),
    "a text for a mapping": (labelled("batch"), "mapping from inputs to axes, got str"),
    "too many entries": (labelled([AXES, AXES]), "one entry for each of x, got 2"),
    "too few axes": (labelled({"x": ("b", "s")}), r"got \('b', 's'\)"),
    "two sizes of a label": (labelled({"x": {0: "b", 1: "b"}}), "is 3 in the example's x, got 5"),
    "a sum that is not": (
        labelled({"x": {0: "b", 1: "b+1"}}),
        r"labelled b\+1, which is 4 in the example, got 5",
    ),
    "a part without a label": (labelled({"x": {0: "b+c"}}), "no axis is labelled b"),
    "less than the example": (labelled({"x": {0: Dim("b", max=2)}}), "at most 2, and is 3"),
    "an axis the module fixes": (
        exporting(lambda self, x: self.linear(x).reshape(3, -1), dynamic_shapes={"x": AXES}),
        r"axis 0 of x was to be dynamic \(b\) and Given works with size 3 only",
    ),
    "an axis that stays one": (labelled({"y": {1: "t"}}, X, drawn(3, 1, 4)), r"traced at \(t 2"),
    # inputs
    "too few arguments": (exporting(plus, X), "missing a required argument: 'y'"),
    "too many arguments": (exporting(linear, X, X), "too many positional arguments"),
    "an unknown keyword": (exporting(kwargs={"z": X}), "unexpected keyword argument 'z'"),
    "a text for arguments": (exporting(args="x"), "tuple of example inputs, got str"),
    "no tensor": (exporting(lambda self, n: self.linear(torch.ones(n, 4)), 3), "hold a tensor"),
    "no example": (exporting(args=None), "example inputs of Given, got None"),
    "complex numbers": (exporting(linear, X.to(torch.complex64)), "got complex64"),
    "double precision": (exporting(linear, X.double()), "x must be one of .* got float64"),
    "sparse": (exporting(linear, torch.eye(4).to_sparse()), "got float32 sparse_coo"),
    "an array": (exporting(linear, X.numpy()), "a tensor, a number, a text or None, got ndarray"),
    "what the module refuses": (
        exporting(linear, drawn(3, 5)),
        LINE + "return self.linear.* raises RuntimeError at the example inputs",
    ),
    # outputs
    "nothing returned": (exporting(lambda *_: None), "must return a tensor, got NoneType"),
    "an empty result": (exporting(lambda *_: ()), "must return a tensor, got tuple"),
    "a number returned": (exporting(lambda _, x: (x, 3)), "output_1 must be .* got int 3"),
    "a text returned": (exporting(lambda _, x: {"a": x, "b": "c"}), "got str 'c'"),
    "a set returned": (exporting(lambda *_: {"a": {1}}), "got set: a graph"),
    "complex returned": (exporting(lambda _, x: torch.fft.fft(x)), "got complex64"),
    "double returned": (exporting(lambda _, x: x.double()), "output must .* got float64"),
    "the name of an input": (exporting(lambda _, x: {"x": x * 2}), "name of an input"),
    "one name twice": (
        exporting(lambda _, x: {"a.b": x, "a": {"b": x * 2}}),
        "two outputs would be named 'a.b'",
    ),
    "too few names": (exporting(output_names=[]), "name the 1 outputs .* got 0"),
    "a text of names": (exporting(output_names="y"), "list of names, got 'y'"),
    "an empty name": (exporting(output_names=[""]), r"list of names, got \[''\]"),
    # what it does
    "a decision": (exporting(Deciding()), LINE + r"if y\.sum\(\) > 0:` depends on the values"),
    "numpy": (exporting(Leaving()), LINE + r"return torch\.from_numpy.* cannot be traced"),
    "no ONNX form": (exporting(Decomposing()), r"linalg_qr, used by `.*torch\.linalg\.qr.*no form"),
    "random numbers": (exporting(lambda _, x: x + torch.rand_like(x)), "same numbers"),
    "dropout that stays on": (
        exporting(lambda self, x: F.dropout(self.linear(x), 0.5, training=True)),
        "output of two runs differs",
    ),
    "sizes it raises on": (
        exporting(Raising(), dynamic_shapes={"x": AXES}),
        LINE + r"assert .* raises AssertionError at b 1, s 1: two at least",
    ),
    "no finite numbers": (exporting(lambda _, x: torch.log(x - 1e9)), "finite numbers"),
    # its parts
    "hooks": (exporting(hooked(), *MASKED), "attention.q_proj must have no forward hooks"),
    "adapters": (exporting(adapted(), *MASKED), "attention.q_proj must be a plain nn.Linear"),
    "double weights": (exporting(nn.Linear(4, 4).double(), X), "weights must .* got float64"),
    "weights without numbers": (exporting(nn.Linear(4, 4, device="meta"), X), "meta device"),
    "bfloat16 on the CPU": (exporting(nn.Linear(4, 4).bfloat16(), X.bfloat16()), "bfloat16"),
    "a class": (({"module": nn.Linear}, {"args": (X,)}), "torch.nn.Module, got type"),
    # options
    "a cache": (exporting(cache=True), "cache is of an Attention exported alone"),
    "one length": (exporting(static=True), "static is of an Attention exported alone"),
    "no such target": (exporting(target="tflite"), "target must be one of"),
    "no length": (exporting(max_seq_len=0), "max_seq_len must be at least 1, got 0"),
    "longer than its table": (
        exporting(Served(), *MASKED, max_seq_len=33),
        "at most the 32 positions .* got 33",
    ),
    "padding on no side": (exporting(padding="top"), "padding must be one of"),
    # what draws inputs
    "inputs that are no function": (exporting(inputs={"x": X}), "must be a function"),
    "inputs that raise": (exporting(inputs=lambda *_: 1 / 0), "ZeroDivisionError"),
    "inputs without a generator": (exporting(inputs=lambda _: {}), "TypeError"),
    "inputs without names": (exporting(inputs=lambda *_: [X]), "by name, got list"),
    "inputs of another name": (exporting(inputs=lambda *_: {"y": X}), r"\(x\), got 'y'"),
    "inputs of another shape": (
        exporting(inputs=lambda *_: {"x": X[:2]}),
        r"x as \[3, 5, 4\] of torch.float32, got \[2, 5, 4\]",
    ),
    "inputs of another dtype": (
        exporting(inputs=lambda *_: {"x": X.half()}),
        "got .* of torch.float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(tmp_path, name):
    (module, options), says = REFUSED[name]
    if isinstance(module, dict):
        module = module["module"]
    with pytest.raises(BadInputError, match=says) as caught:
        export(module, tmp_path / "x", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_leaves_the_artifact_that_was_there(tmp_path):
    export(module_of(linear), tmp_path / "x", args=(X,))
    before = tree(tmp_path)
    for name in ("no name", "a decision", "no ONNX form", "inputs that raise"):
        (module, options), says = REFUSED[name]
        with pytest.raises(BadInputError, match=says):
            export(module, tmp_path / "x", **options)
        assert tree(tmp_path) == before


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
    assert len(session) == len({(s["b"], s["s"]) for s in seen}) - 1  # one was for sensitivity
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
        (lambda self, x: self.linear(x)[..., :2], "output is (1, 1, 4), not (1, 1, 2)"),
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


def test_a_tensor_for_arguments_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="tuple of example inputs, got Tensor"):
        export(module_of(linear), tmp_path / "x", args=X)


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
