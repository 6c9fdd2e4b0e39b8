"""A user's model, what it should compute, and two processes that compute it together.

Run as ``distributed_worker.py RANK FOLDER``: every scenario has a process group of its own, so
that one that fails does not take the next with it. Errors go to ``FOLDER/RANK.json`` by name.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rope_export import Attention, RotaryEmbedding

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, THETA = 19, 32, 4, 2, 8, 100.0
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 noise of outputs and gradients near 1
ROWS = {"attention": 64, "rotation": None}  # of the table of each kind of model


class Rotated(nn.Module):
    """Attention as users write it, with `RotaryEmbedding.rotate` as its only part of ours."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x):
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in projected)
        q, k = self.rope.rotate(q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False), nn.SiLU(), nn.Linear(WIDTH, WIDTH, bias=False)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Token embedding, blocks, logits. Of ``kind`` "attention" or "rotation"."""

    def __init__(self, kind="attention", *, max_seq_len=None, blocks=2):
        super().__init__()

        def attention():
            layout = "half" if kind == "attention" else "interleaved"
            rope = RotaryEmbedding(HEAD_DIM, theta=THETA, layout=layout, max_seq_len=max_seq_len)
            if kind == "rotation":
                return Rotated(rope)
            return Attention(WIDTH, HEADS, num_kv_heads=KV_HEADS, rope=rope)

        self.checkpointed = False
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(blocks))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


def made(kind="attention", seed=0, max_seq_len=..., **options):
    """A model whose scores spread, so that positions matter."""
    model = Model(kind, max_seq_len=ROWS[kind] if max_seq_len is ... else max_seq_len, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5 * 1.5)
    return model


def tokens(*shape, seed=1):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def turned(x, layout):
    """Rotate ``[B, H, S, D]`` by complex multiplication."""
    half, length = x.shape[-1] // 2, x.shape[-2]
    in_halves = layout == "half"
    pairs = x.unflatten(-1, (2, half)).mT if in_halves else x.unflatten(-1, (half, 2))
    rates = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    product = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return (product.mT if in_halves else product).flatten(-2)


def plain(weights, ids, *, layout="half"):
    """Logits, from weights by name."""
    x = weights["embedding.weight"][ids]
    for name in sorted({n[: len("blocks.0")] for n in weights if n.startswith("blocks.")}):
        normal = rms_norm(x, weights[f"{name}.norms.0.weight"])
        q, k, v = (
            (normal @ weights[f"{name}.attention.{p}_proj.weight"].T)
            .unflatten(-1, (-1, HEAD_DIM))
            .transpose(1, 2)
            for p in "qkv"
        )
        q, k = turned(q, layout), turned(k, layout)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + y.transpose(1, 2).flatten(2) @ weights[f"{name}.attention.o_proj.weight"].T
        normal = rms_norm(x, weights[f"{name}.norms.1.weight"])
        inner = normal @ weights[f"{name}.mlp.0.weight"].T
        x = x + inner * inner.sigmoid() @ weights[f"{name}.mlp.2.weight"].T
    return rms_norm(x, weights["norm.weight"]) @ weights["head.weight"].T


def loss_of(logits, ids):
    """Of predicting the token before."""
    return F.cross_entropy(logits.flatten(0, -2), ids.roll(1, -1).flatten())


def expected(model, ids):
    """Logits and gradients by name, float64."""
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    layout = model.blocks[0].attention.rope.layout
    logits = plain(weights, ids, layout=layout)
    loss_of(logits, ids).backward()
    return logits.detach(), {n: w.grad for n, w in weights.items()}


def result(model, ids, run=None):
    """Logits and gradients of a model, or of what a tool made of it."""
    model.zero_grad()
    logits = (model if run is None else run)(ids)
    loss_of(logits.float(), ids).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same(got, want, **tolerance):
    (logits, gradients), (true_logits, true_gradients) = got, want
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(logits.double(), true_logits.double(), **tolerance)
    assert gradients.keys() == true_gradients.keys()
    for name, true in true_gradients.items():
        torch.testing.assert_close(
            gradients[name].double(), true.double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def tables(model):
    return [t for n, t in model.named_buffers() if n.endswith((".cos", ".sin")) and t is not None]


# Two processes

WORLD, LENGTH = 2, 12
SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows(batch):
    """This process's rows."""
    return batch.chunk(WORLD)[dist.get_rank()]


def assert_rows(model, run, want, **tolerance):
    """A half of the batch here gives a half of the logits, and the gradients of the whole."""
    ids = tokens(4, LENGTH)
    logits, gradients = result(model, rows(ids), run)
    gradients = {n: whole(g) for n, g in gradients.items()}
    assert_same((logits, gradients), (rows(want[0]), want[1]), **tolerance)


def truth(model):
    return expected(model, tokens(4, LENGTH))


@scenario
def replicas_share_their_gradients(kind):
    model = made(kind)
    want = truth(model)
    assert_rows(model, DistributedDataParallel(model), want)


def sharded(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


@scenario
def shards_train_as_the_whole(kind):
    model = made(kind)
    want = truth(model)
    stepped = {n: p.detach().double() - 0.1 * want[1][n] for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(sharded(model).parameters(), lr=0.1)
    assert_rows(model, model, want)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter).double(), stepped[name], **CLOSE)


@scenario
def shards_made_on_meta_take_a_whole_state(kind):
    model = made(kind)
    want = truth(model)
    with torch.device("meta"):
        other = Model(kind, max_seq_len=ROWS[kind])
    sharded(other).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = model.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(other, state, options=options)
    assert_rows(other, other, want)


@scenario
def shards_computed_in_bfloat16_keep_their_tables(kind):
    model = made(kind)
    want = truth(model)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert {t.dtype for t in tables(model)} == {torch.float32}
    assert_rows(model, model, want, rtol=0.1, atol=0.1)


@scenario
def heads_are_divided(kind):
    model = made(kind)
    want = expected(model, ids := tokens(2, LENGTH))
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block.attention, mesh, plan)
        if kind == "attention":
            block.attention.num_heads //= WORLD
            block.attention.num_kv_heads //= WORLD
    logits, gradients = result(model, ids)
    assert_same((logits, {n: whole(g) for n, g in gradients.items()}), want)


def gathered(part, dim):
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


@scenario
def parts_of_a_sequence_turn_where_they_stand(kind):
    attention = made(kind).blocks[0].attention
    x = torch.randn(2, WORLD * LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    start = dist.get_rank() * LENGTH
    part = x[:, start : start + LENGTH]
    with torch.no_grad():
        if kind == "attention":
            q, k, v = attention.heads(part, offset=start)
            k, v = gathered(k, 2), gathered(v, 2)
            places = torch.arange(WORLD * LENGTH)
            visible = places <= places[start : start + LENGTH, None]
            y = attention.merge(attention.attend(q, k, v, visible=visible))
            torch.testing.assert_close(gathered(y, 1), attention(x), **CLOSE)
        q, k = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in (x, x.flip(-1)))
        local = (t[:, :, start : start + LENGTH] for t in (q, k))
        for got, t in zip(attention.rope.rotate(*local, offset=start), (q, k), strict=True):
            true = turned(t.double(), attention.rope.layout)
            torch.testing.assert_close(gathered(got, 2).double(), true, **CLOSE)


def main(rank, folder):
    errors = {}
    for run in SCENARIOS:
        for kind in ROWS:
            name = f"{run.__name__}, {kind}"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{name.replace(' ', '')}",
                rank=rank,
                world_size=WORLD,
                timeout=timedelta(seconds=20),
            )
            try:
                run(kind)
            except Exception:
                errors[name] = traceback.format_exc()
            dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
