"""Contenders in processes of their own that take turns.

A process of its own: none spins its threads under another's feet, and its peak memory is its own.
Turns: a noisy machine is noisy for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Job:
    """What one process does, again and again.

    Attributes:
        contender: its name.
        phase: ``"prefill"``, ``"decode"``, or another kind of step that the contender knows.
        length: tokens of the sequence: all new, or all but the last one in the cache.
        provider: where it runs.
        folder: what was prepared for it.
    """

    contender: str
    phase: str
    length: int
    provider: str
    folder: str


@dataclass(frozen=True)
class Step:
    """What a process runs.

    Attributes:
        run: one step; returns when the result is there.
        answer: what a step gave, of the last tokens, ``[batch, tokens, width]``.
        device_memory: bytes taken on the device so far, where that is not the process's memory.
        kept: what must live as long as the step.
        before: what makes the next step the same, outside of what is timed.
    """

    run: Callable[[], object]
    answer: Callable[[object], Array]
    device_memory: Callable[[], int] | None = None
    kept: object = None
    before: Callable[[], None] | None = None


class TurnError(Exception):
    """A contender could not run; the message says why."""


class Contender:
    """A process that runs one step whenever it is told to."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rope_export.bench.worker", json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def loaded(self) -> None:
        """Wait until it is ready to run.

        Raises:
            TurnError: it cannot be made ready here.
        """
        self._ask("")

    def first(self) -> tuple[int, Array]:
        """Run the first step: peak extra bytes, and what it gave of the last tokens.

        Raises:
            TurnError: it does not run.
        """
        file = Path(self._folder.name) / "answer.npy"
        answer = self._ask(str(file))
        array: Array = np.load(file)
        return int(answer["peak"]), array

    def seconds(self) -> float:
        """Run a step and return what it took.

        Raises:
            TurnError: it does not run.
        """
        return float(self._ask("again")["seconds"])

    def _ask(self, question: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if question:
                process.stdin.write(question + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            said = self._errors.read_text(errors="replace").strip().splitlines()
            killed = process.returncode < 0
            why = f"killed by signal {-process.returncode} (out of memory?)" if killed else ""
            raise TurnError(why or (said[-1] if said else f"exit code {process.returncode}"))
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise TurnError(str(answer["failed"]))
        return answer


def at_a_time() -> int:
    """Processes that are made ready at once."""
    return max(1, (os.cpu_count() or 1) // 2)
