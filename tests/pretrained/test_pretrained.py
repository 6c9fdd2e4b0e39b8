"""Checkpoints that are broken, foreign or large: what is wrong is named, and no more is read."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file, save_file

from rope_export import Attention, BadInputError, RotaryEmbedding

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 3
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
ROWS = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": HIDDEN}


def tensors(layers: range = range(LAYERS)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": torch.randn(
            rows, HIDDEN, generator=generator
        )
        for layer in layers
        for name, rows in ROWS.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), made / "model.safetensors")
    return made


def configure(folder: Path, **changes: object) -> None:
    content = CONFIG | changes
    kept = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json: No such file or directory"


def broken_json(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json: not JSON"


def json_of_another_kind(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json: must hold a JSON object, got list"


def no_model_type(folder: Path) -> str:
    configure(folder, model_type=...)
    return "config.json has no 'model_type'"


def unknown_family(folder: Path) -> str:
    configure(folder, model_type="llamma")
    return r"model_type 'llamma' is not known \(near: llama\); .* name it as family: baichuan, "


def no_heads(folder: Path) -> str:
    configure(folder, num_attention_heads=...)
    return "checkpoint/config.json has no 'num_attention_heads'"


def heads_of_another_kind(folder: Path) -> str:
    configure(folder, num_attention_heads="4")
    return "num_attention_heads must be an integer above 0, got '4'"


def heads_that_do_not_divide(folder: Path) -> str:
    configure(folder, num_key_value_heads=3)
    return "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"


def no_layers(folder: Path) -> str:
    configure(folder, num_hidden_layers=1)
    return r"layer must be one of 0 … 0, the model has 1; got 1"


def unknown_scaling(folder: Path) -> str:
    configure(folder, rope_scaling={"rope_type": "magic", "factor": 2.0})
    return r"checkpoint/config.json: rope_parameters\['rope_type'\] must be one of .*, got 'magic'"


def misspelt_scaling(folder: Path) -> str:
    configure(folder, rope_scaling={"rope_type": "linear", "factor": 2.0, "betafast": 1})
    return "rope_parameters of rope_type 'linear' has no field 'betafast'"


def scaling_of_another_kind(folder: Path) -> str:
    configure(folder, rope_scaling=4)
    return "RoPE parameters must be an object, got 4"


def theta_of_another_kind(folder: Path) -> str:
    configure(folder, rope_theta="10000")
    return "rope_theta must be a finite number above 0, got '10000'"


def bias_without_tensors(folder: Path) -> str:
    configure(folder, attention_bias=True)
    return r"has no tensor 'model.layers.1.self_attn.q_proj.bias' \(32,\), which config.json says"


def width_of_another_model(folder: Path) -> str:
    configure(folder, hidden_size=64, head_dim=8)
    return rf"tensor '{Q}' must be \(32, 64\) by config.json, got \(32, 32\)"


def heads_of_another_model(folder: Path) -> str:
    configure(folder, num_key_value_heads=4)
    return r"self_attn.k_proj.weight' must be \(32, 32\) by config.json, got \(16, 32\)"


def missing_tensor(folder: Path) -> str:
    replace_tensors(folder, lambda content: content.pop(Q.replace("q_proj", "v_proj")))
    return "has no tensor 'model.layers.1.self_attn.v_proj.weight'"


def missing_layer(folder: Path) -> str:
    def drop(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if ".1." in name]:
            del content[name]

    replace_tensors(folder, drop)
    return "has no tensor 'layers.1.self_attn.q_proj.weight' under any prefix"


def tensor_of_another_family(folder: Path) -> str:
    extra = {Q.replace("q_proj", "q_norm"): torch.ones(HEAD_DIM)}
    replace_tensors(folder, lambda content: content.update(extra))
    return "tensor 'model.layers.1.self_attn.q_norm.weight' has no place in family llama"


def truncated(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors: not a whole safetensors file"


def not_safetensors(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return "model.safetensors: not a whole safetensors file"


def only_pickled(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin: pickled weights .* are not read; convert them"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "holds no safetensors"


def integers(folder: Path) -> str:
    replace_tensors(folder, lambda content: content.update({Q: content[Q].to(torch.int8)}))
    return f"tensor '{Q}' is I8: quantised weights are not read"


def packed_integers(folder: Path) -> str:
    def pack(content: dict[str, torch.Tensor]) -> None:
        packed = content.pop(Q).to(torch.int32)
        content[Q.replace("weight", "qweight")] = packed

    replace_tensors(folder, pack)
    return r"the attention is quantised \('model.layers.1.self_attn.q_proj.qweight'\)"


def scales(folder: Path) -> str:
    extra = {Q + "_scale_inv": torch.ones(1)}
    replace_tensors(folder, lambda content: content.update(extra))
    return r"the attention is quantised \('model.layers.1.self_attn.q_proj.weight_scale_inv'\)"


def quantised_by_config(folder: Path) -> str:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    return r"quantised \(gptq\); give the checkpoint it was made from"


def float64(folder: Path) -> str:
    replace_tensors(folder, lambda content: content.update({Q: content[Q].double()}))
    return "weights are float64; name a dtype"


def shard(folder: Path) -> dict[str, str]:
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{name.split('.')[2]}.safetensors" for name in content}
    for file in set(names.values()):
        save_file({n: t for n, t in content.items() if names[n] == file}, folder / file)
    return names


def index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def missing_shard(folder: Path) -> str:
    index(folder, {"weight_map": shard(folder)})
    (folder / "model-1.safetensors").unlink()
    return "model-1.safetensors: missing, though model.safetensors.index.json names it"


def index_without_a_map(folder: Path) -> str:
    index(folder, {"metadata": {}})
    return "index.json: has no 'weight_map' object"


def index_of_files_elsewhere(folder: Path) -> str:
    index(folder, {"weight_map": dict.fromkeys(shard(folder), "../elsewhere.safetensors")})
    return "must name files of this folder, got '../elsewhere.safetensors'"


def index_of_another_file(folder: Path) -> str:
    names = shard(folder)
    index(folder, {"weight_map": dict.fromkeys(names, "model-0.safetensors")})
    return f"model-0.safetensors: tensor '{Q}'"


BROKEN = [
    no_config, broken_json, json_of_another_kind, no_model_type, unknown_family, no_heads,
    heads_of_another_kind, heads_that_do_not_divide, no_layers, unknown_scaling, misspelt_scaling,
    scaling_of_another_kind, theta_of_another_kind, bias_without_tensors, width_of_another_model,
    heads_of_another_model, missing_tensor, missing_layer, tensor_of_another_family, truncated,
    not_safetensors, only_pickled, no_weights, integers, packed_integers, scales,
    quantised_by_config, float64, missing_shard, index_without_a_map, index_of_files_elsewhere,
    index_of_another_file,
]  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_what_is_broken_is_named(folder, damage):
    message = damage(folder)
    with pytest.raises(BadInputError, match=message) as raised:
        Attention.from_checkpoint(folder, 1)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "file").touch()
    for name, what in (("nowhere", "does not exist"), ("file", "is no folder")):
        with pytest.raises(BadInputError, match=f"{name}: {what}; a local checkpoint is a folder"):
            RotaryEmbedding.from_config(tmp_path / name)


@pytest.mark.parametrize("layer", [-1, 3, True, "0"])
def test_a_layer_is_a_number_of_one(folder, layer):
    with pytest.raises(BadInputError, match="layer must be one of 0 … 2"):
        Attention.from_checkpoint(folder, layer)


def test_an_unknown_model_is_read_as_a_known_family_when_told(folder):
    expected = Attention.from_checkpoint(folder, 1).state_dict()
    configure(folder, model_type="mine")
    actual = Attention.from_checkpoint(folder, 1, family="llama").state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    with pytest.raises(BadInputError, match=r"family must be one of baichuan, .*; got 'mine'"):
        Attention.from_checkpoint(folder, 1, family="mine")


def test_attention_that_quantisation_spared_is_read(folder):
    spared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    configure(folder, quantization_config=spared)
    assert Attention.from_checkpoint(folder, 1).dtype == torch.float32


def test_weights_are_those_of_the_layer(folder):
    block = Attention.from_checkpoint(folder, 2, dtype="float16", max_seq_len=7)
    weights = tensors()
    for name in "qkvo":
        expected = weights[f"model.layers.2.self_attn.{name}_proj.weight"].half()
        assert torch.equal(getattr(block, f"{name}_proj").weight, expected)
    assert block.rope is not None
    assert block.rope.max_seq_len == 7


@pytest.mark.slow
def test_of_twenty_shards_only_the_bytes_of_the_layer_are_read(folder):
    """Other shards are no safetensors at all, and beside the layer lie 4 GiB."""
    count, picked = 20, 13
    configure(folder, num_hidden_layers=count)
    (folder / "model.safetensors").unlink()
    content = tensors(range(picked, picked + 1))
    header, offset, data = {}, 0, []
    for name, tensor in content.items():
        raw = tensor.numpy().tobytes()
        span = [offset, offset + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        offset += len(raw)
        data.append(raw)
    huge = "model.layers.13.mlp.up_proj.weight"
    shape = [2**15, 2**15]
    header[huge] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 2**32]}
    encoded = json.dumps(header).encode()
    with (folder / "model-13.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + b"".join(data))
        file.truncate(8 + len(encoded) + offset + 2**32)  # a hole: nothing is on the disk
    names = dict.fromkeys(header, "model-13.safetensors")
    for layer in set(range(count)) - {picked}:
        file = f"model-{layer}.safetensors"
        (folder / file).write_text("not to be read")
        names |= {name.replace(".13.", f".{layer}."): file for name in content}
    index(folder, {"weight_map": names})
    program = """if True:
        import resource, sys
        import torch
        from rope_export import Attention
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        block = Attention.from_checkpoint(sys.argv[1], 13)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 500_000, f"{after - before} KiB more"
        print(block.q_proj.weight.double().sum().item())
    """
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = content["model.layers.13.self_attn.q_proj.weight"].double().sum().item()
    assert float(result.stdout) == expected


# The command


@pytest.mark.usefixtures("folder")
def test_a_layer_is_exported_proven_and_says_where_it_came_from(cli_here, tmp_path):
    result = cli_here("block", "--from", "checkpoint", "--layer", "2", "--seq", "24")
    assert result.returncode == 0, result.stderr
    assert "checkpoint   checkpoint, layer 2 (llama), hidden 32, 4 query and 2" in result.stdout
    assert "PASSED" in result.stdout
    out = tmp_path / "exported/checkpoint-layer-2"
    options = json.loads((out / "config.json").read_text())["options"]
    assert options["checkpoint"] == "checkpoint"
    assert (options["layer"], options["family"], options["max_seq_len"]) == (2, "llama", 24)
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert str(tmp_path).encode() not in (out / "model.onnx").read_bytes()
    assert cli_here("validate", str(out)).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "checkpoint", "--layer", "9"), "--layer must be one of 0 … 2"),
        (("--from", "checkpoint", "--family", "gpt2"), "--family must be one of"),
        (("--from", "checkpoint", "--heads", "4"), "--heads is for the checkpoint to say"),
        (("--layer", "1"), "--layer 1 is of a checkpoint: give --from too"),
        (("--from", "nowhere"), "nowhere: does not exist"),
        (("--from", "checkpoint", "--dtype", "bfloat16"), "no bfloat16 kernel"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_bad_input_is_one_line_exit_2_and_nothing_written(cli_here, tmp_path, options, message):
    result = cli_here("block", *options)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def in_bfloat16(folder: Path) -> dict[str, torch.Tensor]:
    content = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    save_file(content, folder / "model.safetensors")
    return content


def test_bfloat16_weights_are_widened_exactly_where_a_provider_has_none(cli_here, folder, tmp_path):
    content = in_bfloat16(folder)
    result = cli_here("block", "--from", "checkpoint", "--seq", "24", "--out", "wide")
    assert result.returncode == 0, result.stderr
    note = "weights are bfloat16 and were widened to float32, exactly: onnxruntime has no bfloat16"
    assert note in result.stdout
    assert note in (tmp_path / "wide/report.md").read_text()
    report = json.loads((tmp_path / "wide/report.json").read_text())
    assert report["passed"]
    assert any(note in said for said in report["notes"])
    assert json.loads((tmp_path / "wide/config.json").read_text())["graph"]["dtype"] == "float32"
    graph = onnx.load(tmp_path / "wide/model.onnx").graph
    held = {onnx.numpy_helper.to_array(t).astype("<f4").tobytes() for t in graph.initializer}
    weight = content["model.layers.0.self_attn.o_proj.weight"].float()
    assert {weight.numpy().tobytes(), weight.T.contiguous().numpy().tobytes()} & held
    # Named, it is refused as ever; what was made for CUDA keeps it.
    refused = cli_here(
        *("block", "--from", "checkpoint", "--dtype", "bfloat16", "--provider", "cpu")
    )
    assert refused.returncode == 2
    assert "no bfloat16 kernel" in refused.stderr
    kept = cli_here(
        *("block", "--from", "checkpoint", "--seq", "24", "--provider", "cuda", "--no-validate"),
        *("--out", "kept"),
    )
    assert kept.returncode == 0, kept.stderr
    assert json.loads((tmp_path / "kept/config.json").read_text())["graph"]["dtype"] == "bfloat16"


def test_tensors_of_several_dtypes_are_kept_in_the_widest(folder):
    content = in_bfloat16(folder)
    exact = torch.randn(KV_HEADS * HEAD_DIM, HIDDEN)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(content | {name: exact}, folder / "model.safetensors")
    block = Attention.from_checkpoint(folder, 1)
    assert block.dtype == torch.float32
    assert torch.equal(block.k_proj.weight, exact)
    assert torch.equal(block.q_proj.weight, content[Q].float())
