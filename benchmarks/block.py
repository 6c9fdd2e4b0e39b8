"""One attention block: eager PyTorch, plain export, a hand-built graph and our three targets.

All contenders have the same weights and inputs, and each is compared with float64 truth before it
is timed. ``decoder`` is the graph with a cache, prefilling an empty one. With a window,
``hand-built`` is the fused operator with its own window, and ``full`` the same without one.

    python benchmarks/block.py --seq 4096 --kv-heads 8
    python benchmarks/block.py --seq 16384 --kv-heads 8 --only eager,ort,hand-built
    python benchmarks/block.py --seq 16384 --kv-heads 8 --window 512 --only ort,hand-built,full
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import contenders
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from rope_export import Attention, export
from rope_export.comparison import errors_against
from rope_export.reference import attention_truth
from rope_export.runtime import Decoder
from rope_export.synthetic import random_block

CONTENDERS = ("eager", "plain", "hand-built", "ort", "decoder", "onnx", "primitive")
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
        **({} if block.window is None else {"local_window_size": block.window}),
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
    elif contender == "full":
        hand_built(without_window(block), path)
    elif contender == "plain":
        plain_export(block, path)
    elif contender == "decoder":
        export(block, folder / contender, cache=True)
    elif contender != "eager":
        result = export(block, folder / contender, target=contender)
        path.symlink_to(result.model)


def step(contender: str, block: Attention, folder: Path, x: np.ndarray) -> Step:
    if contender == "eager":
        tensor = torch.from_numpy(x)
        return lambda: block(tensor).numpy()
    if contender == "decoder":
        decoder = Decoder.open(folder / contender)

        def prefill() -> np.ndarray:
            decoder.reset()
            return decoder.prefill(x)

        return prefill
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
        window=arguments.window,
    )


def without_window(block: Attention) -> Attention:
    whole = copy.deepcopy(block)
    whole.window = None
    return whole


def child(arguments: argparse.Namespace) -> None:
    """Serve one contender; its error is that of the last rows."""
    block, x = make_block(arguments), inputs(arguments)
    run = step(arguments.child, block, Path(arguments.folder), x)
    last = torch.arange(max(0, arguments.seq - 16), arguments.seq)
    judged = without_window(block) if arguments.child == "full" else block
    truth = attention_truth(judged, torch.from_numpy(x), rows=last).numpy()
    contenders.serve(run, lambda output: errors_against(truth, output[:, last]).rel)


def main() -> None:
    arguments = contenders.options(
        __doc__,
        {"seq": 4096, "hidden": 1024, "heads": 16, "kv_heads": 8, "window": None},
        CONTENDERS,
    )
    if arguments.child:
        child(arguments)
        return
    block = make_block(arguments)
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.only.split(","):
            prepare(name, block, Path(root))
        contenders.compete("block", arguments, Path(root), "ort")


if __name__ == "__main__":
    main()
