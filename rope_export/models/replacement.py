"""`replace_attention`: ours in the place of transformers' own, weights kept."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from rope_export.errors import BadInputError
from rope_export.models.comparison import Comparison, Pair
from rope_export.models.decoder_attention import DecoderAttention, whole_rows
from rope_export.models.keywords import cache_of, transformers_version
from rope_export.models.own_config import give_own_config, way_of
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.geometry import family_of, layers_of
from rope_export.pretrained.layer import Layer
from rope_export.pretrained.weights import pieces
from rope_export.rope.embedding import RotaryEmbedding

_LINEAR = (
    "torch.nn.modules.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replace_attention(
    model: nn.Module, *, family: str | None = None, max_seq_len: int | None = None
) -> list[str]:
    """Make every layer of a transformers decoder use `Attention`, in place.

    What the model computes stays what it was: masks (windows, padding, several sequences in a
    row), caches and ``generate`` are transformers' own. Its config becomes a copy, in which
    attention is ``"sdpa"`` or ``"eager"`` as before, else ``"sdpa"`` where the model has it; the
    object it was made from, and other models made from that, stay as they are. The state dict has
    the same names and tensors. Parameters stay the same objects, so that an optimizer made before
    keeps training them; only where queries, keys and values are one product (Phi-3, GPT-NeoX,
    Falcon), norms are one for each head (StableLM) or heads come from latents (DeepSeek) they
    become parameters of their own, and an optimizer must be made after. Attention weights are no
    output any more.

    Every layer is compared with the module it replaces before that is let go: the decoder is run
    on three rows of up to 21 random tokens (whole, padded, and in calls with a cache), each
    attention in float32 on random hidden states of its own, loud and quiet, whatever the size of
    the model; what follows attention in a layer is not run. Longer windows are compared as windows
    of 8 tokens, and what RoPE does only beyond 21 positions is not seen. A model on the meta device
    has no numbers, and is replaced as its configuration reads.

    Args:
        model: a decoder of transformers, with or without its head, or a model that holds one as
            its language model.
        family: a row of `rope_export.pretrained.families`, instead of that of ``model_type``:
            whose attention the model's is like. Not for a model on the meta device.
        max_seq_len: positions served (default: ``max_position_embeddings``).

    Returns:
        names of the modules replaced, empty if that was done before.

    Raises:
        BadInputError: ``model`` is none of transformers, is compiled, is of no known family or sees
            both ways, its configuration states what bears on attention and the family does not
            read, an attention is not what its configuration says (quantised, sharded, with adapters
            or hooks), or a replacement computes something else than the module it is for. The model
            is as it was.
    """
    decoder = _decoder_of(model)
    content = decoder.config.to_dict()
    try:
        name, row = family_of(content, family)
        geometries = layers_of(content, family)
    except BadInputError as error:
        said = str(error).replace("config.json", "model.config")
        raise BadInputError(f"{type(model).__name__}: {said}") from None
    if not row.causal or not getattr(decoder.config, "is_causal", True):
        raise BadInputError(f"{type(model).__name__} ({name}) sees both ways: it is no decoder")
    where = next(path for path, module in model.named_modules() if module is decoder)
    found: dict[str, nn.Module] = {}
    for geometry in geometries:
        path = row.tensors.home.format(layer=geometry.index).rstrip(".")
        path_of_model = f"{where}.{path}" if where else path
        try:
            found[path_of_model] = decoder.get_submodule(path)
        except AttributeError:
            raise BadInputError(
                f"{type(model).__name__} of transformers {transformers_version()} has no module "
                f"{path_of_model!r}, which family {name} has"
            ) from None
    if all(isinstance(module, DecoderAttention) for module in found.values()):
        return []
    made: dict[str, DecoderAttention] = {}
    ropes: dict[str, RotaryEmbedding] = {}
    for geometry, (path, theirs) in zip(geometries, found.items(), strict=True):
        _check(path, theirs, geometry)
        made[path] = _made(geometry, theirs, max_seq_len, ropes)
    _, _, leaf = row.tensors.home.rstrip(".").partition("{layer}")
    layers = [model.get_submodule(path.removesuffix(leaf)) for path in made]
    pairs = [Pair(path, found[path], made[path], layers[i]) for i, path in enumerate(made)]
    compared = _comparison(model, decoder, pairs, max_seq_len, told=family is not None)
    if compared is not None:
        compared.by_meaning()
    undo = _install(model, decoder, made)
    try:
        if compared is not None:
            compared.as_called(way_of(decoder))
    except BaseException:
        undo()
        raise
    give_own_config(model, decoder)
    return list(made)


def _comparison(
    model: nn.Module,
    decoder: Any,
    pairs: Sequence[Pair],
    max_seq_len: int | None,
    *,
    told: bool,
) -> Comparison | None:
    """Of each attention with what is to replace it; None where there are no numbers."""
    if any(p.device.type == "meta" for p in decoder.parameters()):
        if told:
            raise BadInputError(
                f"{type(model).__name__} is on the meta device, where its attention can't be "
                "compared with that of family: load its weights first"
            )
        return None
    stated = min(pair.ours.geometry.max_position_embeddings for pair in pairs)
    return Comparison(decoder, pairs, max_seq_len or stated)


def _install(
    model: nn.Module, decoder: Any, made: Mapping[str, DecoderAttention]
) -> Callable[[], None]:
    """Put what was made in its places; what is returned takes it out again."""
    before = {path: model.get_submodule(path) for path in made}
    rotary: nn.Module | None = getattr(decoder, "rotary_emb", None)
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    hook = decoder.register_forward_pre_hook(SayWholeRows(names), with_kwargs=True)

    def put(modules: Mapping[str, nn.Module], angles: nn.Module | None) -> None:
        for path, module in modules.items():
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module)
        if rotary is not None:
            decoder.rotary_emb = angles

    def undo() -> None:
        put(before, rotary)
        hook.remove()

    put(made, None if rotary is None else Positions(type(rotary)))
    return undo


class Positions(nn.Module):
    """In the place of a decoder's rotary embedding: hands on the positions themselves.

    Every `DecoderAttention` has its own angles, and those of transformers' modules that follow
    the length of the sequence are kept between calls, which breaks compiled graphs.

    Args:
        own_kind: the class in whose place it is.
    """

    def __init__(self, own_kind: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.own_kind = own_kind

    def forward(self, hidden_states: Tensor, position_ids: Tensor, *_: object) -> Tensor:
        """Return ``position_ids``."""
        del hidden_states
        return position_ids


class SayWholeRows:
    """Before a decoder runs: where it is given neither mask, positions nor past, say so.

    Compiled, transformers cannot tell positions it counted itself from those of several sequences
    in a row, and makes a mask of every query and key to be on the safe side.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(  # noqa: D102
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        told = (given.get("attention_mask"), given.get("position_ids"), cache_of(given))
        if any(one is not None for one in told):
            return None
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return None
        return (), given | {"attention_mask": whole_rows(tokens)}


def _decoder_of(model: nn.Module) -> Any:
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    if "torch.OptimizedModule" in kinds or any(
        module._compiled_call_impl is not None for module in model.modules()
    ):
        raise BadInputError(f"{type(model).__name__} is compiled: replace attention before that")
    if "transformers.PreTrainedModel" not in kinds:
        raise BadInputError(f"model must be a model of transformers, got {type(model).__name__}")
    from transformers import PreTrainedModel

    known = cast(Any, model)
    # Where a head is called "decoder", that is what they take for one.
    for found in (known.get_decoder(), known.base_model):
        if isinstance(found, PreTrainedModel):
            return found
    return known


def _check(path: str, theirs: nn.Module, geometry: Layer) -> None:
    """Check that a module is transformers' own, and has just the parameters its config states."""
    if isinstance(theirs, DecoderAttention):
        raise BadInputError(f"{path} is replaced already, other layers are not")
    for name, module in theirs.named_modules(prefix=path):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if not kind.startswith(("transformers.models.", "torch.nn.modules.")) or (
            isinstance(module, nn.Linear) and kind not in _LINEAR
        ):
            raise BadInputError(
                f"{name} is {kind}, no module of transformers' own: merge adapters, and take "
                "weights that are not quantised"
            )
        if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
            raise BadInputError(f"{name} has hooks, which its replacement would not have")
    wanted = pieces(geometry, FAMILIES[geometry.family].tensors)
    shapes = {name: piece.shape for piece in wanted for name in piece.tensors}
    found = dict(theirs.named_parameters())
    for name in sorted({*shapes, *found}):
        if name not in found or name not in shapes:
            raise BadInputError(
                f"{path} {'lacks' if name not in found else 'has'} {name!r} in transformers "
                f"{transformers_version()}, unlike family {geometry.family} as its config states it"
            )
        tensor = found[name]
        if type(tensor.data) is not Tensor or not tensor.is_floating_point():
            raise BadInputError(
                f"{path}.{name} is {type(tensor.data).__name__} of {tensor.dtype}: quantised and "
                "sharded weights have no place in its replacement"
            )
        if tuple(tensor.shape) != shapes[name]:
            raise BadInputError(
                f"{path}.{name} must be {shapes[name]} by its config, got {tuple(tensor.shape)} "
                f"(transformers {transformers_version()})"
            )


def _made(
    geometry: Layer,
    theirs: nn.Module,
    max_seq_len: int | None,
    ropes: dict[str, RotaryEmbedding],
) -> DecoderAttention:
    with torch.device("meta"):
        block = geometry.attention(max_seq_len)
    device = next(theirs.parameters()).device
    if geometry.rope is not None:
        # Tables can be large: layers that turn alike on one device share one.
        key = json.dumps([asdict(geometry.rope), str(device)], sort_keys=True, default=str)
        if key not in ropes:
            with torch.device(device):
                rope = geometry.rope.embedding(max_seq_len or geometry.max_position_embeddings)
            rope.register_buffer("freqs", rope.freqs, persistent=False)
            ropes[key] = rope
        block.rope = ropes[key]
    return DecoderAttention(block, geometry, theirs)
