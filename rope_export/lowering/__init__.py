"""Lowering: from our modules to the operators of an export target.

While a graph is exported, modules hand their tensors to a `target` (by way of `dispatch`). `rules`
says which form is legal where, and why; `choice` takes the best; `ort`, `onnx` and `primitive` emit
it, through `ops`.
"""
