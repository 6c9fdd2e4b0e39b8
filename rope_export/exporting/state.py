"""What a traced module must not do: keep something for its next call, draw random numbers.

A graph computes from its inputs alone. That a module keeps a table, or counts its calls for
somebody else, is no harm; what a result is computed from must not be what an earlier call left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot

from rope_export.errors import BadInputError
from rope_export.exporting.blame import line_of, running_line

# They give something of the size of what they are given, not its numbers.
_SIZES_ONLY = ("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "new_")
_COPIES = ("to", "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh")
_SWITCHES = ("train", "training", "dropout_p", "dropout", "p")

Assigned = dict[str, str]
"""By the path of an attribute, the line that assigned it."""


@contextmanager
def assignments_noted(module: nn.Module, until: str) -> Iterator[Assigned]:
    """Note which attributes of a module and its parts are assigned while the context lasts.

    Args:
        module: whose parts.
        until: the file that runs it; what called it is not looked at.
    """
    assign = nn.Module.__setattr__
    paths = {id(part): f"{path}." if path else "" for path, part in module.named_modules()}
    noted: Assigned = {}

    def noting(self: nn.Module, name: str, value: Any) -> None:
        path = paths.get(id(self))
        kept = path is None or _is_kept(vars(self).get(name), value)
        line = None if kept else running_line(until)
        if line is not None:
            noted.setdefault(f"{path}{name}", line)
        assign(self, name, value)

    with mock.patch.object(nn.Module, "__setattr__", noting):
        yield noted


def refuse_state(
    program: torch.export.ExportedProgram, assigned: Mapping[str, str], *, prefix: str = ""
) -> None:
    """Check that what a program gives follows from its inputs alone.

    Args:
        program: as traced, before operators that write in place are replaced.
        assigned: attributes that its module assigned.
        prefix: of their paths, not shown.

    Raises:
        BadInputError: a result is computed from random numbers, or from a buffer or attribute that
            the call changes.
    """
    signature = program.graph_signature
    states = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    flow = _Flow({node: path for node, path in states.items() if node is not None})
    results: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "output":
            for result in node.all_input_nodes:
                results |= flow.origins(result)
        else:
            flow.follow(node)
    for drawn, line in flow.random.items():
        if drawn in results:
            raise BadInputError(
                f"{line} draws random numbers: a module must give the same numbers for the same "
                "inputs (look for dropout that is always on); take noise as an input"
            )
    changed = {**assigned, **flow.written}
    for path, line in changed.items():
        if path in results:
            name = path.removeprefix(prefix)
            raise BadInputError(
                f"{line} changes {name}, from which results are computed: a graph keeps nothing "
                f"from one call to the next; take {name} as an argument and return what becomes "
                "of it (a cache as a list of (key, value) pairs, torch.cat of past and new)"
            )


class _Flow:
    """Which buffers, attributes and random numbers reach which node.

    Args:
        states: by placeholder, the path of a buffer or attribute.

    Attributes:
        written: by path, the line that first wrote in place.
        random: by name of a node that draws, its line.
    """

    def __init__(self, states: Mapping[str, str]) -> None:
        self._states = states
        self._origins: dict[fx.Node, set[str]] = {}
        self._storage: dict[fx.Node, str] = {}  # the path of what a node is a view of
        self._content: dict[str, set[str]] = {path: {path} for path in states.values()}
        self.written: dict[str, str] = {}
        self.random: dict[str, str] = {}

    def origins(self, node: fx.Node) -> set[str]:
        """Paths, and names of random nodes, whose numbers a node's come from."""
        of_storage = self._storage.get(node)
        if of_storage is not None:
            return self._content[of_storage]
        return self._origins.get(node, set())

    def follow(self, node: fx.Node) -> None:
        """Take in the next node of a graph."""
        if node.op == "placeholder":
            if node.name in self._states:
                self._storage[node] = self._states[node.name]
            return
        found: set[str] = set()
        for each in node.all_input_nodes:
            found |= self.origins(each)
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            self._origins[node] = found
            return
        name = target._schema.name.partition("::")[2]
        if name.startswith(_SIZES_ONLY):
            self._origins[node] = set()
            return
        if torch.Tag.nondeterministic_seeded in target.tags and _draws(node, target):
            self.random[node.name] = line_of(node) or f"the module, by aten.{name},"
            found = {*found, node.name}
        self._origins[node] = found
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        held = None if first is None else self._storage.get(first)
        if held is None or first is None:
            if first is not None and _writes(target):
                self._origins[first] = found
            return
        if _writes(target):
            whole = name == "copy_" and first.op == "placeholder"
            source = node.args[1] if whole and len(node.args) > 1 else None
            if isinstance(source, fx.Node) and _uncast(source) is first:  # its own numbers
                self._storage[node] = held
                return
            now = self.origins(source) if isinstance(source, fx.Node) else found
            self._content[held] = set(now)
            self.written.setdefault(held, line_of(node) or "the module")
        if _writes(target) or _views(target):
            self._storage[node] = held


def _is_kept(before: Any, after: Any) -> bool:
    """Whether what an attribute is assigned is what it was, on whatever device."""
    if before is after:
        return True
    mode = get_innermost_proxy_mode()
    if mode is None or not isinstance(after, Tensor):
        return False
    slot = get_proxy_slot(after, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    return isinstance(node, fx.Node) and _uncast(node).op != "call_function"


def _uncast(node: fx.Node) -> fx.Node:
    """What a node is a copy of, in whatever dtype and on whatever device."""
    while isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2]
        if name not in _COPIES or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def _writes(target: torch._ops.OpOverload) -> bool:
    alias = target._schema.arguments[0].alias_info if target._schema.arguments else None
    return alias is not None and alias.is_write


def _views(target: torch._ops.OpOverload) -> bool:
    alias = target._schema.arguments[0].alias_info if target._schema.arguments else None
    return alias is not None


def _draws(node: fx.Node, target: torch._ops.OpOverload) -> bool:
    """Whether an operator that can draw random numbers is not told to draw none."""
    for index, argument in enumerate(target._schema.arguments):
        if argument.name in _SWITCHES:
            given = node.args[index] if index < len(node.args) else argument.default_value
            given = node.kwargs.get(argument.name, given)
            if given is False or (isinstance(given, int | float) and given == 0):
                return False
    return True
