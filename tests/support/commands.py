"""The command line in a process of its own, and the smallest block it exports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

COMMAND = [sys.executable, "-c", "from rope_export._cli import run; run()"]
SMALL = ("--hidden", "64", "--heads", "4", "--kv-heads", "2", "--seq", "48")

Run = Callable[..., subprocess.CompletedProcess[str]]


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]
