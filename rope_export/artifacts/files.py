"""The files of an artifact: their names, digests, and how text is written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MODEL, WEIGHTS, CONFIG = "model.onnx", "model.onnx.data", "config.json"
REPORT, REPORT_TEXT = "report.json", "report.md"
VECTORS = "test_data_set_"
OURS = (MODEL, WEIGHTS, CONFIG, REPORT, REPORT_TEXT)


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
