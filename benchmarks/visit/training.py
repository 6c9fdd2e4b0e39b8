"""What a rotation takes beside a copy, and a training step beside one that does not rotate."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator

import torch
from contenders import ROTATIONS, Task
from rotation import Case, measure
from train import Contender, Judge, attention_kernel, compete, ratios

from rope_export.rope.pairs import Layout
from visit.findings import Facts
from visit.graphs import LARGE, TINY

_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
_BLOCKS = ("ours", "ours interleaved", "no rope")
# Kernels of others, of a triton that may not be there.
_RIVALS = ("flash-attn", "liger")
_ROUNDS = 30


def rotation(provider: str, dtype: str, tiny: bool) -> Iterator[Facts]:
    """Queries and keys, compiled, forward and backward, in units of copying them."""
    shape = (1, 4, 64, 32) if tiny else (1, 32, 16384, 128)
    for layout in _LAYOUTS:
        case = Case(layout, getattr(torch, dtype), "contiguous", "static")
        taken = measure(case, shape, ["module"], 3 if tiny else _ROUNDS, provider)
        bound = statistics.median(taken["bound"]["forward"])
        ways = {way: statistics.median(times) for way, times in taken["module"].items()}
        yield {
            "layout": layout,
            "copy_ms": bound * 1e3,
            **{way: time / bound for way, time in ways.items()},
            "shape": shape,
        }


def step(provider: str, dtype: str, tiny: bool) -> Iterator[Facts]:
    """A compiled training step: benchmarks/train.py without the float64 truth, which takes long."""
    shape = TINY if tiny else LARGE
    task = Task(
        device=provider,
        dtype=dtype,
        batch=4,
        seq=64 if tiny else 4096,
        hidden=shape["hidden_size"],
        heads=shape["num_heads"],
        kv_heads=shape["num_kv_heads"],
        mode="static",
    )
    with attention_kernel(task):
        here = [name for name in _RIVALS if task.device in ROTATIONS[name].devices]
        here = [name for name in here if importlib.util.find_spec(ROTATIONS[name].package)]
        contenders = [Contender(name, task) for name in (*_BLOCKS, *here)]
        for contender in contenders:
            contender.compile()
        compete(contenders, Judge(task), 2 if tiny else _ROUNDS)
    for contender in contenders:
        yield {
            "contender": contender.name,
            "ms": statistics.median(contender.seconds) * 1e3,
            **ratios(contender, contenders),
        }
