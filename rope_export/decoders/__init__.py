"""Decoders of transformers go on with `Attention`: in training, in generation and in graphs.

transformers keeps what it is good at, masks and caches, and hands them to every layer as it did
before; what is replaced is the attention itself and where it gets its angles from.
"""

from rope_export.decoders.attention import DecoderAttention as DecoderAttention
from rope_export.decoders.replacement import replace_attention as replace_attention
from rope_export.decoders.with_cache import DecoderWithCache as DecoderWithCache
