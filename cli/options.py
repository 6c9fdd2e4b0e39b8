"""Options shared by commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def provider_option(help_text: str) -> Callable[[F], F]:
    """``--provider``, repeatable."""
    return click.option(
        "--provider",
        "providers",
        type=click.Choice(["cpu", "cuda"]),
        multiple=True,
        help=help_text,
    )


def json_option() -> Callable[[F], F]:
    """``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the report as one JSON document on stdout."
    )
