"""From a module to an ONNX graph: trace, lower, convert, and check that dynamic axes stayed so."""

from __future__ import annotations

import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import TracerBase

from rope_export.artifacts.targets import OPSETS
from rope_export.dispatch import lowering_to
from rope_export.errors import ExportError, RopeExportError
from rope_export.exporting.complex_numbers import as_pairs_of_real
from rope_export.exporting.factories import SizesStayFree, with_stated_dtypes
from rope_export.exporting.flex import flex_written_out, forget_tables
from rope_export.exporting.guards import fixed_by, written_down
from rope_export.exporting.refusals import refuse_bfloat16, unconvertible, untraceable
from rope_export.exporting.state import assignments_noted, refuse_state
from rope_export.lowering.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch._dynamo",
    "onnx_ir",
    "onnxscript",
)


class NarrowedError(ExportError):
    """An axis that was to be dynamic works with some sizes only.

    Attributes:
        axis: the flat tensor that goes in, its axis, and the one size it works with; or None.
        line: of the module's own code that fixed it: file, number and text; or None.
    """

    def __init__(
        self, message: str, axis: tuple[int, int, int] | None = None, line: str | None = None
    ) -> None:
        super().__init__(message)
        self.axis = axis
        self.line = line


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    target: Target,
    *,
    prefix: str = "",
) -> torch.export.ExportedProgram:
    """Trace ``module`` while its parts lower to ``target``.

    Args:
        module: what is traced.
        args: positional inputs.
        kwargs: inputs by name.
        dynamic_shapes: of `torch.export.export`.
        target: has what its parts lower to, and the providers.
        prefix: of the paths of its parts, not shown in messages.

    Raises:
        NarrowedError: an axis that was to be dynamic came out fixed or narrower.
        BadInputError: the module cannot be traced, draws random numbers, keeps state, or computes
            in a dtype that a provider lacks; the message has its line.
    """
    with (
        quiet_torch(),
        _stderr_on_success(),
        torch.no_grad(),
        lowering_to(target),
        written_down(__file__) as traces,
        assignments_noted(module, __file__) as assigned,
        _whole_stacks(),
        flex_written_out(),
        SizesStayFree(),
    ):
        try:
            program = torch.export.export(
                module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except RopeExportError:
            raise
        except UserError as error:
            if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
                raise untraceable(error) from error
            raise _narrowed(error, traces) from error
        except (Exception, SystemExit) as error:
            raise untraceable(error) from error
    forget_tables(program)
    refuse_state(program, assigned, prefix=prefix)
    if "cpu" in target.providers:
        refuse_bfloat16(program)
    return program


def convert(program: torch.export.ExportedProgram, target: Target) -> ir.Model:
    """Write the traced program in the ONNX operators of ``target``.

    Raises:
        BadInputError: an operator has no ONNX form; the message has the line that uses it.
    """
    with quiet_torch(), torch.no_grad():
        program = as_pairs_of_real(program)
        with_stated_dtypes(program)
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSETS[target.name],
                custom_translation_table=target.translations(),
                optimize=False,
                verbose=False,
            )
        except RopeExportError:
            raise
        except Exception as error:
            raise unconvertible(error) from error
    assert converted is not None  # dynamo=True without a file
    model: ir.Model = converted.model
    return model


def check_ranges(
    program: torch.export.ExportedProgram, asked: dict[str, dict[int, tuple[int, int]]]
) -> None:
    """Check that every axis asked to be dynamic still takes every size asked for.

    Args:
        program: the traced program.
        asked: for every input, in order, the smallest and largest size of every dynamic axis.

    Raises:
        ExportError: an axis came out fixed or with a narrower range.
    """
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    given = dict(zip(asked, nodes[len(nodes) - len(asked) :], strict=True))
    for name, by_axis in asked.items():
        for axis, (least, largest) in by_axis.items():
            size = given[name].meta["val"].shape[axis]
            if not isinstance(size, torch.SymInt):
                raise ExportError(f"axis {axis} of {name} was to be dynamic and came out as {size}")
            served = program.range_constraints[size.node.expr]
            if served.lower > least or served.upper < largest:
                raise ExportError(
                    f"axis {axis} of {name} was to serve {least} … {largest} "
                    f"and came out as {served.lower} … {served.upper}"
                )


def _narrowed(error: UserError, traces: Sequence[ShapeEnv]) -> NarrowedError:
    """What PyTorch says of an axis, and the line of the module's that it does not say."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    detail = next((line for line in lines if line.startswith("You marked")), lines[0])
    source = re.search(r"\w+\[[^\s`]*\.size\(\)\[(\d+)\]", detail)
    line = None
    if source is not None:
        line = next(filter(None, (fixed_by(env, source[0]) for env in traces)), None)
    message = f"torch.export narrowed an axis: {detail}"
    found = re.search(r"\[(\d+)\]\.size\(\)\[(\d+)\].*constant \((\d+)\)", detail)
    if found is None:
        return NarrowedError(f"{message} ({line})" if line else message, None, line)
    index, axis, size = (int(part) for part in found.groups())
    return NarrowedError(message, (index, axis, size), line)


@contextmanager
def _whole_stacks() -> Iterator[None]:
    """Have every node know all the lines it came from, not only those of forward itself."""

    def inside(self: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
        del self
        files = [frame.filename for frame in stack]
        first = len(files) - files[::-1].index(__file__) if __file__ in files else 0
        return traceback.StackSummary.from_list(stack[first:])

    name = "_filter_traceback_frames"
    with mock.patch.object(TracerBase, name, inside, create=True):
        yield


@contextmanager
def _stderr_on_success() -> Iterator[None]:
    """Hold back what is written to stderr: of a failure it is the graph so far, unasked for."""
    held = io.StringIO()
    with redirect_stderr(held):
        yield
    sys.stderr.write(held.getvalue())


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence the exporter's chatter (missing torchvision, deprecations); errors still raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
