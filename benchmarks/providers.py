"""Prove every target, dtype and variant on one execution provider, and keep the reports.

python benchmarks/providers.py --provider cuda --json benchmarks/results/DATE-proof-cuda.json
python benchmarks/providers.py --provider cpu --seq 256
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

from rope_export import BadInputError, export, runtime
from rope_export.lowering import rules
from rope_export.synthetic import random_block

VARIANTS = {
    "grouped heads": ({"num_kv_heads": 8}, {}),
    "one head for all": ({"num_kv_heads": 1}, {}),
    "interleaved, partly rotated": ({"layout": "interleaved", "rotary_dim": 32}, {}),
    "not causal": ({"causal": False}, {}),
    "head width 40": ({"head_dim": 40}, {}),
    "positions as an input": ({}, {"position_ids": True}),
    "yarn": ({"scaling": {"rope_type": "yarn", "factor": 4}}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--provider", choices=rules.PROVIDERS, required=True)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reason = runtime.unavailable_reason(arguments.provider)
    if reason is not None:
        sys.exit(f"provider {arguments.provider} cannot be used here: {reason}")
    documents, failed = [], 0
    for target, dtype, variant in itertools.product(rules.TARGETS, rules.DTYPES, VARIANTS):
        shape, options = VARIANTS[variant]
        block = random_block(
            **{"hidden_size": 1024, "num_heads": 16, "dtype": dtype, **shape},
            max_seq_len=arguments.seq,
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = export(
                    block,
                    Path(folder) / "block",
                    target=target,
                    providers=[arguments.provider],
                    validate=True,
                    validate_on=[arguments.provider],
                    **options,
                ).report
            except BadInputError as error:
                print(f"{target:<10}{dtype:<10}{variant:<28} refused: {error}", flush=True)
                continue
        worst = report.worst(arguments.provider)
        failed += not report.passed
        used = max(worst.errors.rel / worst.tolerance.rel, worst.errors.row / worst.tolerance.row)
        print(
            f"{target:<10}{dtype:<10}{variant:<28}{'ok' if report.passed else 'FAILED':<8}"
            f"{report.graph['attention']:<38}{worst.name}: {used:.2f} of the tolerance "
            f"{worst.reason or ''}",
            flush=True,
        )
        documents.append({"variant": variant, **report.to_json()})
    if arguments.json:
        arguments.json.write_text(json.dumps(documents, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
