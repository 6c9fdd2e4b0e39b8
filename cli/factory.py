"""``FILE.py:FACTORY`` or ``package.module:FACTORY``: running the user's own code, and only that."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from rope_export.errors import BadInputError, RopeExportError

_STDOUT, _STDERR = 1, 2
_KEYS = ("module", "args", "kwargs", "dynamic_shapes", "inputs", "output_names")
_WANTED = (
    "(module, example inputs), (module, example inputs, dynamic shapes), or a mapping with "
    f"{', '.join(_KEYS)}"
)


@contextmanager
def spoken_apart() -> Iterator[None]:
    """Send what the user's code, and what that runs, prints to stderr: stdout is for the result."""
    if sys.stdout is not None:
        sys.stdout.flush()
    kept: int | None
    try:
        kept = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)
    except OSError:  # one of the two is closed
        kept = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        if kept is not None:
            os.dup2(kept, _STDOUT)
            os.close(kept)


def request_of(name: str) -> dict[str, Any]:
    """Call a factory and return what `export` is to be given.

    Args:
        name: ``FILE.py:FACTORY`` or ``package.module:FACTORY``; the factory takes no arguments.

    Returns:
        ``module`` and ``args``, ``kwargs``, ``dynamic_shapes``, … as it gave them.

    Raises:
        BadInputError: there is no such factory, it raises, or returns something else.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise BadInputError(
            f"{name}: must be FILE.py:FACTORY or package.module:FACTORY, the name of a function "
            "after the colon"
        )
    module = _module(where, name)
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            known = [
                key
                for key, value in vars(module).items()
                if callable(value)
                and not key.startswith("_")
                and getattr(value, "__module__", "") == module.__name__
            ]
            has = f"it has {', '.join(known)}" if known else "it has no functions"
            raise BadInputError(f"{where}: has no {attribute!r}; {has}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise BadInputError(
            f"{name}: must be a function without arguments, got {type(factory).__name__}"
        )
    _check_no_arguments(name, factory)
    return _request(name, _guarded(name, factory))


def name_of(factory: str) -> str:
    """Of the factory's file or module, without folders, packages and ``.py``."""
    where = factory.rpartition(":")[0]
    return Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]


def _check_no_arguments(name: str, factory: Any) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # none is known
        return
    try:
        signature.bind()
    except TypeError as error:
        raise BadInputError(f"{name}: must be a function without arguments: {error}") from None


def _module(where: str, name: str) -> ModuleType:
    path = Path(where)
    named = all(part.isidentifier() for part in where.split("."))
    if named and path.suffix != ".py" and not path.is_file():
        sys.path.insert(0, str(Path.cwd()))
        imported: ModuleType = _guarded(name, lambda: importlib.import_module(where))
        return imported
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise BadInputError(f"{where}: {what}; give a Python file or package.module")
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` has it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BadInputError(f"{where}: is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    loader = spec.loader
    _guarded(name, lambda: loader.exec_module(module))
    return module


def _guarded(name: str, action: Callable[[], Any]) -> Any:
    """Run the user's code; what it raises becomes one line with theirs in it."""
    try:
        return action()
    except RopeExportError:
        raise
    except (Exception, SystemExit) as error:
        raise BadInputError(f"{name}: {_blamed(error)}{_first_line(error)}") from error


def _blamed(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno} "
    if isinstance(error, ModuleNotFoundError) and _imported_here(error):
        return ""
    from rope_export.exporting.blame import blamed

    return f"{blamed(error)} "


def _imported_here(error: BaseException) -> bool:
    """Whether it is the named module itself that is missing."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and "importlib" in frame.tb_frame.f_code.co_filename


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return f"raises {kind}: {text}" if text else f"raises {kind}"


def _request(name: str, returned: Any) -> dict[str, Any]:
    from torch import Tensor, nn

    if isinstance(returned, Mapping):
        unknown = [key for key in returned if key not in _KEYS]
        if unknown:
            raise BadInputError(f"{name}: must return {_WANTED}, got a mapping with {unknown[0]!r}")
        request = dict(returned)
    elif isinstance(returned, tuple | list) and len(returned) in (2, 3):
        module, examples, *shapes = returned
        request = {"module": module}
        if isinstance(examples, Mapping):
            request["kwargs"] = examples
        else:
            request["args"] = (examples,) if isinstance(examples, Tensor) else examples
        if shapes:
            request["dynamic_shapes"] = shapes[0]
    else:
        raise BadInputError(f"{name}: must return {_WANTED}, got {type(returned).__name__}")
    module = request.get("module")
    if not isinstance(module, nn.Module):
        raise BadInputError(
            f"{name}: must return a torch.nn.Module first, got {type(module).__name__}"
        )
    if request.get("args") is None and request.get("kwargs") is None:
        raise BadInputError(f"{name}: must return example inputs with the module, got none")
    return request
