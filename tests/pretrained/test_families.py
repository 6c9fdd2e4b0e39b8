"""Checkpoints of known families, read without transformers, against the models made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import checkpoints
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from checkpoints import CASES, HEADS, LONGEST, SERVED, WHOLE, WRITTEN, Definition, Oracle
from selection import slow_unless
from torch import Tensor
from transformers import AutoModelForCausalLM

from rope_export import Attention, export
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.geometry import layer_of
from rope_export.runtime import Decoder

pytestmark = [
    # torch's exporter copies its own deprecated LeafSpec.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # It says so for every axis that two inputs share.
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]
EVERY = [*CASES, *WRITTEN]
CAUSAL = [name for name in EVERY if name not in CASES or CASES[name].causal]
Oracles = Callable[[str], "Oracle | Definition"]


@pytest.fixture(scope="module")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Checkpoints, each written once."""

    @cache
    def written(name: str) -> Oracle | Definition:
        folder = tmp_path_factory.mktemp("checkpoint")
        if name in CASES:
            return Oracle(CASES[name], folder)
        return Definition(WRITTEN[name], folder)

    return written


def ours_of(oracle: Oracle | Definition, layer: int) -> Attention:
    given = {"family": oracle.case.family, "max_seq_len": LONGEST}
    block = Attention.from_checkpoint(oracle.folder, layer, **given)
    return block.eval().requires_grad_(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    deviation = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert deviation <= 2e-6  # float32, over scores of up to 20


def positions_of(oracle: Oracle | Definition, end: int, count: int) -> Tensor | None:
    return checkpoints.positions(end, count) if oracle.case.axes else None


def test_every_family_has_a_proof():
    proven = {case.model_type for case in CASES.values()}
    proven |= {w.family or w.config["model_type"] for w in WRITTEN.values()}
    assert sorted(FAMILIES) == sorted(proven)


@pytest.mark.parametrize("name", EVERY)
def test_a_full_pass_is_theirs(name, oracle_of):
    oracle = oracle_of(name)
    for layer, [(x, expected)] in enumerate(oracle.run((WHOLE,), cached=False)):
        actual = ours_of(oracle, layer)(x, position_ids=positions_of(oracle, 0, WHOLE))
        assert_close(actual, expected)


@pytest.mark.parametrize("steps", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("name", CAUSAL)
def test_calls_with_a_cache_are_theirs(name, steps, oracle_of):
    oracle = oracle_of(name)
    for layer, calls in enumerate(oracle.run(steps, cached=True)):
        block = ours_of(oracle, layer)
        past, end = block.empty_cache(checkpoints.BATCH), 0
        for x, expected in calls:
            given = positions_of(oracle, end, x.shape[1])
            actual, past = block(x, past=past, position_ids=given)
            assert_close(actual, expected)
            end += x.shape[1]


GRAPHS = [
    (target, name, layer)
    for name, case in CASES.items()
    for layer in case.exported
    for target in ("ort", *case.targets)
]


GRAPHS += [
    ("ort", name, 0) for name in ("Baichuan 7B", "ChatGLM3, 128k", "ChatGLM2, 32k", "InternLM2")
]


# As unlike each other as families are.
BY_DEFAULT = {
    *("gpt-oss", "DeepSeek-V2-Lite", "Qwen3", "Phi-3, LongRoPE", "Gemma 2", "RoFormer"),
}


def traits_of(oracle: Oracle | Definition, layer: int) -> set[str]:
    """What a graph of that layer must be able to do."""
    content = json.loads((oracle.folder / "config.json").read_text())
    made = layer_of(content, layer, oracle.case.family)
    group, norm, rope = made.num_heads // made.num_kv_heads, made.qk_norm, made.rope
    found = {
        {1: "multi-head", HEADS: "multi-query"}.get(group, "grouped"),
        "causal" if made.causal else "bidirectional",
        *(name for name in ("window", "softcap", "sinks", "latent") if getattr(made, name)),
        *(name for name in ("qkv_bias", "out_bias") if getattr(made, name)),
    }
    if made.scale != made.head_dim**-0.5:
        found.add("scale")
    if norm is not None:
        found.add(f"{norm.kind} norm over {norm.over}, {norm.bias=}, {norm.unit_offset=}")
    if made.latent is not None:
        found.add("latent queries" if made.latent.q_rank else "queries at once")
    if rope is None:
        return found | {"no RoPE"}
    table = rope.embedding(LONGEST)
    found |= {rope.layout, "whole head" if rope.dim == made.head_dim else "part of a head"}
    found |= {f"{table.axes} axes", f"{table.found.beyond is None}, {table.found.stretch is None}"}
    return found | ({"magnitude"} if table.attention_factor != 1 else set())


def test_every_family_is_in_some_graph(oracle_of):
    made = {oracle_of(name).case.family or model_type_of(oracle_of(name)) for _, name, _ in GRAPHS}
    assert sorted(made) == sorted(FAMILIES)


def model_type_of(oracle: Oracle | Definition) -> str:
    content = json.loads((oracle.folder / "config.json").read_text())
    return str(content["model_type"])


def test_whatever_a_family_needs_is_in_some_graph(oracle_of):
    exported = {(name, layer) for _, name, layer in GRAPHS}
    needed = {
        (name, layer): traits_of(oracle_of(name), layer)
        for name in EVERY
        for layer in range(CASES[name].layers if name in CASES else 1)
    }
    done = set().union(*(traits for where, traits in needed.items() if where in exported))
    assert {where: traits - done for where, traits in needed.items() if traits - done} == {}


@pytest.mark.parametrize(
    ("target", "name", "layer"),
    slow_unless(lambda target, name, _: target == "ort" and name in BY_DEFAULT, GRAPHS),
)
def test_graphs_are_theirs(target, name, layer, oracle_of, tmp_path):
    oracle = oracle_of(name)
    folder, cached = tmp_path / "block", name in CAUSAL
    plan = {"target": target, "max_seq_len": LONGEST, "position_ids": bool(oracle.case.axes)}
    result = export(ours_of(oracle, layer), folder, cache=cached, **plan)
    if not cached:
        [(x, expected)] = oracle.run((WHOLE,), cached=False)[layer]
        session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
        (actual,) = session.run(None, {"hidden_states": x.numpy()})
        assert_close(torch.from_numpy(actual), expected)
        return
    decoder = Decoder.open(folder, batch=checkpoints.BATCH)
    for steps in SERVED.values():
        decoder.reset()
        end = 0
        for x, expected in oracle.run(steps, cached=True)[layer]:
            count = x.shape[1]
            given = positions_of(oracle, end, count)
            serve = decoder.decode if count == 1 else decoder.prefill
            ids = None if given is None else given.numpy()
            actual = serve(x.detach().numpy(), position_ids=ids)
            assert_close(torch.from_numpy(np.asarray(actual)), expected)
            end += count


# Files.


def rewritten(
    oracle: Oracle | Definition, folder: Path, rename: Callable[[str], str], dtype: torch.dtype
) -> Path:
    """The same checkpoint, its tensors by other names or in another dtype."""
    weights: dict[str, Tensor] = {}
    for file in oracle.folder.glob("*.safetensors"):
        weights |= safetensors.torch.load_file(file)
    folder.mkdir()
    safetensors.torch.save_file(
        {rename(name): weight.to(dtype) for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_bytes((oracle.folder / "config.json").read_bytes())
    return folder


def assert_same_weights(actual: Attention, expected: Attention) -> None:
    own, its = actual.state_dict(), expected.state_dict()
    assert own.keys() == its.keys()
    assert all(torch.equal(own[name], its[name]) for name in its)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("Llama 2", ("", "model.")),
        ("GPT-NeoX", ("", "gpt_neox.")),
        ("GPT-J", ("", "transformer.")),
        ("Falcon, multi-query", ("", "transformer.")),
        ("RoFormer", ("", "roformer.")),
        ("Gemma 3", ("", "model.", "language_model.model.", "model.language_model.")),
        ("Qwen2-VL", ("", "model.", "model.language_model.")),
    ],
)
def test_weights_are_found_by_every_name_they_have_had(name, prefixes, oracle_of, tmp_path):
    oracle = oracle_of(name)
    expected = ours_of(oracle, 1)
    start = re.compile(r"^.*?(?=(?:encoder\.layer|layers|h)\.\d)")
    for number, prefix in enumerate(prefixes):
        folder = rewritten(
            oracle,
            tmp_path / str(number),
            lambda key, prefix=prefix: key if "vis" in key else start.sub(prefix, key),
            torch.float32,
        )
        read = Attention.from_checkpoint(folder, 1, max_seq_len=LONGEST)
        assert_same_weights(read, expected)


def test_weights_are_found_in_shards(oracle_of, tmp_path):
    oracle = oracle_of("Qwen2")
    model = AutoModelForCausalLM.from_pretrained(oracle.folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for layer in range(2):
        read = Attention.from_checkpoint(tmp_path, layer, max_seq_len=LONGEST)
        assert_same_weights(read, ours_of(oracle, layer))


def test_weights_keep_their_dtype_or_take_the_one_asked_for(oracle_of, tmp_path):
    oracle = oracle_of("Gemma 2")  # whose norms could be folded in too early
    half = rewritten(oracle, tmp_path / "half", str, torch.bfloat16)
    read = Attention.from_checkpoint(half)
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    wide = Attention.from_checkpoint(half, dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, weight in read.named_parameters():
        assert torch.equal(weight.float(), wide.get_parameter(name))
