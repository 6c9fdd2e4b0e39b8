"""Options shared by commands."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rope_export.errors import BadInputError

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


def speaking_of_options(names: dict[str, str]) -> Callable[[F], F]:
    """Let a command's errors speak of options where the library speaks of parameters.

    Args:
        names: options by parameter.
    """

    def decorated(command: F) -> F:
        @functools.wraps(command)
        def spoken(*args: Any, **kwargs: Any) -> Any:
            try:
                return command(*args, **kwargs)
            except BadInputError as error:
                message = str(error)
                for name, option in names.items():
                    message = re.sub(rf"(?<![\w.'-]){name}(?![\w.'=-])", option, message)
                raise BadInputError(message) from error

        return spoken  # type: ignore[return-value]

    return decorated


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


def target_option(*, auto: bool = False) -> Callable[[F], F]:
    """``--target``, with ``auto`` where lowerings can be raced."""
    raced = " auto times every legal lowering here and keeps the fastest that is proven."
    return click.option(
        "--target",
        type=click.Choice(["ort", "onnx", "primitive", *(["auto"] if auto else [])]),
        default="ort",
        show_default=True,
        help="Operators: onnxruntime's fused ones, standard ONNX opset 23, or opset 18 arithmetic."
        + (raced if auto else ""),
    )


def seed_option(of_what: str) -> Callable[[F], F]:
    """``--seed``."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        help=of_what,
    )


def onnxruntime_option() -> Callable[[F], F]:
    """``--onnxruntime``."""
    return click.option(
        "--onnxruntime",
        default=None,
        metavar="VERSION",
        help="The oldest onnxruntime that is to run the graph, 1.24 say; what needs a later one is "
        "passed over.  [default: the one installed]",
    )


# Not the word alone, which is the name of a package.
ONNXRUNTIME = {"onnxruntime must": "--onnxruntime must"}


def no_validate_option() -> Callable[[F], F]:
    """``--no-validate``."""
    return click.option("--no-validate", is_flag=True, help="Export without running the graph.")


PROVIDERS_OF_AN_EXPORT = (
    "Make the graph for this provider and prove it there; repeatable.  [default: cpu, and proven "
    "on CUDA too where it loads and has the operators]"
)
