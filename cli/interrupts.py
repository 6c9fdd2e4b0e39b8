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
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
MESSAGE = "interrupted; nothing was written"


class StoppedError(BaseException):
    """A signal reached the main thread; like KeyboardInterrupt, no ordinary handler stops it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@contextmanager
def clean_interrupts() -> Iterator[None]:
    """Make SIGINT and SIGTERM remove what is half written and end the process.

    Raises:
        StoppedError: when the main thread gets to the signal in time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[StoppedError] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        heard.append(StoppedError(signum))
        raise heard[-1]

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(read_end, finished), daemon=True)
    # A signal that whoever started us wants ignored (nohup, a background job) stays ignored.
    watched = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in watched}
    earlier_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    except Exception as error:
        if heard:  # a library turned the interruption into an error of its own
            raise heard[0] from error
        raise
    finally:
        finished.set()
        signal.set_wakeup_fd(earlier_fd)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(write_end)  # ends the watcher's read


def _watch(read_end: int, finished: threading.Event) -> None:
    while message := os.read(read_end, 1):
        if message[0] not in _SIGNALS:
            continue
        if not finished.wait(_PATIENCE_SECONDS):
            from rope_export.artifacts import folder

            folder.discard_unfinished()
            click.echo(f"rope-export: error: {MESSAGE}", err=True)
            os._exit(128 + message[0])
    os.close(read_end)
