"""Complex numbers in a traced program, written as pairs of real ones: ONNX has no others.

PyTorch's exporter knows the form of some operators on complex tensors. Rotations as Llama wrote
them first, and diffusion models do still, reach many more: tables of ``torch.polar`` that are
split, gathered, stacked and expanded. Whatever only moves numbers does the same to both parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_map

from rope_export.errors import BadInputError
from rope_export.exporting.blame import line_of

_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_BOTH_PARTS = (
    "_unsafe_view", "alias", "as_strided", "broadcast_to", "cat", "chunk", "clone", "concat",
    "concatenate", "constant_pad_nd", "contiguous", "cumsum", "detach", "diagonal", "embedding",
    "expand", "expand_as", "flatten", "flip", "gather", "hstack", "index", "index_select",
    "lift_fresh", "lift_fresh_copy", "masked_select", "mean", "movedim", "narrow", "neg", "pad",
    "permute", "positive", "ravel", "repeat", "repeat_interleave", "reshape", "roll", "select",
    "slice", "slice_copy", "split", "split_with_sizes", "squeeze", "stack", "sum", "swapaxes",
    "swapdims", "t", "take_along_dim", "tensor_split", "tile", "transpose", "tril", "triu",
    "unbind", "unflatten", "unsqueeze", "view", "view_as", "vstack", "where", "mT", "mH",
    "adjoint", "H", "moveaxis", "split_copy", "unbind_copy", "expand_copy", "view_copy",
    "permute_copy", "select_copy", "zeros_like",
)  # fmt: skip
_JOINING = ("aten::cat", "aten::stack", "aten::hstack", "aten::vstack", "aten::where")
_CHECKS = frozenset({"_assert_tensor_metadata"})
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_aten = torch.ops.aten

Pair = tuple[Any, Any]
"""Nodes of the real and the imaginary part."""


def as_pairs_of_real(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program without complex tensors; the same one where it has none.

    Raises:
        BadInputError: an operator has no form here; the message has its line.
    """
    found = [node for node in program.graph.nodes if _is_complex(node)]
    if not found:
        return program
    if any(_writes(user) for node in found for user in node.users):
        program = program.run_decompositions({})  # what writes in place would have no parts
    _Rewriting(program).run()
    return program


def _is_complex(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(found, list | tuple):
        return any(map(_is_complex, found))
    return isinstance(found, Tensor) and found.is_complex()


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Rewriting:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._graph = program.graph
        values = [n.meta.get("val") for n in self._graph.nodes]
        self._fake = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
        self._pairs: dict[fx.Node, Pair] = {}
        self._at: fx.Node = next(iter(self._graph.nodes))

    def run(self) -> None:
        """Rewrite, node by node."""
        nodes = list(self._graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        stored: list[fx.Node] = []
        for node in given:
            if _is_complex(node):
                self._store_as_real(node)
                stored.append(node)
        with self._graph.inserting_before(next(n for n in nodes if n.op != "placeholder")):
            for node in stored:
                self._at = node
                self._pairs[node] = self._parts_of_real(node)
        gone: list[fx.Node] = []
        for node in nodes:
            if node.op != "call_function" or not self._concerned(node):
                continue
            self._at = node
            with self._graph.inserting_before(node):
                self._rewrite(node)
            gone.append(node)
        for node in reversed(gone):
            self._graph.erase_node(node)
        self._graph.lint()
        self._program.graph_module.recompile()

    def _concerned(self, node: fx.Node) -> bool:
        return _is_complex(node) or any(each in self._pairs for each in node.all_input_nodes)

    def _rewrite(self, node: fx.Node) -> None:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            whole = node.args[0]
            if target is not operator.getitem or not isinstance(whole, fx.Node):
                raise self._refusal(node)
            real, imaginary = self._pairs[whole]
            at = node.args[1]
            self._pairs[node] = self._emit(target, real, at), self._emit(target, imaginary, at)
            return
        name = target._schema.name.partition("::")[2]
        if name in _CHECKS:
            return
        arithmetic: Callable[..., Any] | None = getattr(self, f"_{name.strip('_')}_", None)
        if name in _CASTS:
            found = self._cast(node)
        elif arithmetic is not None:
            found = arithmetic(*node.args, **node.kwargs)
        elif name in _BOTH_PARTS:
            found = self._both(target, node)
        else:
            raise self._refusal(node)
        if isinstance(found, tuple):
            self._pairs[node] = found
        else:
            node.replace_all_uses_with(found)

    def _refusal(self, node: fx.Node) -> BadInputError:
        where = line_of(node) or "the module"
        name = str(node.target).rpartition(".")[0] or str(node.target)
        return BadInputError(
            f"{where} uses {name} of complex numbers, which has no form in ONNX: write it with "
            "real ones (cos and sin)"
        )

    # Nodes.

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A node that computes, with what it gives."""
        if target in (_aten.view.default, _aten._unsafe_view.default):  # of other strides
            target = _aten.reshape.default
        node = self._graph.call_function(target, args, kwargs)
        node.meta = {key: held for key, held in self._at.meta.items() if key != "val"}
        assert self._fake is not None
        plain_args, plain_kwargs = tree_map(_value_of, (args, kwargs))
        with self._fake:
            node.meta["val"] = target(*plain_args, **plain_kwargs)
        return node

    def _store_as_real(self, node: fx.Node) -> None:
        """A stored complex tensor becomes a real one with two numbers along a last axis."""
        specs = {spec.arg.name: spec for spec in self._program.graph_signature.input_specs}
        spec = specs[node.name]
        assert spec.kind is not InputKind.USER_INPUT  # `call` takes no complex inputs
        assert spec.target is not None
        assert self._fake is not None
        stored: tuple[dict[str, Any], ...] = (self._program._state_dict, self._program._constants)
        for held in stored:
            if spec.target in held:
                whole = held[spec.target].detach().resolve_conj()
                real = held[spec.target] = torch.view_as_real(whole).contiguous()
                node.meta["val"] = self._fake.from_tensor(real, static_shapes=True)

    def _parts_of_real(self, node: fx.Node) -> Pair:
        select = _aten.select.int
        return self._emit(select, node, -1, 0), self._emit(select, node, -1, 1)

    def _parts(self, value: Any) -> Pair:
        """Of a complex node or number; the imaginary part of a real one is 0."""
        if isinstance(value, fx.Node):
            return self._pairs.get(value, (value, 0))
        if isinstance(value, complex):
            return value.real, value.imag
        return value, 0

    # Operators.

    def _both(self, target: Any, node: fx.Node) -> Pair:
        pairs = {each: self._pairs[each] for each in node.all_input_nodes if each in self._pairs}
        if target._schema.name in _JOINING:
            for each in node.all_input_nodes:  # real ones among complex ones
                given = each.meta["val"]
                real = isinstance(given, Tensor) and given.dtype.is_floating_point
                if each not in pairs and real:
                    pairs[each] = each, self._emit(_aten.zeros_like.default, each)
        parts = []
        for index in (0, 1):

            def part(each: Any, index: int = index) -> Any:
                known = isinstance(each, fx.Node) and each in pairs
                return pairs[each][index] if known else each

            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), part)
            parts.append(self._emit(target, *args, **kwargs))
        if target._schema.name in ("aten::mH", "aten::adjoint"):
            parts[1] = self._emit(_aten.neg.default, parts[1])
        return parts[0], parts[1]

    def _cast(self, node: fx.Node) -> Any:
        given = node.meta["val"]
        real, imaginary = self._parts(node.args[0])
        if not given.is_complex():  # PyTorch drops the imaginary part
            return self._emit(_aten._to_copy.default, real, dtype=given.dtype)
        if imaginary == 0:
            imaginary = self._emit(_aten.zeros_like.default, real)
        dtype = _REAL[given.dtype]
        return tuple(
            self._emit(_aten._to_copy.default, part, dtype=dtype) for part in (real, imaginary)
        )

    def _binary(self, kind: str, one: Any, other: Any) -> Any:
        """Of nodes and numbers, of which 0 stands for a part that is not there."""
        if not isinstance(one, fx.Node) and not isinstance(other, fx.Node):
            return {"mul": one * other, "add": one + other, "sub": one - other}[kind]
        if kind == "mul":
            if _none(one) or _none(other):
                return 0
        elif _none(other):
            return one
        elif _none(one):
            return other if kind == "add" else self._emit(_aten.neg.default, other)
        if not isinstance(one, fx.Node):
            if kind == "sub":
                return self._emit(_aten.rsub.Scalar, other, one)
            one, other = other, one
        overload = "Tensor" if isinstance(other, fx.Node) else "Scalar"
        return self._emit(getattr(getattr(_aten, kind), overload), one, other)

    def _whole(self, real: Any, imaginary: Any) -> Pair:
        """Both parts as nodes of one shape."""
        if not isinstance(imaginary, fx.Node):
            imaginary = self._emit(_aten.full_like.default, real, imaginary)
        if not isinstance(real, fx.Node):
            real = self._emit(_aten.full_like.default, imaginary, real)
        return real, imaginary

    def _mul_(self, one: Any, other: Any) -> Pair:
        (a, b), (c, d) = self._parts(one), self._parts(other)
        real = self._binary("sub", self._binary("mul", a, c), self._binary("mul", b, d))
        imaginary = self._binary("add", self._binary("mul", a, d), self._binary("mul", b, c))
        return self._whole(real, imaginary)

    _multiply_ = _mul_

    def _add_(self, one: Any, other: Any, alpha: Any = 1, *, sign: str = "add") -> Pair:
        (a, b), (c, d) = self._parts(one), self._parts(other)
        c, d = (self._binary("mul", part, alpha) if alpha != 1 else part for part in (c, d))
        return self._whole(self._binary(sign, a, c), self._binary(sign, b, d))

    def _sub_(self, one: Any, other: Any, alpha: Any = 1) -> Pair:
        return self._add_(one, other, alpha, sign="sub")

    def _div_(self, one: Any, other: Any) -> Pair:
        (a, b), (c, d) = self._parts(one), self._parts(other)
        kind = "Tensor" if isinstance(c, fx.Node) else "Scalar"
        if _none(d):
            divide = getattr(_aten.div, kind)
            return self._whole(*(p if _none(p) else self._emit(divide, p, c) for p in (a, b)))
        size = self._binary("add", self._binary("mul", c, c), self._binary("mul", d, d))
        minus = self._emit(_aten.neg.default, d) if isinstance(d, fx.Node) else -d
        real = self._binary("sub", self._binary("mul", a, c), self._binary("mul", b, minus))
        imaginary = self._binary("add", self._binary("mul", a, minus), self._binary("mul", b, c))
        kind = "Tensor" if isinstance(size, fx.Node) else "Scalar"
        divide = getattr(_aten.div, kind)
        parts = self._whole(real, imaginary)
        return self._emit(divide, parts[0], size), self._emit(divide, parts[1], size)

    def _reciprocal_(self, value: Any) -> Pair:
        return self._div_(1, value)

    def _matmul_(self, one: Any, other: Any, *, by: Any = _aten.matmul.default) -> Pair:
        (a, b), (c, d) = self._parts(one), self._parts(other)

        def product(x: Any, y: Any) -> Any:
            return 0 if _none(x) or _none(y) else self._emit(by, x, y)

        real = self._binary("sub", product(a, c), product(b, d))
        return self._whole(real, self._binary("add", product(a, d), product(b, c)))

    def _mm_(self, one: Any, other: Any) -> Pair:
        return self._matmul_(one, other, by=_aten.mm.default)

    def _bmm_(self, one: Any, other: Any) -> Pair:
        return self._matmul_(one, other, by=_aten.bmm.default)

    def _outer_(self, one: Any, other: Any) -> Pair:
        columns = tuple(
            part if _none(part) else self._emit(_aten.unsqueeze.default, part, 1)
            for part in self._parts(one)
        )
        (a, b), (c, d) = columns, self._parts(other)
        real = self._binary("sub", self._binary("mul", a, c), self._binary("mul", b, d))
        imaginary = self._binary("add", self._binary("mul", a, d), self._binary("mul", b, c))
        return self._whole(real, imaginary)

    def _conj_(self, value: Any) -> Pair:
        real, imaginary = self._parts(value)
        return real, self._emit(_aten.neg.default, imaginary)

    _conj_physical_ = _conj_

    def _resolve_conj_(self, value: Any) -> Pair:
        return self._parts(value)

    _resolve_neg_ = _resolve_conj_

    def _exp_(self, value: Any) -> Pair:
        real, imaginary = self._parts(value)
        return self._polar_(self._emit(_aten.exp.default, real), imaginary)

    def _abs_(self, value: Any) -> Any:
        squares = [self._binary("mul", part, part) for part in self._parts(value)]
        return self._emit(_aten.sqrt.default, self._binary("add", *squares))

    def _angle_(self, value: Any) -> Any:
        real, imaginary = self._parts(value)
        return self._emit(_aten.atan2.default, imaginary, real)

    # Between real and complex.

    def _real_(self, value: Any) -> Any:
        return self._parts(value)[0]

    def _imag_(self, value: Any) -> Any:
        return self._parts(value)[1]

    def _view_as_real_(self, value: Any) -> Any:
        return self._emit(_aten.stack.default, list(self._parts(value)), -1)

    _view_as_real_copy_ = _view_as_real_

    def _view_as_complex_(self, value: Any) -> Pair:
        return self._parts_of_real(value)

    _view_as_complex_copy_ = _view_as_complex_

    def _complex_(self, real: Any, imaginary: Any) -> Pair:
        return real, imaginary

    def _polar_(self, size: Any, angle: Any) -> Pair:
        cos, sin = (self._emit(turn, angle) for turn in (_aten.cos.default, _aten.sin.default))
        return self._binary("mul", size, cos), self._binary("mul", size, sin)


def _none(part: Any) -> bool:
    return not isinstance(part, fx.Node) and part == 0


def _value_of(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
