"""What an export leaves on disk, and how it is read back without PyTorch.

`folder` makes it appear whole, `files` names and digests what is in it, `artifact` reads it and
checks it, `vectors` are its test vectors, `report` its proof, and `comparison` the arithmetic of
the verdict. `cache_layout` says how a graph keeps its cache, `targets` which targets there are.
"""
