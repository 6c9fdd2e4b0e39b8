"""The README's table of families: ``python -m rope_export.pretrained.families_table``."""

from __future__ import annotations

from dataclasses import fields

from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.family import Family

_USUAL = {field.name: field.default for field in fields(Family)}
_HAS = {
    "window": "sliding window",
    "norm": "norm of queries and keys",
    "softcap": "soft cap",
    "sinks": "sinks",
    "scale": "scale",
    "rotates": "layers without RoPE",
    "qkv_bias": "biases",
}


def table() -> str:
    """Render the table as Markdown, families that differ in name alone on one row."""
    lines = [
        "| `model_type` | models | queries, keys, values | pairing | may have |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        rows.setdefault(_cells(family), []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {cells} |" for cells, names in rows.items()]
    return "\n".join(lines) + "\n"


def _cells(family: Family) -> str:
    names = family.tensors
    if family.latent is not _USUAL["latent"]:
        projections = "latents (MLA)"
    elif names.qkv is not None:
        projections = f"`{names.qkv}`, {names.order}"
    else:
        projections = ", ".join(f"`{name}`" for name in (names.q, names.k, names.v))
    has = [text for field, text in _HAS.items() if getattr(family, field) != _USUAL[field]]
    if not family.causal:
        has.append("sees both ways")
    return f"{family.models} | {projections} | {family.layout} | {', '.join(has)}"


if __name__ == "__main__":
    print(table(), end="")
