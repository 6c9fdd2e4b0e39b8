"""What was found: a line of JSON each, written as it comes, so that a cut loses nothing."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
_SHORT, _LINE = 60, 240
_NOTHING = ("", "None", "[]", "{}", "()", "Counter()")


def said(error: BaseException) -> str:
    """An error in a line; compilers say what matters in one of the first."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " | ".join(lines[:3])[:900]


class Findings:
    """A file of JSON lines, added to by every visit; the terminal has each in short."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def add(self, stage: str, asked: Facts, found: Facts) -> None:
        """Write down what was found, at once."""
        at = round(time.monotonic() - self._start, 1)
        text = json.dumps({"stage": stage, "at": at, "asked": asked, "found": found}, default=str)
        line = json.dumps(json.loads(text, parse_constant=str))  # JSON has no infinite numbers
        what = " ".join(value for value in asked.values() if isinstance(value, str))
        with self._lock:
            with self._file.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(f"{at:6.1f} {stage} {what}: {_in_short(found)}"[:_LINE], flush=True)

    def collect(self, path: Path) -> None:
        """Write all of them as one document."""
        lines = [json.loads(line) for line in self._file.read_text().splitlines()]
        machine: Facts = next((line["found"] for line in lines if line["stage"] == "machine"), {})
        document = {
            "benchmark": "visit",
            "date": machine.get("date"),
            "machine": machine,
            "findings": [line for line in lines if line["stage"] != "machine"],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def _in_short(found: Facts) -> str:
    texts = []
    for name, value in found.items():
        text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
        if text not in _NOTHING and (isinstance(value, str) or len(text) < _SHORT):
            texts.append(f"{name} {text}")
    return ", ".join(texts)
