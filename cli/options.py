"""Options shared by commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    _JsonType = click.ParamType[dict[str, Any]]
else:  # older releases of click have no type arguments
    _JsonType = click.ParamType


class JsonObject(_JsonType):
    """A JSON object on the command line, or in a file named after ``@``."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Parse, or fail with what was wrong."""
        if isinstance(value, dict):
            return value
        text = str(value)
        try:
            if text.startswith("@"):
                text = Path(text[1:]).read_text(encoding="utf-8")
            content = json.loads(text)
        except OSError as error:
            self.fail(f"{value}: {error.strerror}", param, ctx)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(content, dict):
            self.fail(f"{value!r} is not a JSON object", param, ctx)
        return content


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
