"""The artifact folder: it appears whole or not at all, and needs no PyTorch to be read."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.comparison import Bound, Errors
from rope_export.errors import BadInputError
from rope_export.runtime.layout import CacheLayout
from rope_export.runtime.providers import ENDPOINTS

Array = npt.NDArray[Any]

FORMAT = 3
MODEL, WEIGHTS, CONFIG = "model.onnx", "model.onnx.data", "config.json"
REPORT, REPORT_TEXT = "report.json", "report.md"
VECTORS = "test_data_set_"
_OURS = (MODEL, WEIGHTS, CONFIG, REPORT, REPORT_TEXT)
# Folders being written, with the parents made for them: what an interruption must clear away.
_unfinished: dict[Path, list[Path]] = {}


def check_destination(path: Path) -> None:
    """Check that an artifact can be put at ``path`` without losing anything of the user's.

    Raises:
        BadInputError: it is a file, a folder with other things in it, or cannot be written.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise BadInputError(
            f"{str(path)!r}: is no valid text in this locale; use another name or a UTF-8 locale"
        ) from None
    here = Path.cwd()
    if path.resolve() == here or path.resolve() in here.parents:
        raise BadInputError(f"{path}: is the current folder, or above it; give a folder inside it")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BadInputError(f"{path}: is not a folder; give a new folder or an earlier artifact")
    if path.is_dir():
        foreign = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.name not in _OURS and not entry.name.startswith(VECTORS)
        )
        if foreign:
            raise BadInputError(
                f"{path}: holds {foreign[0]!r}, not part of an artifact, and it would be lost; "
                "give a new folder or an earlier artifact"
            )
    parent = path.resolve().parent
    if (parent / MODEL).exists() and (parent / CONFIG).exists():
        raise BadInputError(f"{path}: {parent} is an artifact itself; give a folder beside it")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BadInputError(f"{path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInputError(f"{path}: {parent} is not writable")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to write into; on success it takes the place of ``path``.

    On any exception, interruption included, the folder is removed and ``path`` is as it was.
    """
    check_destination(path)
    path = path.resolve()
    try:
        made = _make_parents(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=".rope-export.tmp-", dir=path.parent))
    except OSError as error:
        raise BadInputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        folder.chmod(0o777 & ~_umask())
        _unfinished[folder] = made
        yield folder
        _swap_in(folder, path)
    finally:
        discard_unfinished()


def discard_unfinished() -> None:
    """Remove every folder being written, and the parents made for it that are still empty."""
    while _unfinished:
        folder, made = _unfinished.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:  # deepest first
            with suppress(OSError):
                parent.rmdir()


def _make_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap_in(folder: Path, path: Path) -> None:
    """Put ``folder`` at ``path``; what was there ends up at ``folder``, to be removed."""
    if not path.exists():
        folder.rename(path)
        return
    if _exchange(folder, path):
        return
    # No atomic exchange on this platform: two renames, undone if the second fails.
    aside = folder.with_name(folder.name + ".old")
    path.rename(aside)
    try:
        folder.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


@dataclass(frozen=True)
class Vector:
    """A stored test vector.

    Attributes:
        name: what it covers.
        folder: ``test_data_set_K``.
        batch: rows.
        sequence: new tokens.
        past: cached tokens before them.
        bounds: for each graph output, PyTorch's own errors at export and what is tolerated.
        steps: when not empty, the vector is one full pass that is run in several calls: how many
            tokens each row is given in each.
    """

    name: str
    folder: str
    batch: int
    sequence: int
    past: int
    bounds: dict[str, Bound]
    steps: tuple[tuple[int, ...], ...] = ()


def write_vector(
    root: Path, vector: Vector, inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Write one vector in the layout of ONNX's backend tests (``input_K.pb``, ``output_K.pb``)."""
    from onnx import numpy_helper

    folder = root / vector.folder
    folder.mkdir()
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for index, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
            (folder / f"{kind}_{index}.pb").write_bytes(tensor.SerializeToString())


def read_vector(root: Path, vector: Vector) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read one vector: inputs and expected outputs by name.

    Raises:
        BadInputError: a file is not a tensor; the message names it.
    """
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, numpy_helper

    found: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    for kind, arrays in found.items():
        folder = root / vector.folder
        for index in itertools.count():
            file = folder / f"{kind}_{index}.pb"
            if not file.is_file():
                break
            tensor = TensorProto()
            try:
                tensor.ParseFromString(file.read_bytes())
                arrays[tensor.name] = numpy_helper.to_array(tensor)
            except (DecodeError, ValueError, TypeError) as error:
                raise BadInputError(f"{file}: not an ONNX tensor: {error}") from error
    return found["input"], found["output"]


def digests(root: Path, *, contents: bool = True) -> dict[str, str]:
    """SHA-256 of every file below ``root`` but the configuration and the reports, by its path.

    Without ``contents`` the files are only listed.
    """
    left_out = {CONFIG, REPORT, REPORT_TEXT}
    return {
        file.relative_to(root).as_posix(): sha256(file) if contents else ""
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.relative_to(root).as_posix() not in left_out
    }


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON document for people and machines: indented, strict, newline at the end."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file whole: an interrupted write leaves what was there."""
    draft = file.with_name(file.name + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, checked to be the one that was written.

    Attributes:
        path: its folder.
        config: ``config.json``.
        vectors: the stored test vectors.
    """

    path: Path
    config: dict[str, Any]
    vectors: tuple[Vector, ...]

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    @property
    def cache(self) -> CacheLayout | None:
        """How the graph keeps its cache, or None when it has none that a `Decoder` can drive."""
        cache = self.config["graph"]["cache"]
        return None if cache is None else CacheLayout.from_json(cache)

    @classmethod
    def read(cls, path: Path, *, verify: bool) -> Artifact:
        """Read the artifact at ``path``.

        Args:
            path: its folder.
            verify: whether the files must be exactly those written, with the content they had.

        Raises:
            BadInputError: a file is missing, foreign, unreadable or altered; the message names it.
        """
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise BadInputError(f"{path}: {what}; give the folder of an artifact")
        config = _read_json(path / CONFIG)
        try:
            files, vectors = _checked(config)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadInputError(
                f"{path / CONFIG}: not an artifact's configuration: {_what_is_wrong(error)}"
            ) from error
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                raise BadInputError(f"{file}: missing; export the artifact again")
            if verify and sha256(file) != expected:
                raise BadInputError(
                    f"{file}: altered or truncated since it was written (its SHA-256 differs from "
                    f"the one in {CONFIG}); export or copy the artifact again"
                )
        foreign = sorted(set(digests(path, contents=False)) - set(files)) if verify else []
        if foreign:
            raise BadInputError(f"{path / foreign[0]}: not part of the artifact; remove it")
        return cls(path, config, vectors)


_LISTED = re.compile(rf"{MODEL}|{WEIGHTS}|{VECTORS}\d+/(input|output)_\d+\.pb")
# What is read of "graph", and its type.
_GRAPH_FIELDS: dict[str, type] = {
    "target": str,
    "opset": int,
    "ir_version": int,
    "dtype": str,
    "providers": list,
    "runs_on": dict,
    "attention": str,
    "rotation": str,
    "tokens": str,
    "passed_over": list,
    "branches": list,
    "packs_rows": bool,
    "ops": dict,
    "sha256": str,
}


def _checked(config: dict[str, Any]) -> tuple[dict[str, str], tuple[Vector, ...]]:
    """Files and vectors of a configuration in which everything that is read later is in order.

    Raises:
        KeyError, TypeError, ValueError: something is not; the message says what.
    """
    if config["format"] != FORMAT:
        raise ValueError(f"format {config['format']!r}, this version reads {FORMAT}")
    graph = _typed(config, "graph", dict)
    for name, kind in _GRAPH_FIELDS.items():
        _typed(graph, name, kind)
    for provider in [*graph["providers"], *graph["runs_on"]]:
        if provider not in ENDPOINTS:
            raise ValueError(f"unknown provider {provider!r}")
    if not graph["providers"]:
        raise ValueError("no providers")
    if graph["cache"] is not None:
        CacheLayout.from_json(graph["cache"])
    if graph["padding_mask"] is not None:
        _typed(graph, "padding_mask", str)
    kinds = set(_typed(graph, "outputs", dict).values())
    if not kinds <= {"tokens", "cache", "whole"}:
        raise ValueError(f"outputs are {', '.join(sorted(map(str, kinds)))}")
    texts = [*_typed(config, "notes", list), *graph["passed_over"], *graph["branches"]]
    texts += [reason for reason in graph["runs_on"].values() if reason is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("notes and reasons must be texts")
    if not all(type(count) is int for count in graph["ops"].values()):
        raise TypeError("ops must be counts")
    _typed(config, "export", dict)
    files = _typed(config, "files", dict)
    for name, digest in files.items():
        if not _LISTED.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"unexpected file {name!r}")
    if MODEL not in files:
        raise ValueError(f"no {MODEL} among the files")
    vectors = tuple(_vector(entry) for entry in _typed(config, "test_vectors", list))
    for vector in vectors:
        if f"{vector.folder}/input_0.pb" not in files:
            raise ValueError(f"no files of {vector.folder!r}")
    return files, vectors


def _bound(entry: dict[str, Any]) -> Bound:
    errors = {key: Errors(**entry[key]) for key in ("eager", "tolerance")}
    if not isinstance(entry["dtype"], str):
        raise TypeError(f"dtype is {entry['dtype']!r}")
    return Bound(**errors, dtype=entry["dtype"])


def _vector(entry: dict[str, Any]) -> Vector:
    bounds = {str(name): _bound(bound) for name, bound in entry["bounds"].items()}
    steps = tuple(tuple(step) for step in entry.get("steps", ()))
    vector = Vector(**entry | {"bounds": bounds, "steps": steps})
    if not isinstance(vector.name, str) or not re.fullmatch(rf"{VECTORS}\d+", vector.folder):
        raise ValueError(f"unexpected test vector {vector.folder!r}")
    for name, least in (("batch", 1), ("sequence", 1), ("past", 0)):
        value = getattr(vector, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} of {vector.folder} is {value!r}")
    for bound in vector.bounds.values():
        numbers = [*astuple(bound.eager), *astuple(bound.tolerance)]
        positive = (bound.tolerance.rel, bound.tolerance.row)
        if not all(type(n) in (int, float) and 0 <= n < 1e300 for n in numbers) or 0 in positive:
            raise ValueError(f"errors and tolerances of {vector.folder} must be finite, above 0")
    if not vector.bounds:
        raise ValueError(f"{vector.folder} has no bound for an output")
    for step in vector.steps:
        if len(step) != vector.batch or not all(type(n) is int and n >= 0 for n in step):
            raise ValueError(f"steps of {vector.folder} must say how many tokens each row gets")
    if any(sum(row) > vector.sequence for row in zip(*vector.steps, strict=True)):
        raise ValueError(f"steps of {vector.folder} take more tokens than there are")
    return vector


def _typed(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name!r} is {type(value).__name__}, not {kind.__name__}")
    return value


def _what_is_wrong(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{file}: missing; give the folder of an artifact") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content
