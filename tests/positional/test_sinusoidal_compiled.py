"""Compiled and exported, the original Transformer's input is right at any length, or NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException
from sinusoidal import CALLS, HALVES, assert_added, assert_rounded_once, encoding, normal, truth
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from rope_export.errors import BadInputError
from rope_export.positional.sinusoidal import SinusoidalPositionalEncoding, TokenEmbedding

# Compilers and exporters


class Input(torch.nn.Module):
    """What stands before the first layer: tokens become vectors with positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = TokenEmbedding(50, 8), encoding()

    def forward(self, tokens: Tensor, offset: Tensor | int = 0) -> Tensor:
        return self.positions(self.tokens(tokens), offset=offset)


def assert_input(actual: Any, module: Input, tokens: Tensor, positions: Any) -> None:
    """Exact but for the roundings of the embedding and of the sum."""
    weight = module.tokens.embedding.weight.detach()
    actual = torch.as_tensor(actual)
    assert actual.dtype == weight.dtype
    embedded = weight.double().numpy()[tokens.numpy()] * np.sqrt(8)
    exact = embedded + truth(positions, 8)
    eps = torch.finfo(weight.dtype).eps
    bound = (np.abs(embedded) + np.abs(exact)) * eps / 2 + 6e-7
    assert actual.shape == exact.shape
    assert (np.abs(actual.detach().double().numpy() - exact) <= bound).all()


def token_ids(batch: int, length: int) -> Tensor:
    drawn = np.random.default_rng(length).integers(0, 50, (batch, length))
    return torch.from_numpy(drawn)


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


LENGTHS = (7, 2, 33, 16, 5, 64, 3, 21, 48, 10)


@pytest.mark.parametrize("offset", [None, 0, torch.tensor(0)], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_lengths_compile_to_at_most_two_full_graphs(
    counter: CompileCounter, offset: int | Tensor | None, dtype: torch.dtype
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = normal(2, length, 8, seed=length, dtype=dtype)
        actual = compiled(x) if offset is None else compiled(x, offset=offset)
        assert_added(actual, x, range(length))
    assert 1 <= counter.frame_count <= 2


def test_tokens_of_ten_lengths_compile_to_at_most_two_full_graphs(counter: CompileCounter) -> None:
    module = Input().eval()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in LENGTHS:
        tokens = token_ids(2, length)
        assert_input(compiled(tokens), module, tokens, range(length))
    assert 1 <= counter.frame_count <= 2


def test_training_compiles_to_at_most_two_full_graphs_that_drop(counter: CompileCounter) -> None:
    module = encoding(dropout=0.5).train()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = normal(40, length, 8, seed=length)
        actual = compiled(x).double().numpy()
        exact = 2 * (x.double().numpy() + truth(range(length), 8))
        dropped = actual == 0
        assert 0.3 < dropped.mean() < 0.7
        np.testing.assert_allclose(actual[~dropped], exact[~dropped], rtol=0, atol=2e-6)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize(("wrap", "graphs"), [(torch.tensor, 1), (int, 2)])
def test_decoding_one_token_after_another_compiles_once(
    counter: CompileCounter, wrap: Callable[[int], Any], graphs: int
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    x = normal(2, 1, 8)
    for offset in (9, 10, 11, 12, 40, 63):
        assert_added(compiled(x, offset=wrap(offset)), x, [offset])
    assert counter.frame_count == graphs


@pytest.mark.parametrize(("length", "offset"), [(65, 0), (5, 60), (5, -1)])
def test_a_length_out_of_range_names_itself_while_it_is_compiled(
    counter: CompileCounter, length: int, offset: int
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    for known in range(2, 8):  # sizes and offsets are symbols by now
        compiled(normal(2, known, 8), offset=known)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="BadInputError") as caught:
        compiled(normal(2, length, 8), offset=offset)
    found = f"positions must lie in 0 … 63, got {offset} … {offset + length - 1}; raise max_len"
    assert found in str(caught.value)


BATCH, LENGTH = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=1, max=64)
DYNAMIC = torch.export.Dim.DYNAMIC
# None of these is the shape traced.
OTHER_SHAPES = [(1, 1), (3, 64), (1, 17), (5, 2), (64, 63)]


def warmed() -> SinusoidalPositionalEncoding:
    module = encoding()
    for call in CALLS.values():  # nothing of these may end up in the graph
        call(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("module", [encoding, warmed])
def test_torch_export_serves_shapes_it_never_saw(
    dtype: torch.dtype, module: Callable[[], SinusoidalPositionalEncoding]
) -> None:
    program = torch.export.export(
        module(), (normal(2, 6, 8, dtype=dtype),), dynamic_shapes=({0: BATCH, 1: LENGTH},)
    )
    for batch, length in OTHER_SHAPES:
        x = normal(batch, length, 8, dtype=dtype)
        assert_added(program.module()(x), x, range(length))


def test_torch_export_takes_a_dynamic_int_as_offset() -> None:
    program = torch.export.export(
        encoding(),
        (normal(2, 6, 8),),
        {"offset": 3},
        dynamic_shapes={"x": {0: BATCH, 1: torch.export.Dim.AUTO}, "offset": DYNAMIC},
    )
    for length, offset in [(2, 62), (17, 30), (62, 2)]:
        x = normal(3, length, 8)
        assert_added(program.module()(x, offset=offset), x, range(offset, offset + length))


def test_torch_export_of_a_too_long_example_says_so() -> None:
    with pytest.raises(BadInputError, match="got 0 … 64; raise max_len"):
        torch.export.export(encoding(), (normal(2, 65, 8),))


def test_torch_export_of_an_axis_that_would_be_too_long_is_refused() -> None:
    longer = torch.export.Dim("length", min=1, max=65)
    with pytest.raises(torch._dynamo.exc.UserError, match="max=64"):
        torch.export.export(encoding(), (normal(2, 6, 8),), dynamic_shapes=({1: longer},))


OFFSETS = [-(2**63), -7, -1, 0, 3, 58, 60, 63, 64, 2**40, 2**63 - 1]


def assert_served_or_nan(actual: Any, x: Tensor, offset: int) -> None:
    """Positions in range are right, and every channel of the others is NaN."""
    actual, positions = torch.as_tensor(actual), [offset + n for n in range(x.shape[-2])]
    inside = [n for n, position in enumerate(positions) if 0 <= position < 64]
    outside = [n for n in range(len(positions)) if n not in inside]
    assert actual.shape == x.shape
    assert actual[:, outside].isnan().all()
    assert_added(actual[:, inside], x[:, inside], [positions[n] for n in inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_graphs_positions_out_of_range_are_nan(
    counter: CompileCounter, dtype: torch.dtype
) -> None:
    module, x = encoding(), normal(2, 6, 8, dtype=dtype)
    program = torch.export.export(
        module,
        (x,),
        {"offset": torch.tensor(3)},
        dynamic_shapes={"x": {0: BATCH, 1: LENGTH}, "offset": None},
    )
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for offset in OFFSETS:
        for graph in (program.module(), compiled):
            assert_served_or_nan(graph(x, offset=torch.tensor(offset)), x, offset)


def test_offsets_that_only_an_accelerator_knows_raise_nothing() -> None:
    """Fake tensors stand for them: what they hold cannot be read."""
    with torch._subclasses.FakeTensorMode():
        x, offset = torch.zeros(2, 6, 8), torch.tensor(64)
        module = encoding()
        assert isinstance(offset, torch._subclasses.FakeTensor)
        assert module(x, offset=offset).shape == (2, 6, 8)


def session_of(
    module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any
) -> Callable[..., np.ndarray]:
    """Export as anybody would, and run in onnxruntime."""
    program = torch.onnx.export(
        module, arguments, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> np.ndarray:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return np.asarray(session.run(None, feeds)[0])

    return run


# torch's exporter copies its own deprecated LeafSpec.
LEAF_SPEC = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_onnx_export_serves_shapes_it_never_saw(dtype: torch.dtype) -> None:
    axes = ({0: BATCH, 1: LENGTH},)
    run = session_of(warmed(), (normal(2, 6, 8, dtype=dtype),), axes)
    for batch, length in OTHER_SHAPES:
        x = normal(batch, length, 8, dtype=dtype)
        assert_added(run(x), x, range(length))
    with pytest.raises((Fail, RuntimeException), match="broadcast"):
        run(normal(1, 65, 8, dtype=dtype))


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_onnx_export_of_tokens_and_an_offset(dtype: torch.dtype) -> None:
    module = Input().to(dtype).eval()
    axes = ({0: BATCH, 1: LENGTH}, None)
    run = session_of(module, (token_ids(2, 6), torch.tensor(3)), axes)
    for batch, length in OTHER_SHAPES:
        tokens = token_ids(batch, length)
        for offset in {0, 64 - length}:
            positions = range(offset, offset + length)
            assert_input(run(tokens, torch.tensor(offset)), module, tokens, positions)


@LEAF_SPEC
@pytest.mark.parametrize("tokens", [torch.int32, torch.int64], ids=str)
def test_plain_onnx_export_of_half_precision_embeddings_rounds_once(tokens: torch.dtype) -> None:
    module = TokenEmbedding(200, 12, padding_idx=1).half().eval()  # 12: its root is no float16
    run = session_of(module, (token_ids(2, 6).to(tokens),), ({0: BATCH, 1: LENGTH},))
    exact = module.embedding.weight.detach().double().numpy() * np.sqrt(12)
    for every in (torch.arange(200).reshape(4, 50), torch.arange(200).reshape(10, 20)):
        assert_rounded_once(run(every.to(tokens)), exact[every.numpy()])


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_onnxruntime_positions_out_of_range_are_nan(dtype: torch.dtype) -> None:
    class Offset(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = encoding()

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return self.positions(x, offset=offset)

    x = normal(2, 6, 8, dtype=dtype)
    run = session_of(Offset().eval(), (x[:, :4], torch.tensor(3)), ({1: LENGTH}, None))
    for offset in OFFSETS:
        assert_served_or_nan(run(x, torch.tensor(offset)), x, offset)
