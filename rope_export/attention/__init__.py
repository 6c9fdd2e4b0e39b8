"""The attention block around RoPE: `block`, its projections and norms, which token sees which.

`specs` says what may vary as data, `visibility` which keys a query sees, `written_out` computes
what no fused kernel of PyTorch has, `tokens` is what one call is given. `random_block` makes blocks
to try, `adapters` refuses what acts beside a block's weights.
"""
