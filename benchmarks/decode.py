"""One decoding step of an attention block: eager PyTorch, a hand-built graph, and `Decoder`.

All contenders hold the same cache of ``--past`` tokens in their own form and add one token to it
again and again, each step at the same place, and each is compared with float64 truth before it is
timed:

- ``eager``: a static cache of just the right length, written in place, no mask;
- ``eager-capacity``: a static cache of ``--capacity``, masked, as transformers has it;
- ``eager-growing``: ``attention(x, past=cache)``, which joins past and new;
- ``hand-built``: GroupQueryAttention between two products, past and present bound to one buffer;
- ``decoder``: `rope_export.runtime.Decoder` on the exported artifact, from NumPy to NumPy;
- ``decoder-capacity``: the same with a buffer of ``--capacity``.

    python benchmarks/decode.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import contenders
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from rope_export import Attention, export
from rope_export.comparison import errors_against
from rope_export.reference import attention_truth
from rope_export.runtime import Decoder
from rope_export.synthetic import random_block

CONTENDERS = (
    "eager",
    "eager-capacity",
    "eager-growing",
    "hand-built",
    "decoder",
    "decoder-capacity",
)
SHAPE = {
    "past": 4096,
    "capacity": 16384,
    "hidden": 2048,
    "heads": 32,
    "kv_heads": 8,
    "window": None,
}


def make_block(arguments: argparse.Namespace) -> Attention:
    return random_block(
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        max_seq_len=arguments.capacity,
        window=arguments.window,
    )


def tokens(arguments: argparse.Namespace) -> torch.Tensor:
    rng = np.random.default_rng(0)
    shape = (1, arguments.past + 1, arguments.hidden)
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def hand_built(block: Attention, path: Path) -> None:
    """The graph an expert writes by hand, for one new token."""
    layers = (block.q_proj, block.k_proj, block.v_proj)
    arrays = {
        "qkv": torch.cat([layer.weight for layer in layers]).numpy().T,
        "out": block.o_proj.weight.numpy().T,
        "cos": block.rope.angles.cos.numpy(),
        "sin": block.rope.angles.sin.numpy(),
    }
    window = {} if block.window is None else {"local_window_size": block.window}
    nodes = [
        helper.make_node("MatMul", ["hidden_states", "qkv"], ["x_qkv"]),
        helper.make_node(
            "GroupQueryAttention",
            ["x_qkv", "", "", "past_key", "past_value", "last", "total", "cos", "sin"],
            ["context", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=block.num_heads,
            kv_num_heads=block.num_kv_heads,
            do_rotary=1,
            **window,
        ),
        helper.make_node("MatMul", ["context", "out"], ["output"]),
    ]
    states, cache = [1, 1, block.hidden_size], [1, block.num_kv_heads, "length", block.head_dim]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "hand_built",
        [
            value("hidden_states", TensorProto.FLOAT, states),
            *(value(f"past_{kind}", TensorProto.FLOAT, cache) for kind in ("key", "value")),
            value("last", TensorProto.INT32, [1]),
            value("total", TensorProto.INT32, []),
        ],
        [
            value("output", TensorProto.FLOAT, states),
            *(value(f"present_{kind}", TensorProto.FLOAT, cache) for kind in ("key", "value")),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def eager_static(
    block: Attention, x: torch.Tensor, cache: tuple[torch.Tensor, ...], capacity: int
) -> Callable[[], np.ndarray]:
    """Write the new token into a buffer, and attend to what the buffer holds."""
    past = cache[0].shape[2]
    buffers = [torch.zeros(*t.shape[:2], capacity, t.shape[3]) for t in cache]
    for buffer, t in zip(buffers, cache, strict=True):
        buffer[:, :, :past] = t
    place = torch.tensor([past])
    hidden = torch.arange(capacity) > past
    if block.window is not None:
        hidden |= torch.arange(capacity) <= past - block.window
    mask = ~hidden[None] if hidden.any() else None

    def step() -> np.ndarray:
        q, k, v = block.heads(x, offset=past)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer.index_copy_(2, place, new)
        context = F.scaled_dot_product_attention(
            q, *buffers, attn_mask=mask, scale=block.scale, enable_gqa=True
        )
        return block.merge(context).numpy()

    return step


def step_of(name: str, arguments: argparse.Namespace, block: Attention) -> Callable[[], np.ndarray]:
    whole = tokens(arguments)
    before, x = whole[:, :-1], whole[:, -1:]
    past = arguments.past
    if name.startswith("decoder"):
        capacity = arguments.capacity if name.endswith("capacity") else past + 1
        decoder = Decoder.open(Path(arguments.folder) / "artifact", capacity=capacity)
        decoder.prefill(before.numpy())
        lengths, new = decoder._lengths, x.numpy()

        def step() -> np.ndarray:
            decoder._lengths = lengths  # the same step again
            return decoder.decode(new)

        return step
    _, cache = block(before, past=block.empty_cache())
    if name == "eager-growing":
        return lambda: block(x, past=cache)[0].numpy()
    if name.startswith("eager"):
        return eager_static(
            block, x, cache, arguments.capacity if name.endswith("capacity") else past + 1
        )
    session = onnxruntime.InferenceSession(
        Path(arguments.folder) / "hand-built.onnx", providers=["CPUExecutionProvider"]
    )
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    buffers = [
        wrap(np.concatenate((t.numpy(), np.zeros_like(t[:, :, :1].numpy())), axis=2)) for t in cache
    ]
    new, last, total = x.numpy(), np.array([past], np.int32), np.array(past + 1, np.int32)
    binding = session.io_binding()

    def hand_built_step() -> np.ndarray:
        inputs = {"hidden_states": new, "last": last, "total": total}
        for input_name, array in inputs.items():
            binding.bind_ortvalue_input(input_name, wrap(array))
        binding.bind_output("output", "cpu")
        for kind, buffer in zip(("key", "value"), buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{kind}", buffer)
            binding.bind_ortvalue_output(f"present_{kind}", buffer)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return hand_built_step


def main() -> None:
    arguments = contenders.options(__doc__, SHAPE, CONTENDERS)
    block = make_block(arguments)
    if arguments.child:
        truth = attention_truth(
            block, tokens(arguments), rows=torch.tensor([arguments.past])
        ).numpy()
        contenders.serve(
            step_of(arguments.child, arguments, block),
            lambda output: errors_against(truth, output).rel,
        )
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        export(block, folder / "artifact", cache=True)
        hand_built(block, folder / "hand-built.onnx")
        contenders.compete("decode", arguments, folder, "decoder")


if __name__ == "__main__":
    main()
