"""Which tensors of a checkpoint make which parameters of `Attention`, and reading them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.pretrained.checkpoint import Checkpoint, naming
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.family import Tensors
from rope_export.pretrained.geometry import layer_of
from rope_export.pretrained.layer import Layer

if TYPE_CHECKING:
    from rope_export.attention.block import Attention

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEPT = ("float32", "float16", "bfloat16")
# What quantised checkpoints put beside, or in the place of, a weight.
_QUANTISED = (
    "qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_packed",
    "weight.absmax", "weight.quant_state", "SCB", "weight_blocks", "weight_scales",
)  # fmt: skip
# Where the language model is, the likeliest first, if several places have such a layer.
_PREFIXES = ("model.", "", "transformer.", "model.language_model.", "language_model.model.")


@dataclass(frozen=True)
class Piece:
    """One parameter and the tensors it is made of.

    Attributes:
        parameter: its name in `Attention`.
        tensors: names in the checkpoint, without the prefix of the layer.
        shape: what each tensor must be.
        make: the parameter from the tensors.
    """

    parameter: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Sequence[Tensor]], Tensor] = lambda found: found[0]

    @property
    def keeps_rows(self) -> bool:
        """Whether the parameter is one tensor as it is."""
        numbers = self.row_numbers()
        return len(numbers) == 1 and torch.equal(self.make(numbers), numbers[0])

    def row_numbers(self) -> list[Tensor]:
        """In the place of the tensors, the numbers of their rows, counted through all of them."""
        count, tail = self.shape[0], [1] * (len(self.shape) - 1)
        numbers = torch.arange(count * len(self.tensors), device="cpu")
        return list(numbers.reshape(-1, count, *tail))


def load_attention(
    path: str | Path,
    layer: int = 0,
    *,
    family: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq_len: int | None = None,
) -> Attention:
    """Build one layer's attention with its weights; nothing else of the checkpoint is read.

    Arguments and errors as of `Attention.from_checkpoint`.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype is not None and dtype not in _KEPT:
        raise BadInputError(f"dtype must be one of {', '.join(_KEPT)}, got {dtype!r}")
    checkpoint, geometry, home, wanted = _found(path, layer, family)
    target = getattr(torch, dtype) if dtype else _stored(checkpoint, home, wanted)
    if target == torch.float64:
        raise BadInputError(
            f"{checkpoint.path}: weights are float64; name a dtype of {', '.join(_KEPT)}"
        )
    read = {
        name: checkpoint.tensor(home + name)
        for name in dict.fromkeys(name for piece in wanted for name in piece.tensors)
    }
    state = {
        piece.parameter: piece.make([read[n] for n in piece.tensors]).to(target).contiguous()
        for piece in wanted
    }
    with naming(checkpoint.path):
        with torch.device("meta"):
            block = geometry.attention(max_seq_len)
        if geometry.rope is not None:
            block.rope = geometry.rope.embedding(max_seq_len or geometry.max_position_embeddings)
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, torch.nn.Parameter(value))
    return block.eval()


def stored_dtype(path: str | Path, layer: int = 0, *, family: str | None = None) -> torch.dtype:
    """The dtype `load_attention` keeps: the widest of the layer's tensors; none of them is read.

    Arguments and errors as of `Attention.from_checkpoint`.
    """
    checkpoint, _, home, wanted = _found(path, layer, family)
    return _stored(checkpoint, home, wanted)


def _found(
    path: str | Path, layer: int, family: str | None
) -> tuple[Checkpoint, Layer, str, list[Piece]]:
    """A layer's geometry, what its tensors' names begin with, and what its parameters are."""
    checkpoint = Checkpoint(path)
    with naming(checkpoint.path):
        geometry = layer_of(checkpoint.config, layer, family)
    names = FAMILIES[geometry.family].tensors
    wanted = pieces(geometry, names)
    home = names.home.format(layer=layer)
    home = _prefix(checkpoint, home, wanted[0].tensors[0]) + home
    _refuse_quantised(checkpoint, home)
    _check(checkpoint, home, wanted, names, geometry)
    return checkpoint, geometry, home, wanted


def _stored(checkpoint: Checkpoint, home: str, wanted: Iterable[Piece]) -> torch.dtype:
    stored = [_FLOATS[checkpoint.dtype(home + n)] for piece in wanted for n in piece.tensors]
    return functools.reduce(torch.promote_types, stored)


def pieces(layer: Layer, names: Tensors) -> list[Piece]:
    """What the parameters of ``layer`` are made of."""
    found = _latent(layer) if layer.latent else _direct(layer, names)
    width = layer.num_heads * layer.value_head_dim
    found.append(Piece("o_proj.weight", (f"{names.o}.weight",), (layer.hidden_size, width)))
    if layer.out_bias:
        found.append(Piece("o_proj.bias", (f"{names.o}.bias",), (layer.hidden_size,)))
    if layer.qk_norm is not None:
        for ours, theirs, heads in (
            ("q_norm", names.q_norm, layer.num_heads),
            ("k_norm", names.k_norm, layer.num_kv_heads),
        ):
            shape = {
                "head": (layer.head_dim,),
                "each_head": (heads, layer.head_dim),
                "projection": (heads * layer.head_dim,),
            }[layer.qk_norm.over]
            for leaf in ("weight", "bias") if layer.qk_norm.bias else ("weight",):
                if "*" in theirs:
                    one = tuple(f"{theirs}.{leaf}".replace("*", str(i)) for i in range(heads))
                    found.append(Piece(f"{ours}.{leaf}", one, shape[1:], _stack))
                else:
                    found.append(Piece(f"{ours}.{leaf}", (f"{theirs}.{leaf}",), shape))
    if layer.sinks:
        found.append(Piece("sinks", (names.sinks,), (layer.num_heads,)))
    return found


def unmade(made: Iterable[Piece], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that parameters were made of, by name: `Piece.make` undone.

    Every piece moves whole rows, none of them twice, so numbers of rows say where each came from.
    """
    found: dict[str, Tensor] = {}
    for piece in made:
        parameter = parameters[piece.parameter]
        if piece.keeps_rows:
            found[piece.tensors[0]] = parameter
            continue
        count = piece.shape[0]
        came_from = piece.make(piece.row_numbers()).reshape(-1)
        rows = parameter.detach().reshape(-1, *piece.shape[1:])
        for index, name in enumerate(piece.tensors):
            if name not in found:
                found[name] = rows.new_empty(piece.shape)
            chosen = (came_from // count == index).nonzero().reshape(-1)
            places = (came_from[chosen] % count).to(rows.device)
            found[name].index_copy_(0, places, rows.index_select(0, chosen.to(rows.device)))
    return found


def _stack(found: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(found))


def _direct(layer: Layer, names: Tensors) -> list[Piece]:
    counts = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    rows = [count * layer.head_dim for count in counts]
    found = []
    for leaf, tail in (("weight", (layer.hidden_size,)), ("bias", ())):
        if leaf == "bias" and not layer.qkv_bias:
            continue
        for i, (ours, theirs) in enumerate(zip("qkv", (names.q, names.k, names.v), strict=True)):
            parameter = f"{ours}_proj.{leaf}"
            if names.qkv is None:
                found.append(Piece(parameter, (f"{theirs}.{leaf}",), (rows[i], *tail)))
            else:
                take = _stacked(rows, i) if names.order == "stacked" else _grouped(layer, i)
                found.append(Piece(parameter, (f"{names.qkv}.{leaf}",), (sum(rows), *tail), take))
    return found


def _stacked(rows: list[int], which: int) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda found: found[0].split(rows)[which]


def _grouped(layer: Layer, which: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Rows of each group: its queries, its key, its value."""
    queries = layer.num_heads // layer.num_kv_heads
    place = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, None))[which]

    def take(found: Sequence[Tensor]) -> Tensor:
        groups = rearrange(found[0], "(g n d) ... -> g n d ...", n=queries + 2, d=layer.head_dim)
        return rearrange(groups[:, place], "g n d ... -> (g n d) ...")

    return take


def _latent(layer: Layer) -> list[Piece]:
    """DeepSeek-V2's names; each head's rotated part moves to its front."""
    spec = layer.latent
    assert spec is not None
    assert layer.rope is not None
    heads, turning = layer.num_heads, layer.rope.dim
    plain = layer.head_dim - turning
    hidden = layer.hidden_size

    def rotated_first(found: Sequence[Tensor]) -> Tensor:
        rows = rearrange(found[0], "(h d) r -> h d r", h=heads)
        return torch.cat((rows[:, plain:], rows[:, :plain]), dim=1).flatten(0, 1)

    def part(place: slice) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda found: rearrange(found[0], "(h d) r -> h d r", h=heads)[:, place].flatten(
            0, 1
        )

    queries = (heads * layer.head_dim,)
    found = []
    if spec.q_rank is None:
        found.append(
            Piece("latent.q_proj.weight", ("q_proj.weight",), (*queries, hidden), rotated_first)
        )
    else:
        found += [
            Piece("latent.q_a_proj.weight", ("q_a_proj.weight",), (spec.q_rank, hidden)),
            Piece("latent.q_a_norm.weight", ("q_a_layernorm.weight",), (spec.q_rank,)),
            Piece(
                "latent.q_b_proj.weight",
                ("q_b_proj.weight",),
                (*queries, spec.q_rank),
                rotated_first,
            ),
        ]
    both = (heads * (plain + layer.value_head_dim), spec.kv_rank)
    mixed = spec.kv_rank + turning
    found += [
        Piece("latent.kv_a_proj.weight", ("kv_a_proj_with_mqa.weight",), (mixed, hidden)),
        Piece("latent.kv_a_norm.weight", ("kv_a_layernorm.weight",), (spec.kv_rank,)),
        Piece("latent.k_b_proj.weight", ("kv_b_proj.weight",), both, part(slice(0, plain))),
        Piece("latent.v_b_proj.weight", ("kv_b_proj.weight",), both, part(slice(plain, None))),
    ]
    if spec.bias:
        if spec.q_rank is not None:
            found.append(Piece("latent.q_a_proj.bias", ("q_a_proj.bias",), (spec.q_rank,)))
        found.append(Piece("latent.kv_a_proj.bias", ("kv_a_proj_with_mqa.bias",), (mixed,)))
    return found


def _prefix(checkpoint: Checkpoint, home: str, first: str) -> str:
    """What comes before the layer's name."""
    ends = [home + first, *(home + first.removesuffix("weight") + q for q in _QUANTISED)]
    found = {
        name.removesuffix(end)
        for name in checkpoint.files
        for end in ends
        if name == end or name.endswith("." + end)
    }
    for prefix in _PREFIXES:
        if prefix in found:
            return prefix
    if len(found) == 1:
        return found.pop()
    if found:
        raise BadInputError(
            f"{checkpoint.path}: {', '.join(sorted(p + home for p in found))} are all such layers; "
            "keep one model in the folder"
        )
    near = next((n for n in checkpoint.files if n.endswith(".weight")), "none")
    raise BadInputError(
        f"{checkpoint.path}: has no tensor {home + first!r} under any prefix; it has, for example, "
        f"{near!r}"
    )


def _refuse_quantised(checkpoint: Checkpoint, home: str) -> None:
    for name in checkpoint.files:
        if name.startswith(home) and name.endswith(tuple("." + q for q in _QUANTISED)):
            raise BadInputError(
                f"{checkpoint.path}: the attention is quantised ({name!r}); give the checkpoint it "
                "was made from"
            )
    stated = checkpoint.config.get("quantization_config")
    if not isinstance(stated, dict):
        return
    spared = [
        str(part)
        for key in ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
        for part in stated.get(key) or ()
    ]
    layer = home.rstrip(".")
    if not any(_covers(part, layer) for part in spared):
        raise BadInputError(
            f"{checkpoint.path}: quantised ({stated.get('quant_method', 'quantization_config')}); "
            "give the checkpoint it was made from"
        )


def _covers(pattern: str, module: str) -> bool:
    """Whether a pattern of spared modules, perhaps with ``*``, has all of ``module``."""
    import fnmatch

    plain = pattern.removeprefix("re:").replace(".*", "*").rstrip(".*")
    return fnmatch.fnmatch(module, plain) or fnmatch.fnmatch(module, f"*{plain}")


def _check(
    checkpoint: Checkpoint, home: str, wanted: list[Piece], names: Tensors, layer: Layer
) -> None:
    """Check that the layer has just the tensors that its configuration states, in their shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        name: piece.shape for piece in wanted for name in piece.tensors
    }
    for name, shape in shapes.items():
        if home + name not in checkpoint.files:
            raise BadInputError(
                f"{checkpoint.path}: has no tensor {home + name!r} {shape}, which config.json "
                f"says family {layer.family} has"
            )
        got = checkpoint.shape(home + name)
        if got != shape:
            raise BadInputError(
                f"{checkpoint.path}: tensor {home + name!r} must be {shape} by config.json, "
                f"got {got}"
            )
        dtype = checkpoint.dtype(home + name)
        if dtype not in _FLOATS:
            raise BadInputError(
                f"{checkpoint.path}: tensor {home + name!r} is {dtype}: quantised weights are not "
                "read; give the checkpoint it was made from"
            )
    known = set(shapes) | set(names.others) | {"rotary_emb.inv_freq"}
    for name in checkpoint.files:
        if name.startswith(home) and name.removeprefix(home) not in known:
            raise BadInputError(
                f"{checkpoint.path}: tensor {name!r} has no place in family {layer.family} as "
                "config.json states it"
            )
