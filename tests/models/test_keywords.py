"""What transformers hands attention by keyword acts, is of no account, or is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from caches import cache_in, caching, counted
from decoders import assert_close, original, replaced, tokens, whole
from torch import Tensor
from transformers import DynamicCache, FalconH1Config, FalconH1ForCausalLM

from rope_export import BadInputError, replace_attention
from rope_export.models.decoder_with_cache import DecoderWithCache
from rope_export.models.keywords import CACHE_NAMES

# Of attention, in releases 5.0 to 5.24.
CACHES = ("past_key_values", "layer_past", "cache")


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_read_and_written_by_each_of_its_names(name):
    attention = replaced("Llama 3").model.layers[1].self_attn
    x = torch.randn(2, 9, 64)
    places = torch.arange(9).expand(2, -1)
    whole_pass, _ = attention(x, position_ids=places)
    cache = DynamicCache()
    parts = [
        attention(x[:, part], position_ids=places[:, part], **{name: cache})[0]
        for part in (slice(6), slice(6, 7), slice(7, 8), slice(8, 9))
    ]
    assert cache.get_seq_length(1) == 9
    assert_close(torch.cat(parts, dim=1), whole_pass)
    assert {name, *CACHES} == set(CACHE_NAMES)


PACKED = {
    "cu_seq_lens_q": torch.tensor([0, 13, 24], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 13, 24], dtype=torch.int32),
    "max_length_q": 13,
    "max_length_k": 13,
    "seq_idx": torch.zeros(1, 24, dtype=torch.int32),
}
UNKNOWN: dict[str, Any] = {"position_bias": torch.zeros(1, 1, 24, 24), "head_mask": torch.ones(4)}


@pytest.mark.parametrize("name", [*PACKED, *UNKNOWN, "is_causal", "a_new_one"])
@pytest.mark.parametrize("model", ["Qwen3", "Gemma 2"])
def test_what_would_change_attention_and_is_not_done_is_refused_by_name(name, model):
    value = ({"is_causal": False, "a_new_one": "x"} | PACKED | UNKNOWN)[name]
    said = re.escape(f"transformers {transformers.__version__} hands attention {name}")
    why = "position_ids" if name in PACKED else "later tokens" if name == "is_causal" else "leave"
    with pytest.raises(BadInputError, match=f"^{said}.*{why}"):
        replaced(model)(tokens(24, batch=1), **{name: value})


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-NeoX", "DeepSeek-V3"])
def test_what_has_no_bearing_on_attention_is_taken(name):
    given: dict[str, Any] = {
        "num_items_in_batch": torch.tensor(3),
        "output_hidden_states": True,
        "output_attentions": False,
        "is_causal": True,
        "use_cache": False,
        "cu_seq_lens_q": None,
        "a_new_one": None,
    }
    theirs = original(name)(tokens(), **given)
    ours = replaced(name)(tokens(), **given)
    assert_close(ours.logits, theirs.logits)
    for actual, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_rows_of_several_sequences_are_told_apart_by_positions_with_or_without_lengths():
    apart = torch.cat((torch.arange(13), torch.arange(11)))[None]
    ids = tokens(24, batch=1)
    model = replaced("Mistral")
    packed = model(ids, position_ids=apart, use_cache=False).logits
    for part in (slice(13), slice(13, 24)):
        assert_close(packed[:, part], original("Mistral")(ids[:, part]).logits)
    with pytest.raises(BadInputError, match="cu_seq_lens_q"):
        model(ids, position_ids=apart, use_cache=False, cu_seq_lens_q=PACKED["cu_seq_lens_q"])


@torch.no_grad()
def test_a_cache_of_fixed_length_is_filled_where_it_should_be():
    def served(model: Any) -> Tensor:
        cache, found = transformers.StaticCache(config=model.config, max_cache_len=40), []
        for start, end in ((0, 9), (9, 10), (10, 14), (14, 24)):
            places = torch.arange(start, end)
            result = model(
                tokens()[:, start:end],
                position_ids=places.expand(2, -1),
                **caching(model, cache),
                **counted(model, places),
            )
            assert cache_in(result) is cache
            found.append(result.logits)
        return torch.cat(found, dim=1)

    for name in ("Llama 3", "Gemma 2"):
        assert_close(served(replaced(name)), whole(original(name), None))


def test_models_that_keep_more_than_keys_and_values_are_refused_as_graphs():
    config = FalconH1Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32,
        mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, pad_token_id=0,
    )  # fmt: skip
    model = FalconH1ForCausalLM(config).eval()
    replace_attention(model, family="llama")
    with pytest.raises(BadInputError, match=r"asks this model's cache for '\w+'"):
        DecoderWithCache(model)(tokens())
