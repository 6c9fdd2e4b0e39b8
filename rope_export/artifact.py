"""The artifact folder: it appears whole or not at all, and needs no PyTorch to be read."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rope_export.comparison import Errors
from rope_export.errors import BadInputError

Array = npt.NDArray[Any]

FORMAT = 1
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
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
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
        eager: PyTorch's own errors on it at export.
        tolerance: what a provider is held to.
    """

    name: str
    folder: str
    batch: int
    sequence: int
    past: int
    eager: Errors
    tolerance: Errors


def write_vector(
    root: Path, vector: Vector, inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Write one vector in the layout of ONNX's backend tests (``input_K.pb``, ``output_K.pb``)."""
    from onnx import numpy_helper

    folder = root / vector.folder
    folder.mkdir()
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for index, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
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
        files = (root / vector.folder).glob(f"{kind}_*.pb")
        for file in sorted(files, key=lambda f: int(f.stem.split("_")[1])):
            tensor = TensorProto()
            try:
                tensor.ParseFromString(file.read_bytes())
                arrays[tensor.name] = numpy_helper.to_array(tensor)
            except (DecodeError, ValueError, TypeError) as error:
                raise BadInputError(f"{file}: not an ONNX tensor: {error}") from error
    return found["input"], found["output"]


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below ``root`` but the configuration and the reports, by its path."""
    left_out = {CONFIG, REPORT, REPORT_TEXT}
    return {
        file.relative_to(root).as_posix(): sha256(file)
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
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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

    @classmethod
    def read(cls, path: Path, *, verify: bool) -> Artifact:
        """Read the artifact at ``path``.

        Args:
            path: its folder.
            verify: whether every file must have the content it was written with.

        Raises:
            BadInputError: a file is missing, unreadable or altered; the message names it.
        """
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise BadInputError(f"{path}: {what}; give the folder of an artifact")
        config = _read_json(path / CONFIG)
        try:
            if config["format"] != FORMAT:
                raise BadInputError(
                    f"{path / CONFIG}: format {config['format']!r}, this version reads {FORMAT}"
                )
            files = dict(config["files"])
            vectors = tuple(
                Vector(**entry | {k: Errors(**entry[k]) for k in ("eager", "tolerance")})
                for entry in config["test_vectors"]
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(
                f"{path / CONFIG}: not an artifact's configuration: {error}"
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
        if MODEL not in files:
            raise BadInputError(f"{path / CONFIG}: lists no {MODEL}")
        return cls(path, config, vectors)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{file}: missing; give the folder of an artifact") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def vector_entry(vector: Vector) -> dict[str, Any]:
    """A vector as ``config.json`` lists it."""
    return asdict(vector)
