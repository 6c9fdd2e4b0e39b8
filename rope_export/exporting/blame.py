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

from rope_export.errors import BadInputError, RopeExportError, first_line

_Frame = tuple[str, int, str]
"""File, number and function."""

_GROWING = ("dynamic_frequency_update", "longrope_frequency_update")
_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent.parent)


def blamed(error: BaseException) -> str:
    """The last line of the caller's own code that led to ``error``: file, number and text."""
    frames = traceback.extract_tb(error.__traceback__)
    return _own((frame.filename, frame.lineno or 0, frame.name) for frame in frames) or "the module"


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
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        assert frame.f_back is not None  # something of ``until`` called this
        frame = frame.f_back
    return _own(reversed(frames))


def line_of(node: torch.fx.Node) -> str | None:
    """The line of the caller's own code that a node of a graph came from, or None."""
    return own_line(str(node.meta.get("stack_trace") or ""))


def own_line(stack: str) -> str | None:
    """The line of the caller's own code in a stack as Python prints it, or None."""
    found = re.findall(r'^ *File "(.*)", line (\d+), in (.*)$', stack, re.MULTILINE)
    return _own((file, int(number), function) for file, number, function in found)


def _own(frames: Iterable[_Frame]) -> str | None:
    """The innermost frame of the caller's own code, else of a package that is not PyTorch's."""
    outside = [
        frame
        for frame in frames
        if frame[0].endswith(".py") and not any(lib in Path(frame[0]).parents for lib in _LIBRARIES)
    ]
    inner = [frame for frame in outside if "site-packages" not in Path(frame[0]).parts]
    for file, number, _ in (inner or outside)[-1:]:
        line = f"{file}:{number} `{linecache.getline(file, number).strip()}`"
        instead = _instead(outside)
        return line if instead is None else f"{line} ({instead})"
    return None


def _instead(frames: Iterable[_Frame]) -> str | None:
    """What this package has in place of code that graphs have always failed in."""
    for file, _, function in frames:
        if "rotary_embedding_torch" in Path(file).parts:
            return (
                "in rotary-embedding-torch, whose tables are left over from earlier calls; "
                "rope_export.replace_rotary_embeddings(model) gives the same numbers without"
            )
        if function in _GROWING and Path(file).name == "modeling_rope_utils.py":
            return (
                "in transformers, whose RoPE of this type changes its frequencies with the length "
                "of each call; rope_export.replace_attention(model) computes them in the graph"
            )
    return None
