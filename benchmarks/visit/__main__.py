"""All that is to be learnt of a CUDA machine in a quarter of an hour, most telling first.

Each finding is appended to OUT/visit.jsonl as it comes, so that a cut loses nothing; what fails is
written down, and the next thing tried. Proofs run in processes side by side, timings alone.

machine   versions, and whether the provider runs
default   where the nodes of the default block go
replay    proofs of the artifacts in --artifacts, made elsewhere (by --make)
telling   proofs of the blocks that say most
capture   a decoding step captured as a CUDA graph against eager PyTorch
prefill   onnxruntime beside eager and compiled PyTorch, and each one's kernels on the device
decode    likewise, through `Decoder` and without it, captured and not
rotation  forward and backward beside a copy
step      a compiled training step with and without RoPE
matrix    proofs of every other target, dtype and variant

A stage begins nothing more when its seconds are over, whatever is left of it.

From the repository root, installed or not; the first where there is no GPU:

    PYTHONPATH=benchmarks python -m visit --make /tmp/artifacts
    PYTHONPATH=benchmarks python -m visit --out /tmp/visit --artifacts /tmp/artifacts
    PYTHONPATH=benchmarks python -m visit --out /tmp/visit --stages telling,matrix --budget 300
    PYTHONPATH=benchmarks python -m visit --out /tmp/visit --provider cpu --tiny
    PYTHONPATH=benchmarks python -m visit --out /tmp/visit --collect benchmarks/results/FILE
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from visit import proofs
from visit.findings import Findings
from visit.processes import Job, do

# Stages, and the seconds after which they begin nothing more: a quarter of an hour in all.
STAGES = {
    "machine": 30.0,
    "default": 45.0,
    "replay": 60.0,
    "telling": 120.0,
    "capture": 60.0,
    "prefill": 90.0,
    "decode": 90.0,
    "rotation": 60.0,
    "step": 90.0,
    "matrix": 600.0,
}
SIDE_BY_SIDE = ("telling", "replay", "matrix")
MEASURES = {
    "machine": "visit.machine:look",
    "default": "visit.graphs:default",
    "capture": "visit.graphs:capture",
    "prefill": "visit.timings:prefill",
    "decode": "visit.timings:decode",
    "rotation": "visit.training:rotation",
    "step": "visit.training:step",
}
_MEASURE_SECONDS = 240.0
_FEW = 6


def jobs_of(stage: str, asked: argparse.Namespace) -> list[Job]:
    """What a stage consists of."""
    provider = {"provider": asked.provider}
    if stage == "machine":
        return [Job(stage, MEASURES[stage], provider)]
    if stage == "replay":
        folders = sorted(asked.artifacts.iterdir()) if asked.artifacts else []
        return [
            Job(stage, "visit.proofs:replayed", {**provider, "folder": str(folder)})
            for folder in folders
        ]
    common = {**provider, "tiny": asked.tiny}
    if stage == "default":
        return [Job(stage, MEASURES[stage], common)]
    if stage in ("telling", "matrix"):
        cases = list(proofs.TELLING) if stage == "telling" else proofs.others()
        if asked.tiny:  # a few of each
            cases = cases[:: len(cases) // _FEW]
        return [
            Job(
                stage,
                "visit.proofs:prove",
                {**common, "target": target, "dtype": dtype, "variant": variant, "seq": asked.seq},
            )
            for target, dtype, variant in cases
            if re.search(asked.only, f"{target} {dtype} {variant}")
        ]
    if stage in ("prefill", "decode"):
        common |= {"lengths": asked.lengths, "seconds": 0.1 if asked.tiny else 0.6}
    dtypes = asked.dtypes[-1:] if stage in ("rotation", "step") else asked.dtypes
    return [
        Job(stage, MEASURES[stage], {**common, "dtype": dtype}, _MEASURE_SECONDS)
        for dtype in dtypes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m visit", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of what is found")
    parser.add_argument("--make", type=Path, help="make the artifacts for --artifacts, and end")
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order")
    parser.add_argument("--budget", type=float, default=800, help="seconds; nothing begins after")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4))
    parser.add_argument("--seq", type=int, help="that blocks are proven at: 1024, 48 if tiny")
    parser.add_argument("--only", default="", help="pattern of the proofs, as 'ort.*cache'")
    parser.add_argument("--artifacts", type=Path, help="a folder of artifacts")
    parser.add_argument("--dtypes", help="timed; the last one in rotation and step")
    parser.add_argument("--lengths", help="timed: 4096,16384")
    parser.add_argument("--tiny", action="store_true", help="small and few, to see that it runs")
    parser.add_argument("--collect", type=Path, help="write what was found as one document")
    asked = parser.parse_args()
    stages = asked.stages.split(",")
    dtypes = asked.dtypes or ("float16,bfloat16" if asked.provider == "cuda" else "float32")
    lengths = asked.lengths or ("24,48" if asked.tiny else "4096,16384")
    asked.dtypes, asked.lengths = dtypes.split(","), [int(n) for n in lengths.split(",")]
    asked.seq = asked.seq or (48 if asked.tiny else 1024)
    if asked.make:
        proofs.make(asked.make, asked.provider, asked.tiny)
        return
    if asked.out is None:
        parser.error("--out FOLDER is needed")
    if not set(stages) <= set(STAGES):
        parser.error(f"--stages: some of {', '.join(STAGES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    findings = Findings(asked.out / "visit.jsonl")
    if asked.collect:
        findings.collect(asked.collect)
        return
    end = time.monotonic() + asked.budget
    for stage in stages:
        jobs = jobs_of(stage, asked)
        until = min(end, time.monotonic() + STAGES[stage])
        if stage in SIDE_BY_SIDE:
            do(jobs, findings, asked.workers, until)
            continue
        for job in jobs:
            found = do([job], findings, 1, until)
            if stage == "machine" and any(facts.get("unavailable") for facts in found):
                sys.exit(f"provider {asked.provider} cannot be used here")
    findings.add("end", {}, {"budget": asked.budget})


if __name__ == "__main__":
    main()
