"""One attention block: eager PyTorch, plain export, a hand-built graph and our three targets.

All contenders have the same weights and inputs, and each is compared with float64 truth before it
is timed. Each lives in a process of its own, so that none spins its threads under another's feet
and its peak memory is its own; they take turns, so that a noisy machine is noisy for all.

    python benchmarks/block.py --seq 4096 --kv-heads 8
    python benchmarks/block.py --seq 16384 --kv-heads 8 --only eager,ort,hand-built
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import torch
from onnx import TensorProto, helper, numpy_helper

from rope_export import Attention, export
from rope_export.comparison import errors_against
from rope_export.reference import attention_truth
from rope_export.synthetic import random_block

CONTENDERS = ("eager", "plain", "hand-built", "ort", "onnx", "primitive")
Step = Callable[[], np.ndarray]


def hand_built(block: Attention, path: Path) -> None:
    """The graph an expert writes by hand: one product, GroupQueryAttention, one product."""
    layers = (block.q_proj, block.k_proj, block.v_proj)
    packed = torch.cat([layer.weight for layer in layers]).detach().numpy().T
    arrays = {
        "qkv": packed,
        "out": block.o_proj.weight.detach().numpy().T,
        "cos": block.rope.angles.cos.numpy(),
        "sin": block.rope.angles.sin.numpy(),
        "one": np.array([1], dtype=np.int32),
    }
    gqa = helper.make_node(
        "GroupQueryAttention",
        ["x_qkv", "", "", "", "", "last", "total", "cos", "sin"],
        ["context", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=block.num_heads,
        kv_num_heads=block.num_kv_heads,
        do_rotary=1,
    )
    nodes = [
        helper.make_node("MatMul", ["hidden_states", "qkv"], ["x_qkv"]),
        helper.make_node("Shape", ["hidden_states"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["hidden_states"], ["length64"], start=1, end=2),
        helper.make_node("Cast", ["length64"], ["length"], to=TensorProto.INT32),
        helper.make_node("Squeeze", ["length"], ["total"]),
        helper.make_node("Sub", ["length", "one"], ["last_one"]),
        helper.make_node("Expand", ["last_one", "batch"], ["last"]),
        gqa,
        helper.make_node("MatMul", ["context", "out"], ["output"]),
    ]
    value = ["batch", "sequence", block.hidden_size]
    graph = helper.make_graph(
        nodes,
        "hand_built",
        [helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, value)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, value)],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def plain_export(block: Attention, path: Path) -> None:
    """What torch.onnx.export makes of the same block at its default opset."""
    dims = {
        0: torch.export.Dim("batch", min=1, max=1 << 20),
        1: torch.export.Dim("sequence", min=1, max=block.rope.max_seq_len),
    }
    torch.onnx.export(
        block,
        (torch.zeros(2, 6, block.hidden_size),),
        path,
        dynamo=True,
        dynamic_shapes={"hidden_states": dims},
        verbose=False,
    )


def prepare(contender: str, block: Attention, folder: Path) -> None:
    path = folder / f"{contender}.onnx"
    if contender == "hand-built":
        hand_built(block, path)
    elif contender == "plain":
        plain_export(block, path)
    elif contender != "eager":
        result = export(block, folder / contender, target=contender)
        path.symlink_to(result.model)


def step(contender: str, block: Attention, folder: Path, x: np.ndarray) -> Step:
    if contender == "eager":
        tensor = torch.from_numpy(x)
        return lambda: block(tensor).numpy()
    session = onnxruntime.InferenceSession(
        folder / f"{contender}.onnx", providers=["CPUExecutionProvider"]
    )
    (name,) = [value.name for value in session.get_inputs()]
    return lambda: session.run(None, {name: x})[0]


def inputs(arguments: argparse.Namespace) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((1, arguments.seq, arguments.hidden), dtype=np.float32)


def make_block(arguments: argparse.Namespace) -> Attention:
    return random_block(
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        max_seq_len=arguments.seq,
    )


class Contender:
    """A process that runs one step whenever it is told to."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        for option in ("seq", "hidden", "heads", "kv_heads"):
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
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


def child(arguments: argparse.Namespace) -> None:
    """Say peak extra memory of the first step and its error, then time a step for every line."""
    block, x = make_block(arguments), inputs(arguments)
    run = step(arguments.child, block, Path(arguments.folder), x)
    before = psutil.Process().memory_info().rss
    output = run()
    with Path("/proc/self/status").open() as status:
        (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    last = torch.arange(max(0, arguments.seq - 16), arguments.seq)
    truth = attention_truth(block, torch.from_numpy(x), rows=last).numpy()
    error = errors_against(truth, output[:, last]).rel
    print(json.dumps([(peak - before) / 2**20, error]), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    onnxruntime.set_default_logger_severity(3)
    if arguments.child:
        child(arguments)
        return
    names = arguments.only.split(",")
    block = make_block(arguments)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for name in names:
            prepare(name, block, folder)
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
    shape = {k: getattr(arguments, k) for k in ("seq", "hidden", "heads", "kv_heads")}
    print("\n" + ", ".join(f"{name} {value}" for name, value in shape.items()))
    print(
        f"{'':<12}{'median':>10}{'min':>10}{'max':>10}{'ort is':>9}{'peak extra':>14}{'error':>10}"
    )
    for name in names:
        times = [
            f"{t * 1e3:.0f} ms" for t in (medians[name], min(seconds[name]), max(seconds[name]))
        ]
        ratio = f"{medians['ort'] / medians[name]:.2f}x" if "ort" in medians else ""
        line = "".join(f"{text:>10}" for text in times)
        print(f"{name:<12}{line}{ratio:>9}{memory[name]:>10.0f} MiB{errors[name]:>10.1e}")
    if arguments.json:
        document = {
            "benchmark": "block",
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
            "rel_error_of_last_rows": errors,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def cpu_name() -> str:
    with Path("/proc/cpuinfo").open() as info:
        fields = dict(line.split(":", 1) for line in info if ":" in line)
    clean = {key.strip(): value.strip() for key, value in fields.items()}
    return (
        f"{clean.get('model name')} (family {clean.get('cpu family')} model {clean.get('model')})"
    )


if __name__ == "__main__":
    main()
