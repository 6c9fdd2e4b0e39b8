"""Models written by users, with our modules inside, are right under PyTorch's own tools."""

# What is expected comes from `distributed_worker.plain`: the same model in float64 from its weights
# alone, rotated by complex multiplication and with the softmax written out.

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import distributed_worker
import onnxruntime
import pytest
import torch
from distributed_worker import (
    CLOSE,
    ROWS,
    WIDTH,
    Model,
    assert_same,
    expected,
    loss_of,
    made,
    plain,
    result,
    tables,
    tokens,
    turned,
)
from selection import slow_unless
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize

from rope_export import Attention

KINDS = pytest.mark.parametrize("kind", ROWS)
MODES = pytest.mark.parametrize(
    ("kind", "compiled"), [("attention", False), ("attention", True), ("rotation", False)]
)
FEWER_MODES = pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        ("attention", False),
        pytest.param("attention", True, marks=pytest.mark.slow),
        ("rotation", False),
    ],
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@KINDS
@pytest.mark.parametrize("max_seq_len", [64, None], ids=["table", "no table"])
def test_the_plain_model_is_the_written_out_one(kind, max_seq_len):
    model = made(kind, max_seq_len=max_seq_len)
    for shape in [(2, 13), (1, 1), (3, 64)]:
        assert_same(result(model, tokens(*shape)), expected(model, tokens(*shape)))
    assert expected(model, tokens(2, 13))[0].abs().max() > 1


# Exporters

OTHER_SHAPES = [(1, 1), (3, 64), (2, 17), (5, 2)]  # none of them the one traced, (2, 6)
DYNAMIC = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
# torch's exporter copies its own deprecated LeafSpec.
LEAF_SPEC = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
# What a user's own attention makes of the rotation is slow.
KIND_EXPORTED = pytest.mark.parametrize("kind", slow_unless(lambda kind: kind == "attention", ROWS))


@pytest.mark.slow
@KINDS
@LEAF_SPEC
def test_torchs_own_onnx_export_serves_lengths_never_traced(kind):
    model = made(kind).eval()
    program = torch.onnx.export(
        model, (tokens(2, 6),), dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (ids_input,) = session.get_inputs()
    for shape in OTHER_SHAPES:
        (logits,) = session.run(None, {ids_input.name: tokens(*shape).numpy()})
        true_logits, _ = expected(model, tokens(*shape))
        torch.testing.assert_close(torch.from_numpy(logits).double(), true_logits, **CLOSE)


@KIND_EXPORTED
def test_a_saved_exported_program_serves_and_trains_at_lengths_never_traced(kind):
    model, file = made(kind), io.BytesIO()
    torch.export.save(torch.export.export(model, (tokens(2, 6),), dynamic_shapes=(DYNAMIC,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in OTHER_SHAPES:
        assert_same(result(loaded, tokens(*shape)), expected(model, tokens(*shape)))


@pytest.mark.slow
@LEAF_SPEC
def test_ahead_of_time_compiled_code_serves_lengths_never_traced(tmp_path):
    model = made("rotation", blocks=1).eval()  # g++ takes its time
    program = torch.export.export(model, (tokens(2, 6),), dynamic_shapes=(DYNAMIC,))
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    run = torch._inductor.aoti_load_package(package)
    for shape in OTHER_SHAPES:
        true_logits, _ = expected(model, tokens(*shape))
        torch.testing.assert_close(run(tokens(*shape)).double(), true_logits, **CLOSE)


# torch.compile

LENGTHS = (13, 7, 33, 64, 5)


def trained(parameters, run):
    """The losses of a few steps at changing lengths."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for length in LENGTHS:
        optimizer.zero_grad()
        ids = tokens(2, 64)[:, :length].contiguous()
        loss = loss_of(run(ids), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "backend", "marked", "graphs"),
    [
        pytest.param("attention", "aot_eager", False, 2, marks=pytest.mark.slow),
        ("rotation", "aot_eager", True, 1),
    ],
)
def test_training_at_changing_lengths_compiles_few_graphs(kind, backend, marked, graphs):
    model = made(kind)
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    layout = model.blocks[0].attention.rope.layout
    want = trained(weights.values(), lambda ids: plain(weights, ids, layout=layout))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def run(ids):
        if marked:
            torch._dynamo.mark_dynamic(ids, 1)
        return compiled(ids)

    assert trained(model.parameters(), run) == pytest.approx(want, rel=2e-5)
    assert counter.frame_count == graphs
    assert want[0] - want[-1] > 0.5
    assert_same(result(model, tokens(2, 21), run), expected(model, tokens(2, 21)))


class Exact(nn.Module):
    """The rotation in float64, rounded once."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def rotate(self, q, k, **_):
        return tuple(turned(x.double(), self.layout).to(x.dtype) for x in (q, k))


@FEWER_MODES
def test_autocast_rotates_as_exactly_as_without(kind, compiled):
    model = made(kind)
    exact = copy.deepcopy(model)
    for block in exact.blocks:
        block.attention.rope = Exact(block.attention.rope.layout)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    ids = tokens(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = result(model, ids, run), result(exact, ids)
        assert model.blocks[0].attention(torch.randn(1, 5, WIDTH)).dtype == torch.bfloat16
    assert got[0].dtype == torch.bfloat16
    assert_same(got, want, rtol=0.02, atol=0.02)
    assert_same(got, expected(model, ids), rtol=0.1, atol=0.1)


@FEWER_MODES
def test_checkpointed_activations_change_no_gradient(kind, compiled):
    model = made(kind)
    model.checkpointed = True
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    assert_same(result(model, tokens(2, 13), run), expected(model, tokens(2, 13)))


# torch.func

# Said of attention, whatever the model.
UNBATCHED = pytest.mark.filterwarnings(
    "ignore:.*not yet implemented the batching rule for aten.._scaled_dot_product:UserWarning"
)


@FEWER_MODES
@UNBATCHED
def test_gradients_of_single_samples_are_vmapped(kind, compiled):
    model, ids = made(kind), tokens(3, 9)
    weights = dict(model.named_parameters())

    def loss(weights, row):
        return loss_of(functional_call(model, weights, (row[None],)), row)

    samples = vmap(grad(loss), in_dims=(None, 0))
    if compiled:
        samples = torch.compile(samples, fullgraph=True, backend="aot_eager")
    gradients = samples({n: p.detach() for n, p in weights.items()}, ids)
    for i, row in enumerate(ids):
        _, true = expected(model, row[None])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient[i].double(), true[name], **CLOSE)


@KINDS
@UNBATCHED
def test_ensembles_and_tangents_go_through(kind):
    models, ids = [made(kind, seed=seed) for seed in range(2)], tokens(2, 9)
    weights, _ = torch.func.stack_module_state(models)
    logits = vmap(lambda w: functional_call(models[0], w, (ids,)))(weights)
    for i, model in enumerate(models):
        torch.testing.assert_close(logits[i].double(), expected(model, ids)[0], **CLOSE)
    at, along = ({n: p.detach() for n, p in m.named_parameters()} for m in models)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = jvp(lambda w: functional_call(models[0], w, (ids,)), (at,), (along,))
    layout = models[0].blocks[0].attention.rope.layout
    at, along = ({n: t.double() for n, t in w.items()} for w in (at, along))
    _, true = jvp(lambda w: plain(w, ids, layout=layout), (at,), (along,))
    torch.testing.assert_close(tangent.double(), true, rtol=1e-5, atol=1e-4)


# Modules as objects


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@KINDS
def test_a_parametrized_weight_is_the_one_used(kind):
    model, ids = made(kind), tokens(2, 9)
    want = expected(model, ids)
    for block in model.blocks:
        for name in "qkvo":
            projection = getattr(block.attention, f"{name}_proj")
            with torch.no_grad():
                projection.weight /= 2
            parametrize.register_parametrization(projection, "weight", Doubled())
    logits, gradients = result(model, ids)
    of_weights = {}
    for name, gradient in gradients.items():
        name, *parametrized = name.split(".parametrizations.weight.original")
        of_weights |= {f"{name}.weight": gradient / 2} if parametrized else {name: gradient}
    assert_same((logits, of_weights), want)


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_loaded(model, *, assign=False):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        kind = "attention" if isinstance(model.blocks[0].attention, Attention) else "rotation"
        other = Model(kind, max_seq_len=ROWS[kind])
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "meta, to_empty": state_loaded,
    "meta, assigned": lambda model: state_loaded(model, assign=True),
    "shared memory": lambda model: copy.deepcopy(model).share_memory(),
    "moving average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@KINDS
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_used_model_is_the_same_model(kind, way):
    model, ids = made(kind), tokens(2, 9)
    want = expected(model, ids)
    result(model, ids)
    other = COPIES[way](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(result(other, ids), want)


@KINDS
@pytest.mark.parametrize("swap", [False, True], ids=["moved", "swapped"])
def test_tables_stay_float32_in_a_bfloat16_model(kind, swap):
    model = made(kind)
    was = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(was)
    exact = copy.deepcopy(model)
    for block in exact.blocks:
        block.attention.rope = Exact(block.attention.rope.layout)
    assert tables(model)
    assert {t.dtype for t in tables(model)} == {torch.float32}
    ids = tokens(2, 64)
    got, want = result(model, ids), result(exact, ids)
    assert got[0].dtype == torch.bfloat16
    assert_same(got, want, rtol=0.02, atol=0.02)


# Two processes


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    worker = [sys.executable, Path(distributed_worker.__file__)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*worker, str(rank), tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not errors, "\n".join(f"{name}:\n{error}" for name, error in errors.items())
