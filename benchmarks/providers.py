"""Prove every target, dtype and variant on one execution provider, and keep the reports.

On CUDA the kernel that attended is asked of onnxruntime, which chooses it while it runs: flash,
memory-efficient or unfused.

python benchmarks/providers.py --provider cuda --json benchmarks/results/DATE-proof-cuda.json
python benchmarks/providers.py --provider cpu --seq 256 --only cache
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_export import Attention, BadInputError, export, runtime
from rope_export.artifacts.report import CaseResult, Report
from rope_export.artifacts.targets import DTYPES, PROVIDERS, TARGETS
from rope_export.attention.random_block import random_block
from rope_export.proof.arrays import to_numpy

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped heads": ({"num_kv_heads": 8}, {}),
    "one head for all": ({"num_kv_heads": 1}, {}),
    "interleaved, partly rotated": ({"layout": "interleaved", "rotary_dim": 32}, {}),
    "not causal": ({"causal": False}, {}),
    "not causal, padded": ({"causal": False, "num_kv_heads": 8}, {"attention_mask": True}),
    "not causal, a window": ({"causal": False, "num_kv_heads": 8, "window": 64}, {}),
    "not causal, soft cap": ({"causal": False, "num_kv_heads": 8, "softcap": 30.0}, {}),
    "head width 40": ({"head_dim": 40}, {}),
    "values half as wide": ({"num_kv_heads": 8, "value_head_dim": 32}, {}),
    "positions as an input": ({}, {"position_ids": True}),
    "yarn": ({"scaling": {"rope_type": "yarn", "factor": 4}}, {}),
    "dynamic": (
        {
            "scaling": {
                "rope_type": "dynamic",
                "factor": 4,
                "original_max_position_embeddings": 100,
            }
        },
        {},
    ),
    "mrope": (
        {"scaling": {"rope_type": "mrope", "mrope_section": [8, 12, 12]}},
        {"position_ids": True},
    ),
    "a cache": ({"num_kv_heads": 8}, {"cache": True}),
    "a cache, padded on the left": ({"num_kv_heads": 8}, {"cache": True, "padding": "left"}),
    "a cache and positions": ({"num_kv_heads": 8}, {"cache": True, "position_ids": True}),
    "a window": ({"num_kv_heads": 8, "window": 64}, {}),
    "a cache and a window": ({"num_kv_heads": 8, "window": 64}, {"cache": True}),
    "a cache of the window": ({"num_kv_heads": 8, "window": 16}, {"cache": "window"}),
    "soft cap": ({"num_kv_heads": 8, "softcap": 30.0}, {}),
    "sinks": ({"num_kv_heads": 8, "sinks": True}, {"cache": True}),
    "norms of queries and keys": ({"num_kv_heads": 8, "qk_norm": True}, {"cache": True}),
    "axial": ({"scaling": {"rope_type": "axial"}, "causal": False}, {"position_ids": True}),
}


def numbers_beyond_the_table(block: Attention, model: Path, provider: str) -> bool:
    """Whether a token whose position is beyond the table is given numbers: it must be NaN."""
    assert block.rope is not None
    places = torch.tensor([[0, 1, block.rope.positions]])
    if block.rope.axes > 1:
        places = places.expand(block.rope.axes, 1, 3)
    hidden = torch.ones(1, 3, block.hidden_size, dtype=block.dtype)
    inputs = {"hidden_states": to_numpy(hidden), "position_ids": places.numpy()}
    output = runtime.Session.open(model, provider).run(inputs)["output"][0, 2]
    return not bool(np.isnan(output.astype(np.float32)).all())


@contextmanager
def kernels() -> Iterator[list[str]]:
    """Kernels that attend meanwhile, by onnxruntime's own names: native code prints them."""
    os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
    found: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield found
        finally:
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            text = file.read().decode(errors="replace")
            found += sorted(set(re.findall(r"SdpaKernel=(\w+)", text)))


@dataclass(frozen=True)
class Proof:
    """A block, exported, and proven on one provider.

    Attributes:
        model: the graph.
        report: of the proof.
        worst: the case closest to its tolerance.
        kernels: that attended.
        beyond: whether a token whose position is beyond the table is given numbers.
    """

    model: Path
    report: Report
    worst: CaseResult
    kernels: list[str]
    beyond: bool

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.report.passed and not self.beyond

    @property
    def used(self) -> float:
        """The part of its tolerance that the worst case takes."""
        errors, tolerance = self.worst.errors, self.worst.tolerance
        return max(errors.rel / tolerance.rel, errors.row / tolerance.row)


def prove(
    block: Attention, folder: Path, *, target: str, provider: str, options: Mapping[str, Any]
) -> Proof:
    """Export a block into ``folder`` and prove it.

    Raises:
        BadInputError: the target has no form for it.
    """
    with kernels() as attended:
        result = export(
            block,
            folder,
            target=target,
            providers=[provider],
            validate=True,
            validate_on=[provider],
            **options,
        )
    worst = result.report.worst(provider)
    assert worst is not None
    asked = result.report.passed and options == {"position_ids": True}
    beyond = asked and numbers_beyond_the_table(block, result.model, provider)
    return Proof(result.model, result.report, worst, attended, beyond)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--only", default="", help="variants with this in their name")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reason = runtime.unavailable_reason(arguments.provider)
    if reason is not None:
        sys.exit(f"provider {arguments.provider} cannot be used here: {reason}")
    documents, failed = [], 0
    variants = [name for name in VARIANTS if arguments.only in name]
    for target, dtype, variant in itertools.product(TARGETS, DTYPES, variants):
        shape, options = VARIANTS[variant]
        block = random_block(
            **{"hidden_size": 1024, "num_heads": 16, "dtype": dtype, **shape},
            max_seq_len=arguments.seq,
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                proof = prove(
                    block,
                    Path(folder) / "block",
                    target=target,
                    provider=arguments.provider,
                    options=options,
                )
            except BadInputError as error:
                print(f"{target:<10}{dtype:<10}{variant:<28} refused: {error}", flush=True)
                continue
        report, worst = proof.report, proof.worst
        failed += not proof.passed
        print(
            f"{target:<10}{dtype:<10}{variant:<28}{'ok' if report.passed else 'FAILED':<8}"
            f"{report.graph['attention']:<38}{' '.join(proof.kernels):<18}{worst.name}: "
            f"{proof.used:.2f} of the tolerance {worst.reason or ''}"
            f"{'  NUMBERS BEYOND THE TABLE' if proof.beyond else ''}",
            flush=True,
        )
        documents.append(
            {
                "variant": variant,
                "kernels": proof.kernels,
                "numbers_beyond_the_table": proof.beyond,
                **report.to_json(),
            }
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(documents, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
