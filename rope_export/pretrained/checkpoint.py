"""`Checkpoint`: a local Hugging Face folder, of which only what is asked for is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rope_export.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MOST_JSON = 1 << 28


class Checkpoint:
    """A folder with ``config.json`` and safetensors, single or sharded.

    Attributes:
        path: the folder.
        config: content of ``config.json``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._file_of: dict[str, Path] | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Which file holds each tensor; of a sharded checkpoint, as its index says.

        Raises:
            BadInputError: there are no safetensors, or the index or a file is broken.
        """
        if self._file_of is None:
            self._file_of = self._find()
        return self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing of it is read."""
        with self._opened(name, "numpy") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors call it (``"F32"``, ``"BF16"``, ``"I8"``, …)."""
        with self._opened(name, "numpy") as file:
            return str(file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """One tensor, copied out of its file."""
        with self._opened(name, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    @contextmanager
    def _opened(self, name: str, framework: str) -> Iterator[Any]:
        path = self.files[name]
        with _open(path, framework) as file:
            try:
                yield file
            except SafetensorError as error:
                raise BadInputError(f"{path}: tensor {name!r}: {error}") from None

    def _find(self) -> dict[str, Path]:
        index = self.path / _INDEX
        if index.exists():
            return self._indexed(index)
        single = self.path / _SINGLE
        files = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            pickled = next((f for p in _PICKLED for f in sorted(self.path.glob(p))), None)
            if pickled is not None:
                raise BadInputError(
                    f"{pickled}: pickled weights can run any code when loaded and are not read; "
                    "convert them with transformers' save_pretrained() or "
                    "safetensors.torch.save_file()"
                )
            raise BadInputError(f"{self.path}: holds no safetensors")
        found: dict[str, Path] = {}
        for path in files:
            with _open(path, "numpy") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def _indexed(self, index: Path) -> dict[str, Path]:
        content = _read_json(index)
        names = content.get("weight_map")
        if not isinstance(names, dict):
            raise BadInputError(f"{index}: has no 'weight_map' object")
        for name, file in names.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise BadInputError(
                    f"{index}: weight_map must name files of this folder, got {file!r} for {name!r}"
                )
        return {name: self.path / file for name, file in names.items()}


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint's folder.

    Raises:
        BadInputError: the folder or file is missing, or is no JSON object.
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise BadInputError(
            f"{path}: {what}; a local checkpoint is a folder with {CONFIG} and safetensors"
        )
    return _read_json(path / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON:
            raise BadInputError(f"{path}: {path.stat().st_size:,} bytes are no configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the folder before ``config.json`` in errors."""
    try:
        yield
    except BadInputError as error:
        if not str(error).startswith(CONFIG):
            raise
        raise BadInputError(f"{path}/{error}") from None


@contextmanager
def _open(path: Path, framework: str) -> Iterator[Any]:
    if not path.exists():
        raise BadInputError(f"{path}: missing, though {_INDEX} names it")
    try:
        opened = safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{path}: not a whole safetensors file: {error}") from None
    with opened as file:
        yield file
