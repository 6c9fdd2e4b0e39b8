"""`Fields`: a model's configuration while it is read, each field checked where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rope_export.checks import finite_number, positive_integer
from rope_export.errors import BadInputError

# What Hugging Face configurations hold beside the parameters of a RoPE and nothing reads.
_IDLE_ROPE_FIELDS = ("finetuned",)
_SCALED_BY_TRAINED_LENGTH = ("llama3", "yarn", "longrope")
_TEXT = "text_config"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Fields:
    """A ``config.json``, under the field names most families use.

    Attributes:
        content: the configuration.
        spelled: field names of this family where they differ; the first that is there counts.
        defaults: what the family assumes where a field is missing.
        read: names of the fields that were asked for.
    """

    content: Mapping[str, Any]
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def name(self, key: str) -> str:
        """How the configuration spells ``key``."""
        names = self.spelled.get(key, (key,))
        return next((name for name in names if name in self.content), names[0])

    def get(self, key: str, default: Any = None) -> Any:
        """A field as it is, or the family's default, or ``default``."""
        name = self.name(key)
        self.read.update((key, *self.spelled.get(key, ())))
        return self.content[name] if name in self.content else self.defaults.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer above 0.

        Raises:
            BadInputError: it is missing without a default, or something else.
        """
        return self._checked(key, default, positive_integer)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0.

        Raises:
            BadInputError: it is missing without a default, or something else.
        """
        return self._checked(key, default, finite_number)

    def _checked(self, key: str, default: _T | None, check: Callable[[str, object], _T]) -> _T:
        value = self.get(key)
        if value is not None:
            return check(f"config.json: {self.name(key)}", value)
        if default is None:
            raise BadInputError(f"config.json has no {self.name(key)!r}")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is the default.

        Raises:
            BadInputError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadInputError(
                f"config.json: {self.name(key)} must be true or false, got {value!r}"
            )
        return value

    def per_layer(self, key: str) -> list[Any] | None:
        """A list with an entry for each layer, or None.

        Raises:
            BadInputError: it is no list, or has another length.
        """
        value = self.get(key)
        if value is None:
            return None
        layers = self.integer("num_hidden_layers")
        if not isinstance(value, list | tuple) or len(value) != layers:
            got = f"{len(value)}" if isinstance(value, list | tuple) else repr(value)
            raise BadInputError(
                f"config.json: {self.name(key)} must list {layers} entries, one a layer, got {got}"
            )
        return list(value)

    @property
    def rope_scaling(self) -> Any:
        """RoPE parameters as older files have them, or nothing."""
        return self.get("rope_scaling")

    def rope(self, layer_type: str | None = None) -> dict[str, Any]:
        """Parameters of the RoPE in one spelling, with theta, share and trained length filled in.

        Old files have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters``, which
        may hold an object for each type of layer.

        Raises:
            BadInputError: a field has another type, or there is none for ``layer_type``.
        """
        stated = self.rope_scaling or self.get("rope_parameters") or {}
        if not isinstance(stated, Mapping):
            raise BadInputError(f"config.json: RoPE parameters must be an object, got {stated!r}")
        if any(isinstance(value, Mapping) for value in stated.values()):
            if layer_type not in stated:
                raise BadInputError(
                    f"config.json: rope_parameters has no {layer_type!r}, only {', '.join(stated)}"
                )
            stated = stated[layer_type] or {}
        found = {k: v for k, v in stated.items() if k not in _IDLE_ROPE_FIELDS}
        rope_type = found.pop("type", None)
        rope_type = found.pop("rope_type", rope_type) or "default"
        theta = found.get("rope_theta")
        found["rope_theta"] = finite_number(
            f"config.json: {self.name('rope_theta')}",
            self.get("rope_theta", 10000.0) if theta is None else theta,
        )
        found["partial_rotary_factor"] = self._rotated_share(found)
        if rope_type == "su":
            rope_type = "longrope"
        if rope_type in _SCALED_BY_TRAINED_LENGTH:
            trained = self.get("original_max_position_embeddings")
            if trained is None:
                trained = found.get("original_max_position_embeddings")
            if trained is None:
                trained = self.integer("max_position_embeddings")
            found["original_max_position_embeddings"] = trained
        if rope_type in ("longrope", "dynamic"):
            found["max_position_embeddings"] = self.integer("max_position_embeddings")
        if rope_type == "dynamic":
            # The length it was trained on is max_position_embeddings, whatever else is stated.
            found.pop("original_max_position_embeddings", None)
        return {"rope_type": rope_type, **found}

    def _rotated_share(self, found: Mapping[str, Any]) -> float:
        share = found.get("partial_rotary_factor")
        share = self.number("partial_rotary_factor", 1.0) if share is None else share
        share = finite_number(f"config.json: {self.name('partial_rotary_factor')}", share)
        if share > 1:
            raise BadInputError(
                f"config.json: {self.name('partial_rotary_factor')} must be at most 1, got {share}"
            )
        if share != 1 and "partial_rotary_factor" not in self.defaults:
            raise BadInputError(
                "config.json: partial_rotary_factor has no place in this family, which rotates "
                f"whole heads; got {share}"
            )
        return share


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model in that of a multimodal one."""
    inner = config.get(_TEXT)
    if not isinstance(inner, Mapping):
        return config
    shared = {k: v for k, v in config.items() if k in ("dtype", "torch_dtype")}
    outer = config.get("model_type")
    return {**shared, "model_type": outer, **inner}
