"""From a module to an ONNX graph: trace, lower, convert, and check that dynamic axes stayed so."""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from rope_export.artifacts.targets import OPSETS
from rope_export.dispatch import lowering_to
from rope_export.errors import BadInputError, ExportError, RopeExportError
from rope_export.lowering.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "torch._dynamo")
_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent.parent)


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    target: Target,
) -> torch.export.ExportedProgram:
    """Trace ``module`` while its parts lower to ``target``.

    Raises:
        ExportError: an axis that was to be dynamic came out fixed or narrower.
        BadInputError: the module cannot be traced; the message has its line.
    """
    with quiet_torch(), _stderr_on_success(), torch.no_grad(), lowering_to(target):
        try:
            return torch.export.export(
                module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except RopeExportError:
            raise
        except GuardOnDataDependentSymNode as error:
            raise BadInputError(
                f"{blamed(error)} depends on the values of a tensor, which a graph cannot follow: "
                "use torch.where, torch.cond or a mask instead of Python's if, int() and slices "
                "by computed lengths"
            ) from error
        except UserError as error:
            lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
            detail = next((line for line in lines if line.startswith("You marked")), lines[0])
            raise ExportError(f"torch.export narrowed an axis: {detail}") from error
        except Exception as error:
            raise BadInputError(
                f"{blamed(error)} cannot be traced by torch.export: {_first_line(error)}"
            ) from error


def convert(program: torch.export.ExportedProgram, target: str) -> ir.Model:
    """Write the traced program in ONNX operators.

    Raises:
        BadInputError: an operator has no ONNX form; the message has the line that uses it.
    """
    from torch.onnx._internal.exporter._errors import ConversionError

    with quiet_torch(), torch.no_grad():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSETS[target],
                optimize=False,
                verbose=False,
            )
        except ConversionError as error:
            raise BadInputError(_unconvertible(program, error)) from error
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


def blamed(error: BaseException) -> str:
    """The last line of the caller's own code that led to ``error``: file, number and text."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(".py")
        and not any(library in Path(frame.filename).parents for library in _LIBRARIES)
    ]
    inner = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    chosen = (inner or frames)[-1:]
    return "".join(f"{f.filename}:{f.lineno} `{f.line}`" for f in chosen) or "the module"


def _unconvertible(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Which operators have no ONNX form, and where they are used."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    what = _first_line(reason)
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and repr(target) in str(reason):
            name = target.name().replace("::", ".")
            lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
            where = f", used by `{lines[-1].strip()}`" if lines else ""
            at = f" ({lines[-2].strip()})" if len(lines) > 1 else ""
            return f"{name}{where}{at} has no form in ONNX; write it with other operators"
    return f"the module cannot be written in ONNX: {what}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
