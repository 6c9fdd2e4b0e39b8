"""That a graph computes what its module does: inputs, float64 truth, and the verdict.

`cases` makes the cases of any export; what is particular to a block (`block_*`) or to a module
(`module_*`) stands beside it. `reference` is truth of attention, `full_precision` of any module
around it, and `validator` runs a graph against them.
"""
