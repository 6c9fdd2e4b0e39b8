"""Rotary position embeddings: from a type's parameters to rotated heads.

`rope_types` turns parameters into `frequencies`, `angles` turns positions into cosines and sines,
`rotation` applies them to heads by `pairs`, `xpos` scales them, and `embedding` is the module that
puts them together.
"""
