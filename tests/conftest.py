"""Shared fixtures: the command line in a process of its own, and one exported block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import mutants
import pytest

from rope_export import ExportResult, export

COMMAND = [sys.executable, "-c", "from rope_export._cli import run; run()"]
SMALL = ("--hidden", "64", "--heads", "4", "--kv-heads", "2", "--seq", "48")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Run ``rope-export`` in an empty folder of its own."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run([*COMMAND, *arguments], check=False, **options)

    return run


@pytest.fixture(scope="session")
def artifact_of_block(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A small proven artifact; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("session") / "block"
    return export(mutants.block(), folder, validate=True)
