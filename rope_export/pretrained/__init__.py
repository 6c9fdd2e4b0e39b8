"""Attention of published checkpoints: which families there are, and how their files are read.

`families` is a table, one row for each ``model_type``, whose rows refer to `statements`; `geometry`
turns a configuration into the geometry of a layer by it; `checkpoint` reads safetensors lazily, and
`weights` says which of its tensors make which parameters. Nothing here imports transformers or
unpickles anything.
"""
