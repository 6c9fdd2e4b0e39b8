"""The command line of rope-export: parse, call the library, print, choose the exit code."""

from .main import run as run
