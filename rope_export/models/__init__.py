"""Decoders of transformers go on with `Attention`: in training, in generation and in graphs.

`replacement` puts ours in the place of theirs (`decoder_attention`), `decoder_with_cache` is the
model as one module for graphs. transformers is imported only by what is given one of its models.
"""
