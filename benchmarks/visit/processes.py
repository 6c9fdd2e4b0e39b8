"""Jobs in processes of their own: one that dies, or takes too long, takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from visit.findings import Facts, Findings, said

# Of a job that has begun when time is up.
_GRACE_SECONDS = 20.0
_END_SECONDS = 5.0
_TRACE, _TAIL = 1500, 800


@dataclass(frozen=True)
class Job:
    """Something to be found out.

    Attributes:
        stage: that it belongs to.
        act: a function as ``module:name``, which yields what it finds as it finds it.
        options: its arguments.
        limit: seconds it may take.
    """

    stage: str
    act: str
    options: dict[str, Any]
    limit: float = 100.0


class Worker:
    """A process that does one job after another."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._answers, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._log.name, threads))
        self._process.start()
        theirs.close()

    def findings(self, job: Job, until: float) -> Iterator[Facts]:
        """What it finds; that the process ended is a finding, too."""
        try:
            self._answers.send((job.act, job.options))
            while self._answers.poll(max(0.0, until - time.monotonic())):
                found = self._answers.recv()
                if found is None:
                    return
                yield found
        except (EOFError, OSError):
            self._process.join()
            error = f"the process ended with {self._process.exitcode}"
        else:
            self._process.kill()
            self._process.join()
            error = "took too long"
        yield {"error": error, "said": Path(self._log.name).read_text(errors="replace")[-_TAIL:]}

    @property
    def lives(self) -> bool:
        """Whether it can be given another job."""
        return self._process.is_alive()

    def end(self) -> None:
        """Let it end, or stop it."""
        self._answers.close()
        self._process.join(_END_SECONDS)
        self._process.kill()
        self._process.join()
        self._log.close()


def _work(answers: Connection, log: str, threads: int) -> None:
    """Do jobs until there are no more; what native code prints goes into the log."""
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), descriptor)
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            act, options = answers.recv()
        except EOFError:
            return
        start = time.monotonic()
        try:
            for found in pkgutil.resolve_name(act)(**options):
                answers.send({**found, "took": round(time.monotonic() - start, 1)})
        except Exception as error:
            answers.send({"error": said(error), "trace": traceback.format_exc()[-_TRACE:]})
        answers.send(None)


def do(jobs: Sequence[Job], findings: Findings, workers: int, until: float) -> list[Facts]:
    """Do jobs on several processes, and return what they found; none begins after ``until``."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    threads = max(1, (os.cpu_count() or 1) // workers)
    found: list[Facts] = []

    def serve() -> None:
        worker = None
        while time.monotonic() < until:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            worker = worker or Worker(threads)
            limit = min(time.monotonic() + job.limit, until + _GRACE_SECONDS)
            for facts in worker.findings(job, limit):
                findings.add(job.stage, job.options, facts)
                found.append(facts)
            if not worker.lives:
                worker.end()
                worker = None
        if worker is not None:
            worker.end()

    serving = [threading.Thread(target=serve) for _ in range(min(workers, len(jobs)))]
    for thread in serving:
        thread.start()
    for thread in serving:
        thread.join()
    if not waiting.empty():
        findings.add(jobs[0].stage, {}, {"left out for lack of time": waiting.qsize()})
    return found
