"""A decoding step made for CUDA alone counts nothing on the host, and computes what others do."""

from __future__ import annotations

import mutants
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rope_export import export

PADDED = {
    "right": np.array([[1] * 7, [1] * 4 + [0] * 3]),
    "left": np.array([[1] * 7, [0] * 3 + [1] * 4]),
}
# float16, and float32 in between.
CLOSE = {"rtol": 0, "atol": 2e-3}


@pytest.fixture(scope="module", params=["right", "left"])
def case(request, tmp_path_factory):
    """A block, its graph for CUDA alone, and that graph on the CPU, which has its operators."""
    block = mutants.block(dtype="float16", window=5, sinks=True)
    folder = tmp_path_factory.mktemp("capturable") / "x"
    result = export(
        block, folder, target="ort", providers=["cuda"], cache=True, padding=request.param
    )
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    return block, request.param, onnx.load(result.model), session


def drawn(block, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, block.hidden_size, generator=generator).to(block.dtype)


def run(session, x, mask, cache):
    names = ("output", "present_key", "present_value")
    given = {"hidden_states": x.numpy(), "attention_mask": mask.astype(np.int64)}
    given |= {"past_key": cache[0], "past_value": cache[1]}
    return dict(zip(names, session.run(list(names), given), strict=True))


def test_a_prompt_and_a_token_are_those_of_the_block(case):
    block, side, _, session = case
    x, token, mask = drawn(block, 7, 1), drawn(block, 1, 2), PADDED[side]
    after = np.concatenate((mask, np.ones((2, 1), np.int64)), axis=1)
    with torch.no_grad():
        y, cache = block(x, past=block.empty_cache(2), attention_mask=torch.from_numpy(mask))
        z, _ = block(token, past=cache, attention_mask=torch.from_numpy(after))
    empty = [tensor.numpy() for tensor in block.empty_cache(2)]
    prompt = run(session, x, mask, empty)
    real = mask.astype(bool)
    np.testing.assert_allclose(prompt["output"][real], y.numpy()[real], **CLOSE)
    step = run(session, token, after, (prompt["present_key"], prompt["present_value"]))
    np.testing.assert_allclose(step["output"], z.numpy(), **CLOSE)


def test_padding_on_the_other_side_is_not_answered_wrongly(case):
    block, side, _, session = case
    x, other = drawn(block, 7, 1), PADDED["left" if side == "right" else "right"]
    output = run(session, x, other, [tensor.numpy() for tensor in block.empty_cache(2)])["output"]
    real = other.astype(bool)
    with torch.no_grad():
        y, _ = block(x, past=block.empty_cache(2), attention_mask=torch.from_numpy(other))
    np.testing.assert_allclose(output[0], y.numpy()[0], **CLOSE)
    if side == "right":  # whole rows of it are not a number
        assert np.isnan(output[1]).all()
    else:  # it finds tokens wherever they are
        np.testing.assert_allclose(output[real], y.numpy()[real], **CLOSE)


def test_lengths_come_from_the_mask(case):
    _, _, model, _ = case
    found = {node.op_type for node in model.graph.node}
    # Range is computed on the host and copied; ReduceMax of integers needs cuDNN.
    assert not found & {"Range", "ReduceMax", "If", "Scan", "Loop"}
    fed = {node.output[0]: node for node in model.graph.node}
    (attention,) = (n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    behind, waiting = set(), [attention.input[5]]  # seqlens_k
    while waiting:
        node = fed.get(waiting.pop())
        if node is not None and node.op_type not in behind | {"Slice"}:
            behind.add(node.op_type)
            waiting += list(node.input)
    assert "Shape" not in behind
