"""Contenders in processes of their own that take turns, and the table and file of what they took.

A process of its own: none spins its threads under another's feet, and its peak memory is its own.
Turns: a noisy machine is noisy for all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import onnx
import onnxruntime
import psutil
import torch

# Steps are launched while the device is busy with this, or launching would be timed: about 10 ms.
AHEAD_CYCLES = 20_000_000


def seconds(step: Callable[[], object], device: str) -> tuple[float, object]:
    """What one step takes, and what it returns; on CUDA without the time it takes to launch it."""
    if device != "cuda":
        start = time.perf_counter()
        result = step()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)
    begin.record()
    result = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result


class Contender:
    """A process that runs one step whenever it is told to."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, sys.argv[0], "--child", name, "--folder", str(folder)]
        for option, value in vars(arguments).items():
            if value is not None and option in arguments.shape:
                command += [f"--{option.replace('_', '-')}", str(value)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.peak_mib, self.error = json.loads(self.process.stdout.readline())

    def seconds(self) -> float:
        """Run one step and return what it took."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(run: Callable[[], object], error_of: Callable[[object], float]) -> None:
    """Say peak extra memory of the first step and its error, then time a step for every line."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = psutil.Process().memory_info().rss
    output = run()
    with Path("/proc/self/status").open() as status:
        (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    print(json.dumps([(peak - before) / 2**20, error_of(output)]), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def options(
    description: str, shape: dict[str, int | None], names: Sequence[str]
) -> argparse.Namespace:
    """Parse the command line of a benchmark; ``shape`` is what every contender must know."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(names))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shape = tuple(shape)
    torch.set_grad_enabled(False)
    onnxruntime.set_default_logger_severity(3)
    return arguments


def compete(benchmark: str, arguments: argparse.Namespace, folder: Path, ours: str) -> None:
    """Let the contenders take turns; print the table and write the file."""
    names = arguments.only.split(",")
    contenders = {name: Contender(name, arguments, folder) for name in names}
    memory = {name: contender.peak_mib for name, contender in contenders.items()}
    errors = {name: contender.error for name, contender in contenders.items()}
    assert max(errors.values()) < 1e-5, errors
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(arguments.rounds + 1):
        for name, contender in contenders.items():
            taken = contender.seconds()
            if round_number:  # the first warms up
                seconds[name].append(taken)
    for contender in contenders.values():
        contender.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    shape = {k: getattr(arguments, k) for k in arguments.shape}
    print("\n" + ", ".join(f"{name} {value}" for name, value in shape.items() if value is not None))
    heads = f"{'median':>11}{'min':>11}{'max':>11}{'ours is':>9}{'peak extra':>14}{'error':>10}"
    print(f"{'':<16}{heads}")
    for name in names:
        times = [
            f"{t * 1e3:.4g} ms" for t in (medians[name], min(seconds[name]), max(seconds[name]))
        ]
        ratio = f"{medians[ours] / medians[name]:.2f}x" if ours in medians else ""
        line = "".join(f"{text:>11}" for text in times)
        print(f"{name:<16}{line}{ratio:>9}{memory[name]:>10.0f} MiB{errors[name]:>10.1e}")
    if arguments.json:
        document = {
            "benchmark": benchmark,
            "date": date.today().isoformat(),
            "machine": {"cpu": cpu_name(), "cpus": os.cpu_count(), "platform": platform.platform()},
            "versions": {
                "torch": torch.__version__,
                "onnxruntime": onnxruntime.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
            },
            "shape": shape,
            "seconds": seconds,
            "peak_extra_mib": memory,
            "rel_error": errors,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def cpu_name() -> str:
    """Model, family and number of the processor."""
    with Path("/proc/cpuinfo").open() as info:
        fields = dict(line.split(":", 1) for line in info if ":" in line)
    clean = {key.strip(): value.strip() for key, value in fields.items()}
    return (
        f"{clean.get('model name')} (family {clean.get('cpu family')} model {clean.get('model')})"
    )
