"""What a module cannot be exported with is refused in one line, and nothing is written."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import modules
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import (
    AXES,
    Served,
    X,
    drawn,
    linear,
    module_of,
    plus,
    tree,
)
from torch import Tensor, nn
from torch.export import Dim

from rope_export import BadInputError, export, validate

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


def holding(tensor: Any, forward: Any = None, *, buffer: bool = True) -> nn.Module:
    """A module with one tensor more."""
    module = module_of(forward or (lambda self, x: self.linear(x) + self.held.to_dense()))
    if buffer:
        module.register_buffer("held", tensor)
    else:
        module.held = tensor
    return module


class Int8(Tensor):
    """As libraries of quantised layers have them."""


def quantised() -> nn.Module:
    module = Served()
    module.attention.o_proj.weight = nn.Parameter(
        module.attention.o_proj.weight.detach().as_subclass(Int8)
    )
    return module


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


class HybridCache:
    """As transformers has them: no tensor, no tuple."""


class Batch:
    def __init__(self) -> None:
        self.x = X


def in_bfloat16(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x).float()


def nested(self: Any, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([self.linear(x[0]), x[1]])
    return torch.nested.to_padded_tensor(rows, 0.0)


def differentiating(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.linear(x).pow(2).sum(), x)[0]


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
    "a cache of transformers": (
        exporting(plus, X, HybridCache()),
        r"y must be .* got HybridCache \(a cache.*use_cache=False.*DecoderWithCache\(model\)",
    ),
    "an object": (exporting(plus, X, Batch()), "got Batch: use its tensors themselves"),
    "a number of NumPy": (exporting(plus, X, np.float32(2)), r"got float32: use 2\.0"),
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
    "a cache of transformers returned": (
        exporting(lambda _, x: {"x_": x, "past_key_values": HybridCache()}),
        r"past_key_values must be a tensor, got HybridCache .*use_cache=False.*DecoderWithCache",
    ),
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
    "numpy": (exporting(Leaving()), LINE + r"return torch\.from_numpy.* leaves PyTorch for NumPy"),
    "no ONNX form": (
        exporting(Decomposing()),
        r"linalg\.qr.*` uses aten\.linalg_qr.*no form",
    ),
    "random numbers": (exporting(lambda _, x: x + torch.rand_like(x)), "same numbers"),
    "dropout that stays on": (
        exporting(lambda self, x: F.dropout(self.linear(x), 0.5, training=True)),
        "draws random numbers",
    ),
    "sizes it raises on": (
        exporting(Raising(), dynamic_shapes={"x": AXES}),
        LINE + r"assert .* raises AssertionError at b 1, s 1: two at least",
    ),
    "leaving": (exporting(lambda *_: exit(3)), "raises SystemExit at the example inputs: 3"),
    "bfloat16 inside": (exporting(in_bfloat16), r"linear\(x\)\.float\(\)` computes in bfloat16"),
    "cast to bfloat16": (
        exporting(lambda self, x: (self.linear(x).bfloat16() * 2).float()),
        LINE + ".*computes in bfloat16",
    ),
    "nested tensors": (exporting(nested), LINE + "rows = torch.nested.* uses nested tensors"),
    "gradients": (exporting(differentiating), "computes gradients"),
    "fake quantisation": (
        exporting(
            lambda _, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
            dynamic_shapes={"x": AXES},
        ),
        "computes with quantised tensors of PyTorch",
    ),
    "no finite numbers": (exporting(lambda _, x: torch.log(x - 1e9)), "finite numbers"),
    # its parts
    "hooks": (exporting(hooked(), *MASKED), "attention.q_proj must have no forward hooks"),
    "adapters": (exporting(adapted(), *MASKED), "attention.q_proj must be a plain nn.Linear"),
    "double weights": (exporting(nn.Linear(4, 4).double(), X), "weights must .* got float64"),
    "weights of a subclass": (
        exporting(quantised(), *MASKED),
        r"attention\.o_proj\.weight must be a plain tensor, got a Int8 of ",
    ),
    "sparse buffers": (exporting(holding(torch.eye(4).to_sparse())), "held must be dense, got"),
    "buffers without numbers": (
        exporting(holding(torch.ones(4, device="meta"))),
        "held must hold numbers, got a tensor on the meta device",
    ),
    "attributes without numbers": (
        exporting(holding(torch.ones(4, device="meta"), buffer=False)),
        "held must hold numbers",
    ),
    "weights of inference mode": (exporting(in_inference_mode(), X), "weight was made under"),
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


def test_a_tensor_for_arguments_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="tuple of example inputs, got Tensor"):
        export(module_of(linear), tmp_path / "x", args=X)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("scripted", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_torchscript_is_refused_by_name(tmp_path, scripted):
    for module, name in (
        (scripted(nn.Linear(4, 4)), "module"),
        (nn.Sequential(nn.ReLU(), scripted(nn.Linear(4, 4))), "1"),
    ):
        with pytest.raises(BadInputError, match=f"^{name} must be a module in Python"):
            export(module, tmp_path / "x", args=(X,))


def warning(self: Any, x: Tensor) -> Tensor:
    warnings.warn("of the module's own", stacklevel=1)
    logging.getLogger("torch.fx").warning("of PyTorch's own")
    return self.linear(x)


@pytest.mark.parametrize("forward", [warning, linear])
def test_what_succeeds_warns_of_nothing_and_logs_nothing(tmp_path, forward, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(
            module_of(forward), tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True
        )
    out, err = capfd.readouterr()
    assert not out
    assert not err
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_validate_is_given_is_refused_as_by_export(tmp_path):
    result = export(module_of(linear), tmp_path / "x", args=(X,))
    for given, options, says in (
        (None, {}, "module must be a torch.nn.Module, got NoneType"),
        (nn.Linear, {}, "module must be a torch.nn.Module, got type"),
        (holding(torch.ones(4, device="meta")), {}, "held must hold numbers"),
        (module_of(linear), {"inputs": 3}, "inputs must be a function that draws inputs, got int"),
    ):
        with pytest.raises(BadInputError, match=says):
            validate(result, given, args=(X,), **options)
