"""``python -m cli``: the command line from a source tree that is not installed."""

from .main import run

run()
