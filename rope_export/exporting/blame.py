"""Which line of the caller's own code it was: what a message about a module must say."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rope_export.errors import BadInputError, RopeExportError

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent.parent)


def blamed(error: BaseException) -> str:
    """The last line of the caller's own code that led to ``error``: file, number and text."""
    frames = traceback.extract_tb(error.__traceback__)
    return _own((frame.filename, frame.lineno or 0) for frame in frames) or "the module"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def in_one_line(when: str) -> Iterator[None]:
    """Say of what the caller's code raises which line it was, and when.

    Args:
        when: follows the name of what is raised.

    Raises:
        BadInputError: in place of everything but this package's own errors.
    """
    try:
        yield
    except RopeExportError:
        raise
    except (Exception, SystemExit) as error:
        said = "" if not str(error).strip() else f": {first_line(error)}"
        raise BadInputError(
            f"{blamed(error)} raises {type(error).__name__} {when}{said}"
        ) from error


def running_line(until: str) -> str | None:
    """The line of the caller's own code that is running: file, number and text.

    Args:
        until: the file whose functions run the caller's code; what called those is not looked at.

    Returns:
        the line, or None where nothing of the caller's is running.
    """
    frame = sys._getframe(1)
    frames = []
    while frame is not None and frame.f_code.co_filename != until:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        assert frame.f_back is not None  # something of ``until`` called this
        frame = frame.f_back
    return _own(reversed(frames))


def line_of(node: torch.fx.Node) -> str | None:
    """The line of the caller's own code that a node of a graph came from, or None."""
    return own_line(str(node.meta.get("stack_trace") or ""))


def own_line(stack: str) -> str | None:
    """The line of the caller's own code in a stack as Python prints it, or None."""
    found = re.findall(r'^ *File "(.*)", line (\d+)', stack, re.MULTILINE)
    return _own((file, int(number)) for file, number in found)


def _own(frames: Iterable[tuple[str, int]]) -> str | None:
    """The innermost frame of the caller's own code, else of a package that is not PyTorch's."""
    outside = [
        (file, number)
        for file, number in frames
        if file.endswith(".py") and not any(lib in Path(file).parents for lib in _LIBRARIES)
    ]
    inner = [frame for frame in outside if "site-packages" not in Path(frame[0]).parts]
    for file, number in (inner or outside)[-1:]:
        return f"{file}:{number} `{linecache.getline(file, number).strip()}`"
    return None
