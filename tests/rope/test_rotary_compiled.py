"""RotaryEmbedding compiled and exported is right at lengths that were never traced."""

import numpy as np
import onnxruntime
import pytest
import torch
from rotary import ANY_LENGTH, CALLS, IN_FLOAT64, assert_rotated, queries_and_keys
from selection import slow_unless
from torch._dynamo.testing import CompileCounter

from rope_export.rope.embedding import RotaryEmbedding

# Compilers and exporters


class Rotate(torch.nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, q, k, position_ids=None):
        return self.rope.rotate(q, k, position_ids=position_ids)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@ANY_LENGTH
@pytest.mark.parametrize("with_ids", [False, True])
def test_ten_lengths_compile_to_at_most_two_full_graphs(counter, max_seq_len, with_ids):
    rope = RotaryEmbedding(8, max_seq_len=max_seq_len)
    compiled = torch.compile(Rotate(rope), fullgraph=True, backend=counter)
    for length in (7, 2, 33, 16, 5, 64, 3, 21, 48, 10):
        inputs = queries_and_keys(length)
        ids = torch.arange(length - 1, -1, -1)
        outputs = compiled(*inputs, ids) if with_ids else compiled(*inputs)
        positions = ids.numpy() if with_ids else np.arange(length)
        assert_rotated(outputs, inputs, positions, IN_FLOAT64)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize(("wrap", "graphs"), [(torch.tensor, 1), (int, 2)])
def test_decoding_one_token_after_another_compiles_once(counter, wrap, graphs):
    rope = RotaryEmbedding(8, max_seq_len=64)
    compiled = torch.compile(rope.rotate, fullgraph=True, backend=counter)
    inputs = queries_and_keys(1)
    for offset in (9, 10, 11, 12, 40, 63):
        outputs = compiled(*inputs, offset=wrap(offset))
        assert_rotated(outputs, inputs, [offset], IN_FLOAT64)
    assert counter.frame_count == graphs


def dynamic_axes(with_ids):
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=1, max=64)
    heads = {0: batch, 2: length}
    return (heads, heads, {0: batch, 1: length}) if with_ids else (heads, heads)


EXPORTED = [
    (64, "interleaved", False),
    (64, "half", True),
    (None, "half", False),
    (None, "interleaved", True),
]
# None of these is the shape traced.
OTHER_SHAPES = [(1, 1), (3, 64), (1, 17), (5, 2)]


def example(batch, length, with_ids):
    """Arguments for `Rotate`, and their positions."""
    inputs = queries_and_keys(length, batch=batch)
    if not with_ids:
        return inputs, np.arange(length)
    ids = np.random.default_rng(length).integers(0, 64, (batch, length))
    return (*inputs, torch.from_numpy(ids)), ids


@pytest.mark.parametrize(("max_seq_len", "layout", "with_ids"), EXPORTED)
def test_torch_export_serves_shapes_it_never_saw(max_seq_len, layout, with_ids):
    module = Rotate(RotaryEmbedding(8, layout=layout, max_seq_len=max_seq_len))
    traced, _ = example(2, 6, with_ids)
    program = torch.export.export(module, traced, dynamic_shapes=dynamic_axes(with_ids))
    for batch, length in OTHER_SHAPES:
        arguments, positions = example(batch, length, with_ids)
        outputs = program.module()(*arguments)
        assert_rotated(outputs, arguments[:2], positions, IN_FLOAT64, layout)


@pytest.mark.parametrize(
    ("max_seq_len", "layout", "with_ids"),
    slow_unless(lambda *row: row == (64, "half", True), EXPORTED),
)
# torch's exporter copies its own deprecated LeafSpec.
@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
# It says so for every axis that two inputs share.
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
def test_plain_onnx_export_serves_shapes_it_never_saw(max_seq_len, layout, with_ids):
    module = Rotate(RotaryEmbedding(8, layout=layout, max_seq_len=max_seq_len)).eval()
    for call in CALLS.values():  # nothing of these may end up in the graph
        call(module.rope)
    traced, _ = example(2, 6, with_ids)
    program = torch.onnx.export(
        module, traced, dynamo=True, dynamic_shapes=dynamic_axes(with_ids), verbose=False
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_inputs()]
    for batch, length in OTHER_SHAPES:
        arguments, positions = example(batch, length, with_ids)
        feeds = {name: x.numpy() for name, x in zip(names, arguments, strict=True)}
        assert_rotated(session.run(None, feeds), arguments[:2], positions, IN_FLOAT64, layout)
