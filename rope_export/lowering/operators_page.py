"""The operators' table of the documentation, made from the rules themselves.

python -m rope_export.lowering.operators_page > docs/operators.md
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace

from rope_export.artifacts.targets import TARGETS
from rope_export.errors import BadInputError
from rope_export.inspection import since
from rope_export.lowering import rules
from rope_export.lowering.choice import Choice, choose
from rope_export.lowering.kernels import DIFFERENCES
from rope_export.lowering.rules import Form
from rope_export.lowering.situation import PLAIN

_FEATURES: dict[str, dict[str, object]] = {
    "causal, grouped heads": {},
    "`--cache`": {"cache": True, "mask": True},
    "`--cache --padding left`": {"cache": True, "mask": True, "padding": "left"},
    "`--cache --cache-dtype int8`, `int4`": {"cache": True, "mask": True, "cache_bits": 8},
    "`--attention-mask`": {"mask": True},
    "`--position-ids`": {"implied_positions": False},
    "`--window 512`": {"window": 512},
    "`--window 512 --cache`": {"window": 512, "cache": True, "mask": True},
    "`--window 512 --cache window`": {
        "window": 512,
        "cache": True,
        "mask": True,
        "window_cache": True,
        "slots": 512,
    },
    "`--softcap`": {"softcap": True},
    "`--sinks`": {"sinks": True},
    "`--sinks --window 512 --cache`": {"sinks": True, "window": 512, "cache": True, "mask": True},
    "xPos, learned or length-following RoPE": {"tabled": False},
    "`--head-dim 40`": {"head_dim": 40, "rotary_dim": 40, "value_head_dim": 40},
    "`--head-dim 20`": {"head_dim": 20, "rotary_dim": 20, "value_head_dim": 20},
    "`--value-head-dim 32`": {"value_head_dim": 32},
    "`--no-causal`": {"causal": False},
    "`--no-causal --attention-mask`": {"causal": False, "mask": True},
    "`--no-causal --window 512`": {"causal": False, "window": 512},
    "`--no-causal --softcap`": {"causal": False, "softcap": True},
}
_COLUMNS = (
    ("cpu", "float32"),
    ("cpu", "float16"),
    ("cuda", "float32"),
    ("cuda", "float16"),
    ("cuda", "bfloat16"),
)
_SHORT = {
    rules.GQA_ROTATING.name: "GQA, rotating",
    rules.GQA.name: "GQA",
    rules.MHA.name: "MHA",
    rules.ATTENTION.name: "Attention",
    rules.ATTENTION_IN_FLOAT32.name: "Attention in float32",
    rules.DECOMPOSED.name: "arithmetic",
    rules.PRIMITIVE.name: "arithmetic",
}
_HEAD = """# Which operators a graph gets, and why

Made from [`rope_export/lowering/rules.py`](../rope_export/lowering/rules.py) by
`python -m rope_export.lowering.operators_page`; a test keeps the two equal. The limits were read in
onnxruntime 1.31's kernels and checked on its CPU provider; how those of CUDA are known is said at
the end.

For a block of 16 heads, 8 key/value heads of width 64 and sequences up to 16384, by target,
provider and dtype. The first form is taken of which every limit holds on every `--provider`; the
numbers are those of the reasons below, why better forms were passed over. `--qk-norm` adds an
RMSNormalization for each of queries and keys and takes Q, K and V from products of their own;
biases, `--scale` and `--layout` change no operator. bfloat16 is not possible on the CPU.
"""
_SEEN = """Nothing here was seen on a GPU. *host*: onnxruntime 1.31's CUDA provider was asked, whose
kernels check types, shapes and attributes before they launch anything; else where it was read.
"""
_OLDER = """\
A graph is made for the onnxruntime that is installed, or for an older one that `--onnxruntime`
names; what needs a later one is passed over. Versions are the oldest of 1.24 to 1.31 that run it
on the CPU and are right."""


def page() -> str:
    """The page as Markdown."""
    reasons: dict[str, int] = {}
    lines = [_HEAD]
    for target in TARGETS:
        lines += [f"## `--target {target}`", ""]
        heads = " | ".join(f"{provider} {dtype}" for provider, dtype in _COLUMNS)
        lines += [f"| | {heads} |", "|---|" + "---|" * len(_COLUMNS)]
        alike: dict[str, list[str]] = {}
        for name, feature in _FEATURES.items():
            cells = [_cell(target, feature, column, reasons) for column in _COLUMNS]
            alike.setdefault(" | ".join(cells), []).append(name)
        lines += [f"| {'<br>'.join(names)} | {row} |" for row, names in alike.items()]
        lines.append("")
    lines += ["## Forms", ""]
    lines += ["| form | attention | rotation | scores in memory |", "|---|---|---|---|"]
    forms = dict.fromkeys(form for forms in rules.FORMS.values() for form in forms)
    lines += [_form(form) for form in forms]
    lines += ["", "## In an older onnxruntime", "", *_OLDER.splitlines(), ""]
    lines += ["| before | target | block | form |", "|---|---|---|---|", *_in_an_older_one(), ""]
    lines += ["| what graphs may have | onnxruntime |", "|---|---|"]
    lines += [f"| {each.what} | {each.version} |" for each in since.OURS]
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## What a graph decides while it runs", ""]
    lines += [f"- {text}" for text in _branches()]
    lines += ["", "## Where CUDA's kernels differ", "", _SEEN]
    lines += ["| | cpu | cuda | so | seen |", "|---|---|---|---|---|"]
    lines += [" ".join(f"| {cell}" for cell in astuple(each)) + " |" for each in DIFFERENCES]
    return "\n".join(lines) + "\n"


def _cell(
    target: str,
    feature: dict[str, object],
    column: tuple[str, str],
    reasons: dict[str, int],
) -> str:
    provider, dtype = column
    situation = replace(PLAIN, **feature, provider=provider, dtype=dtype)  # type: ignore[arg-type]
    try:
        choice = choose(target, [situation])
    except BadInputError:
        (reason, *_) = rules.broken_limits(rules.FORMS[target][-1], [situation])
        return f"not possible ({reasons.setdefault(reason, len(reasons) + 1)})"
    numbers = [reasons.setdefault(reason, len(reasons) + 1) for reason in choice.reasons]
    by_blocks = ", by blocks" if choice.window_block or choice.query_block else ""
    by_blocks += ", by rows" if choice.cut_rows else ""
    noted = f" ({', '.join(map(str, sorted(numbers)))})" if numbers else ""
    return f"{_SHORT[choice.form.name]}{by_blocks}{noted}"


def _in_an_older_one() -> list[str]:
    """What is taken where a limit of an older onnxruntime keeps the better form from being it."""
    limits = {limit for forms in rules.FORMS.values() for form in forms for limit in form.limits}
    versions = {limit.since.version for limit in limits if limit.since is not None}
    alike: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for version in sorted(versions, key=since.parts):
        major, minor = since.parts(version)
        for target, (name, feature), (provider, dtype) in itertools.product(
            TARGETS, _FEATURES.items(), _COLUMNS
        ):
            plain = replace(PLAIN, **feature, provider=provider, dtype=dtype)  # type: ignore[arg-type]
            if rules.broken_limits(rules.FORMS[target][-1], [plain]):
                continue  # not possible, in whatever version
            later, earlier = (
                _SHORT[choose(target, [replace(plain, onnxruntime=number)]).form.name]
                for number in (version, f"{major}.{minor - 1}")
            )
            if later != earlier:
                blocks = alike.setdefault((version, target, later, earlier), {})
                blocks.setdefault(name, []).append(f"{provider} {dtype}")
    lines = []
    for (version, target, later, earlier), blocks in alike.items():
        where = "<br>".join(
            name if len(columns) == len(_COLUMNS) else f"{name} ({', '.join(columns)})"
            for name, columns in blocks.items()
        )
        lines.append(f"| {version} | `{target}` | {where} | {earlier} instead of {later} |")
    return lines


def _form(form: Form) -> str:
    rotation = "inside" if form.rotation is None else f"`{form.rotation.removeprefix('::')}`"
    memory = "on cpu: all pairs of tokens"
    if not form.score_copies(PLAIN):
        capped = replace(PLAIN, softcap=True)
        memory = "on cpu: none"
        if form.score_copies(capped):
            memory += " in float32 without soft cap and sinks, else all pairs of tokens"
    attention = form.attention.removeprefix("::")
    return f"| {_SHORT[form.name]} | `{attention}` | {rotation} | {memory} |"


def _branches() -> list[str]:
    cached = replace(PLAIN, cache=True, mask=True, window=512)
    on_cuda = replace(cached, provider="cuda", dtype="float16")
    by_window = [replace(each, window_cache=True, slots=512) for each in (cached, on_cuda)]
    choices: list[Choice] = [choose("ort", [each]) for each in (cached, on_cuda, *by_window)]
    texts = [text for choice in choices for text in (*choice.branches, *choice.limits)]
    return list(dict.fromkeys(texts))


if __name__ == "__main__":
    print(page(), end="")
