"""``rope-export inspect``: what a model, artifact or checkpoint will do, without running it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import show
from .options import json_option

if TYPE_CHECKING:
    from rope_export.inspection.angle_sources import Angles
    from rope_export.inspection.attention_patterns import AttentionUse
    from rope_export.inspection.files import ExternalFile
    from rope_export.inspection.report import ModelReport
    from rope_export.inspection.rope_patterns import Rotation

Row = tuple[str, str]
_NODES_SHOWN = 3
_OPERATORS_SHOWN = 6
_CONFIG, _REPORT = "config.json", "report.json"


@click.command(
    epilog="""\b
Examples:
  rope-export inspect model.onnx
  rope-export inspect exported/block --json
  rope-export inspect ~/checkpoints/Llama-3.2-1B"""
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--family",
    default=None,
    metavar="NAME",
    help="Read a checkpoint as this model_type instead of its own.",
)
@json_option()
def inspect(path: Path, family: str | None, as_json: bool) -> None:
    """Say how the ONNX file, artifact or checkpoint folder PATH does RoPE and attention.

    Of graphs: operators, rotation, positions served, where a score for every pair of tokens is in
    memory, cache and files, and the onnxruntime they need. Of checkpoints: each layer's attention.
    Nothing is run or loaded, and PyTorch need not be installed for graphs. An artifact that the
    onnxruntime here is too old for is exit code 3.
    """
    document, rows = _inspected(path, family)
    with show.to_stdout():
        if as_json:
            click.echo(json.dumps({"path": str(path), **document}, indent=2, allow_nan=False))
        else:
            for label, text in rows:
                click.echo(f"{label:<12} {text}".rstrip())
    if document["kind"] == "artifact":
        _check_onnxruntime(path)


def _check_onnxruntime(path: Path) -> None:
    """Check that the onnxruntime here, if there is one, runs the artifact."""
    from rope_export.artifacts.artifact import Artifact
    from rope_export.runtime import required

    with suppress(ImportError):
        required.check(Artifact.read(path, verify=False))


def _inspected(path: Path, family: str | None) -> tuple[dict[str, Any], Iterable[Row]]:
    """The JSON document and the rows of the table."""
    from rope_export.errors import BadInputError

    if path.is_file():
        return _model(path)
    if not path.is_dir():
        what = "is not a file or folder" if path.exists() else "does not exist"
        raise BadInputError(f"{path}: {what}; give an ONNX file, an artifact or a checkpoint")
    graphs = sorted(file.name for file in path.glob("*.onnx"))
    hint = f"; for its graph give {path / graphs[0]}" if graphs else ""
    if not (path / _CONFIG).is_file():
        raise BadInputError(f"{path}: no artifact or checkpoint, it has no {_CONFIG}{hint}")
    config = _json_object(path / _CONFIG)
    if "format" in config:
        return _artifact(path)
    if "model_type" in config:
        return _checkpoint(path, config, family)
    raise BadInputError(
        f"{path / _CONFIG}: neither an artifact's ('format') nor a checkpoint's "
        f"('model_type'){hint}"
    )


def _json_object(file: Path) -> dict[str, Any]:
    from rope_export.errors import BadInputError

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _model(path: Path) -> tuple[dict[str, Any], Iterable[Row]]:
    from rope_export.inspection.report import inspect_model

    report = inspect_model(path)
    size = _size(report.model_bytes)
    return {"kind": "model", "model": report.to_json()}, [
        ("model", f"{path}  ({size})"),
        *_model_rows(report),
    ]


# --- artifacts ------------------------------------------------------------------------------


def _artifact(path: Path) -> tuple[dict[str, Any], Iterable[Row]]:
    from rope_export.artifacts.artifact import Artifact
    from rope_export.inspection.report import inspect_model

    artifact = Artifact.read(path, verify=False)
    model = inspect_model(artifact.model)
    proof = _json_object(path / _REPORT) if (path / _REPORT).is_file() else {}
    parts = {name: artifact.config.get(name) for name in ("block", "module", "export", "options")}
    document = {
        "kind": "artifact",
        **parts,
        "passed": proof.get("passed"),
        "validated": proof.get("validated"),
        "model": model.to_json(),
    }
    return document, _artifact_rows(path, artifact.config, proof, model)


def _artifact_rows(
    path: Path, config: dict[str, Any], proof: dict[str, Any], model: ModelReport
) -> Iterator[Row]:
    graph = config["graph"]
    yield "artifact", f"{path}  (model {_size(model.model_bytes)})"
    block = config.get("block")
    if isinstance(block, dict):
        yield from _layer_rows("block", "", block)
    module = config.get("module")
    if isinstance(module, dict):
        yield "module", f"{module.get('class')}, {module.get('parameters')} parameters"
    ranges = graph.get("ranges")
    if isinstance(ranges, dict) and ranges:
        proven = graph.get("proven")
        proven = proven if isinstance(proven, dict) else {}
        yield (
            "sizes",
            ", ".join(_range(label, ranges[label], proven.get(label)) for label in ranges),
        )
    if isinstance(config.get("export"), dict):
        yield "export", _settings(config["export"])
    providers = " and ".join(map(str, graph["providers"]))
    yield "graph", f"{graph['target']}, {graph['dtype']}, made for {providers}"
    yield from _model_rows(model, stated=graph.get("onnxruntime"))
    for text in [*graph["branches"], *config["notes"]]:
        yield "note", text
    yield "", ""
    if not proof:
        yield f"NO PROOF: there is no {_REPORT}", ""
    elif not proof.get("validated"):
        yield "NOT VALIDATED: exported, but never run", ""
    else:
        verdict = "PASSED" if proof.get("passed") else "FAILED"
        cases = proof.get("cases")
        count = len(cases) if isinstance(cases, list) else 0
        yield f"{verdict}: {count} comparisons, when it was exported", ""


def _range(label: str, given: Any, proven: Any) -> str:
    """Sizes a label serves, and those compared; damaged ones as they are."""
    if not isinstance(given, list) or len(given) != 2:
        return f"{label} {given}"
    low, high = given
    text = f"{label} from {low}" if high is None else f"{label} {low} … {high}"
    if isinstance(proven, list) and len(proven) == 2:
        text += f" (proven {proven[0]} … {proven[1]})"
    return text


def _settings(content: dict[str, Any]) -> str:
    """What is set, in one line; objects get lines of their own."""
    parts = []
    for name, value in content.items():
        if value is None or value is False or value in ("", [], {}) or name == "axes":
            continue
        if isinstance(value, dict | list):
            value = json.dumps(value)
        parts.append(name if value is True else f"{name} {value}")
    return ", ".join(parts)


# --- checkpoints ----------------------------------------------------------------------------


def _checkpoint(
    path: Path, config: dict[str, Any], family: str | None
) -> tuple[dict[str, Any], Iterable[Row]]:
    from rope_export.pretrained.checkpoint import naming
    from rope_export.pretrained.geometry import layers_of

    with naming(path):
        layers = [layer.to_json() for layer in layers_of(config, family)]
    return {"kind": "checkpoint", "layers": layers}, _checkpoint_rows(path, layers)


def _checkpoint_rows(path: Path, layers: list[dict[str, Any]]) -> Iterator[Row]:
    """What all layers share, then what groups of them have to themselves."""
    count = f"{len(layers)} layer" if len(layers) == 1 else f"{len(layers)} layers"
    yield "checkpoint", f"{path}  ({count})"
    alike: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, layer in enumerate(layers):
        content = {name: value for name, value in layer.items() if name != "index"}
        key = json.dumps(content, sort_keys=True, default=str)
        alike.setdefault(key, (content, []))[1].append(number)
    groups = list(alike.values())
    first = groups[0][0] if groups else {}
    shared = {
        name: value
        for name, value in first.items()
        if all(name in layer and layer[name] == value for layer, _ in groups)
    }
    yield from _layer_rows("every layer", "", shared)
    for layer, numbers in groups if len(groups) > 1 else ():
        own = {name: value for name, value in layer.items() if name not in shared}
        label = "layer" if len(numbers) == 1 else "layers"
        yield from _layer_rows(label, f"{_ranges(numbers)}: ", own, absent=True)


def _layer_rows(
    label: str, start: str, layer: dict[str, Any], *, absent: bool = False
) -> Iterator[Row]:
    """One line, and one for each object; with ``absent`` what is not there is said too."""
    flat = _settings({name: x for name, x in layer.items() if not isinstance(x, dict)})
    parts = [flat] if flat else []
    if absent:
        parts += [f"no {name}" for name, value in layer.items() if value is None or value is False]
    yield label, start + ", ".join(parts)
    for name, value in layer.items():
        if isinstance(value, dict):
            yield f"  {name}", _settings(value)


def _ranges(numbers: list[int]) -> str:
    """``0-4, 6`` for 0, 1, 2, 3, 4 and 6; numbers in order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# --- graphs ---------------------------------------------------------------------------------


def _model_rows(report: ModelReport, stated: str | None = None) -> Iterator[Row]:
    """Rows of a graph, and of an artifact, which states the oldest onnxruntime it was made for."""
    opsets = ", ".join(
        f"opset {version}" if name == "ai.onnx" else f"{name} {version}"
        for name, version in report.opsets.items()
    )
    made = f", made by {report.producer}" if report.producer else ""
    yield "format", f"ONNX IR {report.ir_version}, {opsets}{made}"
    total = sum(report.weights.values())
    dtypes = ", ".join(f"{_size(size)} {name}" for name, size in report.weights.items())
    oldest = stated or report.onnxruntime
    if oldest is not None:
        why = ", ".join(need.what for need in report.needs if need.version == oldest)
        yield "onnxruntime", f">={oldest}{': ' if why else ''}{why}"
    yield "weights", f"{_size(total)} ({dtypes})" if len(report.weights) > 1 else dtypes or "none"
    for file in report.external:
        yield "in file", _external(file)
    for label, side in (("input", report.inputs), ("output", report.outputs)):
        for each in side:
            yield label, f"{each.name} {each.dtype} {_axes(each.axes)}"
    yield "operators", _operators(report.operators)
    if report.functions:
        calls = ", ".join(_times(count, name) for name, count in report.functions.items())
        yield "functions", f"{calls}, counted by what they hold"
    for rotation in report.rotations:
        yield "rotation", _rotation(rotation)
        yield "", f"  at {_where(rotation.nodes)}"
    if not report.rotations:
        yield "rotation", "none found"
    if report.rotations:
        yield "positions", _positions(report)
    for use in report.attention:
        yield "attention", _attention(use)
        yield "", f"  at {_where(use.nodes)}"
    if not report.attention:
        yield "attention", "none found"
    yield "cache", _cache(report)
    for note in report.notes:
        yield "note", note


def _rotation(rotation: Rotation) -> str:
    name = _times(len(rotation.nodes), rotation.operator)
    parts = [rotation.layout or "layout unknown"]
    if rotation.width is not None:
        parts.append(f"{rotation.width} channels of a head")
    text = f"{name}, {', '.join(parts)}: {_angles(rotation.angles)}"
    return f"{text}; {rotation.remark}" if rotation.remark else text


def _angles(angles: Angles) -> str:
    named = ", ".join(f"{table.name} {list(table.shape)}" for table in angles.tables)
    size = _size(sum(table.bytes for table in angles.tables))
    if angles.kind == "input":
        return f"cosines and sines are given: {', '.join(angles.positions) or 'unknown'}"
    if angles.kind == "constant":
        return f"constant cosines and sines ({named}, {size})"
    positions = f"positions from {', '.join(angles.positions)}" if angles.positions else ""
    source = "Cos and Sin in the graph"
    if angles.kind == "table":
        source = f"tables {named}, {size}" if angles.tables else "a table made in the graph"
    return f"{source}; {positions or 'positions counted'}"


def _positions(report: ModelReport) -> str:
    if report.longest is not None:
        fixed = all(rotation.angles.kind == "constant" for rotation in report.rotations)
        return f"{report.longest} tokens alone" if fixed else f"up to {report.longest} tokens"
    return "any" if report.positions == "unbounded" else "how many are served cannot be told"


def _attention(use: AttentionUse) -> str:
    parts = [_times(len(use.nodes), use.operator)]
    if use.heads is not None:
        parts.append(f"{use.heads} heads")
    if use.kv_heads is not None:
        parts.append(f"{use.kv_heads} key/value heads")
    if use.window is not None:
        kept = ", of which alone the cache holds keys and values" if use.window_cache else ""
        parts.append(f"window {use.window}{kept}")
    if use.cache_bits is not None:
        parts.append(f"keys and values cached as integers of {use.cache_bits} bits")
    scores = {
        "always": "a score for every pair of tokens is in memory",
        "on cpu": "a score for every pair of tokens is in memory on onnxruntime's CPU provider",
        "never": "memory linear in the length",
        None: "memory unknown",
    }[use.scores]
    return f"{', '.join(parts)}: {scores}"


def _cache(report: ModelReport) -> str:
    cache = report.cache
    if cache is None:
        return "none"
    layers = f"{cache.layers} layer" if cache.layers == 1 else f"{cache.layers} layers"
    past, present = (
        ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]} ({len(names)})"
        for names in (cache.inputs, cache.outputs)
    )
    return f"{layers}: {past} {cache.dtype} {_axes(cache.axes)} -> {present or 'nothing'}"


def _external(file: ExternalFile) -> str:
    if file.bytes is None:
        return f"{file.name}  ({file.problem}; {_size(file.needed)} are read of it)"
    problem = f"; {file.problem}" if file.problem else ""
    return f"{file.name}  ({_size(file.bytes)}{problem})"


def _operators(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: ("::" not in item[0], -item[1], item[0]))
    kinds = len(ordered) - _OPERATORS_SHOWN
    shown = [_times(count, name) for name, count in ordered[: None if kinds < 2 else -kinds]]
    rest = sum(count for _, count in ordered[len(shown) :])
    return " + ".join([*shown, f"{rest} of {kinds} other kinds"] if rest else shown)


def _times(count: int, name: str) -> str:
    return f"{count} {name}" if count > 1 else name


def _where(nodes: tuple[str, ...]) -> str:
    shown = ", ".join(nodes[:_NODES_SHOWN])
    more = len(nodes) - _NODES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _axes(axes: tuple[int | str, ...] | None) -> str:
    return "of unknown rank" if axes is None else f"[{', '.join(map(str, axes))}]"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
