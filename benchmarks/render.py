"""Write the README's tables and plots from the committed results, so that no number is typed.

A table or picture stands between two comments, the first of which says what it is made of:

    <!-- measured block prefill 4096 FILE -->
    <!-- measured rotation static FILE -->
    <!-- measured train FILE -->
    <!-- measured plot FILE -->
    ...
    <!-- end -->

FILE is in benchmarks/results/, and so are the pictures. Every table is headed by machine, versions,
date, and the command that does it again.

    python benchmarks/render.py           # rewrites README.md and the pictures
    python benchmarks/render.py --check   # exit code 1 where it would change
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import click

from rope_export.bench import peers, plot
from rope_export.bench.results import Results, shown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- measured (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_FORWARD, _BACKWARD = "forward", "backward"


def rendered(text: str) -> str:
    """The same text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        file = RESULTS / arguments[-1]
        if kind == PLOT:
            lines = of_plot(file)
        else:
            lines = TABLES[kind](json.loads(file.read_text()), *arguments[:-1])
        return "\n".join([match[1].rstrip("\n"), *lines, match[3]])

    return _MARKED.sub(table, text)


def drawn_from(text: str) -> dict[Path, Path]:
    """The results that are drawn, by picture."""
    marks = [match[2].split() for match in _MARKED.finditer(text)]
    files = [RESULTS / name for kind, *_, name in marks if kind == PLOT]
    return {file.with_suffix(".png"): file for file in files}


def digest(file: Path) -> str:
    """Written into a picture: of the results that it shows."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def of_plot(file: Path) -> list[str]:
    """The picture of ``rope-export bench`` over all its lengths."""
    results = Results.from_json(json.loads(file.read_text()))
    phases = " and ".join(dict.fromkeys(phase for phase, _ in results.cases()))
    picture = file.with_suffix(".png").relative_to(ROOT)
    return [f"![{phases}: latency and peak memory over length]({picture})"]


def of_block(content: dict[str, Any], phase: str, length: str) -> list[str]:
    """A phase of ``rope-export bench`` at one length."""
    results = Results.from_json(content)
    measured = results.of(phase, int(length))
    base = next(m for m in measured if m.contender == "eager")
    machine = results.environment
    rows = [
        f"`{results.command}`: {results.title}, {results.dtype}, batch {results.batch}, on "
        f"{results.provider}: {_machine(machine)}, torch {machine['torch']}, onnxruntime "
        f"{machine['onnxruntime']}, {results.date}.",
        "",
        f"| {phase}, {length} tokens | median | least … most | of eager | peak extra memory | "
        "of this machine's limit | error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for m in measured:
        if m.failed is not None:
            if m.contender not in peers.NAMES:  # those that are not here have nothing to say
                rows.append(f"| {m.contender} | {m.failed} | | | | | |")
            continue
        assert m.rel_error is not None
        rows.append(
            f"| {m.contender} | {_ms(m.median)} | {_ms(min(m.seconds))} … {_ms(max(m.seconds))} | "
            f"{m.ratio_to(base):.2f}x | {m.peak_extra_bytes / 2**20:.0f} MiB | "
            f"{results.reach(m)} | {m.rel_error:.1e} |"
        )
    limits = results.limits
    return [
        *rows,
        "",
        f"(A large product reaches {shown(limits['matmul_flops'], 'FLOP/s')} there, a large copy "
        f"{shown(limits['copy_bytes'], 'B/s')}.)",
    ]


def of_rotation(content: dict[str, Any], mode: str) -> list[str]:
    """One mode of ``benchmarks/rotation.py``: forward and backward as multiples of a copy."""
    cases = {c: taken for c, taken in content["seconds"].items() if c.endswith(f" {mode}")}
    columns = {case: ", ".join(case.split(", ")[:2]) for case in cases}
    strides = {case.split(", ")[2] for case in cases}
    layouts = dict.fromkeys(case.split(", ")[0] for case in cases)
    names = [n for n in dict.fromkeys(n for t in cases.values() for n in t) if n != "bound"]
    machine, shape = content["machine"], content["shape"]
    only = f" --only {content['only']}" if content.get("only") else ""
    rows = [
        f"`python benchmarks/rotation.py --strides {','.join(sorted(strides))} --mode {mode} "
        f"--layout {','.join(layouts)}{only}`: forward / "
        f"backward of `q` and `k` {shape} as multiples of `q.clone(), k.clone()`, "
        f"{_machine(machine)}, torch {content['versions']['torch']}, {content['date']}.",
        "",
        f"| {_MODES[mode]} | {' | '.join(columns.values())} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    for name in names:
        cells = [_of_bound(cases[case], name) for case in cases]
        rows.append(f"| {_ROTATIONS.get(name, f'`{name}`')} | {' | '.join(cells)} |")
    return rows


_MODES = {"eager": "eager", "static": "compiled", "dynamic": "compiled, dynamic shapes"}
_ROTATIONS = {
    "module": "`RotaryEmbedding.rotate`",
    "rotate_pairs": "its arithmetic alone",
    "transformers": "transformers",
    "rotary-embedding-torch": "rotary-embedding-torch",
}


def _of_bound(taken: dict[str, Any], name: str) -> str:
    if name not in taken:
        return ""
    ratios = [
        statistics.median(taken[name][way]) / statistics.median(taken["bound"][way])
        for way in (_FORWARD, _BACKWARD)
    ]
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def of_train(content: dict[str, Any]) -> list[str]:
    """``benchmarks/train.py``."""
    machine, versions, options = (content[key] for key in ("machine", "versions", "options"))
    shape = ", ".join(
        f"{name.replace('_', ' ')} {options[name]}"
        for name in ("seq", "hidden", "heads", "kv_heads", "batch", "dtype")
    )
    rows = [
        f"`OMP_NUM_THREADS={machine['threads']} python benchmarks/train.py --device "
        f"{options['device']} --rounds {options['rounds']}`: forward and backward of a "
        f"compiled block, {shape}, {_machine(machine)}, {machine['threads']} threads, torch "
        f"{versions['torch']}, {content['date']}.",
        "",
        "| training step | median | least | of no rotation | graphs | of 6 lengths | error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in content["contenders"].items():
        if "median" not in found:
            rows.append(f"| {name} | {found['remark']} | | | | | |")
            continue
        ratio = found["ratios"].get("of no rope")
        rows.append(
            f"| {name} | {_ms(found['median'])} | {_ms(found['min'])} | "
            f"{'' if ratio is None else f'{ratio:.2f}x'} | {found['graphs']} | "
            f"{found['graphs_of_lengths']} | {found['rel_error']:.1e} |"
        )
    return rows


def _machine(machine: dict[str, Any]) -> str:
    gpus = machine.get("gpus") or [machine.get("device") or "cpu"]
    named = [gpu for gpu in gpus if gpu != "cpu"]
    cpu = machine.get("cpu") or machine.get("capability")
    return ", ".join([*named, f"{cpu}, {machine['cpus']} cores"])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


PLOT = "plot"
TABLES = {"block": of_block, "rotation": of_rotation, "train": of_train}


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where it would change.")
def main(*, check: bool) -> None:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rendered(before)
    if check:
        sys.exit(int(before != after))
    for picture, file in drawn_from(after).items():
        results = Results.from_json(json.loads(file.read_text()))
        plot.draw(results, picture, metadata={"Description": digest(file)})
    readme.write_text(after)


if __name__ == "__main__":
    main()
