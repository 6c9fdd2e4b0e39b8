"""What transformers hands an attention by keyword, and what of it bears on what is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rope_export.errors import BadInputError

# The cache, in the order in which releases came to call it so: of the families named after their
# remote code, up to 5.23, and since.
CACHE_NAMES = ("layer_past", "past_key_values", "cache")

# Handed down to every layer by one release of transformers or another, and without effect on what
# PyTorch's own attention computes there either.
_WITHOUT_EFFECT = {
    "use_cache": "whether there is a cache is seen from the cache",
    "output_attentions": "the weights of attention are no output any more",
    "output_hidden_states": "collected by the decoder",
    "output_router_logits": "collected by the decoder",
    "return_dict": "the form of what the model returns",
    "num_items_in_batch": "divides the loss",
    "token_type_ids": "of tokenizers; where they matter, embeddings or masks are made with them",
    "mm_token_type_ids": "of processors, as token_type_ids",
}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def transformers_version() -> str:
    """Of the installed package, which whoever calls this has a model of."""
    import transformers

    return str(transformers.__version__)


def cache_keyword(model: nn.Module) -> str:
    """What the ``forward`` of a model calls its cache."""
    taken = inspect.signature(type(model).forward).parameters
    found = [name for name in CACHE_NAMES if name in taken]
    if not found:
        raise BadInputError(
            f"{type(model).__name__} of transformers {transformers_version()} takes no cache: its "
            f"forward has none of {', '.join(CACHE_NAMES)}"
        )
    return found[-1]


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments, by whatever name; None where there is none."""
    there = set(given.keys())  # an output of transformers warns when it is asked for an old name
    for name in CACHE_NAMES:
        if name in there and given[name] is not None:
            return given[name]
    return None


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Check arguments that an attention does not take by name.

    Raises:
        BadInputError: one would change what transformers' attention computes, or nobody knows.
    """
    for name, value in given.items():
        if value is None or name in _WITHOUT_EFFECT or name in CACHE_NAMES:
            continue
        if name == "is_causal" and value is True:
            continue
        said = f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name
        if isinstance(value, Tensor):
            said = f"{name} of {tuple(value.shape)}"
        if name == "is_causal":
            why = "a replaced attention hides later tokens"
        elif name in _PACKED:
            why = (
                "sequences in one row are told apart by position_ids from 0 on in each, given "
                "without attention_mask and cache: leave it out"
            )
        else:
            why = "a replaced attention does not know what it means: leave it out"
        raise BadInputError(
            f"transformers {transformers_version()} hands attention {said}; {why}, or keep the "
            "model's own attention"
        )
