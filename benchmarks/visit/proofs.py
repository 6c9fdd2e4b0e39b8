"""Proofs: blocks exported here, and artifacts that were made elsewhere."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import providers
from providers import VARIANTS

from rope_export import BadInputError, export, replay
from rope_export.artifacts.report import Report
from rope_export.artifacts.targets import DTYPES, TARGETS
from rope_export.attention.random_block import random_block
from visit.findings import Facts
from visit.graphs import capturable, opened, placement

# Smaller than those of providers.py: what takes the time is the float64 truth.
SMALL: dict[str, Any] = {"hidden_size": 512, "num_heads": 8, "head_dim": 64}
TINY: dict[str, Any] = {"hidden_size": 64, "num_heads": 8, "head_dim": 64}
_KV_HEADS = 4
_SHOWN = 6
Case = tuple[str, str, str]

# Target, dtype, variant: what says most, first.
TELLING: tuple[Case, ...] = (
    ("ort", "float16", "grouped heads"),
    ("ort", "float16", "a cache"),
    ("ort", "bfloat16", "a cache"),
    ("ort", "float16", "a cache and a window"),
    ("ort", "float32", "grouped heads"),
    ("ort", "float32", "a cache"),
    ("ort", "float16", "positions as an input"),
    ("ort", "float16", "not causal"),
    ("ort", "float16", "a cache, padded on the left"),
    ("onnx", "float16", "a cache"),
    ("onnx", "float32", "grouped heads"),
    ("onnx", "bfloat16", "a cache"),
    ("primitive", "float32", "a cache"),
    ("primitive", "bfloat16", "grouped heads"),
    ("ort", "float16", "a cache of the window"),
    ("ort", "float16", "sinks"),
    ("ort", "float16", "norms of queries and keys"),
)


def others() -> list[Case]:
    """Every case that is not among the telling ones."""
    return [case for case in itertools.product(TARGETS, DTYPES, VARIANTS) if case not in TELLING]


def prove(
    provider: str, target: str, dtype: str, variant: str, seq: int, tiny: bool
) -> Iterator[Facts]:
    """Export a block and prove it."""
    shape, options = VARIANTS[variant]
    block = random_block(**_shape(shape, tiny), dtype=dtype, max_seq_len=seq)
    with tempfile.TemporaryDirectory() as folder:
        try:
            proof = providers.prove(
                block, Path(folder) / "block", target=target, provider=provider, options=options
            )
        except BadInputError as error:
            yield {"refused": str(error)}
            return
        yield {
            **_verdict(proof.report, provider),
            "used": proof.used,
            "kernels": proof.kernels,
            "numbers_beyond_the_table": proof.beyond,
        }
        if provider == "cuda":
            on_the_cpu = placement(opened(proof.model, provider)).get("CPU")
            yield {"on_the_cpu": on_the_cpu, "capturable": capturable(proof.model)}


# Artifacts that are made where there is no GPU and replayed where there is one.
MADE: tuple[Case, ...] = (
    ("ort", "float16", "grouped heads"),
    ("ort", "bfloat16", "a cache"),
    ("ort", "float16", "a cache and a window"),
    ("ort", "float16", "a cache, padded on the left"),
    ("ort", "float32", "positions as an input"),
    ("ort", "float16", "a cache of the window"),
    ("ort", "bfloat16", "not causal"),
    ("onnx", "float16", "a cache"),
    ("primitive", "float32", "a cache"),
)


def make(folder: Path, provider: str, tiny: bool) -> None:
    """Make the artifacts of `MADE`, with the vectors they are replayed with, if not there."""
    for target, dtype, variant in MADE:
        dtype = "float16" if provider == "cpu" and dtype == "bfloat16" else dtype
        path = folder / f"{target} {dtype} {variant}".replace(",", "").replace(" ", "-")
        if path.exists():
            continue
        shape, options = VARIANTS[variant]
        block = random_block(**_shape(shape, tiny), dtype=dtype, max_seq_len=48 if tiny else 512)
        export(block, path, target=target, providers=[provider], **options)


def _shape(changes: dict[str, Any], tiny: bool) -> dict[str, Any]:
    shape = {**(TINY if tiny else SMALL), **changes}
    if "num_kv_heads" in shape:
        shape["num_kv_heads"] = min(_KV_HEADS, shape["num_kv_heads"])
    return shape


def replayed(provider: str, folder: str) -> Iterator[Facts]:
    """Replay an artifact."""
    with providers.kernels() as attended:
        report = replay(folder, providers=[provider])
    yield {**_verdict(report, provider), "kernels": attended}


def _verdict(report: Report, provider: str) -> Facts:
    """A report, with few of its cases."""
    failed = [case for case in report.cases if not case.passed]
    worst = report.worst(provider)
    return {
        "passed": report.passed,
        "failed": Counter(f"{case.name}: {case.tensor}" for case in failed),
        "worst": None if worst is None else worst.to_json(),
        "cases": len(report.cases),
        "attention": report.graph["attention"],
        "ops": report.graph["ops"],
        "passed_over": report.graph["passed_over"],
        "providers": {name: status.__dict__ for name, status in report.providers.items()},
        "first_failed": [case.to_json() for case in failed[:_SHOWN]],
    }
