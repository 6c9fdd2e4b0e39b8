"""Stopping promptly and cleanly on SIGINT and SIGTERM, even inside a long kernel."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

# Python's own handlers wait until a native call returns, which may take minutes. A watcher
# thread hears of the signal at once, gives the main thread this long, then cleans up for it.
_PATIENCE_SECONDS = 2.0


@contextmanager
def clean_interrupts() -> Iterator[None]:
    """Make SIGINT and SIGTERM remove what is half written and end the process.

    Raises:
        KeyboardInterrupt: on SIGINT, when the main thread gets to it in time.
        SystemExit: on SIGTERM, likewise, with code 143.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + signum)

    heard, told = os.pipe()
    os.set_blocking(told, False)
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(heard, finished), daemon=True)
    before = signal.signal(signal.SIGTERM, terminate)
    earlier_fd = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(earlier_fd)
        signal.signal(signal.SIGTERM, before)
        os.close(told)  # ends the watcher's read


def _watch(heard: int, finished: threading.Event) -> None:
    while message := os.read(heard, 1):
        if message[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if not finished.wait(_PATIENCE_SECONDS):
            from rope_export import artifact

            artifact.discard_unfinished()
            click.echo("rope-export: error: interrupted; nothing was written", err=True)
            os._exit(128 + message[0])
    os.close(heard)
