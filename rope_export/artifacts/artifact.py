"""`Artifact`: what was exported, read back and checked; no PyTorch needed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rope_export.artifacts.cache_layout import CacheLayout
from rope_export.artifacts.files import CONFIG, MODEL, VECTORS, WEIGHTS, digests, sha256
from rope_export.artifacts.targets import ENDPOINTS
from rope_export.artifacts.vectors import Vector, vector_from_json
from rope_export.errors import BadInputError

FORMAT = 3


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
    # Of artifacts that do not state it, it is read from the graph.
    if "onnxruntime" in graph and not re.fullmatch(r"\d+\.\d+", _typed(graph, "onnxruntime", str)):
        raise ValueError(f"onnxruntime is {graph['onnxruntime']!r}")
    kinds = set(_typed(graph, "outputs", dict).values())
    if not kinds <= {"tokens", "cache", "whole"}:
        raise ValueError(f"outputs are {', '.join(sorted(map(str, kinds)))}")
    windows = graph.get("windows", {})
    for name, window in windows.items():
        if graph["outputs"].get(name) != "cache" or type(window) is not int or window < 1:
            raise ValueError(f"the window of {name!r} is {window!r}")
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
    vectors = tuple(vector_from_json(entry) for entry in _typed(config, "test_vectors", list))
    for vector in vectors:
        if f"{vector.folder}/input_0.pb" not in files:
            raise ValueError(f"no files of {vector.folder!r}")
    return files, vectors


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
