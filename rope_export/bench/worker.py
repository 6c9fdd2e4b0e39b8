"""The process of one contender: it says when it is ready, then runs a step for every line it reads.

Run as ``python -m rope_export.bench.worker JOB``, JOB being the JSON of a `turns.Job`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil

from rope_export.bench.turns import Job, Step

# Threads of the contender before go on spinning for a while, in wait of more.
_REST_SECONDS = 0.05
_SHORT_SECONDS = 0.02
_WARM_STEPS = 2


def main() -> None:
    """Serve one job; standard output belongs to the protocol, whatever libraries print."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(sys.argv[1]))
    try:
        step = _step(job)
        _say(answers, {})
        for line in sys.stdin:
            _say(answers, _seconds(step) if line == "again\n" else _first(step, Path(line[:-1])))
    except Exception as error:
        text = str(error).strip().splitlines()
        _say(answers, {"failed": f"{type(error).__name__}: {text[0] if text else ''}"[:400]})


def _step(job: Job) -> Step:
    from rope_export.bench import limits, steps

    name, folder = job.contender, Path(job.folder)
    if name in limits.STEPS:
        return limits.STEPS[name](job)
    if name in steps.STEPS:
        return steps.STEPS[name](job)
    if any((folder / each / "config.json").exists() for each in (name, f"{name}-cache")):
        return steps.STEPS[steps.GIVEN](job)  # a graph that was given under a name of its own
    from rope_export.bench import peers  # which, unlike graphs, needs PyTorch

    return peers.STEPS[name](job)


def _first(step: Step, file: Path) -> dict[str, Any]:
    on_device = step.device_memory() if step.device_memory is not None else 0
    if step.before is not None:
        step.before()
    before, peak = _memory_counted_anew()
    result = step.run()
    extra = step.device_memory() - on_device if step.device_memory is not None else peak() - before
    np.save(file, np.asarray(step.answer(result), dtype=np.float64))
    return {"peak": max(0, extra)}


def _seconds(step: Step) -> dict[str, Any]:
    """One step among others of its kind: short ones find threads awake and caches warm."""
    time.sleep(_REST_SECONDS)
    for turn in range(_WARM_STEPS + 1):
        if step.before is not None:
            step.before()
        start = time.perf_counter()
        step.run()
        taken = time.perf_counter() - start
        if turn == 0 and taken > _SHORT_SECONDS:
            break
    return {"seconds": taken}


def _memory_counted_anew() -> tuple[int, Any]:
    """Resident bytes now, and a function that gives their peak since."""
    process = psutil.Process()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux: what is still held after the step
        return process.memory_info().rss, lambda: process.memory_info().rss
    return process.memory_info().rss, _peak_resident


def _peak_resident() -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
