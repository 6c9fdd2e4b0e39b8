"""The command group, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys

import click

import rope_export
from rope_export.errors import BadInputError, ExportError, ProviderUnavailableError

from . import show
from .bench import bench
from .block import block
from .doctor import doctor
from .inspect import inspect
from .interrupts import MESSAGE, StoppedError, clean_interrupts
from .module import module
from .validate import validate

_BAD_INPUT, _UNAVAILABLE, _FAILED = 2, 3, 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(rope_export.__version__, message="rope-export %(version)s")
def main() -> None:
    """Attention with rotary positions: from PyTorch to onnxruntime, with proof.

    \b
    Exit codes: 0 exported and proven, 1 a comparison failed, 2 bad usage or input,
    3 a provider asked for by name cannot be used here, or doctor found a problem.
    """


main.add_command(bench)
main.add_command(block)
main.add_command(doctor)
main.add_command(inspect)
main.add_command(module)
main.add_command(validate)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        with clean_interrupts():
            code = main.main(arguments, prog_name="rope-export", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = _BAD_INPUT
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "rope-export"
        _say(f"{error.format_message()} (see {command} --help)")
        code = _BAD_INPUT
    except click.ClickException as error:
        _say(error.format_message())
        code = _BAD_INPUT
    except show.ReaderGoneError:  # nothing more to say to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except show.OutputError as error:
        _say(str(error))
        code = _BAD_INPUT
    except StoppedError as stopped:
        _say(MESSAGE)
        code = stopped.exit_code
    except ProviderUnavailableError as error:
        _say(str(error))
        code = _UNAVAILABLE
    except ExportError as error:
        _say(str(error))
        code = _FAILED
    except BadInputError as error:
        _say(str(error))
        code = _BAD_INPUT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}; nothing was written")
        code = _BAD_INPUT
    sys.exit(code)


def _say(message: str) -> None:
    click.echo(f"rope-export: error: {' '.join(message.split())}", err=True)
